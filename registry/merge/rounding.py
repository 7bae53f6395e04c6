"""Numbers as they are stored and as they are computed with: widening is exact, rounding happens once, to nearest, ties to even.

Floats of 16 bits are handled as their bits, since numpy has no bfloat16. Rounding a float64 to 16 bits by way of float32 would round twice; it
goes by way of a float32 that is rounded to odd, which keeps what the second rounding needs to know (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from registry.tensors import DType

Array = np.ndarray[Any, Any]
# The type that holds an element's bits, by dtype.
WORDS: dict[DType, Any] = {DType.BF16: np.uint16, DType.F16: np.uint16, DType.F32: np.uint32, DType.F64: np.uint64}
_NUMPY: dict[DType, Any] = {
    DType.F16: np.float16, DType.F32: np.float32, DType.F64: np.float64, DType.I64: np.int64, DType.I32: np.int32, DType.I16: np.int16,
    DType.I8: np.int8, DType.U64: np.uint64, DType.U32: np.uint32, DType.U16: np.uint16, DType.U8: np.uint8, DType.BOOL: np.bool_,
}  # fmt: skip


def values_of(data: Any, dtype: DType) -> Array:
    """The numbers that some bytes hold, one-dimensional: floats as float64, everything else in its own type.

    Raises:
        ValueError: a dtype that has no numbers here (8-bit floats).
    """
    if dtype is DType.BF16:
        found: Array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif dtype in _NUMPY:
        found = np.frombuffer(data, _NUMPY[dtype])
    else:
        raise ValueError(f"{dtype.long_name} is not computed with")
    with np.errstate(invalid="ignore"):  # signalling NaN
        return found.astype(np.float64) if dtype in WORDS else found


def round_once(values: Array, dtype: DType, rest: Array | float = 0.0) -> Array:
    """The bits, in `WORDS[dtype]`, of the numbers of a dtype that are nearest to `values + rest`.

    Args:
        values: float64, any shape.
        dtype: a float of 16, 32 or 64 bits.
        rest: what `values` lack of the exact ones, less than half of their last digit; float64 of the same shape. Only its sign counts where
            it cannot be added, and it is not used for float64.
    """
    if dtype is DType.F64:
        return values.view(np.uint64)
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    if dtype is DType.F32:
        return _nudged(near, values, rest)
    odd = _to_odd(near, values, rest)
    if dtype is DType.BF16:
        rounded: Array = ((odd + (((odd >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        nan = np.isnan(near)
        if nan.any():  # whose bits may run over
            rounded[nan] = 0x7FC0
        return rounded
    with np.errstate(over="ignore"):
        return odd.view(np.float32).astype(np.float16).view(np.uint16)


def _to_odd(near: Array, values: Array, rest: Array | float) -> Array:
    """The bits of float32 numbers rounded to odd: towards zero, and the last bit is set where anything was cut off."""
    wide, bits = near.astype(np.float64), near.view(np.uint32).copy()
    cut, over = wide != values, np.abs(wide) > np.abs(values)
    if np.any(rest):
        over |= ~cut & (np.sign(rest) == -np.sign(values))
        cut |= rest != 0
    bits -= over
    bits |= cut
    return bits


def _nudged(near: Array, values: Array, rest: Array | float) -> Array:
    """float32: `near` is right unless the values lie in the middle between two numbers and the rest decides."""
    bits = near.view(np.uint32)
    if not np.any(rest):
        return bits
    with np.errstate(over="ignore", invalid="ignore"):
        gap = values - near
        other = np.nextafter(near, np.where(gap > 0, np.float32(np.inf), np.float32(-np.inf)).astype(np.float32))
        is_middle = (gap != 0) & (np.abs(gap) == np.abs(other.astype(np.float64) - values))
        towards = is_middle & (rest != 0)
        chosen = np.where((gap > 0) == (np.asarray(rest) > 0), other, near)
    return np.where(towards, chosen, near).astype(np.float32).view(np.uint32)
