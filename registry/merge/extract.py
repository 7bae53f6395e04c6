"""The best low-rank approximation of a difference between two weights.

By Eckart and Young it is the truncated singular value decomposition `Δ ≈ U_r S_r V_rᵀ`. Small matrices are decomposed as they are, in float64.
Large ones go through a randomised range finder with power iterations (Halko, Martinsson and Tropp, 2011): `Q` spans the image of
`(Δ Δᵀ)^q Δ Ω`, and the decomposition of the small matrix `Qᵀ Δ` gives that of `Δ`. Ω is seeded by the tensor's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from blake3 import blake3
from torch import Tensor

from registry.locations import Location
from registry.merge.rounding import WORDS, round_once, values_of
from registry.tensors import DType, StoredTensor

# The shorter side up to which a matrix is decomposed as it is.
EXACT_SIDE = 1024
_OVERSAMPLING, _POWERS = 16, 4
_BLOCK_ELEMENTS = 1 << 20
# Matrices in memory at once, at most.
_MATRICES = 4
# Resident memory as measured: of an interpreter with torch loaded, and of the pieces that are read at once.
_RUNTIME_BYTES, _WORK_BYTES = 290 << 20, 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Factors `left [n, r]` and `right [r, m]` as they are stored, and what they leave: `residual` is `‖Δ - left @ right‖`, `size` is `‖Δ‖`."""

    left: bytes
    right: bytes
    residual: float
    size: float


def peak_bytes(shape: tuple[int, int], rank: int, matrices: int) -> int:
    """About how much memory fitting so many matrices at once takes: the runtime, and for each the difference and what decomposing it needs."""
    elements, short = shape[0] * shape[1], min(shape)
    if short <= EXACT_SIDE:
        return _RUNTIME_BYTES + matrices * (_WORK_BYTES + 8 * (4 * elements + 3 * short * short))
    return _RUNTIME_BYTES + matrices * (_WORK_BYTES + 8 * elements + 32 * sum(shape) * _width(short, rank))


_DTYPES = {DType.F64: torch.float64, DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}
Place = tuple[Location, StoredTensor]


def difference(base: Place, tuned: Place, shape: tuple[int, int]) -> tuple[Tensor, float]:
    """`Δ = W' - W` as a matrix, and its Frobenius norm.

    Args:
        base: where W lies, and the tensor.
        tuned: the same of W'.
        shape: rows and columns of the matrix that both are seen as.

    Returns:
        float64 where the matrix is small enough to be decomposed as it is, else float32, each element rounded once; and the norm.
    """
    dtype = torch.float64 if min(shape) <= EXACT_SIDE else torch.float32
    delta, square = torch.empty(shape[0] * shape[1], dtype=dtype), 0.0
    for first, block in _blocks(base, tuned):
        delta[first : first + len(block)] = block
        square += float(block.square_().sum())
    return delta.view(shape), sqrt(square)


def distance(base: Place, tuned: Place) -> float:
    """The Frobenius norm of `W' - W`."""
    return sqrt(sum(float(block.square_().sum()) for _, block in _blocks(base, tuned)))


def _blocks(base: Place, tuned: Place) -> Iterator[tuple[int, Tensor]]:
    """`W' - W` in float64, in pieces: the number of the first element, and the values."""
    elements = base[1].spec.elements
    for first in range(0, elements, _BLOCK_ELEMENTS):
        count = min(_BLOCK_ELEMENTS, elements - first)
        yield first, _values(tuned, first, count).sub_(_values(base, first, count))


def _values(place: Place, first: int, count: int) -> Tensor:
    location, tensor = place
    size = tensor.spec.dtype.itemsize_bytes
    data = bytearray(count * size)
    location.read_into(tensor.file, tensor.offset_bytes + first * size, memoryview(data))
    return torch.frombuffer(data, dtype=_DTYPES[tensor.spec.dtype]).to(torch.float64)


def at_once() -> int:
    """How many matrices are worked on at the same time."""
    return min(_MATRICES, os.cpu_count() or 1)


def fit(delta: Tensor, size: float, rank: int, name: str, dtype: DType) -> Fit:
    """The factors of a rank that are nearest to a difference, with the square roots of the singular values on both.

    Args:
        delta: float64 or float32 `[n, m]`.
        size: its Frobenius norm.
        rank: of the factors; what the matrix has less is filled with zeros.
        name: of the tensor, which the random numbers are seeded by.
        dtype: that the factors are stored in.
    """
    u, s, v = _exact(delta) if min(delta.shape) <= EXACT_SIDE else _randomised(delta, rank, name)
    kept = min(rank, len(s))
    u, s, v = u[:, :kept], s[:kept], v[:kept]
    # A pair of singular vectors has no sign of its own: the largest element of the left one is made positive.
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True)))
    roots = s.sqrt()
    left, right = torch.zeros((delta.shape[0], rank)), torch.zeros((rank, delta.shape[1]))
    left, right = left.double(), right.double()
    left[:, :kept], right[:kept] = u * (roots * signs), (roots * signs.T.squeeze(1)).unsqueeze(1) * v
    bits = [round_once(factor.numpy(), dtype) for factor in (left, right)]
    stored = [torch.from_numpy(values_of(each.tobytes(), dtype).reshape(each.shape)) for each in bits]
    return Fit(
        left=bits[0].astype(WORDS[dtype]).tobytes(),
        right=bits[1].astype(WORDS[dtype]).tobytes(),
        residual=_residual(delta, stored[0], stored[1]),
        size=size,
    )


Decomposition = tuple[Tensor, Tensor, Tensor]


def _exact(delta: Tensor) -> Decomposition:
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return u, s, v


def _width(short: int, rank: int) -> int:
    return min(short, rank + max(rank, _OVERSAMPLING))


def _randomised(delta: Tensor, rank: int, name: str) -> Decomposition:
    generator = torch.Generator().manual_seed(int.from_bytes(blake3(name.encode()).digest(8), "little") >> 1)
    start = torch.randn((delta.shape[1], _width(min(delta.shape), rank)), generator=generator, dtype=delta.dtype)
    span = _orthonormal(delta @ start)
    for _ in range(_POWERS):
        span = _orthonormal(delta @ _orthonormal(delta.T @ span))
    u, s, v = torch.linalg.svd((span.T @ delta).double(), full_matrices=False)
    return span.double() @ u, s, v


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns).Q
    return q


def _residual(delta: Tensor, left: Tensor, right: Tensor) -> float:
    """`‖Δ - left @ right‖` in float64, in blocks of rows."""
    square, step = 0.0, max(1, _BLOCK_ELEMENTS // max(1, delta.shape[1]))
    for first in range(0, delta.shape[0], step):
        rest = delta[first : first + step].double() - left[first : first + step] @ right
        square += float(rest.square().sum())
    return sqrt(square)
