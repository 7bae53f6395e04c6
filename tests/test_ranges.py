"""Any bytes of a merged model that is not written are those of the one that is."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import mixed
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.base_models import open_base
from registry.errors import BaseChanged, NotFinite, NothingMerged
from registry.merge.blocks import Block, Sources
from registry.merge.plan import Compute, Copy, OutputFile, Plan, needed_bytes
from registry.merge.ranges import Piece, RangedFile, check_changes_anything, one_by_one
from registry.merging import Planned
from registry.registering import Registration
from registry.service import Registry
from registry.workspace import Workspace

KINDS = ("lora", "lora to float16", "dora", "ia3", "linear", "ties", "litgpt")


@dataclass(frozen=True)
class Made:
    """A plan, what it reads, and the files that the engine wrote."""

    plan: Plan
    sources: Sources
    written: Mapping[str, bytes]

    def file(self, path: str) -> RangedFile:
        return RangedFile(next(file for file in self.plan.files if file.path == path), self.plan, self.sources)


def sources_of(registry: Registry, planned: Planned) -> Sources:
    workspace = Workspace(registry.settings)
    return Sources(base=open_base(workspace, planned.plan.base), adapter=planned.together.folder(workspace))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Made]]:
    folder = tmp_path_factory.mktemp("ranges")
    found = {}
    with tiny.open_registry(folder / "home") as registry:
        for number, (kind, planned) in enumerate(mixed.every_plan(registry, folder)):
            registry.merge(planned, out=str(folder / f"out{number}"))
            written = {file.path: (folder / f"out{number}" / file.path).read_bytes() for file in planned.plan.files}
            found[kind] = Made(planned.plan, sources_of(registry, planned), written)
    assert tuple(found) == KINDS
    yield found
    for each in found.values():
        each.sources.base.close()
        each.sources.adapter.close()


def joined(file: RangedFile, start: int, end: int) -> bytes:
    return b"".join(map(bytes, file.read(start, end)))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files(made: Mapping[str, Made], kind: str) -> None:
    for path, data in made[kind].written.items():
        assert joined(made[kind].file(path), 0, len(data)) == data


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_range(made: Mapping[str, Made], kind: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(made[kind].written)))
    expected = made[kind].written[path]
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, min(len(expected), start + (5 << 20))))
    assert joined(made[kind].file(path), start, end) == expected[start:end]


@pytest.mark.parametrize("kind", ["lora", "litgpt"])
def test_where_segments_meet(made: Mapping[str, Made], kind: str) -> None:
    for path, expected in made[kind].written.items():
        file = made[kind].file(path)
        for piece in file.pieces(0, len(expected)):
            for start, end in ((piece.at, piece.end), (max(0, piece.at - 1), piece.at + 1), (piece.at, piece.at)):
                assert joined(file, start, end) == expected[start:end]


def test_only_what_a_range_touches_is_computed(made: Mapping[str, Made]) -> None:
    file = made["lora"].file(mixed.SECOND)
    weight = place_of(made["lora"].plan.files[1], mixed.Q)
    (first, *_, last) = [piece for piece in file.pieces(0, 1 << 40) if piece.index == weight]
    assert (first.first, first.last, last.last) == (0, 1024, mixed.ROWS)
    assert [piece.first for piece in file.pieces(first.end - 1, first.end)] == [0]
    assert [piece.first for piece in file.pieces(first.end - 1, first.end + 1)] == [0, 1024]
    assert list(file.pieces(first.at, first.at)) == []


def test_a_file_tells_what_it_reads(made: Mapping[str, Made]) -> None:
    assert made["lora"].file(mixed.FIRST).base_files == {mixed.FIRST}
    assert made["litgpt"].file("lit_model.pth").base_files == {"lit_model.pth"}


def test_factors_of_all_inputs_count_as_memory(made: Mapping[str, Made]) -> None:
    one, two = (sum(map(needed_bytes, made[kind].plan.computed)) for kind in ("lora", "ties"))
    assert two == 2 * one > 0


def test_the_end_of_an_archive_alone(made: Mapping[str, Made]) -> None:
    """Its checksums follow from all tensors, which are run over once."""
    file, expected = made["litgpt"].file("lit_model.pth"), made["litgpt"].written["lit_model.pth"]
    seen: list[Piece] = []

    def fetch(file: RangedFile, pieces: Iterable[Piece]) -> Generator[Block]:
        for piece in pieces:
            seen.append(piece)
            yield from one_by_one(file, [piece])

    for _ in range(2):
        found = b"".join(map(bytes, file.read(len(expected) - 100, len(expected), fetch)))
        assert found == expected[-100:]
    assert len(seen) == len(set(seen))


# ---- what is not given away


def planned_lora(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Plan, Sources]:
    base = mixed.write_base(folder / "base")
    mixed.write_lora(folder / "lora", tensors)
    with tiny.open_registry(folder / "home") as registry:
        registry.register(str(folder / "lora"), Registration(base=str(base), adapter="lora"))
        planned = registry.plan(registry.resolve("lora"))
        return planned.plan, sources_of(registry, planned)


@pytest.mark.parametrize("name", [mixed.EMBEDDING, mixed.Q, mixed.NORM, "scalar"])
def test_a_base_altered_behind_our_back(tmp_path: Path, name: str) -> None:
    plan, sources = planned_lora(tmp_path, mixed.factors())
    place = next(tensor for tensor in plan.base.tensors if tensor.spec.name == name)
    path = tmp_path / "base" / place.file
    data, status = bytearray(path.read_bytes()), path.stat()
    data[place.offset_bytes] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    output = next(file for file in plan.files if file.path == place.file)
    file = RangedFile(output, plan, sources)
    last = [piece for piece in file.pieces(0, output.size_bytes) if piece.index == place_of(output, name)][-1]
    given_away: list[int] = []
    with closing(file.read(0, output.size_bytes)) as pieces, pytest.raises(BaseChanged) as caught:
        given_away.extend(map(len, pieces))
    assert (caught.value.subject, sum(given_away)) == (name, last.at)


def place_of(file: OutputFile, name: str) -> int:
    """Which segment a tensor is."""
    names = [each.target.name if isinstance(each, (Copy, Compute)) else "" for each in file.segments]
    return names.index(name)


def test_a_delta_that_float16_cannot_hold(tmp_path: Path) -> None:
    plan, sources = planned_lora(tmp_path, mixed.factors(scale=1e5))
    output = plan.files[1]
    with pytest.raises(NotFinite) as caught:
        joined(RangedFile(output, plan, sources), 0, output.size_bytes)
    assert caught.value.tensor == mixed.V


def test_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    plan, sources = planned_lora(tmp_path, mixed.factors(scale=0.0))
    with pytest.raises(NothingMerged):
        check_changes_anything(plan, sources)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_do_something(made: Mapping[str, Made], kind: str) -> None:
    check_changes_anything(made[kind].plan, made[kind].sources)
