"""The verbs of a server's registry that choose: by policy, and what is worth keeping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.client_wire import Wire

if TYPE_CHECKING:
    from registry.policies import KeptPolicy, Selection
    from registry.retention import Retained


class Choosing:
    """A part of `registry.client.RemoteRegistry`."""

    _wire: Wire

    def set_policy(self, adapter: str, text: str) -> KeptPolicy | None:
        """Say what makes a checkpoint of an adapter good enough; gives what was said before."""
        from registry.policies import KeptPolicy

        asked = {"adapter": adapter, "text": text}
        return self._wire.write(dict[str, KeptPolicy | None], "PUT", "/policy", asked)["before"]

    def policy(self, adapter: str) -> KeptPolicy:
        """The policy of an adapter."""
        from registry.policies import KeptPolicy

        return self._wire.get(KeptPolicy, "/policy", {"adapter": adapter})

    def policies(self) -> list[KeptPolicy]:
        """Every policy, by adapter."""
        from registry.policies import KeptPolicy

        return self._wire.get(list[KeptPolicy], "/policies")

    def remove_policy(self, adapter: str) -> KeptPolicy:
        """Take the policy of an adapter away; gives it."""
        from registry.policies import KeptPolicy

        return self._wire.write(KeptPolicy, "DELETE", "/policy", query={"adapter": adapter})

    def select(self, adapter: str, policy: str = "") -> Selection:
        """Judge the checkpoints of an adapter by a policy, its own where none is given."""
        from registry.policies import Selection

        return self._wire.get(Selection, "/selection", {"adapter": adapter, "policy": policy})

    def keep(self, adapter: str, rule: str, *, dry_run: bool = True) -> Retained:
        """Remove the checkpoints of an adapter that are not worth keeping."""
        from registry.retention import Retained

        return self._wire.write(Retained, "POST", "/keep", {"adapter": adapter, "rule": rule, "dry_run": dry_run})
