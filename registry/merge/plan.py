"""The plan of a merge: every output file, its exact size, and for every byte where it comes from. Headers only, no torch.

A weights file is a row of segments without gaps. Nothing is decided while executing: executors of a plan write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from registry.changes import Change, LowRank, Resolution, Step, Tuned
from registry.errors import InvalidRecipe
from registry.formats.adapter import TOKENIZER_FILES, VOCABULARY_FILES
from registry.formats.base_model import INDEX_FILE, LITGPT_WEIGHTS, TEMPLATE_FOLDER
from registry.formats.litgpt import MODEL_CONFIG_FILE
from registry.formats.peft import own_files
from registry.manifest import BaseFormat, BaseModel, Recipe
from registry.tensors import DType, SafetensorsHeader, StoredTensor, TensorSpec, layout_safetensors
from registry.torchzip import Descriptor, Directory, Literal, Storage, ZipLayout, layout_torch_zip

BLOCK_BYTES = 4 << 20
PROVENANCE_FILE = "merge.json"
# Resident memory, as benchmarks/performance.py sees it: of an interpreter without and with torch, and of the blocks of each thread.
_PLAIN_BYTES, _THREAD_BYTES = 75 << 20, 20 << 20
_TORCH_BYTES, _DENSE_THREAD_BYTES = 300 << 20, 60 << 20
# Tuners whose arithmetic has whole matrices in memory: so many, in float64.
_WHOLE_MATRICES = {"kasa": 4, "osf": 4, "fourierft": 6, "frod": 4, "randlora": 3}

_TOKENIZER_FILES = frozenset({
    *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model",
    "tiktoken.model",
})  # fmt: skip
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# What an adapter's folder may override besides its tokenizer.
_FROM_ADAPTER = frozenset(
    {"generation_config.json", "prompt_style.yaml", "preprocessor_config.json", "processor_config.json"}
)


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a base tensor, as they are, under the name in `target`."""

    tensor: StoredTensor
    target: TensorSpec

    @property
    def size_bytes(self) -> int:
        """Bytes in the output."""
        return self.target.size_bytes


@dataclass(frozen=True, slots=True)
class Compute:
    """A tensor of the result that is computed, in blocks of whole rows on a fixed grid."""

    change: Change

    @property
    def target(self) -> TensorSpec:
        """Name, dtype and shape of the result."""
        return self.change.target

    @property
    def size_bytes(self) -> int:
        """Bytes in the output."""
        return self.target.size_bytes

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The grid: first row and one past the last, in order. A block is at most 4 MiB in float32, but one row at least."""
        rows, columns = self.change.shape
        step = max(1, BLOCK_BYTES // (4 * columns)) if rows else 1
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


Segment = Literal | Copy | Compute | Descriptor | Directory


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A weights file of the result. `layout` is set for torch zips, whose checksums follow the data."""

    path: str
    size_bytes: int
    segments: tuple[Segment, ...]
    layout: ZipLayout | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A small file of the result: `data` as given, else copied from the `adapter`'s or the base's folder."""

    path: str
    data: bytes | None = None
    from_adapter: bool = False

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return "made" if self.data is not None else "adapter" if self.from_adapter else "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a merge will do. `base` and `recipe` say of what; files are in the order they are written."""

    recipe: Recipe
    base: BaseModel
    files: tuple[OutputFile, ...]
    sidecars: tuple[Sidecar, ...]

    def _total(self, kind: type[Copy] | type[Compute]) -> int:
        return sum(segment.size_bytes for file in self.files for segment in file.segments if isinstance(segment, kind))

    @property
    def bytes_copied(self) -> int:
        """Tensor bytes that are taken over as they are."""
        return self._total(Copy)

    @property
    def bytes_computed(self) -> int:
        """Tensor bytes that are computed."""
        return self._total(Compute)

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size_bytes for file in self.files)

    def peak_bytes(self, threads: int) -> int:
        """About how much memory executing takes: the interpreter, each thread's blocks, and what the largest tensor needs besides."""
        largest = max(map(needed_bytes, self.computed), default=0)
        if not self.needs_torch:
            return _PLAIN_BYTES + threads * _THREAD_BYTES + largest
        return _TORCH_BYTES + threads * _DENSE_THREAD_BYTES + largest

    @property
    def needs_torch(self) -> bool:
        """Whether there is more to it than exact low-rank sums."""
        return not all(change.is_rounded_sum for change in self.computed)

    @property
    def computed(self) -> tuple[Change, ...]:
        """Every change, in the order of the output."""
        return tuple(s.change for file in self.files for s in file.segments if isinstance(s, Compute))


def needed_bytes(change: Change) -> int:
    """About how much memory a change's tensor takes while it is worked on, besides its blocks: factors, as read and as prepared, and whole
    matrices."""
    return sum(_of_step(step, change.target.elements) for step in change.steps)


def _of_step(step: Step, elements: int) -> int:
    if isinstance(step, LowRank):
        return sum(3 * 8 * each.rows * each.columns for each in (step.left, step.right))
    if isinstance(step, Tuned):
        return 8 * elements * (2 * step.transposed + _WHOLE_MATRICES.get(step.method, 0))
    return sum(_of_step(each, elements) for part in step.parts for each in part.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a plan is made of. `heads`: of each safetensors file of the base its raw head and parsed header."""

    recipe: Recipe
    base: BaseModel
    resolution: Resolution
    adapter_files: Sequence[str]
    adapter_tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    base_tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, tuple[bytes, SafetensorsHeader]] = field(default_factory=dict)


def make_plan(inputs: Inputs) -> Plan:
    """Resolve a recipe against headers.

    Raises:
        InvalidRecipe: the dtype is not one that weights can have.
    """
    dtype = inputs.recipe.dtype
    if dtype is not None and not dtype.is_mergeable:
        raise InvalidRecipe("dtype", dtype.long_name, "expected float64, float32, float16 or bfloat16")
    placed = _place(inputs.base, inputs.resolution, dtype)
    if inputs.base.format is BaseFormat.LITGPT:
        files: tuple[OutputFile, ...] = (_litgpt_file(placed[LITGPT_WEIGHTS]),)
    else:
        files = _named_to_load([_safetensors_file(inputs, path, segments) for path, segments in placed.items()])
    sidecars = tuple(_sidecars(inputs, files))
    return Plan(recipe=inputs.recipe, base=inputs.base, files=files, sidecars=sidecars)


def _place(base: BaseModel, resolution: Resolution, dtype: DType | None) -> dict[str, list[Copy | Compute]]:
    """Every tensor of the result in its file: base tensors where they were, new ones after the rest of their sibling's file."""
    changes = {change.target.name: change for change in resolution.changes}
    placed: dict[str, list[Copy | Compute]] = {}
    for tensor in base.tensors:
        if tensor.spec.name not in resolution.removed:
            change = changes.get(tensor.spec.name, Change(target=tensor.spec, source=tensor))
            placed.setdefault(tensor.file, []).append(_segment(change, dtype))
    known = {tensor.spec.name: tensor.file for tensor in base.tensors}
    for name, change in changes.items():
        if name not in known:
            sibling = change.source.file if change.source else _sibling_file(name, known)
            placed.setdefault(sibling, []).append(_segment(change, dtype))
    return placed


def _sibling_file(name: str, files: Mapping[str, str]) -> str:
    """Where a tensor made of nothing goes: to another tensor of its module, else to the end."""
    module = name.rpartition(".")[0]
    return files.get(f"{module}.weight", list(files.values())[-1])


def _segment(change: Change, dtype: DType | None) -> Copy | Compute:
    if dtype is not None and change.target.dtype.is_mergeable:
        change = replace(change, target=TensorSpec(change.target.name, dtype, change.target.shape))
    return Copy(change.source, change.target) if change.source and change.is_copy else Compute(change)


def _safetensors_file(inputs: Inputs, path: str, segments: Sequence[Copy | Compute]) -> OutputFile:
    """A file with the base's own head where nothing in it changes, so that untouched files stay the same to the byte."""
    raw, header = inputs.heads[path]
    specs = [segment.target for segment in segments]
    is_same = specs == [tensor.spec for tensor in header.tensors] and header.metadata.get("format") == "pt"
    head = raw if is_same else layout_safetensors(specs, {**header.metadata, "format": "pt"}, path)[0]
    size = len(head) + sum(segment.size_bytes for segment in segments)
    return OutputFile(path=path, size_bytes=size, segments=(Literal(head), *segments))


def _litgpt_file(segments: Sequence[Copy | Compute]) -> OutputFile:
    by_name = {segment.target.name: segment for segment in segments}
    layout = layout_torch_zip([segment.target for segment in segments], _shared_storage(segments), LITGPT_WEIGHTS)
    filled = tuple(by_name[piece.name] if isinstance(piece, Storage) else piece for piece in layout.pieces)
    return OutputFile(path=LITGPT_WEIGHTS, size_bytes=layout.size_bytes, segments=filled, layout=layout)


def _shared_storage(segments: Sequence[Copy | Compute]) -> dict[str, str]:
    """Names whose tensor lies on the bytes of an earlier one (tied embeddings), as long as neither is computed."""
    first: dict[tuple[int, TensorSpec], str] = {}
    shared = {}
    for segment in segments:
        if isinstance(segment, Copy):
            spec = segment.target
            key = (segment.tensor.offset_bytes, TensorSpec("", spec.dtype, spec.shape))
            if spec.elements and first.setdefault(key, spec.name) != spec.name:
                shared[spec.name] = first[key]
    return shared


def _named_to_load(files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
    """A single safetensors file under another name gets the name that libraries look for."""
    if len(files) != 1:
        return tuple(files)
    only = files[0]
    return (OutputFile(path="model.safetensors", size_bytes=only.size_bytes, segments=only.segments),)


def _sidecars(inputs: Inputs, files: Sequence[OutputFile]) -> Iterator[Sidecar]:
    weights = {tensor.file for tensor in inputs.base.tensors}
    own = [path for path in own_files(dict.fromkeys(inputs.adapter_files, 0)) if _may_come_from_adapter(path)]
    has_tokenizer = not set(VOCABULARY_FILES).isdisjoint(own)
    has_template = "chat_template" in inputs.adapter_tokenizer_config or any(map(_is_template, own))
    made = _config_files(inputs)
    inline = inputs.base_tokenizer_config.get("chat_template")
    is_lost = has_tokenizer and not has_template and not any(_is_template(file.path) for file in inputs.base.files)
    if is_lost and isinstance(inline, str):
        # The base has its template inside a file that the adapter's tokenizer replaces.
        made[_CHAT_TEMPLATES[0]] = inline.encode()
    for path in own:
        yield Sidecar(path=path, from_adapter=True)
    for path in (file.path for file in inputs.base.files):
        replaced = (has_tokenizer and path in _TOKENIZER_FILES) or (has_template and _is_template(path))
        if path not in {*weights, *own, *made} and not replaced:
            yield Sidecar(path=path)
    for path, data in made.items():
        yield Sidecar(path=path, data=data)
    if len(files) > 1:
        yield Sidecar(path=INDEX_FILE, data=_index(files))


def _is_template(path: str) -> bool:
    return path in _CHAT_TEMPLATES or path.startswith(TEMPLATE_FOLDER)


def _may_come_from_adapter(path: str) -> bool:
    return path in _TOKENIZER_FILES or path in _FROM_ADAPTER or _is_template(path)


def _config_files(inputs: Inputs) -> dict[str, bytes]:
    """Configuration files that must say something else than the base's."""
    edits = dict(inputs.resolution.config)
    dtype = inputs.recipe.dtype
    if inputs.base.format is BaseFormat.LITGPT:
        return {MODEL_CONFIG_FILE: _yaml({**inputs.base.config, **edits})} if edits else {}
    if not edits and dtype is None:
        return {}
    config = json.loads(json.dumps(inputs.base.config))
    nested = config.get("text_config")
    for level in (config, nested) if isinstance(nested, dict) else (config,):
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in level:
                level[key] = dtype.long_name
        level.update({key: value for key, value in edits.items() if key in level})
    missing = {key: value for key, value in edits.items() if key not in config and key not in (nested or {})}
    config.update(missing)
    return {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _yaml(config: Mapping[str, Any]) -> bytes:
    """As litgpt writes it."""
    import yaml  # noqa: PLC0415 - few plans need it

    return yaml.safe_dump(dict(config), sort_keys=True).encode()


def _index(files: Sequence[OutputFile]) -> bytes:
    tensors = [(s.target, file.path) for file in files for s in file.segments if isinstance(s, (Copy, Compute))]
    index = {
        "metadata": {"total_size": sum(spec.size_bytes for spec, _ in tensors)},
        "weight_map": {spec.name: path for spec, path in sorted(tensors, key=lambda pair: pair[0].name)},
    }
    return (json.dumps(index, indent=2) + "\n").encode()
