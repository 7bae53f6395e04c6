"""Merged models that are computed while they are read: what is shared between readers, and what happens when a base changes or is let go."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import mixed
import pytest
import tiny
from torch import Tensor

from registry.errors import BaseChanged, NothingMerged, PathNotFound, RegistryError
from registry.merging import Planned
from registry.mixing import Mixture
from registry.registering import Registration
from registry.remembered import Remembered
from registry.service import Registry
from registry.virtual import VirtualModel, VirtualModels
from registry.workspace import Workspace


@pytest.fixture
def virtual(ckpt: Registry) -> Iterator[VirtualModels]:
    with closing(VirtualModels(Workspace(ckpt.settings))) as models:
        yield models


@pytest.fixture
def planned(ckpt: Registry, tmp_path: Path) -> Planned:
    """A LoRA on the base of several dtypes."""
    return plan(ckpt, tmp_path, "one", mixed.factors())


def plan(ckpt: Registry, folder: Path, name: str, tensors: dict[str, Tensor]) -> Planned:
    base = folder / "mixed"
    if not base.exists():
        mixed.write_base(base)
    mixed.write_lora(folder / name, tensors)
    ckpt.register(str(folder / name), Registration(base=str(base), adapter=name))
    return ckpt.plan(ckpt.resolve(name))


def joined(model: VirtualModel, path: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join(map(bytes, model.read(path, start, end)))


def contents(model: VirtualModel) -> Mapping[str, bytes]:
    return {path: joined(model, path) for path in model.files}


def written(ckpt: Registry, planned: Planned, out: Path) -> Mapping[str, bytes]:
    """What merging writes, but for the file that tells what was merged."""
    ckpt.merge(planned, out=str(out))
    found = tiny.contents(out)
    del found["merge.json"]
    return found


def open_files(folder: Path) -> list[str]:
    """Which weights and blobs below a folder this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [
        path for path in found if path.startswith(str(folder)) and (path.endswith(".safetensors") or "/blobs/" in path)
    ]


# ---- what there is to read


def test_the_files_of_a_merge(virtual: VirtualModels, ckpt: Registry, planned: Planned, tmp_path: Path) -> None:
    model = virtual.open(planned)
    expected = written(ckpt, planned, tmp_path / "out")
    assert {path: len(data) for path, data in expected.items()} == model.files
    assert contents(model) == expected


def test_each_kind_of_plan(virtual: VirtualModels, ckpt: Registry, tmp_path: Path) -> None:
    for number, (kind, planned) in enumerate(mixed.every_plan(ckpt, tmp_path)):
        model = virtual.open(planned)
        for _ in range(2):
            assert contents(model) == written(ckpt, planned, tmp_path / f"out{number}"), kind


def test_small_files_of_the_adapters(virtual: VirtualModels, ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """A tokenizer of the second of two adapters, an index that is made, a configuration of the base."""
    for number in (1, 2):
        place = tiny.write_adapter(tmp_path / f"bot{number}", base=base, seed=number)
        if number == 2:
            tiny.write_json(place / "tokenizer.json", {"model": {"vocab": {"a": 0, "c": 1}}})
            tiny.write_json(place / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
        ckpt.register(str(place), Registration(base=str(base), adapter=f"bot{number}"))
    planned = ckpt.plan(ckpt.resolve("bot1"), ckpt.resolve("bot2"), mixture=Mixture(method="ties"))
    expected = written(ckpt, planned, tmp_path / "out")
    assert b'"c"' in expected["tokenizer.json"]
    assert contents(virtual.open(planned)) == expected


def test_ranges(virtual: VirtualModels, ckpt: Registry, planned: Planned, tmp_path: Path) -> None:
    model = virtual.open(planned)
    for path, data in written(ckpt, planned, tmp_path / "out").items():
        third = len(data) // 3
        assert joined(model, path, third, 2 * third) == data[third : 2 * third]
        assert joined(model, path, third) == data[third:]
        assert joined(model, path, third, third) == joined(model, path, len(data) + 5) == b""
        assert joined(model, path, len(data) - 1, len(data) + 100) == data[-1:]


def test_a_file_that_is_not_there(virtual: VirtualModels, planned: Planned) -> None:
    model = virtual.open(planned)
    for path in ("merge.json", "../home/ckpt.db", ""):
        with pytest.raises(PathNotFound):
            model.read(path)


def test_a_base_in_the_store(virtual: VirtualModels, ckpt: Registry, tmp_path: Path) -> None:
    base = mixed.write_base(tmp_path / "mixed")
    ckpt.add_base(str(base), copy=True)
    planned = plan(ckpt, tmp_path, "one", mixed.factors())
    expected = written(ckpt, planned, tmp_path / "out")
    shutil.rmtree(base)
    assert contents(virtual.open(planned)) == expected


def test_a_base_behind_a_url(virtual: VirtualModels, ckpt: Registry, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    url = f"memory://virtual-{tmp_path.name}"
    system.put(str(mixed.write_base(tmp_path / "mixed")) + "/", url + "/", recursive=True)
    mixed.write_lora(tmp_path / "one", mixed.factors())
    ckpt.register(str(tmp_path / "one"), Registration(base=url, adapter="one"))
    planned = ckpt.plan(ckpt.resolve("one"))
    model = virtual.open(planned)
    expected = written(ckpt, planned, tmp_path / "out")
    assert contents(model) == expected
    reading = model.read(mixed.FIRST, 0, 5 << 20)
    next(reading)
    system.pipe(f"{url}/{mixed.FIRST}", system.cat(f"{url}/{mixed.FIRST}"))  # the same bytes; nobody can know
    with pytest.raises(BaseChanged):
        list(reading)


# ---- many readers


@pytest.mark.parametrize("cache_bytes", [0, 3 << 20, 64 << 20])
def test_many_readers_at_once(ckpt: Registry, planned: Planned, tmp_path: Path, cache_bytes: int) -> None:
    expected = written(ckpt, planned, tmp_path / "out")
    with closing(VirtualModels(Workspace(ckpt.settings), cache_bytes, threads=3)) as virtual:
        together = threading.Barrier(8)

        def read(number: int) -> bool:
            together.wait()
            model = virtual.open(planned)
            return contents(model) == expected and all(
                joined(model, path, number * 1000) == data[number * 1000 :] for path, data in expected.items()
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))


def test_blocks_that_were_kept_are_compared_with_the_base(virtual: VirtualModels, planned: Planned) -> None:
    """Parts of tensors are given away by the identity of the files; all of one only after a look at its bytes, also where they were kept."""
    model = virtual.open(planned)
    place = next(tensor for tensor in planned.plan.base.tensors if tensor.spec.name == mixed.Q)
    path = Path(planned.plan.base.url) / place.file
    alter(path, place.offset_bytes)
    start = place.offset_bytes
    for block in range(2):  # all but the last of its three blocks
        assert len(joined(model, place.file, start + block * (2 << 20), start + (block + 1) * (2 << 20))) == 2 << 20
    with pytest.raises(BaseChanged) as caught:
        joined(model, place.file)
    assert caught.value.subject == mixed.Q


def test_a_slow_reader_holds_up_nobody(ckpt: Registry, planned: Planned) -> None:
    with closing(VirtualModels(Workspace(ckpt.settings), 0, threads=1)) as virtual:
        model = virtual.open(planned)
        slow = [model.read(mixed.SECOND) for _ in range(10)]
        for reading in slow:
            next(reading)
            next(reading)
        expected = joined(model, mixed.SECOND)
        for reading in slow:
            assert expected.endswith(b"".join(map(bytes, reading)))


def test_readers_that_go_away(ckpt: Registry, planned: Planned) -> None:
    with closing(VirtualModels(Workspace(ckpt.settings), threads=1)) as virtual:
        for _ in range(50):
            with closing(virtual.open(planned).read(mixed.SECOND)) as reading:  # type: ignore[type-var]
                next(reading)
                next(reading)
        assert len(joined(virtual.open(planned), mixed.SECOND)) == virtual.open(planned).files[mixed.SECOND]


# ---- what is not given away


def alter(path: Path, offset: int, *, hidden: bool = True) -> None:
    """Change a byte of a file in place, and its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        (old,) = file.read(1)
        file.seek(offset)
        file.write(bytes([old ^ 1]))
    if hidden:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_adapter_that_does_nothing(virtual: VirtualModels, ckpt: Registry, tmp_path: Path) -> None:
    planned = plan(ckpt, tmp_path, "zero", mixed.factors(scale=0.0))
    with pytest.raises(NothingMerged):
        virtual.open(planned)
    assert open_files(tmp_path) == []


def test_a_base_that_changed_before(virtual: VirtualModels, planned: Planned) -> None:
    path = Path(planned.plan.base.url) / mixed.SECOND
    os.utime(path, (1, 1))
    with pytest.raises(BaseChanged) as caught:
        virtual.open(planned)
    assert caught.value.subject == mixed.SECOND


@pytest.mark.parametrize("path", [mixed.SECOND, "config.json"])
def test_a_base_that_changes_between_reads(virtual: VirtualModels, planned: Planned, path: str) -> None:
    model, place = virtual.open(planned), Path(planned.plan.base.url) / path
    expected = joined(model, path)
    kept = place.with_name("kept")
    shutil.copy2(place, kept)
    os.replace(place, place.with_name("away"))
    with pytest.raises(BaseChanged):
        model.read(path)
    os.replace(kept, place)  # the same bytes, at the same time, as another file
    with pytest.raises(BaseChanged):
        virtual.open(planned).read(path)
    os.replace(place.with_name("away"), place)
    assert joined(virtual.open(planned), path) == expected


def test_a_base_that_changes_while_it_is_read(virtual: VirtualModels, planned: Planned) -> None:
    model, path = virtual.open(planned), Path(planned.plan.base.url) / mixed.SECOND
    before = joined(model, mixed.SECOND)
    reading = model.read(mixed.SECOND)
    given_away = [bytes(next(reading)) for _ in range(2)]
    alter(path, path.stat().st_size - 1, hidden=False)
    with pytest.raises(BaseChanged):
        given_away.extend(map(bytes, reading))
    assert before.startswith(b"".join(given_away))


# ---- what is open


def test_models_that_are_let_go_leave_nothing_open(ckpt: Registry, planned: Planned, tmp_path: Path) -> None:
    virtual = VirtualModels(Workspace(ckpt.settings))
    model = virtual.open(planned)
    assert virtual.open(planned) is model
    reading = model.read(mixed.SECOND)
    given_away = [bytes(next(reading))]
    virtual.close()
    given_away += map(bytes, reading)
    assert sum(map(len, given_away)) == model.files[mixed.SECOND]
    assert open_files(tmp_path) == []
    assert joined(model, mixed.SECOND) == b"".join(given_away)
    assert open_files(tmp_path) == []


# ---- values that are remembered


def test_a_value_is_made_once() -> None:
    kept, made = Remembered[int](10), []
    begun = threading.Barrier(4)

    def make() -> int:
        made.append(1)
        return 7

    def ask(_: int) -> int:
        begun.wait()
        return kept.get("seven", make)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [7] * 4
    assert len(made) == 1


def test_the_least_recently_used_goes_first() -> None:
    gone: list[str] = []
    kept = Remembered[str](3, forget=gone.append)
    for name in ("a", "b", "c", "a", "d"):
        kept.get(name, lambda name=name: name)  # type: ignore[misc]
    assert gone == ["b"]
    kept.get("large", lambda: "large", 4)
    assert gone == ["b", "c", "a", "d", "large"]
    kept.get("e", lambda: "e")
    kept.clear()
    assert gone[-1] == "e"


def test_so_many_stay_whatever_their_size() -> None:
    gone: list[int] = []
    kept = Remembered[int](3, at_least=2, forget=gone.append)
    for number in range(4):
        kept.get(number, lambda number=number: number, 100)  # type: ignore[misc]
    assert gone == [0, 1]


def test_what_cannot_be_made_is_asked_for_again() -> None:
    kept = Remembered[int](3)

    def fail() -> int:
        raise PathNotFound("x")

    with pytest.raises(RegistryError):
        kept.get("a", fail)
    assert kept.get("a", lambda: 1) == 1
