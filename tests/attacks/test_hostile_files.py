"""Files made to harm whoever registers them: code in pickles, lying headers, bombs in patterns and archives, traps in the folder.

Each ends in an error of ours and in nothing recorded; none runs code, writes elsewhere, or keeps us waiting.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry.errors import CorruptFile, NotACheckpoint, RegistryError, UnknownBase, UnreadableFile, UnsafePickle
from registry.locations import MAX_FILES
from registry.registering import Registration
from registry.service import Registry


def refused(ckpt: Registry, place: Path, error: type[RegistryError] | tuple[type[RegistryError], ...]) -> RegistryError:
    """Registering a place fails, and leaves nothing."""
    with pytest.raises(error) as caught:
        ckpt.register(str(place))
    assert not ckpt.checkpoints()
    return caught.value


# -- pickles with code in them

MARKER = "MARKER"  # the file that the code makes where it runs
CODE = f"open({MARKER!r}, 'w').close()"


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self._call


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


DANGEROUS: dict[str, bytes] = {
    "os.system": pickle.dumps(Runs(os.system, f"touch {MARKER}"), 2),
    "eval": pickle.dumps({"a": Runs(eval, CODE)}, 2),
    "exec, newest protocol": pickle.dumps([Runs(exec, CODE)], 5),
    "as a key": pickle.dumps({(Runs(exec, CODE),): 1}, 4),
    "GLOBAL": b"cbuiltins\neval\n(V" + CODE.encode() + b"\ntR.",
    "GLOBAL of an old name": b"\x80\x02c__builtin__\neval\n(V" + CODE.encode() + b"\ntR.",
    "STACK_GLOBAL": b"\x80\x04" + text("builtins") + text("exec") + b"\x93" + text(CODE) + b"\x85R.",
    "INST": b"(V" + CODE.encode() + b"\nibuiltins\nexec\n.",
    "OBJ": b"(cbuiltins\nexec\nV" + CODE.encode() + b"\no.",
    "NEWOBJ": b"\x80\x02cbuiltins\nlist\n(cbuiltins\nmap\n(cbuiltins\nexec\n]V" + CODE.encode() + b"\nat\x81tR.",
    "a dotted name": b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + text(f"touch {MARKER}") + b"\x85R.",
}  # fmt: skip
MALFORMED: dict[str, bytes] = {
    "a module that is not there": b"cmaliciously\nrun\n(tR.",
    "a state that names a class": b"\x80\x02ccollections\nOrderedDict\n)R}(V__class__\ncbuiltins\neval\nub.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id that is none": b"\x80\x02Vx\nQ.",
    "nesting": b"(" * 100_000 + b"t" * 100_000 + b".",
    "a place in the memo far away": b"\x80\x02]r\xff\xff\xff\x7f.",
    "nothing": b"",
    "no end": b"\x80\x02}",
}


@pytest.mark.parametrize("data", DANGEROUS.values(), ids=DANGEROUS.keys())
def test_the_attacks_are_real(tmp_path: Path, data: bytes) -> None:
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", program], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / MARKER).exists()


def torch_zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(64))
    return stream.getvalue()


@pytest.mark.parametrize("wrap", [torch_zip, bytes], ids=["zip", "bare"])
@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors", "lit_model.pth.lora"])
@pytest.mark.parametrize("name", DANGEROUS | MALFORMED)
def test_code_in_a_pickle_does_not_run(
    ckpt: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: str,
    wrap: Callable[[bytes], bytes],
) -> None:
    place = tmp_path / "bot"
    place.mkdir()
    (place / file).write_bytes(wrap((DANGEROUS | MALFORMED)[name]))
    if file.startswith("adapter_model"):
        tiny.write_json(place / "adapter_config.json", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    monkeypatch.chdir(tmp_path)
    error = refused(ckpt, place, (UnsafePickle, CorruptFile))
    assert isinstance(error, UnsafePickle) or wrap is bytes or name in MALFORMED
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.parametrize("file", ["lit_model.pth", "pytorch_model.bin"])
def test_code_in_a_base_model_does_not_run(
    ckpt: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    place = tmp_path / "base"
    place.mkdir()
    (place / file).write_bytes(torch_zip(DANGEROUS["eval"]))
    tiny.write_json(place / "model_config.yaml", tiny.LITGPT_CONFIG)
    tiny.write_json(place / "config.json", tiny.CONFIG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UnsafePickle, NotACheckpoint)):
        ckpt.add_base(str(place))
    assert not list(tmp_path.rglob(MARKER))


# -- safetensors (more of their headers in test_tensors)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def safetensors(header: object, data_bytes: int = 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data_bytes)


HEADERS = {
    "huge length": safetensors({"a": entry()}, length=1 << 62),
    "length up to the limit of the file": safetensors({"a": entry()}, length=1 << 20),
    "nesting": safetensors(b"[" * 1_000_000),
    "repeated key": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "overlap": safetensors({"a": entry(), "b": entry(data_offsets=[4, 12])}, 12),
    "hole": safetensors({"a": entry(data_offsets=[8, 16])}, 16),
    "beyond the end": safetensors({"a": entry(shape=[1 << 40], data_offsets=[0, 1 << 42])}),
    "a path for a name": safetensors({"../../x": entry()}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_is_refused(ckpt: Registry, adapter: Path, base: Path, name: str) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(HEADERS[name])
    refused(ckpt, adapter, CorruptFile)
    (base / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CorruptFile):
        ckpt.add_base(str(base))


# -- configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": -1}, {"r": 10**9}, {"r": 4.0}, {"r": True}, {"r": "4"}, {"r": None}, {"r": [4]}, {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")}, {"lora_alpha": "8"}, {"lora_alpha": 1e400}, {"peft_type": 5}, {"peft_type": "../x"}, {"peft_type": None},
        {"target_modules": 5}, {"target_modules": {"a": 1}}, {"target_modules": [["q_proj"], 5]}, {"modules_to_save": 5},
        {"modules_to_save": [5]}, {"modules_to_save": "embed"}, {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": -1}},
        {"rank_pattern": {"q_proj": "x"}}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": {"q_proj": "x"}}, {"alpha_pattern": 7}, {"layers_to_transform": {"a": 1}}, {"layers_to_transform": [[1]]},
        {"exclude_modules": 5}, {"exclude_modules": ["q_proj"]}, {"bias": 5}, {"bias": ["all"]}, {"init_lora_weights": {"a": 1}},
        {"use_dora": True}, {"auto_mapping": {"base_model_class": "os"}}, {"megatron_core": "os"}, {"layer_replication": [[0, 100_000]]},
        {"base_model_name_or_path": {"a": 1}}, {"unheard_of": {"run": "os.system"}},
    ],
)  # fmt: skip
def test_an_absurd_configuration_is_an_error_or_not_mergeable(
    ckpt: Registry, adapter: Path, base: Path, changes: dict[str, Any]
) -> None:
    """Never a traceback, and never a merge with numbers that nobody meant."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tiny.write_json(adapter / "adapter_config.json", config | changes)
    try:
        checkpoint = ckpt.register(str(adapter), Registration(base=str(base))).registered[0].checkpoint
        changes_of_the_base = ckpt.plan(checkpoint).examined[0].resolution.changes
    except RegistryError:
        return
    assert {delta.scale for change in changes_of_the_base for delta in change.steps} == {2.0}


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[]", b"null", b"", b'"x"', b"\xff\xfe{}", b'{"r": NaN}', b'{"r": Infinity}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5_000,
     b" " * (17 << 20)],
)  # fmt: skip
def test_a_configuration_that_is_no_plain_json_is_corrupt(
    ckpt: Registry, adapter: Path, base: Path, raw: bytes
) -> None:
    (adapter / "adapter_config.json").write_bytes(raw)
    refused(ckpt, adapter, (CorruptFile, NotACheckpoint))
    (base / "config.json").write_bytes(raw)
    with pytest.raises(CorruptFile):
        ckpt.add_base(str(base))


@pytest.mark.parametrize(
    "yaml",
    [
        f"!!python/object/apply:os.system ['touch {MARKER}']", f"lora_r: !!python/object/new:subprocess.Popen [[touch, {MARKER}]]",
        "lora_r: !!python/name:os.system", "- 1", "{", "lora_r: 0", "lora_r: .nan", "lora_alpha: .inf", "lora_r: [4]", "\t",
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" * 3 + "lora_r: *b", "[" * 10_000, "lora_r: 2020-13-45",
        "train: 5\nlora_r: x", "lora_r: " + "9" * 5_000,
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_and_does_not_run(
    ckpt: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str
) -> None:
    tiny.write_litgpt_base(tmp_path / "base")
    step = tiny.write_litgpt_run(tmp_path / "run", base="base") / "final"
    (step / "hyperparameters.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CorruptFile, UnknownBase)):
        ckpt.register(str(step))
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {"a": "..\\secret.safetensors"}, {"a": "sub/model.safetensors"}, {"a": 5},
        {"a": ""}, {"a": "missing.safetensors"}, {"a": "model.safetensors"}, {}, [], 5,
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(ckpt: Registry, base: Path, weight_map: object) -> None:
    (base.parent / "secret.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    tiny.write_json(base / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CorruptFile):
        ckpt.add_base(str(base))


# -- what could take forever

BOMBS: list[dict[str, Any]] = [
    {"target_modules": "(([a-z0-9_.]+)+)+X"}, {"target_modules": "(a|a)*" * 20 + "X"}, {"target_modules": "(.*)*(.*)*(.*)*X"},
    {"target_modules": ".*.*.*.*.*.*.*.*.*.*X"}, {"target_modules": "(?:[a-z0-9_.]|[a-z.])*X"}, {"target_modules": "(" * 5_000},
    {"exclude_modules": "(([a-z0-9_.]+)+)+X"}, {"exclude_modules": "(.|.)*X"}, {"rank_pattern": {"(([a-z0-9_.]+)+)+X": 4}},
    {"alpha_pattern": {"(.|[a-z])*(.|[a-z])*X": 4}}, {"rank_pattern": dict.fromkeys((f"(.+)+{number}X" for number in range(99)), 4)},
]  # fmt: skip
PROGRAM = """
import sys
from pathlib import Path
import tiny
from registry import RegistryError
home, *places = map(Path, sys.argv[1:])
with tiny.open_registry(home) as ckpt:
    for place in places:
        try:
            ckpt.check(ckpt.register(str(place)).registered[0].checkpoint)
        except RegistryError:
            pass
        print(place.name, flush=True)
"""


def test_no_pattern_takes_exponential_time(tmp_path: Path, base: Path) -> None:
    places = [
        tiny.write_adapter(tmp_path / f"bomb-{number}", base=base, seed=number, config=bomb)
        for number, bomb in enumerate(BOMBS)
    ]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "home"), *map(str, places)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=120, check=True).stdout
    except subprocess.TimeoutExpired as error:
        done = error.stdout or b""
    finished = done.decode().split()
    assert finished == [place.name for place in places], BOMBS[len(finished)]


# -- traps in the folder


def test_pipes_sockets_and_links_to_folders_are_passed_by(ckpt: Registry, adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(adapter / "tokenizer.json")
    (adapter / "zeros").symlink_to("/dev/zero")
    (adapter / "loop").symlink_to(adapter)
    (adapter / "home").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(adapter / "s"))
        found = ckpt.register(str(adapter)).registered[0].checkpoint
    assert [entry.path for entry in found.manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_instead_of_a_file_does_not_hang(ckpt: Registry, adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    os.mkfifo(adapter / file)
    refused(ckpt, adapter, UnreadableFile)


def test_a_folder_with_very_many_files_is_refused(ckpt: Registry, adapter: Path) -> None:
    (adapter / "many").mkdir()
    (adapter / "file").touch()
    for number in range(MAX_FILES):
        os.link(adapter / "file", adapter / "many" / f"{number}.txt")
    refused(ckpt, adapter, CorruptFile)
