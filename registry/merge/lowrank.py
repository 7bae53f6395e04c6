"""Sums of low-rank matrices: their rows, inner products, and other sums that are equal or nearest to them. No dense matrix is ever made.

Shape letters: `n` rows, `m` columns, `r` the rank of a term, `R` of a sum, `k` the wanted one. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from registry.merge.passes import tiles
from registry.merge.randomness import random_bits
from registry.merge.rounding import Array
from registry.merge.sums import Factors, inner
from registry.merge.weight import Weight

# Bits of a float64's significand.
_EXACT_BITS = 53
# Of the randomised decomposition: columns of the sketch besides those that are wanted, and rounds of sharpening it. Halko et al. advise
# 5 to 10 and 1 to 2; more of either is cheap beside the passes themselves.
_OVERSAMPLING = 16
_ROUNDS = 2


@final
class LowRankDelta:
    """The sum of low-rank terms, as a `Weight`: a task vector, or zeros where there are no terms.

    Each row of a left factor and each column of a right one is rounded to so many bits below its largest element (24 for a rank of 16) that
    products and their sum over the rank fit into the 53 bits of a float64. So the order of summation, and with it blocks, threads and
    processors, make no difference to a single bit, and one may compare elements with thresholds that another pass found.
    The error, relative to the largest of the summed products, is that of a float32.
    """

    def __init__(self, shape: tuple[int, int], terms: Sequence[Factors]) -> None:
        self._shape, self.terms = shape, tuple(term for term in terms if term.left.size and term.right.size)
        self._rounded = [_rounded(term) for term in self.terms]

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def rows(self, first: int, last: int) -> Tensor:
        if len(self.terms) == 1 and (self.terms[0].left.shape[0], self.terms[0].right.shape[1]) == self._shape:
            left, right = self._rounded[0]
            return left[first:last] @ right
        values = torch.zeros((last - first, self._shape[1]), dtype=torch.float64)
        for term, (left, right) in zip(self.terms, self._rounded, strict=True):
            begin, end = max(first, term.row), min(last, term.end)
            if begin < end:
                product = left[begin - term.row : end - term.row] @ right
                values[begin - first : end - first, _columns(term)] += product
        return values


def _columns(term: Factors) -> slice:
    return slice(term.column, term.column + term.right.shape[1])


def _rounded(term: Factors) -> tuple[Tensor, Tensor]:
    bits = (_EXACT_BITS - (term.right.shape[0] - 1).bit_length()) // 2
    left, right = _round_to(bits, term.left * term.scale, axis=1), _round_to(bits, term.right, axis=0)
    return torch.from_numpy(left), torch.from_numpy(right)


def _round_to(bits: int, values: Array, axis: int) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so, and is found in the result
        exponent: Array = np.frexp(np.abs(values).max(axis=axis, keepdims=True))[1]
        rounded: Array = np.ldexp(np.rint(np.ldexp(values, bits - exponent)), exponent - bits)
    return rounded


def gram(deltas: Sequence[LowRankDelta]) -> Tensor:
    """All inner products `<D_i, D_j>`, `[deltas, deltas]`, from products of factors: `s_i s_j Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ)` for `D = s B A`."""
    result = torch.zeros((len(deltas), len(deltas)), dtype=torch.float64)
    for i, one in enumerate(deltas):
        for j, other in enumerate(deltas[: i + 1]):
            result[i, j] = result[j, i] = inner(one.terms, other.terms)
    return result


def stacked(deltas: Sequence[LowRankDelta], coefficients: Sequence[float]) -> Factors:
    """`Σ c_i D_i` as one term of scale 1: left `[n, R]`, right `[R, m]`, where R is the sum of all ranks; nothing is lost.

    What PEFT calls "cat". Coefficients and scales are multiplied into the left factor. Terms of some rows or columns only get zeros elsewhere.
    """
    shape = deltas[0].shape
    terms = [(term, c * term.scale) for each, c in zip(deltas, coefficients, strict=True) for term in each.terms]
    rank = sum(term.right.shape[0] for term, _ in terms)
    left, right, first = np.zeros((shape[0], rank)), np.zeros((rank, shape[1])), 0
    for term, scale in terms:
        place = slice(first, first := first + term.right.shape[0])
        left[term.row : term.end, place] = term.left * scale
        right[place, _columns(term)] = term.right
    return Factors(left, right, 1.0)


@final
@dataclass(frozen=True, slots=True)
class Truncated:
    """An approximation of lower rank: its factors, of scale 1, the squared norm of what was approximated, and that of the difference."""

    factors: Factors
    energy: float
    discarded: float


def truncated(term: Factors, rank: int) -> Truncated:
    """The matrix of rank k that is nearest to a term: the first k of its singular values and vectors.

    From thin QR decompositions `left = Q_l R_l`, `rightᵀ = Q_r R_r` and the SVD of the core `R_l R_rᵀ`, `[R, R]`; the same as PEFT's "svd",
    which decomposes the dense matrix. `left = Q_l U √S` and `right = √S Vᵀ Q_rᵀ` get equal halves of the size, so that both keep their
    digits in 16 bits; of each pair of vectors, the sign is such that the largest element on the left is positive.

    Returns: of rank k, or less where the matrix has less rows, columns or rank than that.
    """
    left, left_core = np.linalg.qr(term.left * term.scale)
    right, right_core = np.linalg.qr(term.right.T)
    return _cut(left, left_core @ right_core.T, right, rank)


def _cut(left: Array, core: Array, right: Array, rank: int, energy: float | None = None) -> Truncated:
    """`left @ core @ right.T`, whose outer factors have orthonormal columns, cut to a rank. `energy`: of the whole, where that is more."""
    u, sizes, v = np.linalg.svd(core, full_matrices=False)
    left, right, root = left @ u[:, :rank], v[:rank] @ right.T, np.sqrt(sizes[:rank])
    if left.size:
        largest = np.take_along_axis(left, np.abs(left).argmax(axis=0, keepdims=True), axis=0)
        root = root * np.where(largest[0] < 0, -1.0, 1.0)
    factors = Factors(left * root, right * root[:, None], 1.0)
    squares = sizes**2
    if energy is None:
        return Truncated(factors, float(squares.sum()), float(squares[rank:].sum()))
    return Truncated(factors, energy, max(0.0, energy - float(squares[:rank].sum())))


def approximated(weight: Weight, rank: int, key: str) -> Truncated:
    """A matrix of rank k near to any weight, which is read a few rows at a time.

    The range finder of Halko, Martinsson and Tropp (2011), algorithm 4.4, with random signs: `Y = D Ω`, sharpened by `D Dᵀ`, its orthonormal
    basis Q, and the decomposition of `Qᵀ D`, `[k + 16, m]`. It reads the weight seven times and keeps a few matrices of `k + 16` rows or
    columns. Where those span the weight, it is the best approximation, else close to it; the reported difference is that of the result.

    Args:
        weight: `[n, m]`.
        rank: k.
        key: what the random signs depend on, the tensor's name for instance.
    """
    n, m = weight.shape
    width = min(rank + _OVERSAMPLING, n, m)
    signs = np.where(random_bits(key, 0, m * width) & 1, 1.0, -1.0).reshape(m, width)
    basis = _orthonormal(_times(weight, signs))
    for _ in range(_ROUNDS):
        basis = _orthonormal(_times(weight, _orthonormal(_transposed_times(weight, basis))))
    right, core = np.linalg.qr(_transposed_times(weight, basis))
    energy = sum(float(weight.rows(first, last).square().sum()) for first, last in tiles(weight.shape))
    return _cut(basis, core.T, right, rank, energy)


def _orthonormal(columns: Array) -> Array:
    return np.linalg.qr(columns)[0]


def _times(weight: Weight, right: Array) -> Array:
    parts = [(weight.rows(first, last) @ torch.from_numpy(right)).numpy() for first, last in tiles(weight.shape)]
    return np.concatenate(parts) if parts else np.zeros((0, right.shape[1]))


def _transposed_times(weight: Weight, left: Array) -> Array:
    result = torch.zeros((weight.shape[1], left.shape[1]), dtype=torch.float64)
    for first, last in tiles(weight.shape):
        result.addmm_(weight.rows(first, last).T, torch.from_numpy(left[first:last]))
    return result.numpy()
