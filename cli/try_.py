"""`ckpt try`: what merging would change, before anything is merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output
from cli.chat import Device, DType
from cli.options import Json, Ref, flag
from registry import connect
from registry.manifest import to_json

if TYPE_CHECKING:
    from registry.trying import Tried, Trying

_REFUSED = 4  # of cli.errors.EXIT_CODES


def try_(
    ref: Ref,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt a line, or JSON lines with 'prompt'. Default: eight of ours."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="The longest answer.")] = 48,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Exit with 4 where a score of the merged model differs by more."),
    ] = None,
    no_record: Annotated[bool, flag("--no-record", "Only show what is found.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    json: Json = False,
) -> None:
    """Have base, adapter and merged model answer a handful of prompts, side by side, and measure what merging changes.

    The merged model is computed in memory and never written. What is found is recorded with the checkpoint: try/logit_difference,
    try/agreement and try/tokens_per_second, which policies can ask for.
    """
    from registry.trying import over_tolerance, try_checkpoint  # noqa: PLC0415 - the help need not wait for it

    wanted = _wanted(prompts, max_tokens, device, dtype)
    with connect() as registry, output.progress(unit="answers") as progress:
        tried = try_checkpoint(registry, registry.resolve(ref), wanted, records=not no_record, progress=progress)
    if json:
        output.print_json(_json(tried))
    else:
        _print(tried)
    failed = [] if tolerance is None else list(over_tolerance(tried, tolerance))
    for reason in failed:
        output.say(f"[bold red]error:[/bold red] {output.plain(tried.checkpoint.ref)}: {output.plain(reason)}")
    if failed:
        raise typer.Exit(_REFUSED)


def _wanted(prompts: Path | None, max_tokens: int, device: str, dtype: str) -> Trying:
    from registry.trying import PROMPTS, Trying, read_prompts  # noqa: PLC0415

    given: Any = {"device": device, "dtype": dtype}
    return Trying(prompts=read_prompts(prompts) if prompts else PROMPTS, max_tokens=max_tokens, **given)


def _json(tried: Tried) -> dict[str, Any]:
    return {
        "checkpoint": tried.checkpoint.ref,
        "logit_difference": tried.largest,
        "mean_logit_difference": tried.mean,
        "agreement": tried.agreement,
        "tokens_per_second": tried.tokens_per_second,
        "unmerged_because": tried.unmerged_because,
        "device": tried.device,
        "data": tried.data,
        "trials": to_json(tried.trials),
    }


def _print(tried: Tried) -> None:
    rows = [
        [each.prompt, each.base or "", each.adapter, each.merged or "", _number(each.largest)] for each in tried.trials
    ]
    output.print_table(["prompt", "base", "adapter", "merged", "difference"], rows, right=["difference"])
    agreement = "" if tried.agreement is None else f"{tried.agreement:.1%} of the tokens"
    output.print_facts(
        {
            "logit difference": "" if tried.largest is None else f"{tried.largest:.3g} at most, {tried.mean:.3g} mean",
            "agreement": agreement,
            "tokens per second": ", ".join(f"{who} {speed:.3g}" for who, speed in tried.tokens_per_second.items()),
        }
    )
    if tried.unmerged_because:
        output.say(f"not merged: {output.plain(tried.unmerged_because)}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
