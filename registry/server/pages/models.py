"""Pages of whole models: the base models that adapters are trained on, and the merged ones that were made of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, final
from urllib.parse import quote

from starlette.responses import Response

from registry.codec import from_json
from registry.comparing import place_of
from registry.errors import InvalidInput, RegistryError, UnknownMerged
from registry.filters import parse_filter
from registry.manifest import BaseModel, Checkpoint, Merged, Recipe, Shipment, TensorRecord
from registry.merge.plan import PROVENANCE_FILE
from registry.merging import merged_folder
from registry.refs import Digest
from registry.server.pages.checkpoint import sent
from registry.server.pages.drawing import metric
from registry.server.pages.heat import Map, Measured, heat_map
from registry.server.pages.mixing_form import Wanted
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Role
from registry.wording import Words, explain

pages = Pages("models")

_NEWEST = 200
_TABLE_TENSORS = 2000
_MERGE_BYTES = 64 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An adapter of a base model: its newest checkpoint, and how many of the newest ones on that base are its own."""

    newest: Checkpoint
    checkpoints: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What `merge.json` says of a merged model: the tools, the warnings, and what happened to each tensor. `words`: why it cannot be read."""

    tools: Mapping[str, str]
    warnings: Sequence[Mapping[str, Any]]
    records: tuple[TensorRecord, ...]
    words: Words | None = None


# -- base models


@pages.page("GET", "/bases", Role.READER)
def list_bases(visit: Visit) -> Shown:
    """Every base model."""
    return Shown("bases.html", bases=visit.scope.registry.bases())


@pages.page("GET", "/bases/{name:path}", Role.READER)
def show_base(visit: Visit) -> Shown:
    """A base model: what it is, where it lies, and what was trained on it."""
    base = visit.scope.registry.base(visit.path["name"])
    where = _on(base)
    page = visit.scope.registry.page(where=parse_filter(where), limit=_NEWEST, namespaces=visit.scope.namespaces)
    return Shown(
        "base.html",
        base=base,
        lines=_lines(page.items),
        has_more=bool(page.cursor),
        looked_at=len(page.items),
        checkpoints_url=f"/checkpoints?where={quote(where, safe='')}",
        dtypes=_dtypes(base),
        layers=len(
            {layer for layer, _ in map(place_of, (each.spec.name for each in base.tensors)) if layer is not None}
        ),
    )


def _on(base: BaseModel) -> str:
    """A filter for what was trained on it."""
    quoted = base.name.replace("'", "''")
    return f"base = '{quoted}'"


def _lines(checkpoints: Sequence[Checkpoint]) -> list[Line]:
    """The adapters of some checkpoints, the newest first."""
    found: dict[str, list[Checkpoint]] = {}
    for each in checkpoints:
        found.setdefault(str(each.adapter), []).append(each)
    return [Line(newest=own[0], checkpoints=len(own)) for own in found.values()]


def _dtypes(base: BaseModel) -> dict[str, int]:
    """Bytes of its tensors, by their dtype."""
    found: dict[str, int] = {}
    for each in base.tensors:
        found[each.spec.dtype.value] = found.get(each.spec.dtype.value, 0) + each.spec.size_bytes
    return found


# -- merged models


@pages.page("GET", "/merged/{digest}", Role.READER)
def show_merged(visit: Visit) -> Shown | Moved:
    """A merged model: its recipe, what merging did to each tensor, its files, where it lies and where it is live."""
    scope, text = visit.scope, visit.path["digest"]
    try:
        merged = _merged(scope, text)
    except UnknownMerged:
        return _kept(scope, text)
    made = _made(scope, merged)
    return Shown(
        "merged.html",
        merged=merged,
        merge_url=_again(merged.recipe, merged.checkpoints),
        base=scope.registry.base(merged.recipe.base.hex),
        inputs=list(zip(merged.checkpoints, merged.recipe.inputs, strict=True)),
        made=made,
        records=made.records[:_TABLE_TENSORS],
        left_out=len(made.records[_TABLE_TENSORS:]),
        map=_map(made.records),
        shipments=_shipments(scope, merged),
        signatures=scope.registry.signatures(merged),
    )


def _kept(scope: Scope, text: str) -> Moved:
    """The page of a recipe that is kept without being carried out.

    Raises:
        UnknownMerged: there is none, either.
    """
    recipe = _digest(text)
    with scope.registry.workspace.reading() as catalog:
        found = catalog.recipes.starting(recipe.hex) if recipe else []
    if not any(all(map(scope.sees_ref, each.checkpoints)) for each in found):
        raise UnknownMerged(text)
    return Moved(f"/merge/saved/{found[0].recipe.digest.hex}")


def _again(recipe: Recipe, checkpoints: Sequence[str]) -> str:
    """Where to merge the same again, with the recipe in the form."""
    weights = {ref: repr(each.weight) for ref, each in zip(checkpoints, recipe.inputs, strict=True)}
    options = {name: str(value) for name, value in recipe.options.items() if isinstance(value, int | float)}
    dtype = recipe.dtype.long_name if recipe.dtype else ""
    return Wanted(refs=tuple(checkpoints), method=recipe.method, weights=weights, options=options, dtype=dtype).url()


@pages.page("GET", "/merged/{digest}/files/{path:path}", Role.READER)
def give_file(visit: Visit) -> Response:
    """The bytes of a file, or a range of them."""
    merged = _merged(visit.scope, visit.path["digest"])
    return sent(merged_folder(visit.scope.registry.workspace, merged), merged.files, visit)


def _merged(scope: Scope, text: str) -> Merged:
    """The merged model with a digest, or with a recipe's.

    Raises:
        UnknownMerged, Ambiguous: none, or several.
    """
    try:
        return scope.merged(text)
    except UnknownMerged:
        recipe = _digest(text)
        with scope.registry.workspace.reading() as catalog:
            found = catalog.merged.find(recipe) if recipe else None
        if found is None or not scope.sees(found):
            raise
        return found


def _digest(text: str) -> Digest | None:
    try:
        return Digest.parse(text)
    except InvalidInput:
        return None


def _shipments(scope: Scope, merged: Merged) -> list[Shipment]:
    every = scope.shipments("", lambda: scope.registry.shipments())
    return [each for each in every if each.merged == merged.digest]


def _made(scope: Scope, merged: Merged) -> Made:
    try:
        with closing(merged_folder(scope.registry.workspace, merged)) as folder, folder.open(PROVENANCE_FILE) as stream:
            said = json.loads(stream.read(_MERGE_BYTES))
        records = [from_json(TensorRecord, {"name": name, **found}) for name, found in said["tensors"].items()]
    except RegistryError as error:
        return Made(tools={}, warnings=(), records=(), words=explain(error))
    return Made(tools=said["tool"], warnings=said.get("warnings", ()), records=tuple(records))


def _map(records: Sequence[TensorRecord]) -> Map:
    return heat_map([_measured(each) for each in records])


def _measured(record: TensorRecord) -> Measured:
    layer, module = place_of(record.name)
    share = record.delta_norm / record.base_norm if record.base_norm else None
    says = f"{record.name}: {record.action}, {record.changed:.1%} of its elements changed, {record.lost:.1%} of the change lost to rounding"
    if share is not None:
        says += f", ‖Δ‖/‖W‖ {metric(share)}"
    return Measured(layer=layer, module=module, value=share, says=says)
