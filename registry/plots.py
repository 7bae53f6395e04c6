"""Pictures of comparisons and of metrics, drawn with matplotlib, which is optional: `pip install ckpt-registry[plot]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from registry.comparing import Difference, WeightPair
from registry.curves import Chart
from registry.disk import Translating
from registry.errors import InvalidInput, MissingPackage

ENDINGS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which people who see colours differently can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DOTS_PER_INCH = 150


def check_target(path: str) -> Path:
    """The path of a picture to write.

    Raises:
        InvalidInput: its ending is none of those that are drawn.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in ENDINGS:
        raise InvalidInput("file", path, f"expected a name that ends in {', '.join(ENDINGS)}")
    return target


def _matplotlib() -> Any:
    """Its figures, without a window.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and half a second to import
    except ImportError as error:
        raise MissingPackage("matplotlib", "plot") from error
    return Figure


def heat_map(difference: Difference, target: Path) -> None:
    """Draw how far two checkpoints are apart, layer by layer and module by module: ‖D_1 - D_2‖ as a share of the larger norm.

    Raises:
        InvalidInput: there is no weight in a numbered layer that both can be compared on.
        MissingPackage: matplotlib is not installed.
        StorageFailed: the file cannot be written.
    """
    pairs = [pair for pair in difference.weights if pair.layer is not None and not pair.problem]
    if not pairs:
        raise InvalidInput("--plot", str(target), "no weight in a numbered layer was compared")
    layers = sorted({pair.layer for pair in pairs if pair.layer is not None})
    modules = list(dict.fromkeys(pair.module for pair in pairs))
    figure = _matplotlib()(figsize=(3 + 0.55 * len(modules), 2 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(_grid(pairs, layers, modules), aspect="auto", cmap="cividis", vmin=0.0)
    axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize=8)
    every = max(1, len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    axes.set_ylabel("layer")
    figure.suptitle(f"{difference.one.ref}\n{difference.other.ref}", fontsize=9)
    figure.colorbar(image, ax=axes, label="‖D₁ - D₂‖ / max ‖D‖")
    _save(figure, target)


def _grid(pairs: Sequence[WeightPair], layers: Sequence[int], modules: Sequence[str]) -> list[list[float]]:
    values = {(pair.layer, pair.module): pair.relative for pair in pairs}
    return [[values.get((layer, module), float("nan")) for module in modules] for layer in layers]


def curves(charts: Sequence[Chart], target: Path) -> None:
    """Draw metrics over steps, one below the other, a line for each run; the best point has a star.

    Raises:
        MissingPackage: matplotlib is not installed.
        StorageFailed: the file cannot be written.
    """
    figure = _matplotlib()(figsize=(7.5, 0.6 + 3.2 * len(charts)), layout="constrained")
    for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        for number, (run, points) in enumerate(chart.runs.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            xs, values = [point.x for point in points], [point.value for point in points]
            axes.plot(xs, values, marker="o", markersize=3.5, color=colour, label=run)
        if chart.best is not None:
            best = chart.best
            axes.plot([best.x], [best.value], marker="*", markersize=15, color="#000000", linestyle="none",
                      label=f"best: {best.ref}, {best.value:.5g}")  # fmt: skip
        axes.set_xlabel(chart.axis)
        axes.set_ylabel(chart.metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    with Translating(str(target)):
        figure.savefig(target, dpi=_DOTS_PER_INCH)
