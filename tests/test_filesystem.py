"""The registry as a file system of fsspec: the same files in all three ways to run, of one version, whole or in parts, read-only."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
from running import serving, settings_of

from registry import connect
from registry.filesystem import CheckpointFileSystem
from registry.registering import Registration
from registry.service import Registry
from registry.teamwork import Role

WEIGHTS = "adapter_model.safetensors"
FILES = ["README.md", "adapter_config.json", WEIGHTS]


@dataclass
class Site:
    """A registry with `bot` (v1, and v2 that is called candidate) and `nlu/intent`, both on `lab/tiny`; `options` lead to it."""

    direct: Registry
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> CheckpointFileSystem:
        return CheckpointFileSystem(skip_instance_cache=True, **self.options)

    def data(self, place: str, path: str = WEIGHTS) -> bytes:
        return (self.folder / place / path).read_bytes()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One that is only read from, in this process."""
    folder = tmp_path_factory.mktemp("files")
    with connect(settings_of(folder / "home")) as direct:
        fill(direct, folder)
        yield Site(direct, folder, {"home": str(folder / "home")})


@pytest.fixture(params=["embedded", "team", "remote"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Each of the ways to run."""
    environment = {}
    if request.param == "team":
        database, store = request.getfixturevalue("postgres_url"), request.getfixturevalue("s3_url")
        environment = {"CKPT_DATABASE_URL": database, "CKPT_STORE": f"{store}/store"}
    with serving(settings_of(tmp_path / "home", **environment)) as server:
        fill(server.direct, tmp_path)
        options: dict[str, Any] = {"home": str(tmp_path / "home")}
        if request.param == "team":
            options |= {"database_url": database, "store": f"{store}/store"}
        if request.param == "remote":
            options = {"server": server.url, "token": server.add_token("reader", Role.READER)}
        yield Site(server.direct, tmp_path, options)


def fill(registry: Registry, folder: Path) -> None:
    base = tiny.write_base(folder / "base", shards=2)
    registry.add_base(str(base), name="lab/tiny", copy=True)
    for number, name in enumerate(("bot", "bot", "nlu/intent"), 1):
        place = tiny.write_adapter(folder / f"adapter-{number}", base="lab/tiny", seed=number)
        (place / "README.md").write_text(f"# {name} {number}\n")
        said = Registration(adapter=name, base="lab/tiny", step=number)
        checkpoint = registry.register(str(place), said).registered[0].checkpoint
        if number == 2:
            registry.set_alias(checkpoint, "candidate")


def test_every_way_to_run_has_the_same_files(site: Site) -> None:
    system = site.system
    assert system.ls("bot@v1", detail=False) == [f"bot@v1/{path}" for path in FILES]
    assert system.cat_file(f"bot@v1/{WEIGHTS}") == site.data("adapter-1")
    assert system.cat_file(f"nlu/intent@step:3/{WEIGHTS}", 10, 90) == site.data("adapter-3")[10:90]
    with system.open("bot@candidate/README.md", "rt") as stream:
        assert stream.read() == "# bot 2\n"
    merged = [name for name in system.ls("bot-merged@candidate", detail=False) if name.endswith(".safetensors")]
    written = site.folder / "written"
    planned = site.direct.plan(site.direct.resolve("bot@candidate"))
    site.direct.merge(planned, out=str(written))
    for name in merged:
        assert system.cat_file(name) == (written / name.rpartition("/")[2]).read_bytes()
    assert len(merged) == 2
    with pytest.raises(FileNotFoundError):
        system.info("nobody@v1/README.md")


def test_any_program_finds_it_by_its_scheme(filled: Site) -> None:
    with fsspec.open(f"ckpt://bot@v2/{WEIGHTS}", **filled.options) as stream:
        tensors = safetensors.numpy.load(stream.read())
    assert {name: each.tobytes() for name, each in tensors.items()} == {
        name: each.tobytes() for name, each in tiny.adapter_tensors(2).items()
    }
    url = f"ckpt://nlu/intent/{WEIGHTS}"
    program = f"import fsspec; print(len(fsspec.open({url!r}).open().read()))"
    environment = {**os.environ, "CKPT_HOME": filled.options["home"]}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True
    )
    assert (ran.stdout, ran.stderr) == (f"{len(filled.data('adapter-3'))}\n", "")


def test_folders_are_repositories(filled: Site) -> None:
    system = filled.system
    assert {"bot", "bot-merged", "nlu", "lab"} <= set(system.ls("", detail=False))
    assert all(entry["type"] == "directory" for entry in system.ls("ckpt://"))
    assert system.ls("nlu", detail=False) == ["nlu/intent", "nlu/intent-merged"]
    assert system.ls("ckpt://nlu/intent/", detail=False) == [f"nlu/intent/{path}" for path in FILES]
    assert system.find("bot@v2") == [f"bot@v2/{path}" for path in FILES]
    assert system.glob("bot@v2/*.json") == ["bot@v2/adapter_config.json"]
    assert [system.isdir(path) for path in ("", "nlu", "nlu/intent", "bot@v1", "bot/README.md")] == [True] * 4 + [False]
    assert system.isfile("bot/README.md")
    assert [system.exists(path) for path in ("bot@v9", "bot/none", "nlu/none", "none", "bot@v1/README.md")] == [
        False
    ] * 4 + [True]
    assert system.du("bot@v1") == sum(len(filled.data("adapter-1", path)) for path in FILES)


def test_what_is_known_of_a_file(filled: Site) -> None:
    system, checkpoint = filled.system, filled.direct.resolve("bot@v2")
    told = system.info(f"bot@candidate/{WEIGHTS}")
    entry = next(each for each in checkpoint.manifest.files if each.path == WEIGHTS)
    assert (told["name"], told["size"], told["type"]) == (f"bot@candidate/{WEIGHTS}", entry.size_bytes, "file")
    assert (told["ETag"], told["sha256"], told["commit"]) == (entry.sha256, entry.sha256, checkpoint.digest.hex[:40])
    assert system.modified("bot@candidate") == checkpoint.created_at
    assert system.ukey(f"bot@v2/{WEIGHTS}") == system.ukey(f"bot/{WEIGHTS}") != system.ukey(f"bot@v1/{WEIGHTS}")
    assert system.checksum(f"bot@v2/{WEIGHTS}") != system.checksum(f"bot@v1/{WEIGHTS}")


@pytest.mark.parametrize("name", ["bot", "bot-merged"])
def test_a_file_is_read_in_any_order(filled: Site, name: str) -> None:
    system = filled.system
    path = f"{name}@v1/{WEIGHTS if name == 'bot' else 'model-00002-of-00002.safetensors'}"
    whole = system.cat_file(path)
    with system.open(path, block_size=512) as stream:
        assert (stream.seekable(), stream.size, stream.writable()) == (True, len(whole), False)
        for start, end in ((700, 800), (0, 8), (len(whole) - 5, len(whole)), (3, 2000), (900, 900)):
            stream.seek(start)
            assert stream.read(end - start) == whole[start:end]
        stream.seek(-4, io.SEEK_END)
        assert stream.read(100) == whole[-4:]
        buffer = bytearray(16)
        stream.seek(8)
        assert (stream.readinto(buffer), bytes(buffer)) == (16, whole[8:24])
    ranges = system.cat_ranges([path, path, "bot/none"], [0, -7, 0], [9, None, 1])
    assert ranges[:2] == [whole[:9], whole[-7:]]
    assert isinstance(ranges[2], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        system.cat_ranges(["bot/none"], 0, 1, on_error="raise")
    assert (system.head(path, 20), system.tail(path, 20)) == (whole[:20], whole[-20:])


def test_an_open_file_stays_that_of_its_version(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path)
    system = CheckpointFileSystem(home=str(tmp_path / "home"), skip_instance_cache=True)
    with system.open(f"bot@candidate/{WEIGHTS}", block_size=64, cache_type="none") as stream:
        start = stream.read(100)
        ckpt.set_alias(ckpt.resolve("bot@v1"), "candidate")
        copy = pickle.loads(pickle.dumps(stream))
        second = (tmp_path / "adapter-2" / WEIGHTS).read_bytes()
        assert start + stream.read() == second
        copy.seek(0)
        assert copy.read() == second
        assert stream.details["commit"] in copy.path
    assert system.cat_file(f"bot@candidate/{WEIGHTS}") == (tmp_path / "adapter-1" / WEIGHTS).read_bytes()


def test_file_systems_travel_between_processes_and_threads(filled: Site) -> None:
    system = pickle.loads(pickle.dumps(filled.system))
    expected = system.cat_file("bot-merged@v1/model-00001-of-00002.safetensors")

    def read(_: int) -> bytes:
        own = CheckpointFileSystem(**filled.options)
        with own.open("bot-merged@v1/model-00001-of-00002.safetensors", block_size=1000) as stream:
            return bytes(stream.read())

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(read, range(32))) == {expected}
    assert system.registry is filled.system.registry


def test_a_merged_model_loads_without_being_written(filled: Site) -> None:
    system = filled.system
    loaded: dict[str, Any] = {}
    for path in system.glob("bot-merged@v2/*.safetensors"):
        loaded |= safetensors.torch.load(system.cat_file(path))
    assert set(loaded) == set(tiny.base_tensors())
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not (loaded[changed].numpy() == tiny.base_tensors()[changed]).all()


def test_names_of_one_part_and_of_two_are_told_apart(ckpt: Registry, tmp_path: Path) -> None:
    fill(ckpt, tmp_path)
    place = tiny.write_adapter(tmp_path / "more", base="lab/tiny", seed=9)
    (place / "docs").mkdir()
    (place / "docs/README.md").write_text("more\n")
    for name in ("nlu", "nlu/docs"):
        ckpt.register(str(place), Registration(adapter=name, base="lab/tiny"))
    system = CheckpointFileSystem(home=str(tmp_path / "home"), skip_instance_cache=True)
    assert set(system.ls("nlu", detail=False)) > {"nlu/docs", "nlu/intent", f"nlu/{WEIGHTS}"}
    assert system.cat_file(f"nlu/intent/{WEIGHTS}") == (tmp_path / "adapter-3" / WEIGHTS).read_bytes()
    assert system.cat_file("nlu@main/docs/README.md") == b"more\n"
    assert system.cat_file("nlu/docs@main/docs/README.md") == b"more\n"
    with pytest.raises(OSError, match="could mean any of"):
        system.ls("nlu/docs")


def test_nothing_is_written(filled: Site) -> None:
    system = filled.system
    for attempt in (
        lambda: system.open("bot/new.txt", "wb"),
        lambda: system.pipe_file("bot/new.txt", b"x"),
        lambda: system.rm("bot/README.md"),
        lambda: system.mkdir("bot/new"),
        lambda: system.makedirs("bot/new"),
        lambda: system.touch("bot/new.txt"),
        lambda: system.cp_file("bot/README.md", "bot/other.md"),
        lambda: system.rmdir("bot"),
    ):
        with pytest.raises(OSError, match="not written"):
            attempt()
    for path in ("bot", "nlu", "bot@v1"):
        with pytest.raises((IsADirectoryError, FileNotFoundError)):
            system.open(path)


def test_errors_are_those_of_file_systems(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path / "home")) as server:
        fill(server.direct, tmp_path)
        server.add_token("nlu", Role.READER, ["nlu"])
        theirs = CheckpointFileSystem(server=server.url, token=server.secrets["nlu"], skip_instance_cache=True)
        assert "bot" not in theirs.ls("", detail=False)
        assert theirs.exists("nlu/intent/README.md")
        with pytest.raises(FileNotFoundError, match="no repository 'bot'"):
            theirs.cat_file("bot/README.md")
        stranger = CheckpointFileSystem(server=server.url, token="ckpt_r_wrong", skip_instance_cache=True)
        with pytest.raises(PermissionError):
            stranger.ls("")
    gone = CheckpointFileSystem(server=server.url, token=server.secrets["nlu"], skip_instance_cache=True)
    with pytest.raises(OSError, match="is CKPT_SERVER right"):
        gone.ls("")
