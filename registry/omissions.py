"""What merging leaves out of an adapter because no change of weights amounts to it, and what the loss is measured on.

Nothing here holds data, only where it lies: of `StoredTensor`s, `weight` and `bias` are the base's, all others the adapter's.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.manifest import Finding
from registry.tensors import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedPrefix:
    """Attention over learned tokens beside a layer's own: `own + gate * softmax(q Kᵀ) V`, K and V made of `tokens` by the layer's qkv matrix.

    That matrix computes `scale * (weight x + bias + shift)`, rows `[heads * size]`. For each group of query heads, `rows` has the first row
    that makes the prefix's V, and `own_rows` the first that makes the layer's own V from what `norm` gives (`norm_offset` is added to its
    weight). `gate` has one number for each query head, group by group; `tokens` is `[length, width]`.
    """

    layer: int
    gate: StoredTensor
    tokens: StoredTensor
    weight: StoredTensor
    bias: StoredTensor | None
    scale: StoredTensor
    shift: StoredTensor
    norm: StoredTensor | None
    norm_bias: StoredTensor | None
    norm_offset: float
    rows: tuple[int, ...]
    own_rows: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBias:
    """A bias `scale * shift`, `[experts]`, on a router that can have none."""

    layer: int
    scale: StoredTensor
    shift: StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Omission:
    """Something that the changes leave out. Nothing is lost where all tensors in `zeros` hold nothing but zeros.

    Otherwise merging is refused with `finding`, for good or until whoever merges accepts the loss, which is measured on `parts`.
    """

    finding: Finding
    zeros: frozenset[str]
    parts: tuple[GatedPrefix, ...] | tuple[RouterBias, ...] = ()
