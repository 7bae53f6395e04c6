"""How domain values look: rows of tables, cards, and the JSON that programs read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from cli.errors import explain
from cli.output import ago, count, number, plain, print_facts, print_heading, print_table, say, size, when
from registry.manifest import (
    BaseModel,
    Checkpoint,
    Finding,
    Level,
    Merged,
    Origin,
    Report,
    Shipment,
    TensorRecord,
    to_json,
)
from registry.selection import direction_of

if TYPE_CHECKING:
    from registry.base_models import Verification
    from registry.combining import Combination
    from registry.results import Details, MergeResult, Outline

_SHOWN_METRICS = 3
_LEVEL_STYLES = {Level.PASS: ("✓", "green"), Level.WARNING: ("!", "yellow"), Level.REFUSED: ("✗", "bold red")}


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint for programs: all its fields, and `ref`."""
    return {"ref": checkpoint.ref, **to_json(checkpoint)}


def print_checkpoints(checkpoints: Sequence[Checkpoint], metric: str = "") -> None:
    """A table of checkpoints with the best value of each metric marked.

    Args:
        metric: one that must have a column, besides the most common ones.
    """
    names = _metric_columns(checkpoints, metric)
    best = {name: _best_value(checkpoints, name) for name in names}
    columns = ["checkpoint", "step", *names, "method", "base", "labels", "tags", "created"]
    rows: list[list[str | Text]] = [
        [
            checkpoint.ref,
            "" if checkpoint.step is None else str(checkpoint.step),
            *(_metric_cell(checkpoint, name, best[name]) for name in names),
            _method(checkpoint),
            checkpoint.base_name,
            _labels(checkpoint),
            ", ".join(f"{key}={value}" for key, value in checkpoint.tags.items()),
            ago(checkpoint.created_at),
        ]
        for checkpoint in checkpoints
    ]
    kept = [index for index, name in enumerate(columns) if name == "checkpoint" or any(str(row[index]) for row in rows)]
    print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], right=["step", *names])


def _metric_columns(checkpoints: Sequence[Checkpoint], metric: str) -> list[str]:
    seen = Counter(dict.fromkeys([metric], len(checkpoints) + 1)) if metric else Counter[str]()
    for checkpoint in checkpoints:
        seen.update({each.name for each in checkpoint.metrics})
    ranked = sorted(
        seen, key=lambda name: (-seen[name], direction_of(name) is None, not name.startswith(("eval", "val")), name)
    )
    return ranked[:_SHOWN_METRICS]


def _best_value(checkpoints: Sequence[Checkpoint], name: str) -> float | None:
    values = [value for each in checkpoints if (value := each.metric(name)) is not None and value == value]
    direction = direction_of(name)
    if direction is None or len(values) < 2:
        return None
    return min(values) if direction == "lower" else max(values)


def _metric_cell(checkpoint: Checkpoint, name: str, best: float | None) -> Text:
    value = checkpoint.metric(name)
    if value is None:
        return Text("")
    return Text(f"{number(value)} ★", style="bold green") if value == best else Text(f"{number(value)}  ")


def _method(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    return f"{manifest.method} r={manifest.rank}" if manifest.rank and manifest.scaling else manifest.method


def _labels(checkpoint: Checkpoint) -> Text:
    """Aliases, then the environments where it is live now."""
    text = Text(", ".join(checkpoint.aliases), style="cyan")
    for environment in checkpoint.environments:
        text.append(", " if text else "").append(f"● {environment}", style="bold magenta")
    return text


def print_checkpoint(checkpoint: Checkpoint) -> None:
    """A card: what a checkpoint is, with metrics, notes and tags."""
    manifest = checkpoint.manifest
    alpha = f", alpha {manifest.alpha:g}" if manifest.alpha is not None and manifest.scaling else ""
    print_facts(
        {
            "checkpoint": Text(checkpoint.ref, style="bold"),
            "digest": str(checkpoint.digest),
            "labels": _labels(checkpoint),
            "method": f"{_method(checkpoint)}{alpha}{f', scaled {manifest.scaling}' if manifest.scaling else ''}",
            "targets": ", ".join(manifest.targets),
            "format": f"{manifest.format.value}, {count(manifest.parameters)} parameters in {manifest.tensors} tensors, {manifest.dtype}",
            "run": checkpoint.run + (f", step {checkpoint.step}" if checkpoint.step is not None else ""),
            "base model": f"{checkpoint.base_name} ({checkpoint.base.short})",
            "architecture": f"{checkpoint.architecture.short}{f', version {checkpoint.arch_version}' if checkpoint.arch_version else ''}",
            "tags": ", ".join(f"{key}={value}" for key, value in checkpoint.tags.items()),
            "registered": f"{when(checkpoint.created_at)} by {checkpoint.author} from {checkpoint.source}",
        }
    )
    if checkpoint.metrics:
        print_heading("Metrics")
        latest = {metric.name: metric for metric in checkpoint.metrics}
        rows = [[m.name, number(m.value), "" if m.step is None else str(m.step), m.split] for m in latest.values()]
        print_table(["metric", "value", "step", "split"], rows, right=["value", "step"])
    if checkpoint.notes:
        print_heading("Notes")
        print_table(["when", "who", "note"], [[when(n.created_at), n.author, n.text] for n in checkpoint.notes])
    print_heading("Files")
    files = [[f.path, size(f.size_bytes), f.digest.short, f.sha256[:12]] for f in manifest.files]
    print_table(["file", "size", "blake3", "sha256"], files, right=["size"])


def combination_json(made: Combination) -> dict[str, Any]:
    """A combined adapter for programs: the checkpoint, and what is not in its factors."""
    tensor, share = made.worst
    return {
        **checkpoint_json(made.checkpoint),
        "created": made.created,
        "recipe": to_json(made.recipe),
        "lost": made.lost,
        "worst": {"tensor": tensor, "lost": share} if tensor else None,
    }


def print_combinations(found: Sequence[Combination]) -> None:
    """New adapters, with what they are made of and what they lost."""
    rows: list[list[str | Text]] = [
        [
            Text(made.checkpoint.ref, style="bold"),
            "" if made.created else "known already",
            made.recipe.method,
            ", ".join(f"{key}={value}" for key, value in made.checkpoint.tags.items()),
            str(made.rank),
            size(made.checkpoint.manifest.size_bytes),
            f"{made.lost:.2%}, at worst {made.worst[1]:.2%} of {made.worst[0]}" if made.lost else "nothing",
        ]
        for made in found
    ]
    kept = [i for i in range(7) if i in (0, 2, 4, 5, 6) or any(str(row[i]) for row in rows)]
    columns = ["checkpoint", "", "method", "tags", "rank", "size", "lost"]
    print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], right=["rank", "size"])
    for finding in found[0].report.findings if found else ():
        if finding.level is Level.WARNING:
            say(f"[yellow]![/yellow] {plain(finding.code)}  {plain(finding.where)}: {plain(_said(finding))}")


def print_report(report: Report, *, passed: bool = True) -> None:
    """Every finding of a check, the worst last so that it stays in sight."""
    order = [Level.PASS, Level.WARNING, Level.REFUSED]
    rows: list[list[str | Text]] = []
    for finding in sorted(report.findings, key=lambda finding: order.index(finding.level)):
        if finding.level is Level.PASS and not passed:
            continue
        mark, style = _LEVEL_STYLES[finding.level]
        rows.append([Text(f"{mark} {finding.code}", style=style), finding.where, _said(finding), finding.advice])
    width = 4 if any(row[3] for row in rows) else 3
    print_table(["finding", "where", "what", "do"][:width], [row[:width] for row in rows])


def base_json(base: BaseModel, *, whole: bool) -> dict[str, Any]:
    """A base model for programs; its tables of tensors and files only when it is asked for by itself."""
    found: dict[str, Any] = to_json(base)
    found["fingerprint"] = {key: found["fingerprint"][key] for key in ("architecture", "weights")}
    found |= {"parameters": base.parameters, "size_bytes": base.size_bytes}
    if whole:
        digests = base.fingerprint.tensors
        found["tensors"] = [
            {"name": t.spec.name, "dtype": t.spec.dtype.value, "shape": list(t.spec.shape), "file": t.file,
             "digest": str(digests[t.spec.name])}
            for t in base.tensors
        ]  # fmt: skip
        return found
    return {key: value for key, value in found.items() if key not in ("tensors", "files", "config")}


def print_bases(bases: Sequence[BaseModel]) -> None:
    """A table of base models."""
    rows = [
        [base.name, base.digest.short, _architecture(base.config), count(base.parameters), size(base.size_bytes), _dtype(base),
         base.arch_version, "the store" if base.in_store else base.url]
        for base in bases
    ]  # fmt: skip
    print_table(
        ["base model", "weights", "architecture", "parameters", "size", "dtype", "version", "place"],
        rows,
        right=["parameters", "size"],
    )


def print_base(base: BaseModel) -> None:
    """A card: what a base model is."""
    print_facts(
        {
            "base model": Text(base.name, style="bold"),
            "weights": str(base.fingerprint.weights),
            "architecture": f"{base.fingerprint.architecture} ({_architecture(base.config)})",
            "version": base.arch_version,
            "size": f"{count(base.parameters)} parameters, {size(base.size_bytes)} in {len(base.tensors)} tensors, {_dtype(base)}",
            "format": base.format.value,
            "place": "the store" if base.in_store else base.url,
            "recorded": f"{when(base.created_at)} by {base.author}",
        }
    )
    print_heading("Files")
    print_table(["file", "size"], [[file.path, size(file.size_bytes)] for file in base.files], right=["size"])


def _architecture(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type") or config.get("name") or "")


def _dtype(base: BaseModel) -> str:
    sizes: Counter[str] = Counter()
    for tensor in base.tensors:
        sizes[tensor.spec.dtype.long_name] += tensor.spec.size_bytes
    return sizes.most_common(1)[0][0] if sizes else ""


def merged_json(merged: Merged) -> dict[str, Any]:
    """A merged model for programs."""
    return {**to_json(merged), "recipe_digest": str(merged.recipe.digest), "size_bytes": merged.size_bytes}


def _ingredients(merged: Merged) -> str:
    """The checkpoints, with method and weights where there are several, and the base model."""
    recipe, names = merged.recipe, ", ".join(merged.checkpoints)
    if len(merged.checkpoints) > 1:
        said = {"weights": [each.weight for each in recipe.inputs], **recipe.options}
        names = f"{names} ({recipe.method}: {detail(said)})"
    return f"{names} and {merged.base_name}"


def print_merged(merged: Merged) -> None:
    """A card: what a merged model is made of and where it lies."""
    print_facts(
        {
            "merged model": Text(str(merged.digest), style="bold"),
            "made of": _ingredients(merged),
            "dtype": merged.recipe.dtype.long_name if merged.recipe.dtype else "",
            "places": ", ".join(place or "the store" for place in merged.locations),
            "note": merged.note,
            "size": f"{size(merged.size_bytes)} in {len(merged.files)} files",
            "made": f"{when(merged.created_at)} by {merged.author}",
        }
    )


def print_shipments(shipments: Sequence[Shipment], *, history: bool) -> None:
    """What is live where, or everything that was."""
    rows = []
    for each in shipments:
        what = f"merged {each.merged.short}" if each.merged else "adapter"
        note = each.note or (f"rolled back to no. {each.restores}" if each.restores else "")
        row = [each.environment, each.checkpoint, what, f"{each.base_name} ({each.base.short})", when(each.shipped_at)]
        rows.append([*row, *([when(each.until) if each.until else "live"] if history else []), each.author, note])
    columns = ["environment", "checkpoint", "as", "base model", "since", *(["until"] if history else []), "by", "note"]
    print_table(columns, rows)


def _said(finding: Finding) -> str:
    return f"expected {finding.expected}; found {finding.found}" if finding.expected else finding.found


def print_report_as_talk(report: Report) -> None:
    """The findings of a refusal, on stderr: they explain an error, they are not the data that was asked for."""
    for finding in report.findings:
        if finding.level is Level.REFUSED:
            mark, style = _LEVEL_STYLES[finding.level]
            advice = f" ({finding.advice})" if finding.advice else ""
            say(
                f"[{style}]{mark} {finding.code}[/{style}]  {plain(finding.where)}: {plain(_said(finding))}{plain(advice)}"
            )


def details_json(details: Details) -> dict[str, Any]:
    """Compatibility and lineage of a checkpoint for programs."""
    report = details.report
    return {
        "compatibility": {**to_json(report), "verdict": report.verdict.value} if report else None,
        "merged": [merged_json(merged) for merged in details.merged],
        "shipments": to_json(details.shipments),
        "previous": details.previous or None,
        "following": details.following or None,
        "children": list(details.children),
    }


def print_details(details: Details) -> None:
    """Compatibility and lineage of a checkpoint."""
    print_heading("Compatibility")
    if details.report is None:
        print_facts({"not known": explain(details.problem).message if details.problem else ""})
    else:
        print_report(details.report, passed=False) if details.report.verdict is not Level.PASS else None
        print_facts(
            {
                details.report.verdict.value: f"with {details.base.name}, by names and shapes; `ckpt check` reads the values too"
            }
        )
    print_heading("Lineage")
    print_facts(
        {
            "base model": f"{details.base.name} ({details.base.digest.short}), {'in the store' if details.base.in_store else details.base.url}",
            "made by": _origin(details.checkpoint.origin),
            "made into": ", ".join(details.children),
            "run": details.checkpoint.run,
            "before it": details.previous,
            "after it": details.following,
            "merged into": ", ".join(merged.digest.short for merged in details.merged),
            "shipped to": ", ".join(_shipping(each) for each in details.shipments),
        }
    )


def _origin(origin: Origin | None) -> str:
    if origin is None:
        return ""
    parents = f" of {', '.join(origin.parents)}" if origin.parents else ""
    said = detail({key: value for key, value in origin.detail.items() if key != "inputs"})
    return f"{origin.action}{parents}{f' ({said})' if said else ''}"


def _shipping(shipment: Shipment) -> str:
    until = f" until {when(shipment.until)}" if shipment.until else ", live"
    return f"{shipment.environment} {when(shipment.shipped_at)}{until}"


def detail(values: Mapping[str, Any]) -> str:
    """An event's detail on one line; digests are shortened."""
    shown = []
    for key, value in values.items():
        text = str(value)
        if value not in ("", [], {}, None):
            shown.append(f"{key}={text[:12] if len(text) == 64 and text.isalnum() else text}")
    return ", ".join(shown)


def verification_json(found: Verification) -> dict[str, Any]:
    """The result of verifying a base model for programs."""
    return {
        "base": found.base.name,
        "intact": found.is_intact,
        "tensors": found.tensors,
        "different": list(found.different),
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
    }


def print_verification(found: Verification) -> None:
    """The result of verifying a base model."""
    if found.is_intact:
        print_facts({"intact": f"{found.base.name}: all {found.tensors} tensors are what was fingerprinted"})
        return
    rows: list[list[str | Text]] = [
        [Text(what, style="bold red"), name]
        for what, names in (
            ("different", found.different),
            ("missing", found.missing),
            ("unexpected", found.unexpected),
        )
        for name in names
    ]
    print_table(["finding", "tensor"], rows)


def plan_json(plan: Outline, threads: int) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "recipe": to_json(plan.recipe),
        "recipe_digest": str(plan.recipe.digest),
        "base": plan.base,
        "files": [{"path": file.path, "size_bytes": file.size_bytes} for file in plan.files],
        "sidecars": [{"path": sidecar.path, "from": sidecar.origin} for sidecar in plan.sidecars],
        "tensors_computed": list(plan.computed),
        "bytes_copied": plan.bytes_copied,
        "bytes_computed": plan.bytes_computed,
        "size_bytes": plan.size_bytes,
        "peak_bytes": plan.peak_bytes(threads),
    }


def print_plan(plan: Outline, threads: int) -> None:
    """What a merge would write, and from what."""
    rows = [[file.path, size(file.size_bytes or 0), "weights"] for file in plan.files]
    rows += [
        [sidecar.path, "", {"made": "written anew"}.get(sidecar.origin, f"the {sidecar.origin}'s")]
        for sidecar in plan.sidecars
    ]
    print_table(["file", "size", "from"], [*rows, ["merge.json", "", "written anew"]], right=["size"])
    print_facts(
        {
            "recipe": str(plan.recipe.digest),
            "tensors changed": f"{len(plan.computed)} of {plan.tensors}",
            "bytes copied": size(plan.bytes_copied),
            "bytes computed": size(plan.bytes_computed),
            "peak memory": f"about {size(plan.peak_bytes(threads))}",
        }
    )


def merge_json(result: MergeResult) -> dict[str, Any]:
    """The result of a merge for programs."""
    return {
        **merged_json(result.merged),
        "created": result.created,
        "location": result.location or None,
        "tensors": to_json(result.records),
    }


def print_merge(result: MergeResult) -> None:
    """The result of a merge: what it is called, where it is, and what happened to the weights."""
    merged, records = result.merged, [record for record in result.records if record.action != "converted"]
    print_facts(
        {
            "merged model" if result.created else "merged before": Text(str(merged.digest), style="bold"),
            "made of": _ingredients(merged),
            "place": result.location or f"the store: `ckpt pull {merged.digest.short} DIR` brings it anywhere",
            "size": f"{size(merged.size_bytes)} in {len(merged.files)} files",
            "tensors changed": str(len(records)) if records else "",
            "‖Δ‖ / ‖W‖": _span([record.delta_norm / record.base_norm for record in records if record.base_norm]),
            "lost to rounding": _lost(records),
        }
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}" if values else ""


def _lost(records: Sequence[TensorRecord]) -> str:
    """The worst tensor's share of elements whose delta was too small for the dtype."""
    worst = max(records, key=lambda record: record.lost, default=None)
    if worst is None or worst.lost < 0.01:
        return ""
    return f"up to {worst.lost:.0%} of the elements that should change ({worst.name}); --dtype float32 keeps them"
