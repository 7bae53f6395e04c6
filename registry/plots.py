"""Pictures of comparisons and of metrics, drawn with matplotlib, which is optional: `pip install ckpt-registry[plot]`.

The same values give the same bytes, with one version of matplotlib.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from typing import Any

from registry.comparing import Difference, WeightPair
from registry.curves import Chart
from registry.disk import Translating
from registry.errors import InvalidInput, MissingPackage

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which people who see colours differently can tell apart; when all are used, with another kind of line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")
_NOTHING = "#D9D9D9"
_DOTS_PER_INCH = 150
# Inches that a picture may have, and the most runs that a legend is drawn for.
_MAX_INCHES, _MAX_LEGEND = 60.0, 30
_LISTED = 4
# Where matplotlib writes the time.
_TIMES = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def check_target(path: str) -> Path:
    """The path of a picture to write.

    Raises:
        InvalidInput: its ending is none of those that are drawn.
        MissingPackage: matplotlib is not installed.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in ENDINGS:
        raise InvalidInput("file", path, f"expected a name that ends in {', '.join(ENDINGS)}")
    if find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "plot")
    return target


def _new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, without a window."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and half a second to import

    return Figure(figsize=(min(width, _MAX_INCHES), min(height, _MAX_INCHES)), layout="constrained")


def heat_map(difference: Difference, target: Path) -> None:
    """Draw how far two checkpoints are apart, layer by layer and module by module: ‖D_1 - D_2‖ as a share of the larger norm.

    Experts of a layer are one module. Weights that are in no layer are named below. Grey is what neither changes, or what was not compared.

    Raises:
        InvalidInput: there is no weight in a numbered layer that both can be compared on.
        StorageFailed: the file cannot be written.
    """
    pairs = [pair for pair in difference.weights if pair.layer is not None and not pair.problem]
    if not pairs:
        raise InvalidInput("--plot", str(target), "no weight in a numbered layer was compared")
    cells = _cells(pairs)
    layers, modules = sorted({layer for layer, _ in cells}), list(dict.fromkeys(module for _, module in cells))
    grid = [[cells.get((layer, module), math.nan) for module in modules] for layer in layers]
    figure = _new_figure(3 + 0.55 * len(modules), 2.8 + 0.16 * len(layers))
    axes = figure.subplots()
    axes.set_facecolor(_NOTHING)
    highest = max(1.0, *cells.values())  # where nothing differs, nothing may look as if it did
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0.0, vmax=highest)
    axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    every = max(1, len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axes.set_ylabel("layer")
    axes.set_title(f"‖Δ₁ - Δ₂‖ / max(‖Δ₁‖, ‖Δ₂‖)\n1: {difference.one.ref}\n2: {difference.other.ref}", fontsize=9)
    if note := _elsewhere(difference.weights):
        figure.supxlabel(note, fontsize=7)
    figure.colorbar(image, ax=axes)
    _save(figure, target)


def _cells(pairs: Sequence[WeightPair]) -> dict[tuple[int, str], float]:
    """The relative distance of each module of each layer; those that differ by numbers in their names are one."""
    together: dict[tuple[int, str], list[WeightPair]] = {}
    for pair in pairs:
        module = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", pair.module)
        together.setdefault((pair.layer or 0, module), []).append(pair)
    return {place: _relative(found) for place, found in together.items()}


def _relative(pairs: Sequence[WeightPair]) -> float:
    norm = max(math.hypot(*(pair.norms[side] for pair in pairs)) for side in (0, 1))
    return math.hypot(*(pair.distance for pair in pairs)) / norm if norm else 0.0


def _elsewhere(pairs: Sequence[WeightPair]) -> str:
    outside = [f"{pair.module} {pair.relative:.2f}" for pair in pairs if pair.layer is None and not pair.problem]
    more = [f"{len(outside) - _LISTED} more"] if len(outside) > _LISTED else []
    return f"in no layer: {', '.join([*outside[:_LISTED], *more])}" if outside else ""


def curves(charts: Sequence[Chart], target: Path) -> None:
    """Draw metrics over steps, one below the other, a line for each run; the best point has a star.

    Raises:
        StorageFailed: the file cannot be written.
    """
    figure = _new_figure(7.5, 0.6 + 3.2 * len(charts))
    for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        styles = cycle(product(_LINES, _COLOURS))
        for (run, points), (line, colour) in zip(chart.runs.items(), styles, strict=False):
            xs, values = [point.x for point in points], [point.value for point in points]
            axes.plot(xs, values, marker="o", markersize=3.5, linestyle=line, color=colour, label=run)
        if chart.best is not None:
            best = chart.best
            axes.plot([best.x], [best.value], marker="*", markersize=15, color="#000000", linestyle="none",
                      label=f"best: {best.ref}, {best.value:.5g}")  # fmt: skip
        axes.set_xlabel(chart.axis)
        axes.set_ylabel(chart.metric)
        axes.grid(alpha=0.3)
        if len(chart.runs) <= _MAX_LEGEND:
            axes.legend(fontsize=8 if len(chart.runs) < len(_COLOURS) else 5)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    from matplotlib import rc_context  # noqa: PLC0415 - as above

    ending = target.suffix.lower()
    times: Mapping[str, None] = _TIMES[ending]
    with Translating(str(target)), rc_context({"svg.hashsalt": "ckpt"}):
        figure.savefig(target, dpi=_DOTS_PER_INCH, metadata=times)
