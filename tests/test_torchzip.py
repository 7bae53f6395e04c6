"""Torch archives: read against files of torch itself, written for torch itself, and attacked."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import CorruptFile, InvalidInput, UnsafePickle
from registry.tensors import DType, TensorSpec
from registry.torchzip import (
    Descriptor,
    Directory,
    Literal,
    Storage,
    TorchArchive,
    ZipLayout,
    is_torch_zip,
    layout_torch_zip,
    read_torch_zip,
)


def saved(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def read(raw: bytes) -> TorchArchive:
    return read_torch_zip(io.BytesIO(raw), "lit_model.pth", len(raw))


def contents(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, as this package sees the file."""
    return {
        t.spec.name: (t.spec.dtype.long_name, t.spec.shape, raw[t.offset_bytes : t.offset_bytes + t.spec.size_bytes])
        for t in read(raw).tensors
    }


def expected(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same, as torch sees the tensors."""
    return {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape), tensor_bytes(t.detach()))
        for name, t in state.items()
    }


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def rezip(
    raw: bytes, change: Mapping[str, bytes], *, method: int = zipfile.ZIP_STORED, extra: tuple[str, ...] = ()
) -> bytes:
    """The archive written anew by Python's own zipfile, with entries replaced by their path below the top folder, and empty ones added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.partition("/")[2], old.read(name)))
        for name in extra:
            new.writestr(name, b"")
    return out.getvalue()


def with_pickle(data: bytes) -> bytes:
    return rezip(saved({"w": torch.zeros(2)}), {"data.pkl": data})


def reason(raw: bytes) -> str:
    with pytest.raises(CorruptFile) as caught:
        read(raw)
    return caught.value.reason


# ---- reading what torch writes

ALL_DTYPES = [getattr(torch, dtype.long_name) for dtype in DType]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_reads_every_dtype_where_torch_put_it(dtype: torch.dtype) -> None:
    state = {
        "m.weight": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
    }
    assert contents(saved(state)) == expected(state)


def test_reads_a_module_state_with_its_version_attributes() -> None:
    state = torch.nn.BatchNorm1d(4).state_dict()
    assert hasattr(state, "_metadata")
    assert contents(saved(state)) == expected(state)


def test_reads_parameters_in_the_order_of_the_pickle() -> None:
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.tag = "kept by torch as a state"  # type: ignore[attr-defined]
    state = OrderedDict(z=torch.nn.Parameter(torch.randn(2, 2)), a=tagged)
    archive = read(saved(state))
    assert [tensor.spec.name for tensor in archive.tensors] == ["z", "a"]
    assert contents(saved(state)) == expected(state)


def test_takes_the_model_out_of_a_training_state_and_drops_the_compiled_prefix() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    training = {"model": state, "optimizer": optimizer.state_dict(), "iter_num": 7, "lr": [0.1, None, torch.Size([2])]}
    assert contents(saved(training)) == expected(model.state_dict())
    assert contents(saved({"state_dict": state, "callbacks": {}, "epoch": 1})) == expected(model.state_dict())


def test_ignores_plain_values_beside_tensors() -> None:
    state = {"w": torch.ones(2), "step": 3, "betas": (0.9, [0.99]), "dtype": torch.bfloat16, "size": torch.Size([1, 2])}
    assert list(contents(saved(state))) == ["w"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_protocol(protocol: int) -> None:
    state = {"w": torch.randn(3), "b": torch.randn(1)}
    assert contents(saved(state, pickle_protocol=protocol)) == expected(state)


def test_names_tied_tensors_and_reads_slices_of_one_storage() -> None:
    table, whole = torch.randn(4, 2), torch.randn(6)
    state = {"a": table, "first": whole[:2], "b": table, "rest": whole[2:], "flat": table.view(-1)}
    raw = saved(state)
    assert contents(raw) == expected(state)
    assert read(raw).shared == (("a", "b", "flat"),)


def test_empty_tensors_never_count_as_shared() -> None:
    whole = torch.zeros(4)
    assert read(saved({"w": whole, "x": whole[2:2], "y": whole[2:2]})).shared == ()


def test_reads_an_archive_of_another_zip_writer() -> None:
    state = {"w": torch.randn(5)}
    assert contents(rezip(saved(state), {})) == expected(state)


def test_knows_a_zip_by_its_first_bytes() -> None:
    assert is_torch_zip(saved({})[:4])
    assert not is_torch_zip(pickle.dumps({})[:4])


def test_neither_import_nor_reading_loads_torch(tmp_path: Path) -> None:
    raw = saved({"w": torch.nn.Parameter(torch.ones(2)), "f8": torch.zeros(2).to(torch.float8_e5m2)})
    (tmp_path / "m.pth").write_bytes(raw)
    script = (
        "import sys; from registry.torchzip import read_torch_zip\n"
        f"with open(sys.argv[1], 'rb') as stream: archive = read_torch_zip(stream, 'm.pth', {len(raw)})\n"
        "print(len(archive.tensors), sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m.pth"],
        capture_output=True, check=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert found.stdout.strip() == "2 []"


# ---- what torch can save and a merge cannot use


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"w": torch.ones(2, 3).T}, "transposed"),
        ({"w": torch.ones(1, 3).expand(2, 3)}, "expanded"),
        ({"w": torch.ones(6)[::2]}, "strided"),
        ({"a": (t := torch.ones(6))[:4], "b": t[2:]}, "overlaps"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"odd name!": torch.ones(1)}, "odd"),
        ({"w": torch._neg_view(torch.ones(2))}, "negated"),
        ({"w": torch.ones((1,) * 9)}, "9 dimensions"),
        ({3: torch.ones(1)}, "not text"),
        ({"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}, "with and without"),
        ({"weights": {"w": torch.ones(1)}}, "nested below 'weights'"),
        ({"model": {"w": torch.ones(1), "deeper": [{"x": torch.ones(1)}]}}, "nested below 'deeper'"),
        ({"model": {}}, "holds 0 tensors"),
        ({"step": 1}, "holds 0 tensors"),
        ([torch.ones(1)], "not a mapping"),
        (torch.ones(1), "not a mapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_with_a_reason(state: object, words: str) -> None:
    assert words in reason(saved(state))


def test_refuses_old_and_scripted_files(tmp_path: Path) -> None:
    assert "torch >= 1.6" in reason(saved({"w": torch.ones(1)}, _use_new_zipfile_serialization=False))
    assert "torch >= 1.6" in reason(pickle.dumps({"w": 1}))
    scripted = rezip(saved({"w": torch.ones(1)}), {}, extra=("archive/constants.pkl",))
    assert "TorchScript" in reason(scripted)


# ---- attacks on the pickle


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def dumped(value: object, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (dumped({"w": Call(os.system, "true")}), f"{os.name}.system"),
        (dumped({"w": Call(os.system, "true")}, protocol=4), f"{os.name}.system"),
        (b"(S'1+1'\ni__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (
            b"\x80\x04Vtorch._utils\nV_rebuild_tensor_v2.__globals__\n\x93.",
            "torch._utils._rebuild_tensor_v2.__globals__",
        ),
        (b"ctorch.hub\nload\n.", "torch.hub.load"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n.", "torch._utils._rebuild_sparse_tensor"),
        (b"c__main__\nMyStorage\n.", "__main__.MyStorage"),
    ],
)
def test_names_the_global_of_an_unsafe_pickle(data: bytes, name: str) -> None:
    with pytest.raises(UnsafePickle) as caught:
        read(with_pickle(data))
    assert name in caught.value.reason


def tensor(
    storage: str = "ctorch\nFloatStorage\n", key: str = "0", numel: int = 2, tail: str = "I0\n(I2\nt(I1\nt"
) -> bytes:
    """A hand-made pickle of {"w": tensor}; `tail` are offset, shape and strides."""
    pid = f"(Vstorage\n{storage}V{key}\nVcpu\nI{numel}\ntQ"
    return f"(Vw\nctorch._utils\n_rebuild_tensor_v2\n({pid}{tail}I00\nNtRd.".encode()


def test_the_hand_made_pickle_is_sound_before_it_is_bent() -> None:
    assert contents(with_pickle(tensor())) == expected({"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "data.pkl is malformed"),
        (tensor()[:-5], "data.pkl is malformed"),
        (b"\x80\x02junk" * 9, "data.pkl is malformed"),
        (tensor(numel=3), "has 8 bytes"),
        (tensor(numel=1 << 70), "no storage"),
        (tensor(numel=-2), "no storage"),
        (tensor(key="9"), "not in the archive"),
        (tensor(key="../data/0"), "no storage"),
        (tensor(storage="Vtext\n"), "no storage"),
        (tensor(storage="ctorch\nHalfStorage\n"), "has 8 bytes"),
        (tensor(storage="ctorch.storage\nUntypedStorage\n", numel=8), "UntypedStorage are not supported"),
        (tensor(tail="I1\n(I2\nt(I1\nt"), "beyond its storage"),
        (tensor(tail="I-1\n(I2\nt(I1\nt"), "whole numbers"),
        (tensor(tail="I0\n(I2\nt(I1\nI1\nt"), "1 dimensions and 2 strides"),
        (tensor(tail="I0\n(I-2\nt(I1\nt"), "whole numbers"),
        (tensor(tail="I0\n(I01\nt(I1\nt"), "whole numbers"),
        (tensor(tail="I0\nVno\nVno\n"), "whole numbers"),
        (tensor(tail="I0\n(I4611686018427387000\nI9\nt(I9\nI1\nt"), "beyond its storage"),
        (b"(Vw\nctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtRd.", "data.pkl is malformed"),
        (b"(Vw\nctorch._utils\n_rebuild_tensor_v3\n(NNNNNNNtRd.", "not built on a storage"),
        (b"ccollections\nOrderedDict\n((lp0\ntR.", "data.pkl is malformed"),
        (b"(Vw\nPstorage\nd.", "data.pkl is malformed"),
        (b"}r\xff\xff\xff\x7f.", "memo number"),
        (b"}" + b")" + b"\x85" * 3_000_000 + b"Ns.", "nested more than"),
        (b"}" + b"(" * 5 + b")" + b"t" * 5 + b"2\x86" * 300 + b"Ns.", "nested more than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_a_bent_pickle(data: bytes, words: str) -> None:
    assert words in reason(with_pickle(data))


def test_a_pickle_cannot_change_how_later_ones_are_read() -> None:
    state = b"}Vcall\nNs}V_call\nNs\x86"
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"torch\nFloatStorage", b"torch\nfloat32", b"torch\nSize"):
        assert "malformed" in reason(with_pickle(b"c" + name + b"\n" + state + b"b."))
    assert contents(with_pickle(tensor())) == expected({"w": torch.zeros(2)})


def test_a_storage_declared_as_two_types_is_refused() -> None:
    first, second = tensor()[1:-2], tensor(storage="ctorch\nIntStorage\n").replace(b"Vw", b"Vx")[1:-2]
    assert "two ways" in reason(with_pickle(b"(" + first + second + b"d."))


# ---- attacks on the archive

WHOLE = saved({"w": torch.arange(4.0), "v": torch.ones(3, 3)})


@settings(deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_refuses_the_file_cut_anywhere(length: int) -> None:
    reason(WHOLE[:length])


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_refuses_junk_however_it_begins(junk: bytes) -> None:
    reason(junk)
    reason(b"PK\3\4" + junk)
    reason(WHOLE + b"\0" + junk)


@settings(deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_leaves_every_tensor_inside_the_file(at: int, change: int) -> None:
    raw = WHOLE[:at] + bytes([WHOLE[at] ^ change]) + WHOLE[at + 1 :]
    try:
        tensors = read(raw).tensors
    except (CorruptFile, UnsafePickle):
        return
    assert all(t.offset_bytes + t.spec.size_bytes <= len(raw) for t in tensors)


def test_refuses_what_torch_never_writes() -> None:
    assert "compressed" in reason(rezip(WHOLE, {}, method=zipfile.ZIP_DEFLATED))
    assert "top folder" in reason(rezip(WHOLE, {}, extra=("other/data.pkl",)))
    assert "top folder" in reason(rezip(WHOLE, {}, extra=("archive/",)))
    assert "byte order" in reason(rezip(WHOLE, {"byteorder": b"big"}))
    assert "has 12 bytes" in reason(rezip(WHOLE, {"data/0": bytes(12)}))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = rezip(WHOLE, {}, extra=("archive/data/0",))
    assert "occurs twice" in reason(twice)


def test_refuses_encryption_a_foreign_local_header_and_a_missing_pickle() -> None:
    directory = WHOLE.index(b"PK\1\2")
    assert "encrypted" in reason(WHOLE[: directory + 8] + b"\x01\x08" + WHOLE[directory + 10 :])
    assert "does not match" in reason(WHOLE.replace(b"archive/data/0", b"archive/data/1", 1))
    renamed = WHOLE.replace(b"archive/data.pkl", b"archive/atad.pkl")
    assert "without data.pkl" in reason(renamed)


@pytest.mark.parametrize(
    ("record", "at", "value", "words"),
    [
        (b"PK\6\6", 0, b"PK\0\0", "no zip64 end record"),
        (b"PK\6\6", 32, struct.pack("<Q", 1), "longer than its entries"),
        (b"PK\6\6", 32, struct.pack("<Q", 99), "malformed zip directory"),
        (b"PK\6\6", 40, struct.pack("<Q", 1 << 40), "are more than"),
        (b"PK\6\6", 48, struct.pack("<Q", 1 << 60), "truncated"),
        (b"PK\6\7", 8, struct.pack("<Q", 1 << 63), "truncated"),
        (b"PK\1\2", 20, struct.pack("<2I", 1 << 20, 1 << 20), "ends at byte"),
        (b"PK\1\2", 20, struct.pack("<2I", 0xFFFFFFFF, 0xFFFFFFFF), "malformed zip directory"),
        (b"PK\1\2", 42, struct.pack("<I", 4), "does not match"),
    ],
)
def test_refuses_a_directory_that_lies(record: bytes, at: int, value: bytes, words: str) -> None:
    start = WHOLE.index(record) + at
    assert words in reason(WHOLE[:start] + value + WHOLE[start + len(value) :])


# ---- what is written


def written(layout: ZipLayout, data: Mapping[str, bytes]) -> bytes:
    """The file as a writer streams it."""
    out, checksums = io.BytesIO(), {name: zlib.crc32(raw) for name, raw in data.items()}
    for piece in layout.pieces:
        match piece:
            case Literal(raw):
                chunk = raw
            case Storage(name):
                chunk = data[name]
            case Descriptor(name):
                chunk = layout.descriptor(name, checksums[name])
            case Directory():
                chunk = layout.directory(checksums)
        assert len(chunk) == piece.size_bytes
        out.write(chunk)
    assert out.tell() == layout.size_bytes
    return out.getvalue()


def random_bytes(spec: TensorSpec) -> bytes:
    """Bytes that are valid for every dtype, booleans too, and differ between tensors."""
    seed = zlib.crc32(spec.name.encode())
    return bytes((seed >> (index % 32)) & 1 for index in range(spec.size_bytes))


specs_strategy = st.dictionaries(
    st.from_regex(r"[a-z]{1,6}(\.[a-z0-9]{1,4}){0,2}", fullmatch=True),
    st.tuples(st.sampled_from(DType), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    min_size=1, max_size=12,
).map(lambda found: [TensorSpec(name, dtype, shape) for name, (dtype, shape) in found.items()])  # fmt: skip


@settings(deadline=None)
@given(specs_strategy, st.randoms(use_true_random=False))
def test_torch_zipfile_and_this_package_read_what_is_laid_out(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], random: Any
) -> None:
    tied = {f"tied.{spec.name}": spec for spec in specs if random.random() < 0.3}
    specs = [*specs, *(TensorSpec(name, spec.dtype, spec.shape) for name, spec in tied.items())]
    same = {name: spec.name for name, spec in tied.items()}
    layout = layout_torch_zip(specs, same, "sub/lit_model.pth")
    raw = written(layout, {spec.name: random_bytes(spec) for spec in specs})
    wanted = {s.name: (s.dtype.long_name, s.shape, random_bytes(tied.get(s.name, s))) for s in specs}

    found = read_torch_zip(io.BytesIO(raw), "sub/lit_model.pth", len(raw))
    assert found.tensors == layout.tensors
    assert found.shared == tuple((s.name, name) for name, s in tied.items() if s.size_bytes)
    assert contents(raw) == wanted
    assert all(t.offset_bytes % 64 == 0 for t in layout.tensors)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "lit_model/data.pkl"
    path = tmp_path_factory.mktemp("layout") / "m.pth"
    path.write_bytes(raw)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert expected(loaded) == wanted
        assert all(loaded[name].data_ptr() == loaded[s.name].data_ptr() for name, s in tied.items())
    assert list(loaded) == [s.name for s in specs]


def test_the_same_request_gives_the_same_bytes() -> None:
    specs = [TensorSpec("a", DType.F32, (2,)), TensorSpec("b", DType.BF16, (3,))]
    data = {spec.name: random_bytes(spec) for spec in specs}
    first, second = (written(layout_torch_zip(specs, {}, "m.pth"), data) for _ in range(2))
    assert first == second


def test_a_chain_of_shared_tensors_is_stored_once() -> None:
    specs = [TensorSpec(name, DType.F32, (2,)) for name in "abc"]
    layout = layout_torch_zip(specs, {"b": "a", "c": "b"}, "m.pth")
    assert [piece.name for piece in layout.pieces if isinstance(piece, Storage)] == ["a"]
    assert read(written(layout, {"a": bytes(8)})).shared == (("a", "b", "c"),)


def test_ten_gigabytes_are_laid_out_by_arithmetic_alone() -> None:
    specs = [
        TensorSpec("small", DType.U8, (3,)),
        TensorSpec("a", DType.BF16, (5 << 30,)),
        TensorSpec("b", DType.F32, (7,)),
    ]
    layout = layout_torch_zip(specs, {}, "m.pth")
    descriptors = {piece.name: piece.size_bytes for piece in layout.pieces if isinstance(piece, Descriptor)}
    assert descriptors == {"small": 16, "a": 24, "b": 16}
    assert sum(piece.size_bytes for piece in layout.pieces) == layout.size_bytes > 10 << 30
    assert struct.unpack("<4sI2Q", layout.descriptor("a", 7)) == (b"PK\7\x08", 7, 10 << 30, 10 << 30)
    assert len(layout.directory({spec.name: 0 for spec in specs})) == layout.pieces[-1].size_bytes


def test_torch_and_this_package_read_beyond_four_gigabytes(tmp_path: Path) -> None:
    specs = [TensorSpec("big", DType.BF16, ((2 << 30) + 1,)), TensorSpec("after", DType.F32, (2,))]
    layout, data = layout_torch_zip(specs, {}, "m.pth"), struct.pack("<2f", 1.5, -2)
    path = tmp_path / "m.pth"
    with path.open("wb") as out:  # sparse: the big tensor is a hole
        for piece in layout.pieces:
            match piece:
                case Literal(raw):
                    out.write(raw)
                case Storage("after"):
                    out.write(data)
                case Storage():
                    out.seek(piece.size_bytes, os.SEEK_CUR)
                case Descriptor(name):
                    out.write(layout.descriptor(name, 0))
                case Directory():
                    out.write(layout.directory({"big": 0, "after": 0}))
    assert path.stat().st_size == layout.size_bytes
    with path.open("rb") as stream:
        assert read_torch_zip(stream, "m.pth", layout.size_bytes).tensors == layout.tensors
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("m/data/0").file_size == specs[0].size_bytes
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["after"].tolist() == [1.5, -2]
    assert loaded["big"].shape == specs[0].shape


def test_more_entries_than_a_short_count_can_say() -> None:
    specs = [TensorSpec(f"t{index}", DType.U8, (1,)) for index in range(70_000)]
    layout = layout_torch_zip(specs, {}, "m.pth")
    raw = written(layout, dict.fromkeys((spec.name for spec in specs), b"\1"))
    assert read_torch_zip(io.BytesIO(raw), "m.pth", len(raw)).tensors == layout.tensors
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        assert len(archive.namelist()) == 70_003


@pytest.mark.parametrize(
    ("specs", "same"),
    [
        ([TensorSpec("a", DType.F32, (1,))] * 2, {}),
        ([TensorSpec("a", DType.F32, (1,))], {"a": "a"}),
        ([TensorSpec("a", DType.F32, (1,)), TensorSpec("b", DType.F32, (1,))], {"a": "b"}),
        ([TensorSpec("a", DType.F32, (1,)), TensorSpec("b", DType.I32, (1,))], {"b": "a"}),
        ([TensorSpec("a", DType.F32, (1,)), TensorSpec("b", DType.F32, (2,))], {"b": "a"}),
    ],
)
def test_refuses_a_layout_that_would_lose_a_tensor(specs: list[TensorSpec], same: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        layout_torch_zip(specs, same, "m.pth")
