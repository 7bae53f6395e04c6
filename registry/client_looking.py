"""The verbs of a server's registry that look at adapters as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from registry.client_wire import Wire, check_namespaces

if TYPE_CHECKING:
    from registry.curves import Point
    from registry.results import AdapterLine


class Looking:
    """A part of `registry.client.RemoteRegistry`."""

    _wire: Wire

    def adapters(self, search: str = "", limit: int = 50, namespaces: Sequence[str] = ()) -> list[AdapterLine]:
        """The adapters, those that were last added to first."""
        from registry.results import AdapterLine

        check_namespaces(namespaces)
        return self._wire.get(list[AdapterLine], "/adapters", {"search": search, "limit": limit})

    def series(self, adapter: str, metric: str) -> list[Point]:
        """The values of a metric over an adapter's steps."""
        from registry.curves import Point

        return self._wire.get(list[Point], "/series", {"adapter": adapter, "metric": metric})

    def metric_names(self, adapter: str = "", namespaces: Sequence[str] = ()) -> list[str]:
        """The metrics that checkpoints have, the most common first."""
        check_namespaces(namespaces)
        return self._wire.get(list[str], "/metrics/names", {"adapter": adapter})
