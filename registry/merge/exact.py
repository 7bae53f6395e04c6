"""Sums of products without error: what a low-rank sum exactly is, for the few elements where a bound on the error does not settle its rounding.

Error-free transformations as in Ogita, Rump and Oishi, "Accurate sum and dot product" (2005): a sum or product of two float64 is another float64
and what that lacks, both exact.
"""

from __future__ import annotations

import math

import numpy as np

from registry.merge.rounding import Array, round_once, values_of
from registry.tensors import DType

_SPLIT = float((1 << 27) + 1)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """`a + b` and its error (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """`a * b` and its error (Dekker, Veltkamp)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Array) -> tuple[Array, Array]:
    scaled = _SPLIT * a
    high = scaled - (scaled - a)
    return high, a - high


def round_sums(start: Array, left: Array, scales: Array, right: Array, dtype: DType) -> Array:
    """The numbers of a dtype nearest to `start + Σ scales * left * right`, as bits; exact ties go to even.

    Args:
        start: float64 `[k]`.
        left: float64 `[k, r]`, with values of 24 significant bits at most, so that `left * right` is exact.
        scales: float64 `[r]`.
        right: float64 `[k, r]`, as `left`.
        dtype: 16 or 32 bit floats.
    """
    if not np.isfinite(start).all():  # nothing can be added to infinities and NaN
        result, finite = round_once(start, dtype), np.isfinite(start)
        result[finite] = round_sums(start[finite], left[finite], scales, right[finite], dtype)
        return result
    products, lacking = two_product(np.broadcast_to(scales, left.shape), left * right)
    terms = np.concatenate([start[:, None], products, lacking], axis=1)
    total, error, slack = terms[:, 0].copy(), np.zeros(len(start)), np.zeros(len(start))
    for column in terms.T[1:]:
        total, lost = two_sum(total, column)
        error, lost = two_sum(error, lost)
        slack += np.abs(lost)
    total, error = two_sum(total, error)
    slack *= 2.0
    low, high = (round_once(total, dtype, rest) for rest in (error - slack, error + slack))
    for index in np.flatnonzero(low != high):
        low[index] = _nearer(terms[index], low[index : index + 1], high[index : index + 1], dtype)
    return low


def _nearer(terms: Array, low: Array, high: Array, dtype: DType) -> int:
    """Which of two neighbours the exact sum of some terms is nearer to; the even one when it lies in the middle."""
    below, above = (float(values_of(bits.tobytes(), dtype)[0]) for bits in (low, high))
    side = math.fsum([*terms.tolist(), -(below + above) / 2])
    if side == 0:
        return int(low[0] if low[0] % 2 == 0 else high[0])
    return int(high[0] if (side > 0) == (above > below) else low[0])
