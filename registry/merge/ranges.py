"""Execute a plan for any bytes of its files: only the blocks of the grid that a range touches are read or computed, and nothing is written.

They are the bytes that `engine` writes. A range with a whole tensor in it compares what was read of the base with the fingerprint before the
tensor's last piece is given away; for parts of tensors, whoever opens the base has to see that its files are the recorded ones.
"""

from __future__ import annotations

import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

from registry.changes import Change, Combined, LowRank, Part, Step, Tuned
from registry.errors import BaseChanged, NotFinite, NothingMerged
from registry.fingerprint import tensor_hasher
from registry.merge.blocks import Block, ComputedTensor, Sources, torch_in_one_thread
from registry.merge.plan import BLOCK_BYTES, Compute, Copy, OutputFile, Plan, Segment
from registry.merge.reading import Scratch, read_bytes
from registry.merge.sums import FactorReader
from registry.refs import Digest
from registry.remembered import Remembered
from registry.tensors import StoredTensor
from registry.torchzip import Descriptor, Literal

# Tensors whose factors a file keeps by itself; whoever shares memory between files gives its own `prepare`.
_KEPT = 2
# What is copied at once: as much as a block of 16-bit numbers, so that buffers that do both are no larger.
_COPY_BYTES = BLOCK_BYTES // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is read or computed at once: rows `first … last` of a computed tensor, or such bytes of any other segment.

    `index` is the segment's, `at` where the first byte is in the file.
    """

    index: int
    first: int
    last: int
    at: int
    size_bytes: int

    @property
    def end(self) -> int:
        """One past the last byte in the file."""
        return self.at + self.size_bytes


# Gives the blocks of pieces of tensors in their order, each valid until the next.
Fetch = Callable[["RangedFile", Iterable[Piece]], Generator[Block]]
# Gives a segment's tensor, made ready if it is not.
Prepare = Callable[[int, Change, Callable[[], ComputedTensor]], ComputedTensor]


def one_by_one(file: RangedFile, pieces: Iterable[Piece]) -> Generator[Block]:
    """Blocks that are computed when they are asked for."""
    scratch = Scratch()
    for piece in pieces:
        yield file.block(piece, scratch)


@dataclass(slots=True)
class _Passing:
    """A tensor that goes by as a whole: the hash of what it was made from, None where that needs no comparing, and its checksum so far."""

    hasher: Any
    checksum: int = 0


@final
class RangedFile:
    """A weights file of a plan that can be read at any place, by several threads at once.

    It remembers which tensors of the base were compared, and the checksums that a zip wants behind its data.
    """

    def __init__(self, file: OutputFile, plan: Plan, sources: Sources, prepare: Prepare | None = None) -> None:
        self._file, self._plan, self._sources = file, plan, sources
        self._factors = FactorReader(sources.adapter)
        self._prepare = prepare or _keeping_few()
        self._starts = list(accumulate((segment.size_bytes for segment in file.segments), initial=0))
        self._compared: set[int] = set()
        self._checksums: dict[str, int] = {}
        self._summing = threading.Lock()

    @property
    def base_files(self) -> frozenset[str]:
        """The files of the base that its bytes follow from."""
        return frozenset(tensor.file for segment in self._file.segments for tensor in _of_base(segment))

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """The pieces that bytes `start … end` of the file lie in, in order."""
        first_index = max(0, bisect_right(self._starts, start) - 1)
        for index in range(first_index, len(self._file.segments) if start < end else first_index):
            begin = self._starts[index]
            if begin >= end:
                return
            for first, last, offset, size in _grid(self._file.segments[index]):
                if begin + offset + size > start and begin + offset < end:
                    yield Piece(index=index, first=first, last=last, at=begin + offset, size_bytes=size)

    def is_computed(self, piece: Piece) -> bool:
        """Whether a piece takes more than reading."""
        return isinstance(self._file.segments[piece.index], Compute)

    def _is_of_tensor(self, piece: Piece) -> bool:
        return isinstance(self._file.segments[piece.index], (Copy, Compute))

    def block(self, piece: Piece, scratch: Scratch) -> Block:
        """A piece of a tensor, on buffers that nobody else uses meanwhile."""
        segment = self._file.segments[piece.index]
        if isinstance(segment, Compute):
            with nullcontext() if segment.change.is_rounded_sum else torch_in_one_thread():
                tensor = self._prepare(piece.index, segment.change, lambda: self._computed(segment.change))
                return tensor.block(piece.first, piece.last, scratch)
        assert isinstance(segment, Copy)  # noqa: S101 - what lies around tensors is never asked for
        data = scratch.take("base", piece.size_bytes)
        self._sources.base.read_into(segment.tensor.file, segment.tensor.offset_bytes + piece.first, data)
        return Block(data, base=data)

    def _computed(self, change: Change) -> ComputedTensor:
        return ComputedTensor(change, self._sources, self._factors)

    def read(self, start: int, end: int, fetch: Fetch = one_by_one) -> Generator[bytes | memoryview]:
        """Bytes `start … end` in pieces, each valid until the next.

        Args:
            start, end: within the file.
            fetch: reads and computes blocks, perhaps ahead.

        Raises:
            BaseChanged: a tensor of the base that the range has in it as a whole is not what was fingerprinted.
            NotFinite: a merged value overflows.
        """
        passing: _Passing | None = None
        with closing(fetch(self, filter(self._is_of_tensor, self.pieces(start, end)))) as blocks:
            for piece in self.pieces(start, end):
                data: bytes | memoryview
                if self._is_of_tensor(piece):
                    block = next(blocks)
                    if piece.first == 0:
                        passing = self._begun(piece, start, end)
                    self._see(piece, block, passing)
                    data = block.data
                else:
                    data = self._frame(self._file.segments[piece.index], fetch)
                yield data[max(0, start - piece.at) : end - piece.at]

    # -- what lies around tensors

    def _frame(self, segment: Segment, fetch: Fetch) -> bytes:
        if isinstance(segment, Literal):
            return segment.data
        layout = self._file.layout
        assert layout is not None  # noqa: S101 - the planner puts such segments into torch zips only
        if isinstance(segment, Descriptor):
            return layout.descriptor(segment.name, self._checksum(segment.name, fetch))
        stored = [each.name for each in self._file.segments if isinstance(each, Descriptor)]
        return layout.directory({name: self._checksum(name, fetch) for name in stored})

    def _checksum(self, name: str, fetch: Fetch) -> int:
        """The CRC-32 of a tensor; where it has not gone by yet, it does now."""
        with self._summing:  # whoever comes second finds it
            if name not in self._checksums:
                index = self._places[name]
                for _ in self.read(self._starts[index], self._starts[index + 1], fetch):
                    pass
            return self._checksums.get(name, 0)  # an empty tensor has no pieces

    # -- tensors that go by

    def _begun(self, piece: Piece, start: int, end: int) -> _Passing | None:
        """The tensor that a piece begins; None where the range has not all of it."""
        if piece.at < start or self._starts[piece.index + 1] > end:
            return None
        source = _read_along(self._file.segments[piece.index])
        return _Passing(None if source is None else tensor_hasher(source.spec))

    def _see(self, piece: Piece, block: Block, passing: _Passing | None) -> None:
        segment = self._file.segments[piece.index]
        assert isinstance(segment, (Copy, Compute))  # noqa: S101 - it has a block
        if not block.record.finite:
            raise NotFinite(segment.target.name, segment.target.dtype.long_name)
        if passing is None:
            return
        if passing.hasher is not None:
            self._hash(piece, block, passing)
        if self._file.layout is not None:
            passing.checksum = zlib.crc32(block.data, passing.checksum)
        if piece.end == self._starts[piece.index + 1]:
            self._finish(piece.index, passing, segment)

    def _hash(self, piece: Piece, block: Block, passing: _Passing) -> None:
        """A block from a cache does not have the bytes that it was made from: they are read again, once for each tensor."""
        if block.base is not None:
            passing.hasher.update(block.base)
        elif piece.index in self._compared:
            passing.hasher = None
        else:
            passing.hasher.update(self._base_bytes(piece))

    def _base_bytes(self, piece: Piece) -> bytearray:
        segment = self._file.segments[piece.index]
        source = _read_along(segment)
        assert isinstance(segment, Compute)  # noqa: S101 - copies have their bytes
        assert source is not None  # noqa: S101 - there is a hash of it
        columns = segment.change.shape[1]
        return read_bytes(self._sources.base, source, piece.first * columns, (piece.last - piece.first) * columns)

    def _finish(self, index: int, passing: _Passing, segment: Copy | Compute) -> None:
        source = _read_along(segment)
        if passing.hasher is not None and source is not None:
            expected, found = self._plan.base.fingerprint.tensors[source.spec.name], Digest(passing.hasher.hexdigest())
            if found != expected:
                raise BaseChanged(source.spec.name, str(expected), str(found))
            self._compared.add(index)
        if self._file.layout is not None:
            self._checksums[segment.target.name] = passing.checksum

    @property
    def _places(self) -> dict[str, int]:
        segments = enumerate(self._file.segments)
        return {segment.target.name: index for index, segment in segments if isinstance(segment, (Copy, Compute))}


def _keeping_few() -> Prepare:
    kept = Remembered[ComputedTensor](_KEPT)
    return lambda index, change, make: kept.get(index, make)


def _grid(segment: Segment) -> Iterator[tuple[int, int, int, int]]:
    """A segment's pieces: first and last as `Piece` has them, the offset in the segment and the size in bytes."""
    if isinstance(segment, Compute):
        row_bytes = segment.change.shape[1] * segment.target.dtype.itemsize_bytes
        for first, last in segment.blocks():
            yield first, last, first * row_bytes, (last - first) * row_bytes
        return
    step = _COPY_BYTES if isinstance(segment, Copy) else max(1, segment.size_bytes)
    for first in range(0, segment.size_bytes, step):
        last = min(first + step, segment.size_bytes)
        yield first, last, first, last - first


def _read_along(segment: Segment) -> StoredTensor | None:
    """The tensor of the base whose bytes come with the blocks of a segment, in order and all of them."""
    if isinstance(segment, Copy):
        return segment.tensor
    if isinstance(segment, Compute) and (source := segment.change.source) is not None:
        return source if source.spec.shape == segment.target.shape else None
    return None


def _of_base(segment: Segment) -> Iterator[StoredTensor]:
    """The tensors of the base that a segment follows from."""
    if isinstance(segment, Copy):
        yield segment.tensor
    elif isinstance(segment, Compute):
        if segment.change.source is not None:
            yield segment.change.source
        for step in segment.change.steps:
            yield from _needed(step)


def _needed(step: Step) -> Iterator[StoredTensor]:
    if isinstance(step, Tuned):
        yield from step.base.values()
    elif isinstance(step, Combined):
        for part in step.parts:
            for each in part.steps:
                yield from _needed(each)


def check_changes_anything(plan: Plan, sources: Sources) -> None:
    """See that a plan does anything at all, as far as the factors of low-rank changes tell.

    Raises:
        NothingMerged: they are all zero, and there is nothing else.
    """
    factors = FactorReader(sources.adapter)
    if not any(_changes(change, factors) for change in plan.computed):
        raise NothingMerged(plan.base.name, 0.0)


def _changes(change: Change | Part, factors: FactorReader) -> bool:
    return change.replacement is not None or any(_does_something(step, factors) for step in change.steps)


def _does_something(step: Step, factors: FactorReader) -> bool:
    if isinstance(step, LowRank):
        values = factors.read(step)
        return bool(values.scale and values.left.any() and values.right.any())
    return isinstance(step, Tuned) or any(_changes(part, factors) for part in step.parts)
