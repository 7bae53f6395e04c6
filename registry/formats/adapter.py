"""What a folder with an adapter in it says, before anything is matched with a base model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from registry.errors import CorruptFile
from registry.locations import Location
from registry.manifest import Format, Metric
from registry.tensors import MAX_HEADER_BYTES, DType, StoredTensor, TensorSpec, read_safetensors_header
from registry.training_state import Beginning

MAX_CONFIG_BYTES = 16 << 20
# Any of these makes a tokenizer; its configuration alone does not.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter as its files describe it. `config` is the parsed configuration that its arithmetic needs; `tensors` lie in `weights_file`.

    `base_config` is the base model's configuration where the adapter's folder has a copy (litgpt), else empty.
    """

    format: Format
    method: str
    rank: int | None
    alpha: float | None
    scaling: str
    targets: tuple[str, ...]
    base_name: str
    weights_file: str
    tensors: tuple[StoredTensor, ...]
    config: Mapping[str, Any]
    files: tuple[str, ...]
    base_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.spec.elements for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        """The dtype of most elements, by its long name."""
        counts: dict[DType, int] = {}
        for tensor in self.tensors:
            counts[tensor.spec.dtype] = counts.get(tensor.spec.dtype, 0) + tensor.spec.elements
        return max(counts, key=lambda dtype: counts[dtype]).long_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint found in a place: where, under which adapter and run it belongs, and what the files around it know.

    `left_out` are files of the folder that do not belong to the checkpoint, with the reason. `began` is what the run says that it went on from.
    """

    location: Location
    adapter_name: str
    run: str
    step: int | None
    metrics: tuple[Metric, ...]
    adapter: Adapter
    left_out: Mapping[str, str] = field(default_factory=dict)
    began: Beginning | None = None


def read_tensors(location: Location, path: str) -> tuple[StoredTensor, ...]:
    """The tensors of a safetensors file or a torch zip, whichever the bytes say it is. No torch, no unpickling of code.

    Raises:
        CorruptFile: neither, or damaged.
        UnsafePickle: the pickle asks for something besides tensors and plain containers.
    """
    size_bytes = location.files()[path]
    with location.open(path) as stream:
        head = stream.read(8)
        stream.seek(0)
        if head.startswith(b"PK"):
            from registry.torchzip import read_torch_zip  # noqa: PLC0415 - most adapters are safetensors

            return read_torch_zip(stream, path, size_bytes).tensors
        if head[:1] == b"\x80" and int.from_bytes(head, "little") > MAX_HEADER_BYTES:
            raise CorruptFile(path, "a bare pickle, which could run code when read: save it again as safetensors")
        return read_safetensors_header(stream, path, size_bytes).tensors


def read_json(location: Location, path: str) -> dict[str, Any]:
    """A JSON object. NaN and infinities are refused.

    Raises:
        CorruptFile: it is not one.
    """
    try:
        found = json.loads(read_text(location, path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CorruptFile(path, "not a JSON object")
    return found


def read_yaml(location: Location, path: str) -> dict[str, Any]:
    """A YAML mapping of plain values.

    Raises:
        CorruptFile: it is not one.
    """
    import yaml  # noqa: PLC0415 - showing a PEFT checkpoint need not wait for it

    try:
        found = yaml.safe_load(read_text(location, path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptFile(path, f"not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise CorruptFile(path, "not a YAML mapping")
    return found


def read_text(location: Location, path: str) -> str:
    """A small text file in UTF-8.

    Raises:
        CorruptFile: too large, or not UTF-8.
    """
    with location.open(path) as stream:
        raw = stream.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise CorruptFile(path, f"larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(path, "not UTF-8 text") from error


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def finite_number(value: object, path: str, key: str) -> float:
    """A finite number from a configuration.

    Raises:
        CorruptFile: it is not one.
    """
    if not is_number(value) or not math.isfinite(value):
        raise CorruptFile(path, f"{key} is {str(value)[:40]}, expected a number")
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value from a configuration is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 10**300


def positive_rank(value: object, path: str, key: str) -> int:
    """A rank from a configuration: a whole number of at least 1.

    Raises:
        CorruptFile: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise CorruptFile(path, f"{key} is {value!r}, expected a whole number of at least 1")
    return value


def spec_like(spec: TensorSpec, *, name: str) -> TensorSpec:
    """The same shape and dtype under another name."""
    return TensorSpec(name, spec.dtype, spec.shape)
