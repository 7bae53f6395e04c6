"""Safetensors headers: what we lay out reads back, also by the library; what is malformed is a corrupt file and nothing else."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from registry.errors import CorruptFile
from registry.tensors import (
    MAX_TENSORS,
    DType,
    SafetensorsHeader,
    TensorSpec,
    layout_safetensors,
    read_safetensors_header,
)

FILE = "model.safetensors"
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_:+-]{0,20}", fullmatch=True).filter(lambda name: name != "__metadata__")
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(DType), st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    max_size=8,
    unique_by=lambda spec: spec.name,
)


def read(data: bytes) -> SafetensorsHeader:
    return read_safetensors_header(io.BytesIO(data), FILE, len(data))


def file_of(header: object, data_bytes: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data_bytes)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@given(SPECS, st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3))
def test_a_layout_reads_back(specs: list[TensorSpec], metadata: Mapping[str, str]) -> None:
    head, placed = layout_safetensors(specs, metadata, FILE)
    header = read(head + bytes(sum(spec.size_bytes for spec in specs)))
    assert sorted(header.tensors, key=str) == sorted(placed, key=str)
    assert header.metadata == metadata
    assert [tensor.spec for tensor in placed] == specs
    assert len(head) % 8 == 0


def test_the_library_reads_our_layout_and_we_read_its_files() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=np.int64),
    }
    specs = [TensorSpec("b", DType.I64, (3,)), TensorSpec("a.weight", DType.F32, (2, 3))]
    head, placed = layout_safetensors(specs, {"format": "pt"}, FILE)
    loaded = load(head + b"".join(arrays[spec.name].tobytes() for spec in specs))
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)

    data = save(arrays, {"format": "pt"})
    for tensor in read(data).tensors:
        raw = data[tensor.offset_bytes : tensor.offset_bytes + tensor.spec.size_bytes]
        assert raw == arrays[tensor.spec.name].tobytes()
    assert {tensor.spec for tensor in read(data).tensors} == {tensor.spec for tensor in placed}


@given(st.binary(max_size=64) | st.binary(max_size=64).map(file_of) | st.text(max_size=40).map(str.encode).map(file_of))
def test_random_bytes_are_a_corrupt_file_at_worst(data: bytes) -> None:
    with suppress(CorruptFile):
        assert read(data).file_bytes == len(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        NAMES | st.just("__metadata__"), st.fixed_dictionaries(dict.fromkeys(entry(), JSON)) | JSON, max_size=3
    )
)
def test_random_headers_are_a_corrupt_file_at_worst(header: dict[str, Any]) -> None:
    with suppress(CorruptFile):
        assert all(tensor.spec.size_bytes == 0 for tensor in read(file_of(header)).tensors)


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\0\0",
    "header beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "largest length": b"\xff" * 8 + b"{}",
    "no JSON": file_of(b"{"),
    "array": file_of([]),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "nested": file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "digits": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}'),
    "repeated tensor": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), 8),
    "repeated field": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "unknown field": file_of({"a": entry(extra=1)}, 8),
    "missing field": file_of({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "unknown dtype": file_of({"a": entry(dtype="F33")}, 8),
    "dtype of another type": file_of({"a": entry(dtype=[])}, 8),
    "negative dimension": file_of({"a": entry(shape=[-2])}, 8),
    "boolean dimension": file_of({"a": entry(shape=[True, 2])}, 8),
    "fractional dimension": file_of({"a": entry(shape=[2.0])}, 8),
    "nine dimensions": file_of({"a": entry(shape=[1] * 8 + [2])}, 8),
    "overflowing dimensions": file_of({"a": entry(shape=[1 << 61] * 8)}, 8),
    "shape and size differ": file_of({"a": entry(shape=[3])}, 8),
    "one offset": file_of({"a": entry(data_offsets=[8])}, 8),
    "negative size": file_of({"a": entry(data_offsets=[8, 0])}, 8),
    "hole": file_of({"a": entry(data_offsets=[4, 12])}, 12),
    "overlap": file_of({"a": entry(), "b": entry()}, 16),
    "truncated": file_of({"a": entry()}, 7),
    "something appended": file_of({"a": entry()}, 9),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "metadata of half a character": file_of(b'{"__metadata__":{"a":"\\ud800"}}'),
    "NaN": file_of(b'{"__metadata__":NaN}'),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptFile):
        read(data)


def test_too_many_tensors_are_refused() -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ",".join(f'"a{number}":{empty}' for number in range(MAX_TENSORS + 1))
    with pytest.raises(CorruptFile, match="more than"):
        read(file_of(b"{%s}" % header.encode()))


@pytest.mark.parametrize(
    "name", ["", "../../x", "a/../b", "/a", "a//b", ".a", "a b", "a\0", "a\n", "é", "a" * 513, "a\\b"]
)
def test_an_odd_tensor_name_is_refused(name: str) -> None:
    with pytest.raises(CorruptFile):
        read(file_of({name: entry()}, 8))


def test_names_as_real_models_have_them_are_accepted() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "encoder/layer_0:0", "a.b-c+d"]
    specs = [TensorSpec(name, DType.BF16, (2, 2)) for name in names]
    head, _ = layout_safetensors(specs, {}, FILE)
    assert [tensor.spec for tensor in read(head + bytes(24)).tensors] == specs


@pytest.mark.parametrize("dtype", DType)
def test_a_dtype_is_known_by_both_its_names(dtype: DType) -> None:
    assert DType.from_long_name(dtype.value) is dtype
    assert DType.from_long_name(f"torch.{dtype.long_name}") is dtype
    assert TensorSpec("a", dtype, (2, 3)).size_bytes == 6 * dtype.itemsize_bytes


def test_short_names_of_dtypes_and_unknown_ones() -> None:
    assert [DType.from_long_name(text) for text in ("fp16", "half", "bf16")] == [DType.F16, DType.F16, DType.BF16]
    assert DType.from_long_name("float31") is None
    assert TensorSpec("scalar", DType.F32, ()).elements == math.prod(())
