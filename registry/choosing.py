"""Choosing by policy: what is good enough for an environment, and which checkpoints are worth keeping."""

from __future__ import annotations

from dataclasses import replace

from registry.db.catalog import Catalog
from registry.db.listing import Scope
from registry.errors import BelowPolicy, InvalidInput
from registry.manifest import Checkpoint
from registry.policies import failures, parse_policy
from registry.refs import AdapterName
from registry.retention import Kept, Retained, judge, parse_rule
from registry.workspace import Workspace


def objections(catalog: Catalog, checkpoint: Checkpoint, environment: str) -> list[str]:
    """What the policy of a checkpoint's adapter has against shipping it to an environment, in sentences."""
    kept = catalog.policies.find(checkpoint.adapter)
    policy = None if kept is None else parse_policy(kept.text)
    if policy is None or environment not in policy.gates:
        return []
    return [str(each) for each in failures(policy, checkpoint)]


def check_good_enough(failed: list[str], checkpoint: Checkpoint, environment: str, override: str) -> None:
    """See that a checkpoint may be shipped.

    Raises:
        BelowPolicy: there are objections, and nobody says why it is shipped all the same.
    """
    if failed and not override.strip():
        raise BelowPolicy(checkpoint.ref, environment, failed)


def keep(workspace: Workspace, adapter: str, text: str, *, dry_run: bool) -> Retained:
    """Remove the checkpoints of an adapter that a rule does not keep, or only say which; see `registry.service.Registry.keep`."""
    name = AdapterName.parse(adapter)
    if dry_run:
        with workspace.reading() as catalog:
            return _retained(_judged(catalog, name, text), is_done=False)
    with workspace.writing() as change:
        found = _retained(_judged(change.catalog, name, text), is_done=True)
        for each in found.removed:
            change.catalog.checkpoints.remove(each)
        if found.removed:
            change.record("keep", str(name), rule=text, removed=[each.ref for each in found.removed])
        return found


def _judged(catalog: Catalog, adapter: AdapterName, text: str) -> list[Kept]:
    """Every checkpoint with the reasons to keep it; what only others need is kept for their sake."""
    rule = parse_rule(text)
    checkpoints = catalog.checkpoints.passing(Scope(adapter))
    shipped = {each.checkpoint for each in catalog.shipments.all()} if rule.shipped else set()
    judged = judge(rule, checkpoints, shipped)
    if judged and not any(each.reasons for each in judged):  # a tag that is misspelt, steps that no run has
        raise InvalidInput("rule", text, f"it keeps none of the {len(judged)} checkpoints of {adapter}")
    return [
        each if each.reasons else replace(each, reasons=tuple(catalog.checkpoints.uses(each.checkpoint)))
        for each in judged
    ]


def _retained(judged: list[Kept], *, is_done: bool) -> Retained:
    return Retained(
        kept=tuple(each for each in judged if each.reasons),
        removed=tuple(each.checkpoint for each in judged if not each.reasons),
        is_done=is_done,
    )
