"""What is recorded of a merge, block by block, on the way from the arithmetic to a tensor's record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """What happened to some rows; the records of a tensor's blocks are added up with `+`.

    `base_square`, `delta_square`: sums of squares of the base and of what came to it. `reached`: elements that a change touches; `changed`:
    those of the result that differ from the base's. `largest_delta` is of blocks in which no element changed: what was too small.
    `finite`: no value of the result is NaN or infinite. `coefficients` are the tensor's, the same in each of its blocks.
    """

    elements: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    reached: int = 0
    changed: int = 0
    largest_delta: float = 0.0
    finite: bool = True
    coefficients: tuple[float, ...] = ()

    def __add__(self, other: BlockRecord) -> BlockRecord:
        return BlockRecord(
            elements=self.elements + other.elements,
            base_square=self.base_square + other.base_square,
            delta_square=self.delta_square + other.delta_square,
            reached=self.reached + other.reached,
            changed=self.changed + other.changed,
            largest_delta=max(self.largest_delta, other.largest_delta),
            finite=self.finite and other.finite,
            coefficients=self.coefficients or other.coefficients,
        )


NOTHING = BlockRecord()
