"""What a GGUF file says of itself, without its numbers.

The library ``gguf`` makes an object of every word of the vocabulary, which takes four seconds for a small
model; here lists are stepped over. Training, which needs them, reads with the library.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainwax.router.errors import ConfigError

__all__ = ["Header", "fingerprint", "read_header"]

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_TEXT, _LIST = 8, 9
_MOST = 1 << 20
"""Entries and bytes of a text beyond which a header is no header."""
_PIECES, _PIECE = 64, 1 << 16


@dataclass(frozen=True)
class Header:
    """Single values by name (lists are left out), and the tensors' shapes as numpy counts: (n_out, n_in)."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Read a file's header. Raises :class:`ConfigError` with the file where it cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ConfigError(f"{path}: no GGUF file that can be read: {error}") from None


def fingerprint(path: Path) -> str:
    """A hash of the file's size and of pieces all over it: the same model, without reading gigabytes."""
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(size - _PIECE, 0) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}")
        tensors, entries = self._count(), self._count()
        values = {}
        for _ in range(entries):
            name = self._text()
            value = self._value(self._number("<I"))
            if value is not None:
                values[name] = value
        shapes = {}
        for _ in range(tensors):
            name = self._text()
            shape = tuple(self._number("<Q") for _ in range(min(self._number("<I"), 9)))
            shapes[name] = shape[::-1]  # the file has the fastest dimension first
            self._at += 12  # type and offset
        return Header(values, shapes)

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            inner, count = self._number("<I"), self._count()
            if inner == _TEXT:
                for _ in range(count):
                    size = self._count()
                    self._at += size
            elif inner in _SCALARS:
                self._at += count * struct.calcsize(_SCALARS[inner])
            else:
                raise ValueError(f"a list of the type {inner}")
            return None
        if kind not in _SCALARS:
            raise ValueError(f"a value of the type {kind}")
        return self._number(_SCALARS[kind])

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _count(self) -> int:
        count: int = self._number("<Q")
        if count > _MOST:
            raise ValueError(f"{count} entries")
        return count

    def _text(self) -> str:
        size = self._count()
        end = self._at + size
        if end > len(self._data):
            raise ValueError("it ends in the middle of a text")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end
        return text
