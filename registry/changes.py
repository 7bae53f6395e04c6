"""What an adapter does to a base model, in terms of tensors: the words that formats speak and the merge engine understands.

Shape letters: `d_out`, `d_in` of a weight stored as `[d_out, d_in]`, `r` the rank. Nothing here holds data, only where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.manifest import Finding
from registry.tensors import StoredTensor, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows `start .. start + count` of a stored matrix."""

    tensor: StoredTensor
    start: int
    count: int

    @classmethod
    def all_of(cls, tensor: StoredTensor) -> Rows:
        """The whole matrix."""
        return cls(tensor=tensor, start=0, count=tensor.spec.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`scale * (B @ A)` with A `[r, d_in]`, B `[n, r]`, added to rows `row .. row + n` of a weight `[d_out, d_in]`.

    `transposed`: the weight is stored as `[d_in, d_out]` (GPT-2's Conv1D, embeddings); then `(B @ A)ᵀ` is added, and `row` is 0.
    """

    a: Rows
    b: Rows
    scale: float
    row: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of one tensor of the result.

    The value starts from `replacement` (a tensor of the adapter) if there is one, else from `source` (a tensor of the base); then the
    `deltas` are added. `target` is the result's name and shape, with the base's dtype. A target the base does not have is added to it.
    """

    target: TensorSpec
    source: StoredTensor | None = None
    replacement: StoredTensor | None = None
    deltas: tuple[LowRank, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """An adapter's tensors matched with a base model's: every one is used in `changes`, or named in `findings`.

    `config` holds the fields of the base's configuration that the merged model must have changed.
    """

    changes: tuple[Change, ...]
    findings: tuple[Finding, ...]
    config: Mapping[str, object] = field(default_factory=dict)
