"""Routes of choosing by policy, and of what is worth keeping."""

from __future__ import annotations

from typing import Annotated

from registry.errors import UnknownPolicy
from registry.policies import KeptPolicy, Selection
from registry.retention import Retained
from registry.server.bodies import KeepWanted, NewPolicy, PolicySet
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Role

routes = Routes("choosing")
OfAdapter = Annotated[str, "The adapter."]


@routes.route("PUT", "/policy", Role.SHIPPER, is_keyed=True)
def set_policy(scope: Scope, body: NewPolicy) -> PolicySet:
    """Say what makes a checkpoint of an adapter good enough; gives what was said before."""
    return PolicySet(before=scope.registry.set_policy(str(scope.adapter(body.adapter)), body.text))


@routes.route("GET", "/policies", Role.READER)
def list_policies(scope: Scope) -> list[KeptPolicy]:
    """Every policy."""
    return [each for each in scope.registry.policies() if scope.principal.sees(each.adapter)]


@routes.route("GET", "/policy", Role.READER)
def get_policy(scope: Scope, adapter: OfAdapter) -> KeptPolicy:
    """What makes a checkpoint of an adapter good enough."""
    return scope.registry.policy(_seen(scope, adapter))


def _seen(scope: Scope, adapter: str) -> str:
    """An adapter that may be seen; another one has no policy."""
    name = str(adapter)
    if scope.namespaces and not scope.sees_ref(name):
        raise UnknownPolicy(name)
    return name


@routes.route("DELETE", "/policy", Role.SHIPPER, is_keyed=True)
def remove_policy(scope: Scope, adapter: OfAdapter) -> KeptPolicy:
    """Take the policy of an adapter away; gives it."""
    return scope.registry.remove_policy(_seen(scope, adapter))


@routes.route("GET", "/selection", Role.READER)
def select_checkpoint(
    scope: Scope,
    adapter: OfAdapter,
    policy: Annotated[str, "A policy to judge by, instead of the adapter's own."] = "",
) -> Selection:
    """Judge the checkpoints of an adapter by a policy."""
    return scope.registry.select(str(scope.adapter(adapter)), policy)


@routes.route("POST", "/keep", Role.WRITER, is_keyed=True)
def keep_checkpoints(scope: Scope, body: KeepWanted) -> Retained:
    """Remove the checkpoints of an adapter that are not worth keeping, or only say which."""
    return scope.registry.keep(str(scope.adapter(body.adapter)), body.rule, dry_run=body.dry_run)
