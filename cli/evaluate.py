"""`ckpt eval` and `ckpt metric import`: measure checkpoints, here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli import output, parse
from cli.chat import Device, DType
from cli.options import Json, Ref, flag
from registry import connect
from registry.errors import InvalidInput
from registry.manifest import Checkpoint, Metric, to_json
from registry.refs import CheckpointRef

if TYPE_CHECKING:
    from registry.evaluating import Evaluation

_KINDS = ("loss", "ppl", "accuracy", "exact_match")


def evaluate(
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF…", help="Checkpoints.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Lines with text; prompt and completion; messages; or prompt, choices, answer."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(_KINDS), help="What to measure; may be repeated. Default: loss."),
    ] = None,
    command: Annotated[
        str,
        typer.Option(
            metavar="PROGRAM", help="Measure with this: {path}, {base} and {ref} are replaced; it prints JSON."
        ),
    ] = "",
    all_missing: Annotated[
        bool, flag("--all-missing", "Every checkpoint of a run or adapter that was not measured yet.")
    ] = False,
    run: Annotated[str, typer.Option(metavar="NAME", help="With --all-missing: of this run.")] = "",
    adapter: Annotated[str, typer.Option(metavar="NAME", help="With --all-missing: of this adapter.")] = "",
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Begins the names of the metrics. Default: the file's name.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first so many lines.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="So many texts at once.")] = 8,
    again: Annotated[bool, flag("--again", "Measure also what was measured on this data before.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Only say what would be measured.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="With --command: the longest it may take.")
    ] = 3600,
    device: Device = "auto",
    dtype: DType = "auto",
    json: Json = False,
) -> None:
    """Measure checkpoints on data, unmerged, and record the numbers with the data's digest, so that only like is compared with like."""
    if bool(refs) == all_missing:
        raise InvalidInput(
            "REF", " ".join(refs or ()), "name checkpoints, or say --all-missing with --run or --adapter"
        )
    if (data is None) == (not command):
        raise InvalidInput("--data", str(data or ""), "say --data FILE, or --command PROGRAM")
    with connect() as registry:
        found = [registry.resolve(ref) for ref in refs or ()] or _of(registry, run, adapter)
        if command:
            if all_missing and not name:
                raise InvalidInput("--name", "", "say it, so that it can be told what was measured before")
            measured: Iterator[Any] = _by_program(
                registry, found, (command, name, timeout), again=again or not all_missing, dry_run=dry_run
            )
        else:
            wanted = _wanted(cast("Path", data), metric or ["loss"], name, limit, batch_size, device, dtype)
            measured = _by_model(registry, found, wanted, again=again, dry_run=dry_run)
        rows = list(measured)
    if json:
        output.print_json(
            [
                {"checkpoint": ref, "is_known": known, "metrics": [to_json(each) for each in metrics]}
                for ref, metrics, known in rows
            ]
        )
    else:
        _print(rows, "to be measured" if dry_run else "")


_Row = tuple[str, tuple[Metric, ...], bool]


def _of(registry: Any, run: str, adapter: str) -> list[Checkpoint]:
    """The checkpoints of a run, or of an adapter, by step."""
    if not run and not adapter:
        raise InvalidInput("--all-missing", "", "say of which --run or --adapter")
    quoted = run.replace("'", "''")
    found = registry.checkpoints(adapter, parse.condition(f"run = '{quoted}'" if run else ""))
    if not found:
        raise InvalidInput("--run", run, "no checkpoint of this run")
    return sorted(found, key=lambda each: (str(each.adapter), each.run, each.step or 0, each.version))


def _wanted(
    data: Path, metrics: list[str], name: str, limit: int | None, batch_size: int, device: str, dtype: str
) -> Evaluation:
    from registry.evaluating import Evaluation  # noqa: PLC0415 - the help need not wait for it
    from registry.evaluation_data import read_data  # noqa: PLC0415

    if odd := next((each for each in metrics if each not in _KINDS), None):
        raise InvalidInput("--metric", odd, f"expected {', '.join(_KINDS)}")
    given: Any = {"metrics": tuple(dict.fromkeys(metrics)), "device": device, "dtype": dtype}
    return Evaluation(data=read_data(data, limit), name=name or data.stem, batch_size=batch_size, **given)


def _by_model(
    registry: Any, found: list[Checkpoint], wanted: Evaluation, *, again: bool, dry_run: bool
) -> Iterator[_Row]:
    from registry.evaluating import check_kinds, evaluate, known_metrics  # noqa: PLC0415

    if dry_run:
        check_kinds(wanted)
        for each in found:
            known = () if again else known_metrics(each, wanted)
            yield each.ref, known, len(known) == len(wanted.metrics)
        return
    with output.progress(unit="examples") as progress:
        for done in evaluate(registry, found, wanted, again=again, progress=progress):
            yield done.checkpoint.ref, done.metrics, done.is_known


def _by_program(
    registry: Any, found: list[Checkpoint], said: tuple[str, str, float], *, again: bool, dry_run: bool
) -> Iterator[_Row]:
    from registry.evaluation_programs import Program, known_numbers, run_program  # noqa: PLC0415

    command, name, timeout = said
    program = Program(command=command, name=name, timeout_seconds=timeout)
    with output.progress(unit="checkpoints") as progress:
        for each in found:
            known = () if again else known_numbers(each, program)
            yield each.ref, known if known or dry_run else run_program(registry, each, program), bool(known)
            progress("measuring", 1, len(found))


def _print(rows: list[_Row], otherwise: str) -> None:
    names = list(dict.fromkeys(metric.name for _, metrics, _ in rows for metric in metrics))
    cells = []
    for ref, metrics, is_known in rows:
        values = {metric.name: output.number(metric.value) for metric in metrics}
        cells.append([ref, *(values.get(name, "") for name in names), "known" if is_known else otherwise])
    output.print_table(["checkpoint", *names, ""], cells, right=names)


def metric_import(
    ref: Ref,
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="Results of lm-evaluation-harness, MLflow, W&B, or plain JSON.")
    ],
    source: Annotated[
        str,
        typer.Option(
            "--from", metavar="lm-eval|mlflow|wandb|json", help="Which tool wrote it. Default: told from the file."
        ),
    ] = "",
    name: Annotated[str, typer.Option(metavar="NAME", help="Begins the names of the metrics.")] = "",
    json: Json = False,
) -> None:
    """Record the numbers that another tool has measured on a checkpoint."""
    from dataclasses import replace  # noqa: PLC0415

    from registry.result_files import SOURCES, read_results  # noqa: PLC0415

    if source and source not in SOURCES:
        raise InvalidInput("--from", source, f"expected {', '.join(SOURCES)}")
    CheckpointRef.parse(ref)
    with connect() as registry:
        checkpoint = registry.resolve(ref)
        found = [
            replace(metric, name=f"{name}/{metric.name}" if name else metric.name)
            for metric in read_results(path, cast("Any", source or None), checkpoint.step)
        ]
        registry.add_metrics(checkpoint, found)
    if json:
        output.print_json([to_json(each) for each in found])
    else:
        output.print_line(
            f"recorded {len(found)} metrics of {checkpoint.ref}: {', '.join(each.name for each in found[:8])}{' …' if len(found) > 8 else ''}"
        )
