"""Arrays and random generators as JSON, to the last bit: what saved states are made of."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["generator", "pack", "resume", "unpack"]


def pack(array: NDArray[np.float64]) -> list[Any]:
    """Shape and bytes (float64, little endian, base64).

    >>> unpack(pack(np.array([[0.1], [-0.0]]))).tolist()
    [[0.1], [-0.0]]
    """
    data = np.ascontiguousarray(array, dtype="<f8")
    return [list(array.shape), base64.b64encode(data.tobytes()).decode("ascii")]


def unpack(packed: list[Any]) -> NDArray[np.float64]:
    """What :func:`pack` was given. Raises ValueError for anything else."""
    shape, data = packed
    return np.frombuffer(base64.b64decode(data), dtype="<f8").reshape(shape).astype(np.float64)


def generator(chance: random.Random) -> list[Any]:
    """Where a random generator stands.

    >>> one, other = random.Random(1), random.Random(2)
    >>> resume(other, generator(one))
    >>> one.random() == other.random()
    True
    """
    version, internal, gauss = chance.getstate()
    return [version, list(internal), gauss]


def resume(chance: random.Random, state: list[Any]) -> None:
    """Stand where :func:`generator` said."""
    version, internal, gauss = state
    chance.setstate((version, tuple(internal), gauss))
