import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_Places = NDArray[np.intp]

def read(raw: bytes, most: int, mask: int, /) -> tuple[bytes, int, int, int, int]: ...
def numbers(context: str, most: int, mask: int, /) -> bytes: ...
def expect(
    out: _Floats,
    words: _Places,
    table: _Floats,
    mean: _Floats,
    own: _Floats,
    keeps: _Floats,
    level: float,
    mean_here: _Floats,
    own_here: _Floats,
    keeps_here: _Floats,
    level_here: float,
    /,
) -> None: ...
def spread(out: _Floats, mean: _Floats, doubt: _Floats, cost: _Floats, width: float, /) -> None: ...
def worth(
    drawn: _Floats, mean: _Floats, cost: _Floats, rows: int, width: int, price: float, /
) -> tuple[float, float]: ...
def note(
    kept_drawn: _Floats,
    kept_mean: _Floats,
    kept_cost: _Floats,
    row: int,
    width: int,
    places: _Places,
    drawn: _Floats,
    mean: _Floats,
    cost: _Floats,
    /,
) -> None: ...
def best(mean: _Floats, spread: _Floats, toll: _Floats, normals: _Floats, /) -> tuple[int, int]: ...
def said(table: _Floats, words: _Places, width: int, place: int, /) -> tuple[float, float]: ...
def move(table: _Floats, words: _Places, width: int, place: int, by: float, shrink: float, /) -> None: ...
