"""The recording of runs: calls, attempts, feedback, decisions, dead letters and the sources' items.

:class:`SqliteRecording` writes one (and reads it), :class:`RecordingReader` only reads. A replay reads the
same format; :mod:`chainwax.router.export` carries it to and from JSON lines and Parquet.
"""

from chainwax.router.recording.base import NoRecording, Recording
from chainwax.router.recording.reader import RecordingReader
from chainwax.router.recording.rows import DeadLetter, Learned, RecordedCall, RecordedItem, RunInfo
from chainwax.router.recording.writer import SqliteRecording

__all__ = [
    "DeadLetter",
    "Learned",
    "NoRecording",
    "RecordedCall",
    "RecordedItem",
    "Recording",
    "RecordingReader",
    "RunInfo",
    "SqliteRecording",
]
