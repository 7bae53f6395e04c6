"""`ckpt list`, `show`, `history`: what is in the registry, and what is best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli import output, parse, views
from cli.options import Higher, Json, Lower, Subject
from registry import connect
from registry.errors import InvalidInput, UnknownMetric
from registry.manifest import Checkpoint, Direction, to_json
from registry.selection import Grouping, sort_checkpoints

if TYPE_CHECKING:
    from registry.selection import Ranking
    from registry.service import Registry


def list_(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Of this adapter only.")] = "",
    best: Annotated[
        str | None,
        typer.Option(
            "--best", metavar="[METRIC]", help="Only the best. Without METRIC: by the one that all candidates share."
        ),
    ] = None,
    per: Annotated[str, typer.Option(metavar="adapter|run|base", help="With --best: the best of each.")] = "",
    top: Annotated[int, typer.Option(min=1, metavar="N", help="With --best: so many instead of one.")] = 1,
    lower: Lower = False,
    higher: Higher = False,
    where: Annotated[
        str, typer.Option(metavar="EXPR", help="A filter: metric.eval_loss < 0.9 and tag.team = 'nlu' and step >= 200")
    ] = "",
    sort: Annotated[
        str, typer.Option(metavar="KEY", help="step, created, version, size, metric.NAME…; -KEY for the reverse.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many, the last ones.")] = None,
    json: Json = False,
) -> None:
    """Show checkpoints, or only the best of them. The best value of each metric has a star."""
    keep, direction = parse.condition(where), parse.direction(lower=lower, higher=higher)
    if best is None and (per or top != 1 or direction):
        raise InvalidInput("--per, --top, --min, --max", "", "only with --best")
    with connect() as registry:
        found = registry.checkpoints(adapter, keep)
        if not found:
            _say_empty(json, filtered=bool(where))
            return
        metric = ""
        if best is not None:
            ranking = _rank(registry, found, best, per, top, direction)
            found, metric = [each for group in ranking.groups for each in group.checkpoints], ranking.metric
    if sort:
        found = sort_checkpoints(found, sort)
    _print(found[-limit:] if limit else found, metric, json=json)


def _rank(
    registry: Registry, found: list[Checkpoint], metric: str, per: str, top: int, direction: Direction | None
) -> Ranking:
    if per not in ("", "adapter", "run", "base"):
        raise InvalidInput("--per", per, "expected adapter, run or base")
    grouping = cast("Grouping | None", per or None)
    try:
        ranking = registry.best(found, metric=metric or None, direction=direction, per=grouping, top=top)
    except UnknownMetric:
        if any(str(each.adapter) == metric for each in found):
            output.say(f"{metric} is an adapter: ckpt list {metric} --best")
        raise
    output.say(f"by {output.plain(ranking.metric)}, {ranking.direction} is better")
    if ranking.without:
        output.say(f"{ranking.without} of {len(found)} left out: no finite {output.plain(ranking.metric)}")
    return ranking


def _say_empty(json: bool, *, filtered: bool) -> None:
    if json:
        output.print_json([])
    output.say("nothing matches the filter" if filtered else "no checkpoint yet: `ckpt register PATH`")


def _print(found: list[Checkpoint], metric: str, *, json: bool) -> None:
    if json:
        output.print_json([views.checkpoint_json(each) for each in found])
    else:
        views.print_checkpoints(found, metric)


def show(ref: Subject, json: Json = False) -> None:
    """Show everything about a checkpoint: contents, metrics, notes, compatibility, what it comes from and what came of it."""
    with connect() as registry:
        subject = registry.subject(ref)
        if not isinstance(subject, Checkpoint):
            output.print_json(views.merged_json(subject)) if json else views.print_merged(subject)
            return
        details = registry.details(subject)
    if json:
        output.print_json({**views.checkpoint_json(subject), **views.details_json(details)})
    else:
        views.print_checkpoint(subject)
        views.print_details(details)


def history(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="An adapter, a checkpoint or a base model. Default: everything.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last so many.")] = None,
    json: Json = False,
) -> None:
    """Show who changed what, and when."""
    with connect() as registry:
        events = registry.history(subject, limit)
    if json:
        output.print_json([to_json(event) for event in events])
    elif events:
        rows = [[output.when(e.at), e.author, e.action, e.subject, views.detail(e.detail)] for e in events]
        output.print_table(["when", "who", "did", "to", "detail"], rows)
    else:
        output.say("nothing happened yet")
