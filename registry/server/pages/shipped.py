"""Pages of what is live where: now, at any time, and over time; shipping and rolling back, each shown before it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, final
from urllib.parse import urlencode

from registry.choosing import objections
from registry.errors import BelowPolicy, InvalidInput, Outdated, UnknownEnvironment
from registry.manifest import Checkpoint, Merged, Shipment, utc_now
from registry.refs import AdapterName, check_label
from registry.server.pages.moments import in_form, moment
from registry.server.pages.timeline import WIDTH, draw_timeline
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Role
from registry.wording import explain

pages = Pages("shipped")

_AT_ONCE = 50
_PERIODS = {"day": 1, "week": 7, "month": 30, "quarter": 91, "year": 365}
_NEWEST = 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is to be done: from `before`, None where nothing is live, to a checkpoint, maybe in the shape of a merged model. `objections` are
    what the adapter's policy has against it."""

    environment: str
    checkpoint: str
    merged: str
    before: Shipment | None
    objections: tuple[str, ...] = ()

    @property
    def adapter(self) -> str:
        """Whose line it is."""
        return self.checkpoint.partition("@")[0]

    @property
    def seen(self) -> int:
        """The number of the shipment that it takes over from, 0 for none: what whoever confirms has seen."""
        return self.before.number if self.before else 0


# -- look


@pages.page("GET", "/shipped", Role.READER)
def show_shipped(visit: Visit) -> Shown:
    """What is live where, what was, and how that went."""
    environment, now = visit.query.one("environment"), utc_now()
    at = moment(visit.query.one("at"), "at", is_end=True)
    limit = visit.query.number("limit", _AT_ONCE, range(1, 10_001))
    everything = visit.scope.shipments("", lambda: visit.scope.registry.shipments())
    chosen = [each for each in everything if environment in ("", each.environment)]
    if environment and not chosen:
        raise UnknownEnvironment(environment, tuple(sorted({each.environment for each in everything})))
    live = visit.scope.shipments("", lambda: visit.scope.registry.shipped(environment or None, at)) if chosen else []
    period = visit.query.one("period")
    start = _start(chosen, period, now)
    return Shown(
        "shipped.html",
        environment=environment,
        environments=sorted({each.environment for each in everything}),
        live=live,
        returnable=_returnable(everything),
        at=at,
        at_text=in_form(at),
        history=list(reversed(chosen))[:limit],
        total=len(chosen),
        limit=limit,
        period=period,
        periods=list(_PERIODS),
        width=WIDTH,
        timeline=draw_timeline(chosen, start, now, at) if chosen else None,
        with_query=lambda **said: _url(visit, said),
    )


def _returnable(shipments: Sequence[Shipment]) -> set[int]:
    """The numbers of those before which something of the same adapter was live: what a rollback brings back."""
    restores = {each.number: each.restores for each in shipments}
    first: dict[tuple[str, str], int] = {}
    found = set()
    for each in shipments:
        original = each.number
        while (earlier := restores.get(original)) is not None:
            original = earlier
        if first.setdefault((each.environment, _adapter(each)), each.number) < original:
            found.add(each.number)
    return found


def _start(shipments: Sequence[Shipment], period: str, now: datetime) -> datetime:
    """Where the picture begins: so many days ago, or a little before the first shipment."""
    if period:
        if period not in _PERIODS:
            raise InvalidInput("period", period[:80], f"one of {', '.join(_PERIODS)}")
        return now - timedelta(days=_PERIODS[period])
    first = min((each.shipped_at for each in shipments), default=now)
    return first - max((now - first) * 0.02, timedelta(seconds=10))


def _url(visit: Visit, said: dict[str, object]) -> str:
    """This page with some of its query changed; empty text takes a part away."""
    kept = {name: visit.query.one(name) for name in ("environment", "at", "period", "limit")} | said
    pairs = {name: value for name, value in kept.items() if value}
    return f"/shipped?{urlencode(pairs)}" if pairs else "/shipped"


# -- ship


@pages.page("GET", "/shipped/ship", Role.SHIPPER)
def ask_to_ship(visit: Visit) -> Shown:
    """Choose what goes where; then what that changes, to be confirmed."""
    ref, environment = visit.query.one("ref"), visit.query.one("environment")
    if not ref or not environment:
        return Shown(_template(visit, "choose"), ref=ref, environment=environment, **_choices(visit.scope))
    return _confirm_ship(visit, _change(visit.scope, visit.scope.subject(ref), environment))


@pages.page("POST", "/shipped/ship", Role.SHIPPER)
def ship(visit: Visit) -> Moved | Shown:
    """Record it, if what is live there is still what was shown."""
    scope, note = visit.scope, visit.form.one("note")
    subject = scope.subject(visit.form.one("ref"))
    environment = check_label(visit.form.one("environment"))
    try:
        with scope.registry.workspace.writing():
            _check_seen(visit, _change(scope, subject, environment))
            scope.registry.ship(subject, environment, note, override=visit.form.one("override"))
    except Outdated as error:
        return _confirm_ship(visit, _change(scope, subject, environment), note, error, status=409)
    except BelowPolicy as error:
        return _confirm_ship(visit, _change(scope, subject, environment), note, error, status=422)
    return Moved(f"/shipped?{urlencode({'environment': environment})}")


def _change(scope: Scope, subject: Checkpoint | Merged, environment: str) -> Change:
    environment = check_label(environment)
    checkpoint = subject if isinstance(subject, Checkpoint) else scope.checkpoint(subject.checkpoints[0])
    with scope.registry.workspace.reading() as catalog:
        live = [each for each in catalog.shipments.live() if each.environment == environment]
        against = objections(catalog, checkpoint, environment)
    line = [each for each in live if _adapter(each) == str(checkpoint.adapter)]
    return Change(
        environment=environment,
        checkpoint=checkpoint.ref,
        merged=subject.digest.hex if isinstance(subject, Merged) else "",
        before=line[0] if line else None,
        objections=tuple(against),
    )


def _confirm_ship(
    visit: Visit, change: Change, note: str = "", error: Outdated | BelowPolicy | None = None, *, status: int = 200
) -> Shown:
    template, words = _template(visit, "ship"), explain(error) if isinstance(error, Outdated) else None
    return Shown(template, status=status, change=change, note=note, words=words)


def _choices(scope: Scope) -> dict[str, Any]:
    """What is likely to be shipped, each with a word about it, and the environments that there are."""
    found = scope.registry.page(limit=_NEWEST, namespaces=scope.namespaces).items
    named = [(f"{each.adapter}@{alias}", each.ref) for each in found for alias in each.aliases]
    merged = [each for each in reversed(scope.registry.merged()) if scope.sees(each)][:_NEWEST]
    return {
        "refs": [
            *named,
            *((each.ref, each.run) for each in found),
            *((each.digest.short, f"merged: {', '.join(each.checkpoints)}") for each in merged),
        ],
        "environments": sorted({each.environment for each in scope.shipments("", scope.registry.shipments)}),
    }


# -- roll back


@pages.page("GET", "/shipped/rollback", Role.SHIPPER)
def ask_to_roll_back(visit: Visit) -> Shown:
    """What would come back, to be confirmed."""
    return _confirm_rollback(visit, _return(visit.scope, visit.query.one("environment"), visit.query.one("adapter")))


@pages.page("POST", "/shipped/rollback", Role.SHIPPER)
def roll_back(visit: Visit) -> Moved | Shown:
    """Bring back what was live before, if what is live there is still what was shown."""
    scope, environment, adapter = visit.scope, visit.form.one("environment"), visit.form.one("adapter")
    note = visit.form.one("note")
    try:
        with scope.registry.workspace.writing():
            _check_seen(visit, _return(scope, environment, adapter))
            scope.registry.rollback(environment, adapter, note)
    except Outdated as error:
        return _confirm_rollback(visit, _return(scope, environment, adapter), note, error, status=409)
    return Moved(f"/shipped?{urlencode({'environment': environment})}")


def _return(scope: Scope, environment: str, adapter: str) -> Change:
    name: AdapterName = scope.adapter(adapter)
    with scope.registry.workspace.reading() as catalog:
        current, target = catalog.shipments.rollback_target(environment, name)
    merged = target.merged.hex if target.merged else ""
    return Change(environment=environment, checkpoint=target.checkpoint, merged=merged, before=current)


def _confirm_rollback(
    visit: Visit, change: Change, note: str = "", error: Outdated | None = None, *, status: int = 200
) -> Shown:
    template, words = _template(visit, "rollback"), explain(error) if error else None
    return Shown(template, status=status, change=change, note=note, words=words)


# -- both


def _check_seen(visit: Visit, change: Change) -> None:
    if visit.form.one("seen") != str(change.seen):
        raise Outdated(change.environment, "something else has gone live there in the meantime: look again")


def _template(visit: Visit, name: str) -> str:
    """A page of its own, or, within another one, what goes into its dialog."""
    return f"_shipped_{name}.html" if visit.is_partial else f"shipped_{name}.html"


def _adapter(shipment: Shipment) -> str:
    return shipment.checkpoint.partition("@")[0]
