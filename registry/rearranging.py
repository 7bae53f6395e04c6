"""Write whole models in the other layout, transformers' or litgpt's.

Rows are moved, never computed with. What was written is read back, the source's tensors are put together from it again, and their digests
compared, before anything appears under its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from registry.base_models import add_base, current_base, open_base
from registry.disk import Translating, appearing
from registry.errors import BaseChanged, InvalidInput, NotConvertible, PathNotFound, UnknownBase, UnknownMerged
from registry.fingerprint import DigestCache, digest_tensors, weights_digest
from registry.formats.adapter import read_json, read_yaml
from registry.formats.base_model import BaseHead, read_base
from registry.formats.litgpt import MODEL_CONFIG_FILE
from registry.formats.litgpt_config import (
    LITGPT,
    TRANSFORMERS,
    bias_kinds,
    disagreements,
    litgpt_config,
    transformers_config,
    with_biases,
)
from registry.formats.litgpt_names import Moved, Rearranged, Rows, correspondence, rearrange
from registry.locations import Location, open_location
from registry.lora_files import write_json, write_yaml
from registry.manifest import BaseFormat, BaseModel, Merged, to_json
from registry.merge.plan import PROVENANCE_FILE
from registry.merging import merged_folder
from registry.rearranged import RearrangedModel
from registry.refs import Digest
from registry.registering import Registered
from registry.tensors import StoredTensor
from registry.workspace import Progress, Workspace, silent

RECORD_FILE = "conversion.json"
WORDS = {BaseFormat.SAFETENSORS: TRANSFORMERS, BaseFormat.LITGPT: LITGPT}
_LITGPT_FILES = (MODEL_CONFIG_FILE, "hyperparameters.yaml", "prompt_style.yaml")
# Buffers that old versions of transformers saved; they follow from the configuration.
BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a conversion is to make. `base` names the base model in the other layout, `config` a file with its configuration.

    At least one of `out` (a new folder) and `name` (under which the registry records the result) is given.
    """

    layout: BaseFormat
    out: Path | None = None
    name: str = ""
    base: str = ""
    config: Path | None = None

    def check(self) -> None:
        """See that it goes anywhere.

        Raises:
            InvalidInput: neither a folder nor a name.
        """
        if self.out is None and not self.name:
            raise InvalidInput("--out", "", "say where to: --out DIR, or --as NAME, or both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was converted. `place` is the folder that was written, empty when there is none.

    `tensors` were written, and `compared` elements of the weights compared with the source's. `exact`: every value is the one it was.
    `difference`: of what an adapter adds to a weight, the largest `‖D - D'‖ / ‖D‖`. `registered` (an adapter) or `base` (a model) is its record.
    """

    place: str
    tensors: int
    compared: int
    exact: bool
    difference: float = 0.0
    registered: Registered | None = None
    base: BaseModel | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model to read: what to call it, where it lies, its headers, the digest of every tensor, and what is recorded of where it is from."""

    label: str
    location: Location
    head: BaseHead
    digests: Mapping[str, Digest]
    origin: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those that make it up."""
        return tuple(tensor for tensor in self.head.tensors if not tensor.spec.name.endswith(BUFFERS))


def find_model(workspace: Workspace, text: str) -> Model:
    """The model that a text means: a base model by name or digest, a merged model by digest, or a folder by its path or URL.

    Raises:
        UnknownBase: none of these.
        BaseChanged: the base model is not what was recorded.
        Ambiguous: a prefix of a digest fits several.
        NotACheckpoint, CorruptFile: the folder holds no model, or a damaged one.
    """
    with workspace.reading() as catalog:
        with suppress(UnknownBase):
            return _open_base(workspace, catalog.bases.find(text))
        with suppress(UnknownMerged):
            return _open_merged(workspace, catalog.merged.resolve(text))
        near = catalog.bases.names()
    try:
        location = open_location(text)
    except PathNotFound:
        raise UnknownBase(text, near) from None
    head = read_base(location)
    digests = digest_tensors(location, head.tensors, cache=workspace.cache)
    origin = {"url": location.url, "weights": str(weights_digest(digests))}
    return Model(label=location.url, location=location, head=head, digests=digests, origin=origin)


def convert_model(workspace: Workspace, model: Model, wanted: Wanted, progress: Progress = silent) -> Conversion:
    """Write a model in the other layout.

    Args:
        workspace: where it is recorded.
        model: what to convert; it is closed.
        wanted: `out` is needed; with a name, the result is recorded as a base model.
        progress: told of the bytes that are done.

    Raises:
        NotConvertible: something in it has no place in the other layout, or the result is not the same model.
        Conflict: something is there already.
    """
    if wanted.out is None:
        raise InvalidInput(
            "--out", "", "a whole model is written to a folder: say which; --as NAME records it there as a base model"
        )
    with closing(model.location):
        if model.head.format is wanted.layout:
            raise NotConvertible(model.label, WORDS[wanted.layout], ["it is one already"])
        conversion = _write_model(model, wanted, wanted.out, progress)
    base = _record_base(workspace, wanted.out, wanted.name, progress) if wanted.name else None
    return replace(conversion, base=base)


def _record_base(workspace: Workspace, folder: Path, name: str, progress: Progress) -> BaseModel:
    """Record what was written; weights that are known keep their name and their place."""
    with closing(open_location(str(folder))) as written:
        digests = digest_tensors(written, read_base(written).tensors, cache=workspace.cache)
    with workspace.reading() as catalog:
        known = catalog.bases.by_weights(weights_digest(digests))
    return known or add_base(workspace, str(folder), name=name, progress=progress).base


def _open_base(workspace: Workspace, base: BaseModel) -> Model:
    current, changed = current_base(workspace, base)
    if changed:
        raise BaseChanged(changed[0], "the file that was recorded", "another one")
    location = open_base(workspace, current)
    origin = {"base": base.name, "weights": str(base.digest)}
    return Model(
        label=base.name, location=location, head=read_base(location), digests=base.fingerprint.tensors, origin=origin
    )


def _open_merged(workspace: Workspace, merged: Merged) -> Model:
    location = merged_folder(workspace, merged)
    head = read_base(location)
    digests = digest_tensors(location, head.tensors, cache=workspace.cache)
    origin = {"merged": str(merged.digest), "recipe": to_json(merged.recipe)}
    return Model(
        label=f"merged model {merged.digest.short}", location=location, head=head, digests=digests, origin=origin
    )


def _write_model(model: Model, wanted: Wanted, out: Path, progress: Progress) -> Conversion:
    to_litgpt = wanted.layout is BaseFormat.LITGPT
    config = other_config(model.head, model.location, model.label, wanted)
    table = row_table(config if to_litgpt else model.head.config, model.tensors, to_litgpt=to_litgpt)
    arranged = _check(rearrange(model.tensors, table), model.label, wanted.layout)
    moved, shared = with_head(arranged.tensors, table) if to_litgpt else (arranged.tensors, {})
    if to_litgpt:
        _check_biases(moved, config, model.label)
    else:
        config = with_biases(config, bias_kinds(tensor.spec.name for tensor in model.tensors), model.label)
        moved, config = _tied(model, moved, table, config)
    laid_out = RearrangedModel(model.location, moved)
    total = sum(tensor.spec.size_bytes for tensor in laid_out.tensors)
    with appearing(out) as folder:
        if to_litgpt:
            laid_out.write_torch_zip(folder, shared, lambda done: progress("converting", done, total))
            write_yaml(folder / MODEL_CONFIG_FILE, config)
        else:
            laid_out.write_safetensors(folder, lambda done: progress("converting", done, total))
            write_json(folder / "config.json", config)
        kept = [
            path for path in model.head.sidecars if path not in _LITGPT_FILES and (to_litgpt or path != "config.json")
        ]
        copy_files(model.location, kept, folder)
        write_json(folder / RECORD_FILE, _record(model))
        _verify_model(model, folder, [rows.flipped for rows in table], wanted.layout)
    elements = sum(tensor.spec.elements for tensor in model.tensors)
    return Conversion(place=str(out), tensors=len(moved), compared=elements, exact=True)


def other_config(head: BaseHead, location: Location, label: str, wanted: Wanted) -> dict[str, Any]:
    """The configuration of a model in the other layout: the one that was given, the one that lies beside the weights, or one that is made.

    Raises:
        NotConvertible: none can be made.
    """
    if wanted.config is not None:
        folder = open_location(str(wanted.config.absolute().parent))
        return (read_yaml if wanted.layout is BaseFormat.LITGPT else read_json)(folder, wanted.config.name)
    if wanted.layout is BaseFormat.LITGPT:
        return litgpt_config(head.config, label, label)
    if "config.json" in head.sidecars:
        found = read_json(location, "config.json")
        if problems := disagreements(head.config, found):
            raise NotConvertible(label, TRANSFORMERS, problems)
        return found
    return transformers_config(head.config, label)


def row_table(config: Mapping[str, Any], tensors: Sequence[StoredTensor], *, to_litgpt: bool) -> list[Rows]:
    """Where the rows of a model's tensors go, by the configuration of its litgpt side."""
    legacy = any(".attn.attn." in tensor.spec.name for tensor in tensors)
    table = correspondence(config, legacy=legacy)
    return [rows.flipped for rows in table] if to_litgpt else list(table)


def _check(arranged: Rearranged, label: str, layout: BaseFormat) -> Rearranged:
    strange = [f"{name}: no such tensor in {WORDS[layout]} of this family" for name in arranged.strangers]
    if strange or arranged.problems:
        raise NotConvertible(label, WORDS[layout], [*strange, *arranged.problems])
    return arranged


def with_head(moved: Sequence[Moved], table: Sequence[Rows]) -> tuple[tuple[Moved, ...], dict[str, str]]:
    """A litgpt model always has an output head; that of a tied one lies on the bytes of the embedding."""
    by_name = {each.spec.name: each for each in moved}
    embedding = by_name.get("transformer.wte.weight")
    if "lm_head.weight" in by_name or embedding is None:
        return tuple(moved), {}
    head = Moved(replace(embedding.spec, name="lm_head.weight"), embedding.ranges)
    return (head, *moved), {"transformer.wte.weight": "lm_head.weight"}


def _check_biases(moved: Sequence[Moved], config: Mapping[str, Any], label: str) -> None:
    found = bias_kinds(each.spec.name for each in moved)
    wanted = {"qkv", "proj", "mlp"} if config.get("bias", True) else {"qkv"} if config.get("attn_bias") else set()
    wanted |= {"head"} if config.get("lm_head_bias") else set()
    if found != wanted:
        here, there = (", ".join(sorted(kinds)) or "nothing" for kinds in (found, wanted))
        raise NotConvertible(label, LITGPT, [f"biases on {here}, where its configuration has them on {there}"])


def _tied(
    model: Model, moved: Sequence[Moved], table: Sequence[Rows], config: Mapping[str, Any]
) -> tuple[tuple[Moved, ...], dict[str, Any]]:
    """transformers ignores the output head of a model that it believes to be tied: it is left out if it is the same, else the model untied."""
    if "lm_head.weight" not in model.digests:
        raise NotConvertible(model.label, TRANSFORMERS, ["it has no output head"])
    names = {rows.source: f"{rows.target}.weight" for rows in table if rows.source in ("lm_head", "transformer.wte")}
    is_same = model.digests.get("lm_head.weight") == model.digests.get("transformer.wte.weight")
    if config.get("tie_word_embeddings") and is_same:
        return tuple(each for each in moved if each.spec.name != names["lm_head"]), dict(config)
    return tuple(moved), {**config, "tie_word_embeddings": False}


def copy_files(source: Location, paths: Sequence[str], folder: Path) -> None:
    """Copy small files of a location, under the same paths."""
    for path in paths:
        with source.open(path) as stream:
            data = stream.read()
        with Translating(str(folder / path)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)


def _record(model: Model) -> dict[str, Any]:
    """Where the model comes from; if it was merged, with the record of that, whose list of files is another layout's."""
    record = {
        "tool": {"ckpt-registry": version("ckpt-registry")},
        "from": {"layout": model.head.format.value, **model.origin},
    }
    if PROVENANCE_FILE in model.location.files():
        said = read_json(model.location, PROVENANCE_FILE)
        record["merge"] = {key: said.get(key) for key in ("recipe", "recipe_digest", "base", "inputs", "warnings")}
    return record


def _verify_model(model: Model, folder: Path, back: Sequence[Rows], layout: BaseFormat) -> None:
    """Put the source's tensors together again from the files that were written, and compare their digests."""
    with closing(open_location(str(folder))) as written:
        head = read_base(written)
        arranged = rearrange(head.tensors, back)
        moved = _with_untied_head(arranged.tensors, model)
        again = RearrangedModel(written, moved)
        digests = digest_tensors(again, again.tensors, cache=DigestCache(Path(os.devnull)))
    wrong = [f"{tensor.spec.name} did not come back the same" for tensor in model.tensors
             if digests.get(tensor.spec.name) != model.digests[tensor.spec.name]]  # fmt: skip
    if wrong:
        raise NotConvertible(model.label, WORDS[layout], wrong)


def _with_untied_head(moved: Sequence[Moved], model: Model) -> tuple[Moved, ...]:
    return with_head(moved, ())[0] if model.head.format is BaseFormat.LITGPT else tuple(moved)
