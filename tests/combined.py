"""Combinations of a few small matrices, as tests of their arithmetic need them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from registry.changes import Combined, Option, Part
from registry.merge.combine import combine
from registry.merge.lowrank import LowRankDelta
from registry.merge.methods import METHODS, checked
from registry.merge.sums import Factors
from registry.merge.weight import Dense, Weight, whole


def recipe(method: str, weights: Sequence[float], *, keys: Sequence[str] | None = None, **options: Option) -> Combined:
    """A combination with these weights and options; `lambda_` stands for `lambda`, inputs are called 0, 1, … unless told otherwise."""
    given = {name.rstrip("_"): value for name, value in options.items()}
    names = keys or [str(index) for index in range(len(weights))]
    parts = tuple(Part(weight=weight, key=key) for weight, key in zip(weights, names, strict=True))
    return Combined(method=method, parts=parts, name="layers.0.weight", options=checked(method, weights, given))


def combined(step: Combined, base: Tensor, parts: Sequence[Weight], *, rows: int | None = None) -> Tensor:
    """The combined weight, float64, read so many rows at a time."""
    weight = combine(step, Dense(base), parts)
    every = rows or max(1, base.shape[0])
    blocks = [weight.rows(first, min(first + every, base.shape[0])) for first in range(0, base.shape[0], every)]
    return torch.cat(blocks) if blocks else weight.rows(0, 0)


def change(step: Combined, parts: Sequence[LowRankDelta], *, rows: int | None = None) -> Tensor:
    """What a combination of task vectors is, float64: the weight that it is added to is zero."""
    return combined(step, torch.zeros(parts[0].shape, dtype=torch.float64), parts, rows=rows)


def task_vectors(
    count: int, shape: tuple[int, int], *, rank: int = 3, seed: int = 0, alike: float = 0.0
) -> list[LowRankDelta]:
    """Random low-rank matrices; `alike`: how much of one that they all share."""
    random = np.random.default_rng(seed)

    def term(scale: float) -> Factors:
        return Factors(random.standard_normal((shape[0], rank)), random.standard_normal((rank, shape[1])), scale)

    shared = term(alike)
    return [LowRankDelta(shape, [term(0.5), shared] if alike else [term(0.5)]) for _ in range(count)]


def dense(deltas: Sequence[Weight]) -> Tensor:
    """All values, float64 `[inputs, rows, columns]`."""
    return torch.stack([whole(delta) for delta in deltas])


def inputs_of(method: str) -> int:
    """A number of inputs that the method takes."""
    return int(min(3, METHODS[method].most))
