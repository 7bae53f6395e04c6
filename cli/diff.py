"""`ckpt diff`: what differs between two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output
from cli.options import Json, Ref, flag
from registry import connect
from registry.manifest import to_json

if TYPE_CHECKING:
    from registry.comparing import Difference, MetricPair, WeightPair

_SHOWN = 20


def diff(
    one: Ref,
    other: Ref,
    everything: Annotated[bool, flag("--all", "Every weight, not only those that differ most.")] = False,
    plot: Annotated[
        str, typer.Option(metavar="FILE", help="Draw a heat map of layers and modules: .png, .svg or .pdf.")
    ] = "",
    json: Json = False,
) -> None:
    """Compare two checkpoints of one base model: configuration, metrics, and what each does to every weight.

    ‖Δ‖ is the norm of what it adds, rank the effective one: the exponential of the entropy of the singular values' shares.

    For example: ckpt diff support-bot@v3 support-bot@best --plot diff.png
    """
    from registry.plots import check_target, heat_map  # noqa: PLC0415 - the help need not wait for it

    target = check_target(plot) if plot else None
    with connect() as registry, output.progress() as progress:
        found = registry.diff(registry.resolve(one), registry.resolve(other), progress)
    if json:
        output.print_json(diff_json(found))
    else:
        _print(found, everything=everything)
    if target is not None:
        heat_map(found, target)
        output.say(f"drawn: {output.plain(plot)}")


def diff_json(found: Difference) -> dict[str, Any]:
    """A difference for programs."""
    return {
        "one": found.one.ref,
        "other": found.other.ref,
        "same": found.one.digest == found.other.digest,
        "fields": [to_json(field) for field in found.fields],
        "unmerged": list(found.unmerged),
        "metrics": [to_json(pair) for pair in found.metrics],
        "weights": [
            {**to_json(pair), "layer": pair.layer, "module": pair.module, "relative": pair.relative}
            for pair in found.weights
        ],
    }


def _print(found: Difference, *, everything: bool) -> None:
    names = [found.one.ref, found.other.ref]
    if found.one.digest == found.other.digest:
        output.say("the same files")
    if found.fields:
        rows = [[field.name, _text(field.one), _text(field.other)] for field in found.fields]
        output.print_table(["", *names], rows)
    if found.metrics:
        output.print_table(
            ["metric", *names, "change"], [_metric(pair) for pair in found.metrics], right=[*names, "change"]
        )
    for name, reason in zip(names, found.unmerged, strict=True):
        if reason:
            output.say(f"not compared of {output.plain(name)}: {output.plain(reason)}")
    ranked = sorted(found.weights, key=lambda pair: (not pair.problem, -pair.relative, -pair.distance))
    shown = ranked if everything else ranked[:_SHOWN]
    if shown:
        columns = ["weight", "‖Δ‖", "‖Δ‖ ", "‖Δ-Δ‖", "relative", "cosine", "rank", "rank "]
        output.print_table(columns, [_weight(pair) for pair in shown], right=columns[1:])
        output.say(_summary(found.weights, len(shown)))
    else:
        output.say("no change of weights to compare")


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _metric(pair: MetricPair) -> list[str]:
    one, other = (("" if value is None else output.number(value)) for value in (pair.one, pair.other))
    if pair.one is None or pair.other is None:
        return [pair.name, one, other, ""]
    if not pair.is_like:
        return [pair.name, one, other, "measured on other data"]
    verdict = {True: " better", False: " worse", None: ""}[pair.is_better]
    return [pair.name, one, other, f"{pair.other - pair.one:+.4g}{verdict}"]


def _weight(pair: WeightPair) -> list[str]:
    if pair.problem:
        return [pair.name, "", "", "", pair.problem, "", "", ""]
    cosine = "" if pair.cosine is None else f"{pair.cosine:.4f}"
    ranks = ["" if rank is None else f"{rank:.2f}" for rank in pair.ranks]
    return [
        pair.name,
        *(f"{norm:.4g}" for norm in pair.norms),
        f"{pair.distance:.4g}",
        f"{pair.relative:.3f}",
        cosine,
        *ranks,
    ]


def _summary(weights: Sequence[WeightPair], shown: int) -> str:
    total = sum(pair.distance**2 for pair in weights) ** 0.5
    norms = [sum(pair.norms[side] ** 2 for pair in weights) ** 0.5 for side in (0, 1)]
    rest = f"; the {shown} that differ most are shown, --all shows the rest" if shown < len(weights) else ""
    return f"{len(weights)} weights: ‖Δ‖ {norms[0]:.4g} and {norms[1]:.4g}, apart by {total:.4g}{rest}"
