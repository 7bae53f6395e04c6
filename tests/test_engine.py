"""Merging for real: the same bytes whatever happens, and nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pytest
import tiny
import torch
from blake3 import blake3
from merging import assert_rounded_once, read_weights
from mixed import COLUMNS, EMBEDDING, FIRST, IN_FIRST, NORM, RANK, SECOND, K, O, Q, V, base_tensors, factors
from safetensors.torch import save_file
from torch import Tensor

from registry.errors import BaseChanged, Conflict, MergeRunning, NotFinite, NothingMerged, StorageFailed
from registry.locations import open_location
from registry.manifest import FileEntry
from registry.merge.blocks import Sources
from registry.merge.engine import execute
from registry.merge.journal import Journal
from registry.merge.sinks import FolderSink
from registry.merging import MergeResult, Planned
from registry.registering import Registration
from registry.tensors import DType
from registry.workspace import Progress, silent


@final
class Workbench:
    """A base model in two shards, an adapter, and a registry that knows both."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
        self.folder, self.base, self.adapter = folder, folder / "base", folder / "adapter"
        self.registry = tiny.open_registry(folder / "home")
        self.base.mkdir()
        first = {name: tensor for name, tensor in tensors.items() if name in IN_FIRST}
        for file, part in ((FIRST, first), (SECOND, {n: t for n, t in tensors.items() if n not in first})):
            save_file(part, self.base / file, {"format": "pt"})
        weight_map = {name: FIRST if name in first else SECOND for name in tensors}
        tiny.write_json(self.base / "model.safetensors.index.json", {"weight_map": weight_map})
        tiny.write_json(self.base / "config.json", {"model_type": "llama"})
        self.adapter.mkdir()
        save_file(dict(adapter), self.adapter / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }
        tiny.write_json(self.adapter / "adapter_config.json", config)
        said = Registration(base=str(self.base), adapter="tried")
        (found,) = self.registry.register(str(self.adapter), said).registered
        self.checkpoint = found.checkpoint

    def plan(self, dtype: DType | None = None) -> Planned:
        return self.registry.plan(self.checkpoint, dtype=dtype)

    def merge(self, out: str | Path | None, *, dtype: DType | None = None, progress: Progress = silent) -> MergeResult:
        return self.registry.merge(self.plan(dtype), out=None if out is None else str(out), progress=progress)

    def execute(self, out: Path, threads: int) -> None:
        planned = self.plan()
        sources = Sources(base=open_location(str(self.base)), adapter=open_location(str(self.adapter)))
        with Journal(self.folder / "journals", planned.plan.recipe.digest, str(out)) as journal:
            execute(
                planned.plan,
                sources,
                FolderSink(out),
                journal,
                provenance=lambda f, r: ("merge.json", b"{}"),
                threads=threads,
            )
            journal.finish()

    def leftovers(self, out: Path) -> list[str]:
        """What a merge that failed left behind."""
        places = [out, out.with_name(f"{out.name}.partial"), *(self.folder / "home" / "merging").glob("*.json")]
        return [path.name for path in places if path.exists()] + [
            str(merged.digest) for merged in self.registry.merged()
        ]


Make = Callable[..., Workbench]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(tensors: Mapping[str, Tensor] | None = None, adapter: Mapping[str, Tensor] | None = None) -> Workbench:
        return Workbench(tmp_path, tensors or base_tensors(), adapter or factors())

    return make


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): blake3(path.read_bytes()).hexdigest() for path in files}


def stop_after(share: float, what: Callable[[], None]) -> Progress:
    """A progress that does something once such a share of the bytes is done."""
    done_bytes = 0

    def progress(task: str, done: int, total: int) -> None:
        nonlocal done_bytes
        done_bytes += done if task == "merging" else 0
        if done_bytes > share * total:
            what()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is written after the other."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


CHILD = """
import os, resource, signal, sys
import tiny
from pathlib import Path
from registry.errors import RegistryError
sys.path.insert(0, {tests!r})
from test_engine import stop_after
home, out, *said = sys.argv[1:]
os.cpu_count = lambda: 1  # one file after the other
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def wait():
    print("running", flush=True)
    sys.stdin.read()
with tiny.open_registry(Path(home)) as registry:
    planned = registry.plan(registry.resolve("tried"))
    progress = {progress}
    try:
        registry.merge(planned, out=out, progress=progress)
    except RegistryError as error:
        print(error.code)
"""


def child(
    bench: Workbench, out: Path, progress: str = "lambda what, done, total: None", **environment: str
) -> subprocess.Popen[str]:
    """Another process that merges to the same place."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([tests, str(Path(__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=tests, progress=progress), str(bench.folder / "home"), str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


# ---- what is written


def test_float32_and_16_bits(make: Make, tmp_path: Path) -> None:
    bench = make()
    result = bench.merge(tmp_path / "out")
    found, base, low_rank = read_weights(tmp_path / "out"), base_tensors(), factors()
    for name in (Q, K, V, O):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        delta = (low_rank[f"{module}.lora_B.weight"] @ low_rank[f"{module}.lora_A.weight"]) * (6 / RANK)
        if base[name].dtype is torch.float32:
            assert torch.equal(found[name], base[name] + delta)
        else:
            error = torch.full(delta.shape, 1e-6, dtype=torch.float64)
            assert_rounded_once(found[name], base[name].double() + delta.double(), error)
    untouched = base.keys() - {Q, K, V, O}
    assert all(torch.equal(found[name], base[name]) and found[name].dtype is base[name].dtype for name in untouched)
    records = {record.name: record for record in result.records}
    assert records.keys() == {Q, K, V, O}
    changed = (found[Q] != base[Q]).double().mean()
    assert records[Q].changed == pytest.approx(float(changed), rel=1e-5)
    assert records[Q].lost == pytest.approx(float(1 - changed), rel=1e-3)
    assert records[Q].base_norm == pytest.approx(float(base[Q].double().norm()), rel=1e-5)
    assert all(record.action == "merged" and record.delta_norm > 0 for record in records.values())


def test_threads_do_not_show(make: Make, tmp_path: Path) -> None:
    bench = make()
    for threads in (1, 2, 5):
        bench.execute(tmp_path / f"out{threads}", threads)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out5")


def test_processes_do_not_show(make: Make, tmp_path: Path) -> None:
    bench = make()
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        shutil.copytree(tmp_path / "home", tmp_path / f"home{seed}")
        with child(bench, out, PYTHONHASHSEED=seed) as process:
            assert process.communicate()[0] == ""
        found.append(contents(out))
        shutil.rmtree(tmp_path / "home")
        shutil.copytree(tmp_path / f"home{seed}", tmp_path / "home", dirs_exist_ok=True)
    assert "merge.json" in found[0]
    assert found[0] == found[1]


def test_a_litgpt_archive_has_right_checksums(tmp_path: Path) -> None:
    base = tiny.write_litgpt_base(tmp_path / "base")
    tiny.write_litgpt_run(tmp_path / "run", base=str(base))
    with tiny.open_registry(tmp_path / "home") as registry:
        registry.register(str(tmp_path / "run"), Registration(base=str(base), adapter="tried"))
        registry.merge(registry.plan(registry.resolve("tried")), out=str(tmp_path / "out"))
    archive = tmp_path / "out" / "lit_model.pth"
    assert zipfile.ZipFile(archive).testzip() is None
    before, after = (torch.load(path, weights_only=True) for path in (base / "lit_model.pth", archive))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"transformer.h.{layer}.attn.qkv.weight" for layer in range(tiny.LAYERS)
    }


def test_to_the_store_and_to_a_url(make: Make, tmp_path: Path) -> None:
    bench = make()
    stored = bench.merge(None)
    assert (stored.created, stored.location) == (True, "")
    assert bench.merge(None).created is False
    bench.registry.pull(stored.merged, tmp_path / "pulled")
    bench.merge(tmp_path / "out")
    url = f"memory://engine/{tmp_path.name}"
    bench.merge(url)
    remote = open_location(url)
    fetched = {path: blake3(remote.open(path).read()).hexdigest() for path in remote.files()}
    assert contents(tmp_path / "pulled") == contents(tmp_path / "out") == fetched
    assert bench.registry.merged()[0].locations == ("", str(tmp_path / "out"), url)


# ---- what is refused, and leaves nothing


@pytest.mark.parametrize("name", [EMBEDDING, Q, NORM, "scalar"])
def test_a_base_altered_behind_our_back(make: Make, tmp_path: Path, name: str) -> None:
    bench, out = make(), tmp_path / "out"
    planned = bench.plan()
    place = next(tensor for tensor in planned.plan.base.tensors if tensor.spec.name == name)
    path = bench.base / place.file
    status, offset = path.stat(), place.offset_bytes + place.spec.size_bytes - 1
    with path.open("r+b") as file:
        file.seek(offset)
        last = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BaseChanged) as caught:
        bench.merge(out)
    assert caught.value.subject == name
    assert not out.exists()
    assert bench.registry.merged() == []
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([last]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bench.merge(out).created


def test_an_adapter_that_does_nothing(make: Make, tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors[K][0, 0] = -0.0
    bench = make(tensors, {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in factors().items()})
    with pytest.raises(NothingMerged) as caught:
        bench.merge(tmp_path / "out")
    assert caught.value.largest_delta == 0
    assert bench.leftovers(tmp_path / "out") == []


def test_an_adapter_that_rounding_swallows(make: Make, tmp_path: Path) -> None:
    tensors = {name: torch.ones_like(tensor) for name, tensor in base_tensors().items()}
    bench = make(tensors, factors(scale=1e-9))
    with pytest.raises(NothingMerged) as caught:
        bench.merge(tmp_path / "out")
    assert 0 < caught.value.largest_delta < 1e-7
    assert bench.leftovers(tmp_path / "out") == []


def test_a_delta_that_float16_cannot_hold(make: Make, tmp_path: Path) -> None:
    bench = make(adapter=factors(scale=1e5))
    with pytest.raises(NotFinite) as caught:
        bench.merge(tmp_path / "out")
    assert (caught.value.tensor, caught.value.dtype) == (V, "float16")
    assert bench.leftovers(tmp_path / "out") == []


def test_a_base_that_float16_cannot_hold(make: Make, tmp_path: Path) -> None:
    bench = make({**base_tensors(), NORM: torch.full((COLUMNS,), 1e5)})
    with pytest.raises(NotFinite) as caught:
        bench.merge(tmp_path / "out", dtype=DType.F16)
    assert caught.value.tensor == NORM
    assert bench.leftovers(tmp_path / "out") == []


def test_a_place_that_is_taken(make: Make, tmp_path: Path) -> None:
    bench, out = make(), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep me")
    steps: list[Any] = []
    with pytest.raises(Conflict):
        bench.merge(out, progress=lambda *step: steps.append(step))
    assert ([step for step in steps if step[0] == "merging"], contents(out).keys()) == ([], {"mine"})


# ---- what is interrupted, and goes on


@pytest.fixture
def whole(make: Make, tmp_path: Path) -> tuple[Workbench, dict[str, str]]:
    """A workbench, and what a merge that nothing interrupts writes there."""
    bench = make()
    bench.merge(tmp_path / "whole")
    return bench, contents(tmp_path / "whole")


Whole = tuple[Workbench, dict[str, str]]


@pytest.mark.usefixtures("one_core")
def test_interrupted_it_goes_on_with_the_next_shard(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out, partial = whole, tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        bench.merge(out, progress=stop_after(0.75, interrupt))
    assert not out.exists()
    assert contents(partial).keys() == {FIRST}
    before = (partial / FIRST).stat()
    result = bench.merge(out)
    after = (out / FIRST).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(out) == expected
    assert {record.name for record in result.records} == {Q, K, V, O}
    assert not partial.exists()
    assert list((tmp_path / "home" / "merging").iterdir()) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_interrupted_while_several_files_are_written(whole: Whole, tmp_path: Path, share: float) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench.merge(out, progress=stop_after(share, interrupt))
    assert not out.exists()
    bench.merge(out)
    assert contents(out) == expected
    assert list((tmp_path / "home" / "merging").iterdir()) == []


@pytest.mark.usefixtures("one_core")
def test_a_finished_shard_that_was_damaged_is_made_again(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench.merge(out, progress=stop_after(0.75, interrupt))
    shard = tmp_path / "out.partial" / FIRST
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    bench.merge(out)
    assert contents(out) == expected


def test_leftovers_of_another_merge_are_not_published(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    (tmp_path / "out.partial" / "sub").mkdir(parents=True)
    (tmp_path / "out.partial" / "sub" / "model-00003-of-00003.safetensors").write_bytes(b"another recipe's")
    bench.merge(out)
    assert contents(out) == expected


def test_interrupted_on_the_way_to_the_store(whole: Whole, tmp_path: Path) -> None:
    bench, expected = whole
    with pytest.raises(KeyboardInterrupt):
        bench.merge(None, progress=stop_after(0.75, interrupt))
    assert bench.registry.merged()[0].locations == (str(tmp_path / "whole"),)
    bench.registry.pull(bench.merge(None).merged, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == expected


def publish_only(bench: Workbench, out: Path) -> None:
    """What a process leaves that dies between publishing and recording."""
    planned = bench.plan()
    digest = planned.plan.recipe.digest

    def provenance(files: Sequence[FileEntry], records: object) -> tuple[str, bytes]:
        said = {"recipe_digest": str(digest), "files": {entry.path: {} for entry in files}}
        return "merge.json", json.dumps(said).encode()

    sources = Sources(base=open_location(str(bench.base)), adapter=open_location(str(bench.adapter)))
    with Journal(bench.folder / "home" / "merging", digest, str(out)) as journal:
        execute(planned.plan, sources, FolderSink(out), journal, provenance=provenance)


def test_published_but_not_recorded_is_recorded_by_the_next_try(make: Make, tmp_path: Path) -> None:
    bench, out = make(), tmp_path / "out"
    publish_only(bench, out)
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    result = bench.merge(out)
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before
    assert [merged.locations for merged in bench.registry.merged()] == [(str(out),)]
    assert result.merged.files[-1].path == "merge.json"
    assert not bench.merge(out).created


def test_what_only_claims_to_be_this_merge_is_left_alone(make: Make, tmp_path: Path) -> None:
    bench, out = make(), tmp_path / "out"
    publish_only(bench, out)
    weights = bytearray((out / SECOND).read_bytes())
    weights[-1] ^= 1
    (out / SECOND).write_bytes(weights)
    with pytest.raises(Conflict):
        bench.merge(out)
    assert (out / SECOND).read_bytes() == weights
    assert bench.registry.merged() == []


def test_killed_it_goes_on(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    with child(bench, out, "stop_after(0.75, kill)") as process:
        process.communicate()
    assert process.returncode == -9
    assert not out.exists()
    before = (tmp_path / "out.partial" / FIRST).stat()
    bench.merge(out)
    assert (out / FIRST).stat().st_mtime_ns == before.st_mtime_ns
    assert contents(out) == expected


def test_two_at_once(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    with child(bench, out, "stop_after(0.75, wait)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        with pytest.raises(MergeRunning):
            bench.merge(out)
        with pytest.raises(MergeRunning):  # nor another recipe to the same place
            bench.merge(out, dtype=DType.F32)
        assert set(process.communicate()[0].splitlines()) <= {"running"}
    assert contents(out) == expected


def test_a_full_disk(whole: Whole, tmp_path: Path) -> None:
    (bench, expected), out = whole, tmp_path / "out"
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))"
    )
    with child(bench, out, f"[lambda what, done, total: None, {limit}][0]") as process:
        assert process.communicate()[0] == "storage_failed\n"
    assert not out.exists()
    assert contents(tmp_path / "out.partial") == {}
    assert [merged.locations for merged in bench.registry.merged()] == [(str(tmp_path / "whole"),)]
    bench.merge(out)
    assert contents(out) == expected


def test_the_record_of_a_merge_lists_every_file(whole: Whole, tmp_path: Path) -> None:
    _, written = whole
    document = json.loads((tmp_path / "whole" / "merge.json").read_text())
    listed = {path: file["blake3"] for path, file in document["files"].items()}
    assert {**listed, "merge.json": written["merge.json"]} == written
    assert document["tensors"].keys() == {Q, K, V, O}


def test_a_parent_that_is_a_file(whole: Whole, tmp_path: Path) -> None:
    bench, _ = whole
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        bench.merge(tmp_path / "file" / "out")
