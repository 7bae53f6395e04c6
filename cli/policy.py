"""`ckpt policy`, `select`, `keep`: what is good enough, which is the best of those, and what is worth keeping."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output
from cli.options import Json, flag
from registry import connect
from registry.errors import InvalidInput
from registry.manifest import to_json
from registry.policies import Advice, Judged, Selection
from registry.retention import Retained

_MOST_PASSED_OVER = 20
_REFUSED = 4  # of cli.errors.EXIT_CODES

policy_app = typer.Typer(no_args_is_help=True, help="What makes a checkpoint of an adapter good enough.")
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter.")]


@policy_app.command("set")
def policy_set(
    adapter: Adapter,
    text: Annotated[
        str,
        typer.Argument(
            metavar="POLICY", help="For example 'eval_loss min, accuracy >= 0.8, patience 3, gate production'."
        ),
    ],
) -> None:
    """Set the policy of an adapter: what is best, what is needed, when to stop, and which environments it guards."""
    with connect() as registry:
        before = registry.set_policy(adapter, text)
    output.print_line(f"set the policy of {adapter}" + (f", before: {before.text}" if before else ""))


@policy_app.command("show")
def policy_show(adapter: Adapter, json: Json = False) -> None:
    """Show the policy of an adapter."""
    with connect() as registry:
        found = registry.policy(adapter)
    if json:
        output.print_json(to_json(found))
    else:
        output.print_line(found.text)
        output.say(f"set by {output.plain(found.author)}, {found.set_at:%Y-%m-%d %H:%M} UTC")


@policy_app.command("list")
def policy_list(json: Json = False) -> None:
    """Show every policy."""
    with connect() as registry:
        found = registry.policies()
    if json:
        output.print_json([to_json(each) for each in found])
        return
    for each in found:
        output.print_line(f"{each.adapter}: {each.text}")
    if not found:
        output.say('no policy yet: `ckpt policy set ADAPTER "eval_loss min, accuracy >= 0.8"`')


@policy_app.command("rm")
def policy_rm(adapter: Adapter) -> None:
    """Take the policy of an adapter away."""
    with connect() as registry:
        before = registry.remove_policy(adapter)
    output.print_line(f"removed the policy of {adapter}: {before.text}")


def select(
    adapter: Adapter,
    policy: Annotated[str, typer.Option(metavar="POLICY", help="Judge by this one instead of the adapter's own.")] = "",
    alias: Annotated[str, typer.Option(metavar="NAME", help="Point this alias to the checkpoint that is chosen.")] = "",
    json: Json = False,
) -> None:
    """Say which checkpoint of an adapter its policy chooses, and why; and whether a run may stop."""
    with connect() as registry:
        found = registry.select(adapter, policy)
        if alias and found.chosen is not None:
            registry.set_alias(found.chosen.checkpoint, alias)
    if json:
        output.print_json(to_json(found))
    else:
        _print_selection(found)
    if found.chosen is None:
        output.say_error(f"no checkpoint of {adapter} meets every condition", "--policy judges by another one")
        raise typer.Exit(_REFUSED)
    if alias:
        output.say(f"{adapter}@{alias} is {found.chosen.checkpoint.ref}")


def keep(
    adapter: Adapter,
    rule: Annotated[
        str, typer.Argument(metavar="RULE", help="For example 'best 3, last 2, every 1000 steps, shipped'.")
    ],
    yes: Annotated[
        bool, flag("--yes", "Remove the others. Without it, only what would be removed is shown.", "-y")
    ] = False,
    json: Json = False,
) -> None:
    """Keep what is worth keeping of an adapter, and remove its other checkpoints; `ckpt gc` frees their space then."""
    if not rule.strip():
        raise InvalidInput("rule", rule, "say what is worth keeping")
    with connect() as registry:
        found = registry.keep(adapter, rule, dry_run=not yes)
    if json:
        output.print_json(to_json(found))
    else:
        _print_retained(found)


def _print_selection(found: Selection) -> None:
    chosen, over = found.chosen, found.passed_over
    by = f"{found.policy.metric} {'min' if found.policy.direction == 'lower' else 'max'}"
    output.say(f"by {output.plain(by)}" + "".join(f", {output.plain(str(each))}" for each in found.policy.conditions))
    if chosen is not None:
        output.print_line(f"{chosen.checkpoint.ref}  {found.policy.metric} {_value(chosen)}")
    if over:
        output.say(f"{len(over)} before it fail" if chosen else f"all {len(over)} fail")
        rows = [[each.checkpoint.ref, _value(each), _why(each)] for each in over[:_MOST_PASSED_OVER]]
        output.print_table(["passed over", found.policy.metric, "because"], rows, right=[found.policy.metric])
    for each in found.advice:
        output.say(_advice(each))


def _value(judged: Judged) -> str:
    return "" if judged.value is None else output.number(judged.value)


def _why(judged: Judged) -> str:
    return "; ".join(map(str, judged.failures)) or "there is no finite value to rank it by"


def _advice(advice: Advice) -> str:
    run = output.plain(advice.run) or "the run"
    since = f"{advice.since} later checkpoint{'' if advice.since == 1 else 's'}"
    verdict = "it may stop" if advice.may_stop else "go on"
    return (
        f"{run}: {since} no better than {advice.best}: {verdict}" if advice.since else f"{run}: still improving: go on"
    )


def _print_retained(found: Retained) -> None:
    rows = [[each.checkpoint.ref, _step(each.checkpoint.step), "kept", ", ".join(each.reasons)] for each in found.kept]
    rows += [[each.ref, _step(each.step), "removed" if found.is_done else "would go", ""] for each in found.removed]
    output.print_table(["checkpoint", "step", "", "because"], rows, right=["step"])
    freed = output.size(sum(each.manifest.size_bytes for each in found.removed))
    if not found.removed:
        output.say("nothing is to be removed")
    elif found.is_done:
        output.say(f"removed {len(found.removed)}; `ckpt gc` frees up to {freed}")
    else:
        output.say(f"{len(found.removed)} would be removed, up to {freed}; --yes removes them")


def _step(step: int | None) -> str:
    return "" if step is None else str(step)
