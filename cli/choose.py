"""`ckpt list`, `show`, `history`: what is in the registry, and what is best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli import output, parse, views
from cli.options import Higher, Json, Lower, Subject
from registry import connect
from registry.errors import InvalidInput, InvalidReference, UnknownAdapter, UnknownMetric
from registry.manifest import Checkpoint, Direction, to_json
from registry.selection import Grouping, sort_checkpoints

if TYPE_CHECKING:
    from registry.filters import Filter
    from registry.service import Registry

_SHOWN = 100
_PAGE = 1000


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
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many, the last ones. Default: 100.")
    ] = None,
    cursor: Annotated[str, typer.Option(metavar="TEXT", help="Those before a list that was cut, as it said.")] = "",
    json: Json = False,
) -> None:
    """Show checkpoints, or only the best of them. The best value of each metric has a star."""
    keep, direction = parse.condition(where), parse.direction(lower=lower, higher=higher)
    if best is None and (per or top != 1 or direction):
        raise InvalidInput("--per, --top, --min, --max", "", "only with --best")
    metric = ""
    with connect() as registry:
        if best is None:
            found = _last(registry, adapter, keep, sort, cursor, limit or _SHOWN)
        else:
            asked = _Asked(adapter, keep, best or None, _grouping(per), top, direction)
            found, metric = _best(registry, asked)
            found = (sort_checkpoints(found, sort) if sort else found)[-(limit or len(found)) :]
    if found:
        _print(found, metric, json=json)
    else:
        _say_empty(json, filtered=bool(where))


def _last(
    registry: Registry, adapter: str, where: Filter | None, sort: str, cursor: str, limit: int
) -> list[Checkpoint]:
    """The last checkpoints of a list, in its order; without one, by adapter and version."""
    found: list[Checkpoint] = []
    # pages come from the start: the last ones are the first of the order turned round
    turned = sort[1:] if sort.startswith("-") else f"-{sort}" if sort else ""
    while len(found) < limit:
        page = registry.page(adapter, where, sort=turned, cursor=cursor, limit=min(limit - len(found), _PAGE))
        found += page.items
        cursor = page.cursor
        if not cursor:
            break
    if cursor:
        output.say(f"only {len(found)} of them: --limit N shows more, --cursor {cursor} those before")
    if sort:
        return sort_checkpoints(found[::-1], sort)
    return sorted(found, key=lambda each: (each.adapter, each.version))


@dataclass(frozen=True, slots=True)
class _Asked:
    adapter: str
    where: Filter | None
    metric: str | None
    per: Grouping | None
    top: int
    direction: Direction | None


def _grouping(per: str) -> Grouping | None:
    if per not in ("", "adapter", "run", "base"):
        raise InvalidInput("--per", per, "expected adapter, run or base")
    return cast("Grouping | None", per or None)


def _best(registry: Registry, asked: _Asked) -> tuple[list[Checkpoint], str]:
    """The best checkpoints and the metric they were ranked by; none where there are no candidates."""
    try:
        ranking = registry.rank(
            asked.adapter,
            asked.where,
            metric=asked.metric,
            direction=asked.direction,
            per=asked.per,
            top=asked.top,
        )
    except UnknownMetric:
        if not registry.page(asked.adapter, asked.where, limit=1).items:
            return [], ""
        if asked.metric and _is_adapter(registry, asked.metric):
            output.say(f"{asked.metric} is an adapter: ckpt list {asked.metric} --best")
        raise
    output.say(f"by {output.plain(ranking.metric)}, {ranking.direction} is better")
    if ranking.without:
        output.say(f"{ranking.without} of {ranking.candidates} left out: no finite {output.plain(ranking.metric)}")
    return [each for group in ranking.groups for each in group.checkpoints], ranking.metric


def _is_adapter(registry: Registry, text: str) -> bool:
    try:
        return bool(registry.page(text, limit=1).items)
    except (UnknownAdapter, InvalidReference):
        return False


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
