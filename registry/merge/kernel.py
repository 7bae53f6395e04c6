"""The compiled inner loop of low-rank sums (`kernel.c`), where it was built; the same sums in numpy give the same bytes, only more slowly."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from registry.merge.rounding import Array
from registry.tensors import DType

TILE = 512
STEP = 4
LIBRARY = Path(__file__).with_name("_kernel.so")
_KINDS = {DType.BF16: 0, DType.F16: 1, DType.F32: 2}
_INPUTS = ("base", "left", "tiles", "row_reach", "reach", "exact_right", "exact_left")
_COUNTS = ("rows", "columns", "r", "capacity")


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_INPUTS, "out", "doubtful")),
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("small", ctypes.c_float),
    )


class _Sums(ctypes.Structure):
    _fields_ = (
        ("base_square", ctypes.c_double), ("result_square", ctypes.c_double), ("changed", ctypes.c_int64), ("doubtful", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sums:
    """What the kernel found about a block: sums of squares before and after, elements that changed, and how many are still in doubt."""

    base_square: float
    result_square: float
    changed: int
    doubtful: int


@cache
def _library() -> Any:
    """The library, or None where it was not built."""
    try:
        found = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    found.ckpt_sum.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    found.ckpt_sum.restype = None
    return found


def is_there() -> bool:
    """Whether the kernel was built."""
    return _library() is not None


def sum_block(
    arrays: dict[str, Array],
    *,
    small: float,
    kinds: tuple[DType, DType],
    out: Array,
    doubtful: Array,
    shape: tuple[int, int, int],
) -> Sums:
    """Add a product to a block and round; see `kernel.c` for the arrays' shapes.

    Args:
        arrays: by the names in `_INPUTS`, contiguous.
        small: what the product may be off by besides, absolute.
        kinds: dtypes of the base and of the result.
        out: receives the result.
        doubtful: int32; receives the indices of the elements in doubt, as many as there is room for.
        shape: rows, columns, r.
    """
    block = _Block(
        *(arrays[name].ctypes.data for name in _INPUTS),
        out.ctypes.data,
        doubtful.ctypes.data,
        *shape,
        doubtful.size,
        small,
    )
    sums = _Sums()
    _library().ckpt_sum(ctypes.byref(block), _KINDS[kinds[0]], _KINDS[kinds[1]], ctypes.byref(sums))
    return Sums(sums.base_square, sums.result_square, sums.changed, sums.doubtful)
