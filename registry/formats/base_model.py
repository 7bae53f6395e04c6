"""What a folder with a base model in it says: configuration, files, and where every tensor lies."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from registry.errors import CorruptFile, NotACheckpoint
from registry.formats.adapter import read_json, read_yaml
from registry.locations import Location
from registry.manifest import BaseFile, BaseFormat, BaseModel
from registry.tensors import StoredTensor, read_safetensors_header

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
LITGPT_WEIGHTS = "lit_model.pth"
TEMPLATE_FOLDER = "additional_chat_templates/"
# What litgpt and the Hugging Face Trainer call the folders of a run, each with a checkpoint.
RUN_FOLDER = re.compile(r"((?:step|checkpoint)-(\d+)|final)(?:/|$)")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# Files that are weights or training state in some form: a model directory made from the base must not carry them along.
_NOT_SIDECARS = (
    ".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz",
    ".lora", ".adapter", ".adapter_v2", ".index.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseHead:
    """A base model as its headers describe it. `weights_files` are those with tensors; `sidecars` configuration, tokenizer and the like."""

    format: BaseFormat
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    weights_files: tuple[str, ...]
    sidecars: tuple[str, ...]

    def files(self, location: Location) -> tuple[BaseFile, ...]:
        """All of them with size and identity."""
        sizes = location.files()
        return tuple(
            BaseFile(path=path, size_bytes=sizes[path], identity=location.identity(path))
            for path in sorted((*self.weights_files, *self.sidecars))
        )


def index_of(tensors: Iterable[StoredTensor]) -> bytes:
    """The index file of a model in several files of safetensors, or in one with an unusual name; empty for one that needs none."""
    stored = sorted(tensors, key=lambda tensor: tensor.spec.name)
    places = {tensor.file for tensor in stored}
    if places <= {WEIGHTS_FILE} or not all(place.endswith(".safetensors") for place in places):
        return b""
    index = {
        "metadata": {"total_size": sum(tensor.spec.size_bytes for tensor in stored)},
        "weight_map": {tensor.spec.name: tensor.file for tensor in stored},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def read_base(location: Location) -> BaseHead:
    """Read the headers of a base model.

    Raises:
        NotACheckpoint: no model in a known format here.
        CorruptFile: a file is damaged, or the index and the shards disagree.
    """
    files = location.files()
    if LITGPT_WEIGHTS in files and "model_config.yaml" in files:
        return _read_litgpt(location, files)
    weight_map = _weight_map(location, files)
    weights = tuple(sorted(set(weight_map.values()))) or _files_without_index(files)
    if not weights:
        raise NotACheckpoint(location.url, _why_not_a_base(files))
    if "config.json" not in files:
        raise NotACheckpoint(location.url, "safetensors files but no config.json beside them")
    tensors: dict[str, StoredTensor] = {}
    for path in weights:
        with location.open(path) as stream:
            header = read_safetensors_header(stream, path, files[path])
        for tensor in header.tensors:
            if tensor.spec.name in tensors:
                raise CorruptFile(path, f"{tensor.spec.name} is in {tensors[tensor.spec.name].file} too")
            tensors[tensor.spec.name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CorruptFile(INDEX_FILE, f"says that {name} is in {file}, but it is not")
    return BaseHead(
        format=BaseFormat.SAFETENSORS,
        config=read_json(location, "config.json"),
        tensors=tuple(tensors.values()),
        weights_files=weights,
        sidecars=_sidecars(files),
    )


def places_with_models(location: Location) -> tuple[str, ...]:
    """URLs of the whole model that a folder is, or of those of a training run in it: `step-N` or `checkpoint-N` in order, then `final`."""
    files = location.files()
    found = [match for path in files if path.count("/") == 1 and (match := RUN_FOLDER.match(path))]
    names = dict(sorted({match[1]: int(match[2] or sys.maxsize) for match in found}.items(), key=itemgetter(1)))
    places = [f"{location.url.rstrip('/')}/{name}" for name in names if _is_model(files, f"{name}/")]
    return (*places, location.url) if _is_model(files) else tuple(places)


def _is_model(files: Mapping[str, int], folder: str = "") -> bool:
    """Whether a folder's names are those of a whole model."""
    own = {path.removeprefix(folder) for path in files if path.startswith(folder)}
    if LITGPT_WEIGHTS in own:
        return "model_config.yaml" in own
    weights = INDEX_FILE in own or _files_without_index(dict.fromkeys(own, 0))
    return "config.json" in own and bool(weights)


def _read_litgpt(location: Location, files: Mapping[str, int]) -> BaseHead:
    from registry.torchzip import read_torch_zip  # noqa: PLC0415 - showing a checkpoint need not wait for it

    with location.open(LITGPT_WEIGHTS) as stream:
        archive = read_torch_zip(stream, LITGPT_WEIGHTS, files[LITGPT_WEIGHTS])
    if any(".lora_" in tensor.spec.name for tensor in archive.tensors):
        raise NotACheckpoint(location.url, f"{LITGPT_WEIGHTS} holds LoRA factors, not a base model")
    return BaseHead(
        format=BaseFormat.LITGPT,
        config=read_yaml(location, "model_config.yaml"),
        tensors=archive.tensors,
        weights_files=(LITGPT_WEIGHTS,),
        sidecars=_sidecars(files),
    )


def _files_without_index(files: Mapping[str, int]) -> tuple[str, ...]:
    if "model.safetensors" in files:
        return ("model.safetensors",)
    return tuple(
        path
        for path in files
        if "/" not in path and path.endswith(".safetensors") and not path.startswith(("adapter_", "consolidated"))
    )


def _weight_map(location: Location, files: Mapping[str, int]) -> dict[str, str]:
    """Which file holds each tensor, by the index; empty without one."""
    if INDEX_FILE not in files:
        return {}
    found = read_json(location, INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CorruptFile(INDEX_FILE, "no weight_map in it")
    for name, file in found.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or file.startswith("."):
            raise CorruptFile(INDEX_FILE, f"{name} points outside the folder: {file!r}")
    missing = set(found.values()) - set(files)
    if missing:
        raise CorruptFile(INDEX_FILE, f"names {sorted(missing)[0]}, which is not there: an incomplete download?")
    return found


def _sidecars(files: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(
        path
        for path in files
        if ("/" not in path or path.startswith(TEMPLATE_FOLDER))
        and not path.endswith(_NOT_SIDECARS)
        and not path.startswith(("adapter_", "merge.json"))
    )


def _why_not_a_base(files: Mapping[str, int]) -> str:
    if not files:
        return "an empty folder"
    if any(path.startswith("pytorch_model") for path in files):
        return (
            "pickled weights (pytorch_model.bin): save the model again with save_pretrained, which writes safetensors"
        )
    if any(path.startswith("adapter_model.") for path in files):
        return "an adapter, not a base model"
    return "no *.safetensors with config.json, and no lit_model.pth with model_config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The input embedding and the output head of a base model, by tensor name. `tied`: the model uses one matrix for both."""

    input_name: str
    head_name: str
    tied: bool


def find_embeddings(base: BaseModel) -> Embeddings | None:
    """Find input embedding and head among a Hugging Face model's tensors; None when there is no single input embedding.

    Tied is what the configuration says. Where it is silent, a head that the files do not have, or that equals the input embedding to the
    byte, is the same matrix.
    """
    names = {tensor.spec.name for tensor in base.tensors}
    inputs = [name for name in names if name.endswith(_EMBEDDING_NAMES)]
    if len(inputs) != 1:
        return None
    heads = [name for name in names if name.split(".", 1)[-1] in _HEAD_NAMES or name in _HEAD_NAMES]
    family_head = "embed_out.weight" if inputs[0].endswith("embed_in.weight") else "lm_head.weight"
    if inputs[0].startswith("language_model.model."):
        family_head = f"language_model.{family_head}"
    head = heads[0] if len(heads) == 1 else family_head
    digests, flag = base.fingerprint.tensors, base.config.get("tie_word_embeddings")
    is_same = head not in names or digests[head] == digests[inputs[0]]
    return Embeddings(input_name=inputs[0], head_name=head, tied=bool(flag) if flag is not None else is_same)
