"""Thin task vectors out: which elements of each are kept, by their size or by chance, and what becomes of those.

Every function here is an algorithm of passes over the matrices (`registry.merge.passes`) and returns what does the thinning, a few rows at a
time. They are exact: thresholds are elements of the matrices themselves, found without sorting or keeping them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from registry.changes import Combined
from registry.merge.methods import number
from registry.merge.passes import Algorithm
from registry.merge.randomness import random_bits
from registry.merge.rounding import Array
from registry.merge.weight import Weight

# Sets what a task vector loses to zero, in place: its rows, the number of the first, and the input's number.
Thin = Callable[[Tensor, int, int], None]
Thinning = Callable[[Combined, Sequence[Weight]], Algorithm[Thin]]

# Bits of the lower half of a float32; the upper one has 15, since its sign is known.
_HALF_BITS = 16
_WORDS = 1 << 32


def keep_largest(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Thin]:
    """Keep the `k = max(1, ⌊density * n⌋)` largest of the n elements of each task vector (Yadav et al., TIES, 2023, arXiv:2306.01708).

    All elements as large as the k-th are kept, as in the paper's program: no element is preferred for its place. mergekit and PEFT keep k of
    them, whichever their sort puts first. The paper's k is of the whole model; per tensor, as both tools do, adapters of different size of
    change in different layers keep all layers.
    """
    count = elements_of(deltas)
    least = count - max(1, share_of(step, "density", count))
    bounds = yield from order_statistics(partial(_magnitudes, deltas), [[least]] * len(deltas))
    return partial(_within, bounds[:, 0], None)


def keep_middle(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Thin]:
    """Drop the `⌊gamma * n⌋` largest elements and so many of the smallest that `⌊density * n⌋` are left (Davari and Belilovsky, Model
    Breadcrumbs, 2023, arXiv:2312.06795). As in mergekit, fewer of the largest are dropped where density does not leave so many.

    All elements as large as the least or the largest of those are kept, too.
    """
    count = elements_of(deltas)
    kept = max(1, share_of(step, "density", count))
    least = max(0, count - kept - share_of(step, "gamma", count))
    bounds = yield from order_statistics(partial(_magnitudes, deltas), [[least, least + kept - 1]] * len(deltas))
    return partial(_within, bounds[:, 0], bounds[:, 1])


def elements_of(deltas: Sequence[Weight]) -> int:
    """How many elements each of them has."""
    rows, columns = deltas[0].shape
    return rows * columns


def share_of(step: Combined, option: str, count: int) -> int:
    """So many of so many: rounded down, from the number as it was written, so that 0.57 of 100 are 57."""
    return int(Fraction(repr(number(step.options, option))) * count)


def _within(least: Tensor, most: Tensor | None, delta: Tensor, first: int, index: int) -> None:
    """Written so that a value which is not a number stays, and is found in the result."""
    del first
    magnitudes = delta.float().abs_()
    delta.mul_(~(magnitudes < least[index]))
    if most is not None:
        delta.mul_(~(magnitudes > most[index]))


def _magnitudes(deltas: Sequence[Weight], first: int, last: int) -> list[Tensor]:
    return [delta.rows(first, last).float().abs_() for delta in deltas]


def order_statistics(values: Callable[[int, int], list[Tensor]], ranks: Sequence[Sequence[int]]) -> Algorithm[Tensor]:
    """The elements of several matrices that so many others are smaller than (equal ones in any order), float32 `[matrices, ranks]`.

    Exact, in two passes: the bits of floats that are not negative are in the floats' order, so the upper half of the bits is found by counting,
    then the lower half among the elements that have it.

    Args:
        values: rows of each matrix, float32, not negative.
        ranks: of each matrix, from 0; the same number of them.
    """
    wanted = torch.tensor(ranks)
    upper, rest = _locate((yield partial(_count_upper, values)).unsqueeze(1), wanted)
    lower, _ = _locate((yield partial(_count_lower, values, upper)), rest)
    return ((upper << _HALF_BITS) + lower).int().view(torch.float32)


def _count_upper(values: Callable[[int, int], list[Tensor]], first: int, last: int) -> Tensor:
    return torch.stack([torch.bincount(_bits(each) >> _HALF_BITS, minlength=1 << 15) for each in values(first, last)])


def _count_lower(values: Callable[[int, int], list[Tensor]], upper: Tensor, first: int, last: int) -> Tensor:
    found = [
        [_lower_counts(_bits(each), half) for half in row] for each, row in zip(values(first, last), upper, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in found])


def _lower_counts(bits: Tensor, upper: Tensor) -> Tensor:
    return torch.bincount(bits[bits >> _HALF_BITS == upper] & 0xFFFF, minlength=1 << _HALF_BITS)


def _bits(values: Tensor) -> Tensor:
    """As non-negative integers; what is not a number may have a sign, and is larger than all others without it."""
    return values.view(torch.int32).flatten() & 0x7FFF_FFFF


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Where so many are smaller: the bin, and how many of its own are. counts `[matrices, ranks or 1, bins]`, ranks `[matrices, ranks]`."""
    below = counts.cumsum(-1)
    bins = (below <= ranks.unsqueeze(-1)).sum(-1)
    before = below.expand(*ranks.shape, -1).gather(-1, (bins - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return bins, ranks - torch.where(bins > 0, before, 0)


def drop_any(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Thin]:
    """Keep each element with probability `density`, divided by it, so that the expected value stays (Yu et al., DARE, 2023, arXiv:2311.03099).

    As in the paper and in PEFT; mergekit multiplies so that the sum of magnitudes is the one from before, which differs by chance.
    """
    yield from ()
    density = number(step.options, "density")

    def thin(delta: Tensor, first: int, index: int) -> None:
        drawn = _drawn(step, index, first, delta)
        delta.mul_(torch.from_numpy(drawn < round(density * _WORDS))).div_(density)

    return thin


def drop_by_rank(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Thin]:
    """Keep an element with a probability p that rises with the rank of its magnitude in its row, divided by p (Deep et al., DELLA, 2024,
    arXiv:2406.11617).

    From `p = density - epsilon` of the smallest to `density + epsilon` of the largest, in equal steps; of equal magnitudes the left one is the
    smaller. A single column has `p = density`. The range is mergekit's (the paper's epsilon is the whole width), the division the paper's
    (mergekit: as for dare).
    """
    yield from ()
    density, epsilon = number(step.options, "density"), number(step.options, "epsilon")

    def thin(delta: Tensor, first: int, index: int) -> None:
        steps = np.linspace(-epsilon, epsilon, delta.shape[1]) if delta.shape[1] > 1 else np.zeros(delta.shape[1])
        probability = (density + steps)[_row_ranks(delta)]
        drawn = _drawn(step, index, first, delta)
        delta.mul_(torch.from_numpy(drawn < probability * _WORDS)).div_(torch.from_numpy(probability))

    return thin


def _row_ranks(delta: Tensor) -> Array:
    """The rank of each element's magnitude among its row's, from 0. Sorted together with their columns, equal magnitudes keep their order."""
    columns = np.arange(delta.shape[1])
    bits = delta.float().abs_().view(torch.int32).numpy().astype(np.int64)
    order = np.sort(bits << 32 | columns, axis=1) & 0xFFFF_FFFF
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, columns[None], axis=1)
    return ranks


def _drawn(step: Combined, index: int, first: int, delta: Tensor) -> Array:
    """The random words that belong to some rows of an input's task vector: keyed by seed, adapter and tensor, counted by element."""
    rows, columns = delta.shape
    key = f"{step.options['seed']}\0{step.parts[index].key}\0{step.name}"
    return random_bits(key, first * columns, rows * columns).reshape(rows, columns)
