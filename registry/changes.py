"""What an adapter does to a base model, in terms of tensors: the words that formats speak and the merge engine understands.

A weight is seen as a matrix `[rows, columns]`: a convolution `[d_out, d_in, k...]` as `[d_out, d_in * k...]`, experts `[E, d_1, d_2]` as
`[E * d_1, d_2]`, a vector `[n]` as `[n, 1]`, a scalar as `[1, 1]`. Nothing here holds data, only where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from registry.manifest import Finding
from registry.omissions import Omission
from registry.tensors import DType, StoredTensor, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A view `[rows, columns]` of a stored tensor: element (i, j) is the tensor's element `offset + i * row_step + j * column_step`."""

    tensor: StoredTensor
    rows: int
    columns: int
    row_step: int
    column_step: int = 1
    offset: int = 0

    @classmethod
    def of(cls, tensor: StoredTensor, *, start: int = 0, count: int | None = None) -> Matrix:
        """Rows `start … start + count` of a tensor, all of them unless told otherwise; dimensions behind the first are flattened."""
        columns = prod(tensor.spec.shape[1:])
        rows = tensor.spec.shape[0] - start if count is None else count
        return cls(tensor=tensor, rows=rows, columns=columns, row_step=columns, offset=start * columns)

    @property
    def span(self) -> int:
        """Elements of the tensor from its first to its last element."""
        return (
            (self.rows - 1) * self.row_step + (self.columns - 1) * self.column_step + 1
            if self.rows and self.columns
            else 0
        )

    @property
    def T(self) -> Matrix:  # noqa: N802 - as numpy and torch call it
        """The transpose."""
        return Matrix(
            tensor=self.tensor,
            rows=self.columns,
            columns=self.rows,
            row_step=self.column_step,
            column_step=self.row_step,
            offset=self.offset,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """`scale * (left @ right)`, left `[n, r]`, right `[r, m]`, added to rows `row … row + n` and columns `column … column + m` of a weight.

    A LoRA on a linear layer has `left = B, right = A`; where the weight is stored transposed (Conv1D, embeddings), `left = Aᵀ, right = Bᵀ`.
    """

    left: Matrix
    right: Matrix
    scale: float
    row: int = 0
    column: int = 0


Option = str | int | float | bool | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What any other tuner makes of a weight; `registry.merge.tuners` has the arithmetic of each `method`.

    `tensors` of the adapter by the names that the arithmetic knows them under, `options` likewise; `base` are tensors of the base that it needs
    besides the weight itself. `transposed`: the weight is stored as `[d_in, d_out]`.
    """

    method: str
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    base: Mapping[str, StoredTensor] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one of several adapters does to a weight `W`, as a task vector `W' - W`, and its weight in the combination.

    `replacement` and `steps` as in `Change`. `key` is the adapter's, which random numbers are keyed by.
    """

    weight: float
    key: str
    steps: tuple[Step, ...] = ()
    replacement: StoredTensor | None = None

    @property
    def deltas(self) -> tuple[LowRank, ...]:
        """The low-rank ones among its steps."""
        return tuple(step for step in self.steps if isinstance(step, LowRank))

    @property
    def is_low_rank(self) -> bool:
        """Whether all that it does, if anything, is to add low-rank deltas."""
        return self.replacement is None and len(self.deltas) == len(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Several adapters on one weight: `W + combine(W'_1 - W, W'_2 - W, …)`; `registry.merge.combine` has the arithmetic of each `method`.

    `name` is the weight's, which random numbers are keyed by; `options` are the recipe's.
    """

    method: str
    parts: tuple[Part, ...]
    name: str
    options: Mapping[str, Option] = field(default_factory=dict)


Step = LowRank | Tuned | Combined
_FLOATS = (DType.BF16, DType.F16, DType.F32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What becomes of one tensor of the result.

    The value starts from `replacement` (a tensor of the adapter) if there is one, else from `source` (a tensor of the base); then come the
    `steps`, in order. `target` is the result's name and shape, with the base's dtype. A target the base does not have is added to it.
    A target with neither (a bias that the base lacks) starts from zeros. `columns`: of the matrix that it is seen as, where that is not all
    dimensions behind the first (experts).
    """

    target: TensorSpec
    source: StoredTensor | None = None
    replacement: StoredTensor | None = None
    steps: tuple[Step, ...] = ()
    columns: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that the target is seen as."""
        return matrix_shape(self.target, self.columns)

    @property
    def deltas(self) -> tuple[LowRank, ...]:
        """The low-rank ones among its steps."""
        return tuple(step for step in self.steps if isinstance(step, LowRank))

    @property
    def is_low_rank(self) -> bool:
        """Whether all that it does to the base, if anything, is to add low-rank deltas."""
        return self.replacement is None and len(self.deltas) == len(self.steps)

    @property
    def is_rounded_sum(self) -> bool:
        """Whether it starts from floats of 32 bits at most, adds nothing but such low-rank deltas, and ends in 16 bits.

        Nearly every merge is that; `registry.merge.sums` makes it, exactly, and without torch.
        """
        origin = self.replacement or self.source
        if origin is None or len(self.deltas) != len(self.steps) or self.target.dtype not in (DType.BF16, DType.F16):
            return False
        factors = (each.tensor.spec.dtype for step in self.deltas for each in (step.left, step.right))
        return all(dtype in _FLOATS for dtype in (origin.spec.dtype, *factors))

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of `source` stay as they are, under the target's name."""
        if self.source is None or self.replacement is not None or self.steps:
            return False
        return (self.source.spec.dtype, self.source.spec.shape) == (self.target.dtype, self.target.shape)


def matrix_shape(spec: TensorSpec, columns: int | None = None) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor is seen as: all dimensions behind the first are columns, unless told otherwise."""
    width = prod(spec.shape[1:]) if columns is None else columns
    return (spec.elements // width if width else 0), width


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """An adapter's tensors matched with a base model's: every one is used in `changes`, or named in `findings`.

    `config` holds the fields of the base's configuration that the merged model must have changed. `removed` names base tensors that the
    result does not have. `omitted` is what the adapter does besides. `places` names tensors of the adapter that hold whole numbers: where
    values belong, not values.
    """

    changes: tuple[Change, ...]
    findings: tuple[Finding, ...]
    config: Mapping[str, object] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    omitted: tuple[Omission, ...] = ()
    places: frozenset[str] = frozenset()
