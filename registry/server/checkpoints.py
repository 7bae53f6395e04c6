"""Routes of checkpoints: find, register, annotate, remove; and the history."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from registry.failures import to_document
from registry.filters import Filter, parse_filter
from registry.manifest import Checkpoint, Direction, Event, Merged
from registry.refs import CheckpointRef, nearest_name
from registry.registering import Registered
from registry.selection import Grouping, Ranking
from registry.server.bodies import (
    AliasSet,
    CheckpointDetails,
    Empty,
    NewAlias,
    NewMetrics,
    NewNote,
    Problem,
    SentCheckpoint,
    Subject,
    TagChange,
)
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Page, Role
from registry.uploading import register

routes = Routes("checkpoints")

Ref = Annotated[
    str, "A reference: name, name@v3, name@alias, name@step:500, name@best:METRIC, or a digest's first digits."
]
Adapter = Annotated[str, "Of this adapter only."]
Where = Annotated[str, "A filter, as in `ckpt list --where`."]
BATCH_BYTES = 16 << 20


@routes.route("GET", "/checkpoints", Role.READER)
def list_checkpoints(
    scope: Scope,
    adapter: Adapter = "",
    where: Where = "",
    sort: Annotated[str, "Another order: step, created, metric.NAME and others; -KEY for the reverse."] = "",
    cursor: Annotated[str, "Where to go on, as the page before said."] = "",
    limit: Annotated[int, "The most to give.", range(1, 1001)] = 50,
) -> Page[Checkpoint]:
    """Checkpoints in pages, the newest first."""
    return scope.registry.page(
        adapter, _filter(where), sort=sort, cursor=cursor, limit=limit, namespaces=scope.namespaces
    )


def _filter(where: str) -> Filter | None:
    return parse_filter(where) if where else None


@routes.route("GET", "/best", Role.READER)
def rank_checkpoints(
    scope: Scope,
    adapter: Adapter = "",
    where: Where = "",
    metric: Annotated[str | None, "By this metric; without one, by the one that all share."] = None,
    direction: Annotated[Direction | None, "Which is better; known by the name of most metrics."] = None,
    per: Annotated[Grouping | None, "The best of each adapter, run or base."] = None,
    top: Annotated[int, "How many of each.", range(1, 1001)] = 1,
) -> Ranking:
    """The best checkpoints by a metric."""
    return scope.registry.rank(
        adapter,
        _filter(where),
        metric=metric,
        direction=direction,
        per=per,
        top=top,
        namespaces=scope.namespaces,
    )


@routes.route("GET", "/checkpoint", Role.READER)
def get_checkpoint(scope: Scope, ref: Ref) -> Checkpoint:
    """The checkpoint that a reference means."""
    return scope.checkpoint(ref)


@routes.route("GET", "/subject", Role.READER)
def get_subject(scope: Scope, ref: Ref) -> Subject:
    """The checkpoint, or the merged model by its digest, that a reference means."""
    found = scope.subject(ref)
    return Subject(kind="merged" if isinstance(found, Merged) else "checkpoint", value=found)


@routes.route("GET", "/details", Role.READER)
def get_details(scope: Scope, ref: Ref) -> CheckpointDetails:
    """A checkpoint with its compatibility, what it comes from and what came of it."""
    found = scope.registry.details(scope.checkpoint(ref))
    return CheckpointDetails(
        checkpoint=found.checkpoint,
        base=found.base,
        report=found.report,
        problem=None if found.problem is None else Problem(**to_document(found.problem)),
        merged=tuple(filter(scope.sees, found.merged)),
        shipments=found.shipments,
        previous=found.previous,
        following=found.following,
        children=tuple(filter(scope.sees_ref, found.children)),
    )


@routes.route("GET", "/trail", Role.READER)
def list_trail(scope: Scope, ref: Ref) -> list[Checkpoint]:
    """The checkpoints of a run up to one, that one included."""
    return scope.registry.trail(scope.checkpoint(ref))


@routes.route("POST", "/checkpoints", Role.WRITER)
def register_checkpoint(scope: Scope, body: SentCheckpoint) -> Registered:
    """Register a checkpoint whose files were sent before. The same content again changes nothing."""
    return register_checkpoints(scope, (body,))[0]


@routes.route("POST", "/checkpoints/batch", Role.WRITER, body_bytes=BATCH_BYTES)
def register_checkpoints(scope: Scope, body: tuple[SentCheckpoint, ...]) -> list[Registered]:
    """Register several checkpoints whose files were sent before: all of them, or none."""
    for sent in body:
        _check(scope, sent)
    return register(scope.registry.workspace, scope.principal, [sent.received() for sent in body])


def _check(scope: Scope, sent: SentCheckpoint) -> None:
    scope.may_change(sent.said.adapter or str(nearest_name(sent.found.adapter, "adapter")))
    for parent in sent.said.origin.parents if sent.said.origin else ():
        scope.checkpoint(parent)


@routes.route("DELETE", "/checkpoint", Role.WRITER, is_keyed=True, current=get_checkpoint)
def remove_checkpoint(scope: Scope, ref: Ref) -> Empty:
    """Remove a checkpoint; refused while something needs it."""
    scope.registry.remove(scope.checkpoint(ref))
    return Empty()


@routes.route("POST", "/notes", Role.WRITER, is_keyed=True)
def add_note(scope: Scope, body: NewNote) -> Empty:
    """Add a note to a checkpoint."""
    scope.registry.note(scope.checkpoint(body.checkpoint), body.text)
    return Empty()


@routes.route("POST", "/tags", Role.WRITER, is_keyed=True)
def change_tags(scope: Scope, body: TagChange) -> Empty:
    """Set tags on a checkpoint, and take others away."""
    scope.registry.tag(scope.checkpoint(body.checkpoint), body.tags, body.remove)
    return Empty()


@routes.route("POST", "/metrics", Role.WRITER, is_keyed=True)
def add_metrics(scope: Scope, body: NewMetrics) -> Empty:
    """Record numbers measured on a checkpoint; of one name the last counts."""
    scope.registry.add_metrics(scope.checkpoint(body.checkpoint), body.metrics)
    return Empty()


def _aliased(scope: Scope, body: NewAlias) -> Checkpoint:
    """Where an alias points that is about to be moved."""
    adapter = scope.checkpoint(body.checkpoint).adapter
    return scope.checkpoint(str(CheckpointRef(adapter, "label", body.name)))


@routes.route("PUT", "/aliases", Role.WRITER, is_keyed=True, current=_aliased)
def set_alias(scope: Scope, body: NewAlias) -> AliasSet:
    """Point an alias of a checkpoint's adapter to the checkpoint. `If-Match` with the tag of the one it points to guards against races."""
    return AliasSet(before=scope.registry.set_alias(scope.checkpoint(body.checkpoint), body.name))


@routes.route("DELETE", "/aliases", Role.WRITER, is_keyed=True)
def remove_alias(
    scope: Scope, adapter: Annotated[str, "The adapter."], name: Annotated[str, "The alias."]
) -> Checkpoint:
    """Take an alias away; gives where it pointed."""
    return scope.registry.remove_alias(str(scope.adapter(adapter)), name)


@routes.route("GET", "/history", Role.READER)
def list_history(
    scope: Scope,
    subject: Annotated[str, "Of this adapter, checkpoint or base model only."] = "",
    limit: Annotated[int, "The last so many.", range(1, 10_001)] = 100,
    author: Annotated[str, "By this one only."] = "",
    since: Annotated[datetime | None, "From then on; with its zone."] = None,
    cursor: Annotated[str, "Those before a page, as it said."] = "",
) -> Page[Event]:
    """What was changed, by whom, oldest first."""
    return scope.registry.history_page(
        subject, author=author, since=since, cursor=cursor, limit=limit, namespaces=scope.namespaces
    )
