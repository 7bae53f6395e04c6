"""Tensors as byte ranges: dtypes, safetensors headers, and where every tensor lies. No torch, no copies of weights.

The safetensors format (8-byte little-endian header length, JSON header, data) as its README specifies it, with stricter limits: a
duplicate key, an unknown dtype, a hole, an overlap, an odd name or an absurd size is refused here, so that nothing later has to wonder.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any

from registry.errors import CorruptFile

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 400_000
MAX_DIMENSIONS = 8
_NAME = re.compile(r"[A-Za-z0-9_.:/+-]{1,512}")


class DType(StrEnum):
    """Element types, by their safetensors names."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"

    @property
    def itemsize_bytes(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE_BYTES[self]

    @property
    def is_mergeable(self) -> bool:
        """Whether a delta can be added: the 16, 32 and 64 bit floats."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_whole(self) -> bool:
        """Whether the elements are whole numbers."""
        return self.startswith(("I", "U"))

    @property
    def long_name(self) -> str:
        """As torch and the command line call it: `bfloat16`."""
        return _LONG_NAMES.get(self, self.value.lower())

    @classmethod
    def from_long_name(cls, text: str) -> DType | None:
        """The dtype for `bfloat16`, `bf16` or `BF16`; None when there is none."""
        wanted = text.lower().removeprefix("torch.")
        return next((d for d in cls if wanted in (d.value.lower(), d.long_name)), _ALIASES.get(wanted))


_ITEMSIZE_BYTES = {
    DType.F64: 8, DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.F8_E4M3: 1, DType.F8_E5M2: 1,
    DType.I64: 8, DType.I32: 4, DType.I16: 2, DType.I8: 1,
    DType.U64: 8, DType.U32: 4, DType.U16: 2, DType.U8: 1, DType.BOOL: 1,
}  # fmt: skip
_LONG_NAMES = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16",
    DType.F8_E4M3: "float8_e4m3fn", DType.F8_E5M2: "float8_e5m2",
    DType.I64: "int64", DType.I32: "int32", DType.I16: "int16", DType.I8: "int8",
    DType.U64: "uint64", DType.U32: "uint32", DType.U16: "uint16", DType.U8: "uint8", DType.BOOL: "bool",
}  # fmt: skip
_ALIASES = {"fp64": DType.F64, "fp32": DType.F32, "fp16": DType.F16, "half": DType.F16, "float": DType.F32}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of a tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the data."""
        return self.elements * self.dtype.itemsize_bytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its bytes lie: `offset_bytes` counts from the start of `file` (a path relative to its model directory).

    The bytes are row-major (C order), little-endian and contiguous.
    """

    spec: TensorSpec
    file: str
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What the head of a safetensors file says. Tensor offsets count from the start of the file, in file order."""

    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    file_bytes: int


def read_safetensors_header(stream: IO[bytes], file: str, file_bytes: int) -> SafetensorsHeader:
    """Parse and validate the header of a safetensors file.

    Args:
        stream: a binary stream positioned at the start.
        file: the file's path relative to its model directory; kept in the result and in errors.
        file_bytes: size of the whole file, so that a truncated one is seen at once.

    Raises:
        CorruptFile: anything against the format or the limits of this module.
    """
    head = stream.read(8)
    if len(head) < 8:
        raise CorruptFile(file, f"too short for a safetensors file ({file_bytes} bytes)")
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise CorruptFile(file, f"header of {length} bytes does not fit a file of {file_bytes} bytes")
    raw = stream.read(length)
    if len(raw) != length:
        raise CorruptFile(file, "the header ends early")
    entries = _parse_header_json(raw, file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata.keys(), *metadata.values()))):
        raise CorruptFile(file, "__metadata__ must map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise CorruptFile(file, f"{len(entries)} tensors are more than {MAX_TENSORS}")
    tensors = sorted(
        (_parse_entry(name, entry, file, 8 + length) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.spec.size_bytes),
    )
    _check_coverage(tensors, 8 + length, file_bytes, file)
    return SafetensorsHeader(tuple(tensors), metadata, file_bytes)


def _parse_header_json(raw: bytes, file: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CorruptFile(file, "the header repeats a key")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(file, f"the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CorruptFile(file, "the header is not a JSON object")
    return entries


def _is_text(value: object) -> bool:
    """Whether it is text that can be written again: JSON can spell halves of characters."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _parse_entry(name: str, entry: Any, file: str, data_start: int) -> StoredTensor:
    check_tensor_name(name, file)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(file, f"{name}: expected exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DType.__members__:
        raise CorruptFile(file, f"{name}: unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise CorruptFile(file, f"{name}: bad shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CorruptFile(file, f"{name}: bad data_offsets {offsets!r}")
    spec = TensorSpec(name, DType(entry["dtype"]), tuple(shape))
    if offsets[1] - offsets[0] != spec.size_bytes:
        raise CorruptFile(file, f"{name}: {offsets[1] - offsets[0]} bytes for shape {shape} of {spec.dtype}")
    return StoredTensor(spec, file, data_start + offsets[0])


def check_tensor_name(name: str, file: str) -> None:
    """Accept what real checkpoints use: letters, digits and `_ . : / + -`, at most 512, without empty or dotted path parts.

    Raises:
        CorruptFile: another name.
    """
    if not _NAME.fullmatch(name) or ".." in name or name.startswith(("/", ".")) or "//" in name:
        raise CorruptFile(file, f"odd tensor name {name[:80]!r}")


def _check_coverage(tensors: Sequence[StoredTensor], start: int, end: int, file: str) -> None:
    at = start
    for tensor in tensors:
        if tensor.offset_bytes != at:
            raise CorruptFile(file, f"{tensor.spec.name}: a hole or overlap at byte {at}")
        at += tensor.spec.size_bytes
    if at != end:
        raise CorruptFile(
            file, f"tensors end at byte {at}, the file at byte {end}: truncated, or with something appended"
        )


def layout_safetensors(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], file: str
) -> tuple[bytes, tuple[StoredTensor, ...]]:
    """Lay out a new safetensors file in the given tensor order.

    Returns:
        The head (length field and JSON, padded with blanks to a multiple of 8 bytes) and each tensor's place in the file.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset, offsets = 0, []
    for spec in specs:
        offsets.append(offset)
        end = offset + spec.size_bytes
        entries[spec.name] = {"dtype": spec.dtype.value, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    head = struct.pack("<Q", len(raw)) + raw
    placed = (StoredTensor(spec, file, len(head) + at) for spec, at in zip(specs, offsets, strict=True))
    return head, tuple(placed)
