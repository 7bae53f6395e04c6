"""`ckpt plot`: metrics over steps, in the terminal or as a picture."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from cli import output
from cli.charts import draw
from cli.options import Json
from registry import connect
from registry.curves import chart, chart_json

_WIDTH_WITHOUT_TERMINAL = 80


def plot(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Whose checkpoints.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="May be repeated. Default: the one that all checkpoints share."),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FILE", help="Draw a picture instead: .png, .svg or .pdf. Needs matplotlib.")
    ] = "",
    json: Json = False,
) -> None:
    """Draw an adapter's metrics over steps: a line for each run, a star on the best point.

    For example: ckpt plot support-bot --metric eval_loss --out loss.png
    """
    from registry.plots import check_target, curves  # noqa: PLC0415 - the help need not wait for it

    target = check_target(out) if out else None
    with connect() as registry:
        checkpoints = registry.checkpoints(adapter)
    charts = [chart(checkpoints, name) for name in metric] if metric else [chart(checkpoints)]
    for found in charts:
        if found.left_out:
            name = output.plain(found.metric)
            output.say(f"{found.left_out} of {len(checkpoints)} left out: no finite {name}")
    if target is not None:
        curves(charts, target)
        output.say(f"drawn: {output.plain(out)}")
    if json:
        output.print_json([chart_json(found) for found in charts])
    elif target is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
        for found in charts:
            for line in draw(found, width):
                output.print_line(line)
