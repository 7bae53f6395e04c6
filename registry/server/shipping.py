"""Routes of what is live where."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from registry.errors import Ambiguous
from registry.manifest import Shipment
from registry.server.bodies import NewShipment, Rollback, RolledBack
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Role

routes = Routes("shipments")


@routes.route("POST", "/shipments", Role.SHIPPER, is_keyed=True)
def ship(scope: Scope, body: NewShipment) -> Shipment:
    """Record that a checkpoint or merged model went live."""
    return scope.registry.ship(scope.subject(body.subject), body.environment, body.note, override=body.override)


@routes.route("GET", "/shipments", Role.READER)
def list_shipments(
    scope: Scope,
    environment: Annotated[str, "Of this environment only."] = "",
    at: Annotated[datetime | None, "What was live then, instead of now; with its zone."] = None,
    history: Annotated[bool, "Every shipment, oldest first."] = False,
) -> list[Shipment]:
    """What is live where, or was at a time; or everything that ever was."""
    named = environment or None

    def look_up() -> list[Shipment]:
        return scope.registry.shipments(named) if history else scope.registry.shipped(named, at)

    return scope.shipments("" if at else environment, look_up)


@routes.route("POST", "/rollback", Role.SHIPPER, is_keyed=True)
def roll_back(scope: Scope, body: Rollback) -> RolledBack:
    """Bring back what was live before; repeated, it walks further back."""
    adapter = str(scope.adapter(body.adapter)) if body.adapter else _only_adapter(scope, body.environment)
    before, now = scope.registry.rollback(body.environment, adapter, body.note)
    return RolledBack(before=before, now=now)


def _only_adapter(scope: Scope, environment: str) -> str:
    """Of somebody who sees only some adapters, the one that is live; for others the registry finds out."""
    if not scope.namespaces:
        return ""
    live = scope.shipments(environment, lambda: scope.registry.shipped(environment))
    adapters = sorted({each.checkpoint.partition("@")[0] for each in live})
    if len(adapters) > 1:
        raise Ambiguous(environment, adapters)
    return adapters[0]
