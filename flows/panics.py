"""Keeping Bytewax's panics off the terminal.

Where a step fails, Bytewax's Rust side writes a panic and a backtrace to file descriptor 2 before the
exception reaches Python, where it says all that there is to say.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_panics"]

# Threads that panic at the same time write into each other's lines: how one begins says nothing.
_PANIC = re.compile(rb".*\bpanicked at \S+\.rs:\d+:\d+:")
_TRAIL = re.compile(rb"(Box<dyn Any>|stack backtrace:|note: |\s+\d+: |\s+at |\s*$)")


@contextmanager
def without_panics(*, to_the_end: bool = False) -> Iterator[None]:
    """Drop the panics from what is written to descriptor 2; all else is passed on at once.

    In a process that is one of several, Bytewax has Python write some of them, and some come late.
    ``to_the_end`` drops those too: Python's messages go the same way as all others, and afterwards, when
    the process is about to end, nothing is written any more.
    """
    os.environ.setdefault("RUST_BACKTRACE", "0")
    sys.stderr.flush()
    terminal = os.dup(2)
    ours, theirs = os.pipe()
    os.dup2(theirs, 2)
    os.close(theirs)
    before = sys.stderr
    if not to_the_end:
        # Python's own messages go round the pipe: it would make a terminal look like a file.
        around = os.fdopen(os.dup(terminal), "wb", 0)
        sys.stderr = io.TextIOWrapper(around, encoding=before.encoding, errors="replace", write_through=True)
    thread = threading.Thread(target=_pass_on, args=(ours, terminal), name="chainwax-stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        now, sys.stderr = sys.stderr, before
        if now is not before:
            now.close()
        before.flush()
        if to_the_end:
            terminal = os.open(os.devnull, os.O_WRONLY)
        os.dup2(terminal, 2)
        # A child process may hold the pipe open.
        thread.join(1.0)


def _pass_on(source: int, target: int) -> None:
    panic = 0  # lines of a panic that may still come: the one behind its first line is anything
    with os.fdopen(source, "rb", 0) as pipe:
        rest = b""
        while chunk := pipe.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            kept = b""
            for line in lines:
                if _PANIC.match(line):
                    panic = 2
                elif panic == 2 or (panic and _TRAIL.match(line)):
                    panic = 1
                else:
                    panic = 0
                    kept += line + b"\n"
            if kept:
                os.write(target, kept)
        if rest and not (panic and _TRAIL.match(rest)):
            os.write(target, rest)
