"""`ckpt check`, `merge`, `pull`: from a checkpoint to a model that can be loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output, parse, views
from cli.options import (
    Between,
    Density,
    Epsilon,
    Gamma,
    Json,
    Lambda,
    Method,
    Note,
    Ref,
    Refs,
    Seed,
    Subject,
    T,
    Weights,
    flag,
)
from registry import connect
from registry.codec import plain
from registry.errors import InvalidInput, InvalidRecipe
from registry.manifest import Level, to_json
from registry.tensors import DType

if TYPE_CHECKING:
    from registry.merging import Planned
    from registry.service import Registry

_REFUSED = 4


def check(
    ref: Ref,
    base: Annotated[
        str, typer.Option(metavar="REF", help="Another base model. Default: the one it was trained on.")
    ] = "",
    json: Json = False,
) -> None:
    """Say whether a checkpoint goes with its base model and can be merged: every finding, not just the first. Exit code 4 when refused."""
    with connect() as registry, output.progress() as progress:
        report = registry.check(registry.resolve(ref), base, progress)
    if json:
        output.print_json({**to_json(report), "verdict": report.verdict.value})
    else:
        views.print_report(report)
        output.say(
            f"{output.plain(report.checkpoint)} and {output.plain(report.base)}: [bold]{report.verdict.value}[/bold]"
        )
    if report.verdict is Level.REFUSED:
        raise typer.Exit(_REFUSED)


def merge(
    refs: Refs = None,
    method: Method = "",
    weights: Weights = "",
    between: Between = None,
    t: T = "",
    lambda_: Lambda = "",
    density: Density = "",
    epsilon: Epsilon = "",
    gamma: Gamma = "",
    decay: Annotated[str, typer.Option(metavar="D", help="ema: how much of the mean stays at each step.")] = "",
    seed: Seed = "",
    out: Annotated[
        str | None, typer.Option(metavar="DIR_OR_URL", help="Write the model there. Default: the registry's store.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16. Default: each base tensor's own.")
    ] = "",
    allow_lossy: Annotated[
        bool,
        flag("--allow-lossy", "Merge even what can only be merged in part. What is lost is measured and recorded."),
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Only show the plan.")] = False,
    detach: Annotated[
        bool,
        flag("--detach", "Print the number of the job that does it, and do not wait. With a server or workers only."),
    ] = False,
    virtual: Annotated[
        bool,
        flag("--virtual", "Keep the recipe only: its model is computed whenever somebody loads it, and takes no room."),
    ] = False,
    note: Note = "",
    json: Json = False,
) -> None:
    """Merge a checkpoint, or several together, into their base model.

    Checked first; nothing is written when one is refused. The result is a complete model folder.

    In it, merge.json tells what it was made of. The same merge again finds its result; an interrupted one goes on where it was.

    ckpt merge support-bot@best --out ./merged

    ckpt merge math code chat --method ties --weights 1,1,0.5 --density 0.3

    ckpt merge --between math code --t 0.3

    ckpt merge math code --method ties --weights 0.7,0.3 --virtual
    """
    wanted = parse.mixture(
        method, weights, t=t, lambda_=lambda_, density=density, epsilon=epsilon, gamma=gamma, decay=decay, seed=seed
    )
    with connect() as registry:
        with output.progress() as progress:
            inputs = [registry.resolve(ref) for ref in parse.inputs(refs, between)]
            planned = registry.plan(
                *inputs, mixture=wanted, dtype=_dtype(dtype), allow_lossy=allow_lossy, progress=progress
            )
        if dry_run:
            _print_plan(planned, json=json)
            return
        if virtual:
            _save(registry, planned, out, note, json=json)
            return
        if detach:
            _detach(registry, planned, out, note, json=json)
            return
        with output.progress() as progress:
            result = registry.merge(planned, out=out, note=note, progress=progress)
    if json:
        output.print_json(views.merge_json(result))
    else:
        views.print_merge(result)
    for finding in result.report.findings:
        if finding.level is Level.WARNING:
            output.say(
                f"[yellow]![/yellow] {output.plain(finding.where)}: {output.plain(finding.found)} ({output.plain(finding.advice)})"
            )


def _detach(registry: Registry, planned: Planned, out: str | None, note: str, *, json: bool) -> None:
    settings = registry.settings
    if not (settings.is_shared or settings.server):
        raise InvalidInput(
            "--detach", "", "merges run in this very process: there is no server or worker to leave it to"
        )
    if out is not None:
        raise InvalidInput("--detach", "", "workers merge into the store: leave --out away, and `ckpt pull` the result")
    job = registry.start_merge(planned, note)
    if json:
        output.print_json(plain(job))
    else:
        output.print_line(str(job.id))
    output.say(f"`ckpt jobs show {job.id} --follow` waits for it")


def _save(registry: Registry, planned: Planned, out: str | None, note: str, *, json: bool) -> None:
    if out is not None:
        raise InvalidInput("--virtual", "", "nothing is written: leave --out away")
    saved = registry.save_recipe(planned, note)
    if json:
        output.print_json(plain(saved))
    else:
        output.print_line(saved.id)
    output.say(
        f'with HF_ENDPOINT set to a server (`ckpt serve`): AutoModelForCausalLM.from_pretrained("{saved.id}"), or `hf download {saved.id}`'
    )


def _dtype(text: str) -> DType | None:
    if not text:
        return None
    found = DType.from_long_name(text)
    if found is None or not found.is_mergeable:
        raise InvalidRecipe("dtype", text, "expected float32, bfloat16, float16 or float64")
    return found


def _print_plan(planned: Planned, *, json: bool) -> None:
    threads = os.cpu_count() or 1
    if json:
        output.print_json(views.plan_json(planned.outline, threads))
    else:
        views.print_plan(planned.outline, threads)


def pull(
    ref: Subject,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """Write a checkpoint's files, exactly as they were registered, or a merged model into a folder. Verified on the way."""
    target = folder.expanduser().absolute()
    with connect() as registry, output.progress() as progress:
        subject = registry.subject(ref)
        registry.pull(subject, target, progress)
    output.print_line(f"pulled {subject.digest.short} into {folder}")
