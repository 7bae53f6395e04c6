"""Routes of adapters as a whole: which there are, and what was measured on them."""

from __future__ import annotations

from typing import Annotated

from registry.curves import Point
from registry.results import AdapterLine
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Role

routes = Routes("adapters")


@routes.route("GET", "/adapters", Role.READER)
def list_adapters(
    scope: Scope,
    search: Annotated[str, "Only those with this text in their names."] = "",
    limit: Annotated[int, "The most to give.", range(1, 1001)] = 50,
) -> list[AdapterLine]:
    """Adapters, those that were last added to first."""
    return scope.registry.adapters(search, limit, scope.namespaces)


@routes.route("GET", "/series", Role.READER)
def get_series(
    scope: Scope, adapter: Annotated[str, "The adapter."], metric: Annotated[str, "The metric's exact name."]
) -> list[Point]:
    """The values of a metric over an adapter's steps, by run."""
    name = str(scope.adapter(adapter))
    return scope.discreetly(lambda: scope.registry.series(name, metric))


@routes.route("GET", "/metrics/names", Role.READER)
def list_metric_names(scope: Scope, adapter: Annotated[str, "Of this adapter only."] = "") -> list[str]:
    """The metrics that checkpoints have, the most common first."""
    return scope.registry.metric_names(adapter, scope.namespaces)
