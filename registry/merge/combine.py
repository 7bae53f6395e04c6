"""Combine several adapters' changes of one weight into one.

`W` is the weight, `[rows, columns]`, `D_i = W'_i - W` what input i adds to it (its task vector), `w_i` the input's weight in the combination.
Every method is a function of the `D_i`; the result is `W` plus that. Methods that need to know something of the whole matrix first, a
threshold or how the inputs lie to each other, read it in passes; nothing larger than a few rows is ever kept.

The bytes depend on nothing but the inputs: what is computed of an element uses the same numbers in every pass, sums over a matrix are made in
one order, magnitudes are compared as float32, and random numbers belong to places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from registry.changes import Combined
from registry.merge.coefficients import coefficients_from_gram
from registry.merge.lowrank import LowRankDelta, gram
from registry.merge.methods import METHODS, fixed_coefficients, number
from registry.merge.passes import Algorithm, Passes, tiles
from registry.merge.thinning import (
    Thin,
    Thinning,
    drop_any,
    drop_by_rank,
    elements_of,
    keep_largest,
    keep_middle,
    order_statistics,
    share_of,
)
from registry.merge.weight import Weight

# Makes the combined rows from the same rows of all task vectors, which it may change, and the number of the first.
Fuse = Callable[[list[Tensor], int], Tensor]
Method = Callable[[Combined, Sequence[Weight]], Algorithm[Fuse]]


def combine(step: Combined, base: Weight, parts: Sequence[Weight]) -> Weight:
    """The weight after a combination.

    Args:
        step: method, options and, in its parts, the inputs' weights; valid as `registry.merge.methods.checked` says.
        base: W.
        parts: one per input, in order: `W'_i`, or its task vector `D_i` where that is a `LowRankDelta` (without terms if it leaves W as it is).
    """
    deltas = [_task_vector(part, base) for part in parts]
    return _Sum(base, Combination(step, deltas))


def coefficients(step: Combined, base: Weight, parts: Sequence[Weight]) -> tuple[float, ...] | None:
    """The `c_i` of a method whose result is `W + Σ c_i D_i`, None for others. Arguments as in `combine`."""
    if not METHODS[step.method].is_exact:
        return None
    deltas = [_task_vector(part, base) for part in parts]
    return Passes(base.shape, _coefficients(step, deltas)).result()


@final
class Combination:
    """The combined task vector of several, as a `Weight`. What takes passes over the whole is done when the first rows are asked for."""

    def __init__(self, step: Combined, deltas: Sequence[Weight]) -> None:
        self._deltas = deltas
        self._fuse = Passes(self.shape, _ALGORITHMS[step.method](step, deltas))

    @property
    def shape(self) -> tuple[int, int]:
        return self._deltas[0].shape

    def rows(self, first: int, last: int) -> Tensor:
        fuse = self._fuse.result()
        values = torch.empty((last - first, self.shape[1]), dtype=torch.float64)
        for start, end in tiles(self.shape, first, last):
            begin, stop = max(start, first), min(end, last)
            values[begin - first : stop - first] = fuse([delta.rows(begin, stop) for delta in self._deltas], begin)
        return values


@final
class _Sum:
    """A weight and what is added to it."""

    def __init__(self, base: Weight, delta: Weight) -> None:
        self._base, self._delta = base, delta

    @property
    def shape(self) -> tuple[int, int]:
        return self._base.shape

    def rows(self, first: int, last: int) -> Tensor:
        values = self._base.rows(first, last)
        for start, end in tiles(self.shape, first, last):
            begin, stop = max(start, first), min(end, last)
            values[begin - first : stop - first].add_(self._delta.rows(begin, stop))
        return values


@final
class _Difference:
    """`after - before`. Both are asked for whole tiles of a fixed grid, since what a tuner computes may differ in the last bit between grids."""

    def __init__(self, after: Weight, before: Weight) -> None:
        self._after, self._before = after, before

    @property
    def shape(self) -> tuple[int, int]:
        return self._before.shape

    def rows(self, first: int, last: int) -> Tensor:
        grid = tiles(self.shape, first, last)
        found = [self._after.rows(start, end).sub_(self._before.rows(start, end)) for start, end in grid]
        return torch.cat(found)[first - grid[0][0] : last - grid[0][0]] if found else self._before.rows(first, last)


def _task_vector(part: Weight, base: Weight) -> Weight:
    return part if isinstance(part, LowRankDelta) else _Difference(part, base)


def _exact(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Fuse]:
    """`Σ c_i D_i`; see `registry.merge.methods.fixed_coefficients` and `registry.merge.coefficients`."""
    found = yield from _coefficients(step, deltas)
    return partial(_weighted_sum, found)


def _coefficients(step: Combined, deltas: Sequence[Weight]) -> Algorithm[tuple[float, ...]]:
    weights = [part.weight for part in step.parts]
    fixed = fixed_coefficients(step.method, weights, step.options)
    if fixed is not None:
        return fixed
    low_rank = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    products = gram(low_rank) if len(low_rank) == len(deltas) else (yield partial(_products, deltas))
    return coefficients_from_gram(step.method, products, weights, step.options)


def _products(deltas: Sequence[Weight], first: int, last: int) -> Tensor:
    rows = torch.stack([delta.rows(first, last).flatten() for delta in deltas])
    return rows @ rows.T


def _weighted_sum(weights: Sequence[float], deltas: list[Tensor], first: int) -> Tensor:
    del first
    total = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        total.add_(delta.mul_(weight))
    return total


def _agreeing_mean(weights: Sequence[float], scale: float, deltas: list[Tensor], first: int) -> Tensor:
    """The mean of the `w_i D_i` that have the sign of `Σ w_i D_i`, per element: `λ Σ w_i D_i / Σ |w_i|` over them.

    A sum of zero counts as positive. The sign is elected by the weighted task vectors, as in mergekit; PEFT lets the unweighted ones vote, so
    that an input of weight 0 has a say. Divided by weights, as in mergekit, so that the result is a mean; PEFT divides by how many agree.
    The sizes of negative weights, which take an input's opposite: mergekit divides by their sum, which may be anything.
    """
    del first
    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    return _mean_of_sign(_elected(weighted), weighted, weights).mul_(scale)


def _elected(votes: list[Tensor]) -> Tensor:
    """The sign of the sum, 1 or -1."""
    return (sum(votes[1:], votes[0]) >= 0).double().mul_(2).sub_(1)


def _mean_of_sign(sign: Tensor, weighted: list[Tensor], weights: Sequence[float]) -> Tensor:
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(weighted, weights, strict=True):
        agreeing = delta.mul_(sign)
        divisor.add_(agreeing > 0, alpha=abs(weight))
        total.add_(agreeing.clamp_(min=0))
    return total.mul_(sign).div_(divisor.masked_fill_(divisor == 0, 1.0))


def _thinned(thin: Thin, fuse: Fuse, deltas: list[Tensor], first: int) -> Tensor:
    for index, delta in enumerate(deltas):
        thin(delta, first, index)
    return fuse(deltas, first)


def _adding(step: Combined) -> Fuse:
    """`λ Σ w_i D̂_i` of thinned task vectors."""
    return partial(_weighted_sum, [part.weight * number(step.options, "lambda") for part in step.parts])


def _electing(step: Combined) -> Fuse:
    """The mean of the thinned task vectors that agree in sign."""
    return partial(_agreeing_mean, [part.weight for part in step.parts], number(step.options, "lambda"))


def _sparse(
    thinning: Thinning, fusing: Callable[[Combined], Fuse], step: Combined, deltas: Sequence[Weight]
) -> Algorithm[Fuse]:
    """Each task vector is thinned out to about `density` of its elements, then all are fused. At density 1 nothing is thinned out."""
    if number(step.options, "density") >= 1:
        return fusing(step)
    thin = yield from thinning(step, deltas)
    return partial(_thinned, thin, fusing(step))


def _sce(step: Combined, deltas: Sequence[Weight]) -> Algorithm[Fuse]:
    """Select, calculate, erase (Wan et al., FuseChat, 2024, arXiv:2408.07990): keep the elements in which the inputs differ most, weigh each
    input by its energy in those, and take the mean of those that agree in sign.

    Selected are the `⌊density * m⌋` largest of the m variances (over inputs) that are not zero, and all as large as the last of them. `e_i` is
    the sum of squares of what is kept of `D_i`, the result `λ Σ e_i D_i / Σ e_i` over the inputs that have the sign of `Σ D_i`. mergekit's
    formula, but for small numbers: there, inputs whose mean squares sum up to less than 1e-6, as those of adapters do, all weigh the same.
    """
    least = None
    if number(step.options, "density") < 1:
        deviations = partial(_deviations, deltas)
        varying = int((yield lambda first, last: torch.count_nonzero(deviations(first, last)[0])))
        selected = share_of(step, "density", varying)
        if not selected:
            return lambda rows, first: torch.zeros_like(rows[0])
        least = float((yield from order_statistics(deviations, [[elements_of(deltas) - selected]]))[0, 0])

    def select(rows: list[Tensor]) -> list[Tensor]:
        kept = None if least is None else ~(_deviation(rows) < least)
        return rows if kept is None else [each.mul_(kept) for each in rows]

    def energies(first: int, last: int) -> Tensor:
        return torch.stack([each.square_().sum() for each in select([delta.rows(first, last) for delta in deltas])])

    found = yield energies
    weights = (found / found.sum()).float().tolist() if found.sum() else [1.0] * len(deltas)
    scale = number(step.options, "lambda")

    def fuse(rows: list[Tensor], first: int) -> Tensor:
        del first
        kept = select(rows)
        sign = _elected(kept)
        weighted = [each.mul_(weight) for each, weight in zip(kept, weights, strict=True)]
        return _mean_of_sign(sign, weighted, weights).mul_(scale)

    return fuse


def _deviations(deltas: Sequence[Weight], first: int, last: int) -> list[Tensor]:
    return [_deviation([delta.rows(first, last) for delta in deltas])]


def _deviation(rows: list[Tensor]) -> Tensor:
    """Roots of the variances over inputs, float32: in the variances' order, and not lost where squares would be too small."""
    mean = sum(rows[1:], rows[0]).div(len(rows))
    return sum(((each - mean).square_() for each in rows), torch.zeros_like(mean)).div_(len(rows)).sqrt_().float()


def _sparsely(thinning: Thinning, fusing: Callable[[Combined], Fuse]) -> Method:
    return partial(_sparse, thinning, fusing)


_ALGORITHMS: dict[str, Method] = {
    **{name: _exact for name, method in METHODS.items() if method.is_exact},
    "magnitude": _sparsely(keep_largest, _adding),
    "ties": _sparsely(keep_largest, _electing),
    "dare_linear": _sparsely(drop_any, _adding),
    "dare_ties": _sparsely(drop_any, _electing),
    "della_linear": _sparsely(drop_by_rank, _adding),
    "della": _sparsely(drop_by_rank, _electing),
    "breadcrumbs": _sparsely(keep_middle, _adding),
    "breadcrumbs_ties": _sparsely(keep_middle, _electing),
    "sce": _sce,
}
