"""Tuners that rotate or reflect what goes into a layer or comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt, sqrt
from typing import final

import torch
from torch import Tensor

from registry.changes import Option
from registry.merge.tuners.options import number
from registry.merge.weight import RowWise, Weight


def oft(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W diag(R_1, R_2, …)ᵀ`, every R a rotation of b inputs, or one for all. An embedding's rows are outputs: there `W diag(R_1, …)`.

    With Q skew, `R = (I - Q)(I + Q)⁻¹`, or the first terms of the Neumann series of `(I + Q)(I - Q)⁻¹`: the two turn in opposite directions.
    Tensors: oft_R `[blocks or 1, b (b - 1) / 2]`, the elements of each Q above its diagonal, row by row. Options: terms (0: no series), reach
    (the largest norm that all Q may have together, when COFT limits it; else 0), is_embedding.
    Source: `peft.tuners.oft.layer.OFTRotationModule`.
    """
    skew = _skew(tensors["oft_R"])
    if reach := number(options, "reach"):
        norms = skew.norm(dim=(1, 2), keepdim=True)
        skew = skew * (reach / sqrt(skew.shape[0]) / norms).clamp(max=1)
    terms = int(number(options, "terms"))
    turns = _neumann(skew, terms) if terms else _cayley(skew)
    turns = turns if options["is_embedding"] else turns.transpose(1, 2)
    return RowWise(before, lambda rows, _: _turn(rows, turns))


def _skew(above: Tensor) -> Tensor:
    """Skew matrices `[n, b, b]` from what is above their diagonals, `[n, b (b - 1) / 2]`."""
    size = side_of(above.shape[1])
    row, column = torch.triu_indices(size, size, 1)
    found = above.new_zeros(above.shape[0], size, size)
    found[:, row, column] = above
    return found - found.transpose(1, 2)


def side_of(elements: int) -> int:
    """The side of a square matrix with so many elements above its diagonal."""
    return (1 + isqrt(1 + 8 * elements)) // 2


def _cayley(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    found: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return found


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """So many terms, as PEFT counts them from 0.18 on: all but the first and the last are doubled; three terms have the third power, too."""
    found = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms == 1:
        return found
    found += 2 * skew
    if terms == 2:
        return found
    power = skew @ skew
    found += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        found += 2 * power
    return found + power @ skew


def _turn(rows: Tensor, turns: Tensor) -> Tensor:
    """Rows times the block-diagonal matrix of `turns` `[blocks or 1, b, b]`, whose only block may stand for all."""
    parts = rows.view(rows.shape[0], -1, turns.shape[1]).transpose(0, 1)
    return (parts @ turns).transpose(0, 1).flatten(start_dim=1)


def boft(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`diag(s) W (F_{N-1} … F_0)ᵀ`, every F a block-diagonal rotation of shuffled inputs, `P_i diag(R_i1, R_i2, …) P_iᵀ`.

    Tensors: boft_R `[N, blocks, b, b]`, of which only the skew part counts, boft_s with one element for each output.
    Source: `peft.tuners.boft.layer.Linear.get_delta_weight`, `BOFTLayer.block_butterfly_perm`.
    """
    blocks = tensors["boft_R"]
    turns = [_cayley(0.5 * (each - each.transpose(1, 2))).transpose(1, 2) for each in blocks]
    orders = [
        _butterfly(blocks.shape[1], blocks.shape[2], level) if len(turns) > 1 else None for level in range(len(turns))
    ]
    scale = tensors["boft_s"].flatten()

    def change(rows: Tensor, first: int) -> Tensor:
        for order, each in zip(orders, turns, strict=True):
            if order is None:
                rows = _turn(rows, each)
            else:
                shuffled = torch.empty_like(rows)
                shuffled[:, order] = rows
                rows = _turn(shuffled, each)[:, order]
        return rows * scale[first : first + rows.shape[0], None]

    return RowWise(before, change)


def _butterfly(blocks: int, size: int, level: int) -> Tensor:
    """The order of inputs at a level, int64 `[blocks * size]`: within `2 ** level` blocks, half blocks of even number first."""
    halves = torch.arange(blocks * size).view(-1, 2 ** (level + 1), size // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()


def hra(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W (I - 2 u_1 u_1ᵀ)(I - 2 u_2 u_2ᵀ) …`, or `W (I - 2 U Uᵀ)` with columns made orthogonal.

    Tensors: hra_u `[d_in, r]`, whose columns are made unit vectors. Options: is_orthogonal. Source: `peft.tuners.hra.layer.HRALayer`.
    """
    u = tensors["hra_u"] / tensors["hra_u"].norm(dim=0)
    mirrors = [torch.linalg.qr(u).Q] if options["is_orthogonal"] else list(u.split(1, dim=1))

    def change(rows: Tensor, _: int) -> Tensor:
        for mirror in mirrors:
            rows.addmm_(rows @ mirror, mirror.T, alpha=-2)
        return rows

    return RowWise(before, change)


def road(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`R W`, R a scaled rotation of pairs of outputs: in groups of g, the i-th of the first half with the i-th of the second.

    `y_i = c_i x_i - s_i x_j` and `y_j = c_j x_j + s_j x_i`, with `c = α cos θ`, `s = α sin θ`.
    Tensors: road_theta and road_alpha, `[d_out / 2]` (one angle for a pair, road_1), `[d_out]` (road_2), or `[2 d_out]` (road_4: in each
    group those of c, then those of s). Options: group. A bias, seen as `[rows, 1]`, is turned likewise.
    Source: `peft.tuners.road.layer._apply_road`.
    """
    outputs, group = before.shape[0], int(number(options, "group"))
    theta, alpha = (_angles(tensors[f"road_{name}"], outputs, group) for name in ("theta", "alpha"))
    cosine, sine = (alpha[0] * theta[0].cos())[..., None], (alpha[1] * theta[1].sin())[..., None]

    def change(rows: Tensor, first: int) -> Tensor:
        pairs = rows.view(-1, 2, group // 2, rows.shape[1])
        own = slice(first // group, first // group + pairs.shape[0])
        swapped = torch.stack([-pairs[:, 1], pairs[:, 0]], dim=1)
        return (pairs * cosine[own] + swapped * sine[own]).flatten(end_dim=2)

    return _Grouped(before, group, change)


def _angles(values: Tensor, outputs: int, group: int) -> Tensor:
    """Those of cosines and those of sines, `[2, outputs / group, 2, group / 2]`."""
    if values.shape[0] == 2 * outputs:
        return values.view(-1, 2, 2, group // 2).transpose(0, 1)
    halves = values.view(-1, 1 if 2 * values.shape[0] == outputs else 2, group // 2)
    return halves.expand(2, outputs // group, 2, group // 2)


@final
class _Grouped:
    """Rows that follow from the same group of rows of another weight: `change` gets whole groups and the number of the first row."""

    def __init__(self, before: Weight, group: int, change: Callable[[Tensor, int], Tensor]) -> None:
        self._before, self._group, self._change = before, group, change

    @property
    def shape(self) -> tuple[int, int]:
        return self._before.shape

    def rows(self, first: int, last: int) -> Tensor:
        start, stop = first // self._group * self._group, -(-last // self._group) * self._group
        return self._change(self._before.rows(start, stop), start)[first - start : last - start]
