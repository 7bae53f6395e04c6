"""LoRA factors taken apart and put together for the modules of another layout: what becomes of them when rows of weights move.

A module's delta is a sum of blocks `scale * left @ right` on some of its rows. Moving rows moves rows of `left`; modules that are fused get the
blocks of all that they are made of, one that is split gets its rows of each. Only views of the factors are handled here, no values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from registry.changes import Change, LowRank, Matrix
from registry.formats.litgpt_names import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`scale * left @ right` on some rows of a module. `strips` are the parts of `left`, each with the row of the module it begins at."""

    right: Matrix
    scale: float
    strips: tuple[tuple[Matrix, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A module `[rows, columns]` with the blocks of its delta; without any, the delta is zero."""

    name: str
    rows: int
    columns: int
    blocks: tuple[Block, ...] = ()

    @property
    def rank(self) -> int:
        """Columns of the B, and rows of the A, that hold all blocks side by side."""
        return sum(block.right.rows for block in self.blocks)

    def cut(self, first: int, last: int) -> Module:
        """Its rows `first … last`, as a module of their own."""
        blocks = []
        for block in self.blocks:
            strips = [
                (row_view(left, max(first - at, 0), min(last - at, left.rows)), max(at - first, 0))
                for left, at in block.strips
                if at < last and at + left.rows > first
            ]
            if strips:
                blocks.append(replace(block, strips=tuple(strips)))
        return replace(self, rows=last - first, blocks=tuple(blocks))


def row_view(matrix: Matrix, first: int, last: int) -> Matrix:
    """Rows `first … last` of a view."""
    return replace(matrix, rows=last - first, offset=matrix.offset + first * matrix.row_step)


def column_view(matrix: Matrix, first: int, last: int) -> Matrix:
    """Columns `first … last` of a view."""
    return replace(matrix, columns=last - first, offset=matrix.offset + first * matrix.column_step)


@dataclass(slots=True)
class _Gathered:
    columns: int
    strips: dict[tuple[Matrix, float], list[tuple[Matrix, int]]] = field(default_factory=dict)


def regroup(changes: Sequence[Change], table: Sequence[Rows]) -> tuple[dict[str, Module], tuple[str, ...]]:
    """What an adapter does to the modules of the other layout.

    Args:
        changes: what it does to the tensors of its own base model.
        table: where each row goes.

    Returns:
        The other layout's modules by name, in the order of the table, and everything that has no place there.
    """
    by_source: dict[str, list[Rows]] = {}
    heights: dict[str, int] = {}
    for rows in table:
        by_source.setdefault(rows.source, []).append(rows)
        heights[rows.target] = heights.get(rows.target, 0) + rows.count
    found: dict[str, _Gathered] = {}
    problems = []
    for change in changes:
        module, _, kind = change.target.name.rpartition(".")
        if reason := _problem(change, kind, module in by_source):
            problems.append(f"{change.target.name}: {reason}")
            continue
        for step in change.steps:
            if isinstance(step, LowRank):
                _spread(step, by_source[module], found)
    modules = {name: _module(name, heights[name], found[name]) for name in heights if name in found}
    return modules, tuple(problems)


def _problem(change: Change, kind: str, is_known: bool) -> str:
    if change.replacement is not None or not change.steps:
        return "values that replace the base's are no LoRA"
    if not is_known or kind != "weight" or len(change.target.shape) != 2:
        return "a change of it has no place in the other layout"
    odd = [
        step
        for step in change.steps
        if not isinstance(step, LowRank) or step.column or step.right.columns != change.target.shape[1]
    ]
    return "its change is no plain LoRA" if odd else ""


def _spread(step: LowRank, places: Sequence[Rows], found: dict[str, _Gathered]) -> None:
    for place in places:
        first = max(step.row, place.source_row)
        last = min(step.row + step.left.rows, place.source_row + place.count)
        if first < last:
            strip = row_view(step.left, first - step.row, last - step.row), place.target_row + first - place.source_row
            gathered = found.setdefault(place.target, _Gathered(step.right.columns))
            gathered.strips.setdefault((step.right, step.scale), []).append(strip)


def _module(name: str, rows: int, gathered: _Gathered) -> Module:
    blocks = tuple(
        Block(right=right, scale=scale, strips=tuple(strips)) for (right, scale), strips in gathered.strips.items()
    )
    return Module(name=name, rows=rows, columns=gathered.columns, blocks=blocks)


def common_scale(modules: Mapping[str, Module]) -> float:
    """The scale that most of the rank of some modules has; 1 when there is none."""
    weights: dict[float, int] = {}
    for block in blocks_of(modules):
        weights[block.scale] = weights.get(block.scale, 0) + block.right.rows
    return max(weights, key=lambda scale: weights[scale]) if weights else 1.0


def blocks_of(modules: Mapping[str, Module]) -> Iterator[Block]:
    """Every block of some modules."""
    for module in modules.values():
        yield from module.blocks
