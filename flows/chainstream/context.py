"""What an agent keeps between items."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

__all__ = ["AudioBuffer", "Buffer", "ImageBuffer", "TextBuffer", "VideoBuffer"]


class Buffer:
    """A queue of items; with ``maxlen`` the oldest are dropped.

    >>> kept = Buffer(maxlen=2)
    >>> for n in range(3): kept.append(n)
    >>> kept.get_all(), kept.pop(), len(kept)
    ([1, 2], 1, 1)
    """

    def __init__(self, maxlen: int | None = None, item_type: str | None = None) -> None:
        self.maxlen = maxlen
        self.item_type = item_type
        self.buffer: deque[Any] = deque(maxlen=maxlen)

    def append(self, data: Any) -> None:
        """Add at the end."""
        self.buffer.append(data)

    def pop(self) -> Any:
        """Take from the front. Raises IndexError where it is empty."""
        return self.buffer.popleft()

    def popright(self) -> Any:
        """Take from the end. Raises IndexError where it is empty."""
        return self.buffer.pop()

    def get(self, i: int) -> Any:
        """The item at a place."""
        return self.buffer[i]

    def get_all(self) -> list[Any]:
        """All items, which stay."""
        return list(self.buffer)

    def read(self) -> list[Any]:
        """The same as :meth:`get_all`."""
        return list(self.buffer)

    def snapshot(self) -> list[Any]:
        """The same as :meth:`get_all`."""
        return list(self.buffer)

    def pop_all(self) -> list[Any]:
        """All items, which go."""
        items = list(self.buffer)
        self.buffer.clear()
        return items

    def clear(self) -> None:
        """Drop all items."""
        self.buffer.clear()

    def __getitem__(self, index: int) -> Any:
        return self.buffer[index]

    def __len__(self) -> int:
        return len(self.buffer)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.buffer))

    def __repr__(self) -> str:
        return f"Buffer({list(self.buffer)!r})"


class AudioBuffer(Buffer):
    """A buffer of recordings."""

    def __init__(self, duration: int | None = None) -> None:
        super().__init__(duration, "audio")


class TextBuffer(Buffer):
    """A buffer of texts."""

    def __init__(self, max_text_num: int | None = None) -> None:
        super().__init__(max_text_num, "text")


class ImageBuffer(Buffer):
    """A buffer of pictures."""

    def __init__(self, max_image_num: int | None = None) -> None:
        super().__init__(max_image_num, "image")


class VideoBuffer(Buffer):
    """A buffer of frames."""

    def __init__(self, max_frame_num: int | None = None) -> None:
        super().__init__(max_frame_num, "video")
