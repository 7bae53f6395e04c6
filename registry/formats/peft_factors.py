"""A module with LoRA's factors: what weight they are for, and the steps that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from registry.changes import LowRank, Matrix, Step, Tuned
from registry.tensors import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The factors `A [r, d_in]` and `B [d_out, r]` of a module, or those of a convolution, `[r, d_in, k...]` and `[d_out, r, 1...]`.

    `extra` holds what a variant adds to them (`m`: DoRA's magnitudes, `diag`: KaSA's singular values). `block`: which factor is
    block-diagonal (`a` or `b`), and so stored as its blocks one below the other. `is_transposed`: the weight is stored as `[d_in, d_out]`.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    extra: Mapping[str, StoredTensor]
    is_embedding: bool
    is_transposed: bool
    scale: float
    block: str
    blocks: int

    @property
    def rank(self) -> int:
        """The rank by A's rows."""
        return self.a.spec.shape[0]

    @property
    def b_rank(self) -> int:
        """The rank by B's columns."""
        return self.b.spec.shape[1] * (self.blocks if self.block == "b" else 1)

    @property
    def is_of_one_kind(self) -> bool:
        """Whether both factors are a linear layer's, an embedding's or a convolution's, and blocks divide them."""
        a, b = self.a.spec.shape, self.b.spec.shape
        if len(a) != len(b) or len(a) < 2 or prod(b[2:]) != 1:
            return False
        return not self.block or (
            len(a) == 2 and a[0] % self.blocks == 0 and (self.block == "a" or b[0] % self.blocks == 0)
        )

    @property
    def made(self) -> tuple[int, ...]:
        """The shape of the weight that the factors are for."""
        d_in = self.a.spec.shape[1] * (self.blocks if self.block == "a" else 1)
        d_out, kernel = self.b.spec.shape[0], self.a.spec.shape[2:]
        return (d_in, d_out) if self.is_transposed or self.is_embedding else (d_out, d_in, *kernel)

    def is_grouped(self, weight: tuple[int, ...]) -> bool:
        """Whether they are of a convolution of g groups: B has a g-th of A's rank, and the weight a g-th of A's channels."""
        a, groups = self.a.spec.shape, self.rank // self.b.spec.shape[1]
        return groups > 1 and len(weight) == len(a) > 2 and weight[1] * groups == a[1]

    def steps(self) -> Iterator[Step]:
        """What they do to the weight."""
        factors = {"a": self.a, "b": self.b, **self.extra}
        if "m" in self.extra or "diag" in self.extra:
            method = "kasa" if "diag" in self.extra else "dora_embedding" if self.is_embedding else "dora"
            yield Tuned(method=method, tensors=factors, options={"scale": self.scale}, transposed=self.is_transposed)
        elif self.block:
            yield from self._block_steps()
        else:
            yield self._low_rank(Matrix.of(self.b), Matrix.of(self.a))

    def _block_steps(self) -> Iterator[LowRank]:
        """One for each block of a block-diagonal factor: it reaches only some columns (A) or rows (B) of the weight."""
        ranks, rows = self.rank // self.blocks, self.b.spec.shape[0] // self.blocks
        for block in range(self.blocks):
            right = Matrix.of(self.a, start=block * ranks, count=ranks)
            if self.block == "a":
                yield self._low_rank(_columns(self.b, block * ranks, ranks), right, column=block * right.columns)
            else:
                yield self._low_rank(Matrix.of(self.b, start=block * rows, count=rows), right, row=block * rows)

    def _low_rank(self, left: Matrix, right: Matrix, row: int = 0, column: int = 0) -> LowRank:
        """`scale * (left @ right)` at a place of a weight `[d_out, d_in]`, turned where the weight is stored the other way round."""
        if self.is_transposed or self.is_embedding:
            return LowRank(left=right.T, right=left.T, scale=self.scale, row=column, column=row)
        return LowRank(left=left, right=right, scale=self.scale, row=row, column=column)


def _columns(tensor: StoredTensor, start: int, count: int) -> Matrix:
    """Columns `start … start + count` of a stored matrix."""
    rows, columns = tensor.spec.shape
    return Matrix(tensor=tensor, rows=rows, columns=count, row_step=columns, offset=start)
