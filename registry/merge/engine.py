"""Execute a plan: several threads read and compute pieces, one hashes them and writes them in order.

The bytes do not depend on the number of threads. Memory is a few pieces, whatever the model's size, and the factors of the tensors in work.
"""

from __future__ import annotations

import os
import queue
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, cast, final

import torch
from torch import Tensor

from registry.changes import Change, LowRank, Rows
from registry.errors import BaseChanged, NotFinite, NothingMerged
from registry.fingerprint import tensor_hasher
from registry.locations import Location
from registry.manifest import FileEntry, TensorRecord
from registry.merge.deltas import (
    TORCH_DTYPES,
    Block,
    BlockRecord,
    Factors,
    Scratch,
    factor_record,
    merge_block,
    sum_dtype,
)
from registry.merge.journal import Journal
from registry.merge.plan import BLOCK_BYTES, Compute, Copy, OutputFile, Plan, Segment, Sidecar
from registry.merge.sinks import Sink, SinkWriter
from registry.refs import Digest
from registry.tensors import DType, StoredTensor, TensorSpec
from registry.torchzip import Descriptor, Directory, Literal

Advance = Callable[[int], None]
_SIGNIFICANT_DIGITS = 6
# Pieces under way besides those in work: enough to keep all threads busy while one waits for its turn.
_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was written: every file with its digest, and what happened to every tensor that was computed."""

    files: tuple[FileEntry, ...]
    records: tuple[TensorRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a plan reads."""

    base: Location
    adapter: Location


def execute(
    plan: Plan,
    sources: Sources,
    sink: Sink,
    journal: Journal,
    *,
    provenance: Callable[[Sequence[FileEntry], Sequence[TensorRecord]], tuple[str, bytes]],
    advance: Advance = lambda done_bytes: None,
    threads: int | None = None,
) -> Outcome:
    """Write a merged model.

    Files that an earlier try finished are kept. The sink is published as the last step.

    Args:
        plan: what to write.
        sources: the folders that the plan reads from.
        sink: where to.
        journal: of this recipe and sink, locked.
        provenance: makes name and bytes of the file that is written last, from all others.
        advance: told of each number of weight bytes that are done.
        threads: that compute; the number of cores when None.

    Raises:
        BaseChanged: a tensor of the base is not what was fingerprinted.
        NothingMerged: no element would differ from the base's.
        NotFinite: a merged value overflows.
        StorageFailed: the sink does not take the bytes.
    """
    sink.prepare(plan.size_bytes)
    with _Pieces(sources, threads or os.cpu_count() or 1) as pieces:
        try:
            entries, records = _write_weights(plan, pieces, sink, journal, advance)
        except (NothingMerged, NotFinite):  # trying again would not help
            sink.discard()
            journal.finish()
            raise
    entries.extend(_write_small(sink, sidecar.path, _sidecar_data(sidecar, sources)) for sidecar in plan.sidecars)
    path, data = provenance(entries, records)
    entries.append(_write_small(sink, path, data))
    sink.publish()
    return Outcome(files=tuple(entries), records=tuple(records))


def _write_weights(
    plan: Plan, pieces: _Pieces, sink: Sink, journal: Journal, advance: Advance
) -> tuple[list[FileEntry], list[TensorRecord]]:
    entries: list[FileEntry] = []
    records: list[TensorRecord] = []
    largest = 0.0
    for file in plan.files:
        kept = journal.finished(file.path)
        if kept is not None and sink.holds(kept[0]):
            advance(file.size_bytes)
            entry, of_file = kept
        else:
            writing = _FileWriting(file, plan, pieces, advance)
            entry, of_file = writing.run(sink)
            largest = max(largest, writing.largest_delta)
            journal.add(entry, of_file)
        entries.append(entry)
        records.extend(of_file)
    if not any(record.changed for record in records if record.action != "converted"):
        raise NothingMerged(plan.base.name, largest)
    return entries, records


def _sidecar_data(sidecar: Sidecar, sources: Sources) -> bytes:
    if sidecar.data is not None:
        return sidecar.data
    with (sources.adapter if sidecar.from_adapter else sources.base).open(sidecar.path) as stream:
        return stream.read()


def _write_small(sink: Sink, path: str, data: bytes) -> FileEntry:
    with _cancelling(sink.create(path, len(data))) as writer:
        writer.write(data)
        return writer.commit()


@contextmanager
def _cancelling(writer: SinkWriter) -> Iterator[SinkWriter]:
    try:
        yield writer
    finally:
        writer.cancel()


@dataclass(slots=True)
class _Piece:
    """A piece of the output. `base`: the bytes of the base's tensor that went into it, none where another shape replaces it."""

    data: memoryview
    base: memoryview | None = None
    record: BlockRecord | None = None
    scratch: Scratch | None = None


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.view(-1).view(torch.uint8).numpy()))


_Task = Callable[[Scratch], _Piece]


@final
class _Pieces:
    """Computes pieces on a pool of threads and gives them back in order, a few ahead of who takes them."""

    def __init__(self, sources: Sources, threads: int) -> None:
        self._sources = sources
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._window = threads + _AHEAD
        self._free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        for _ in range(self._window + 1):
            self._free.put(Scratch())

    def __enter__(self) -> _Pieces:
        # One thread a piece: pieces are the parallelism, and torch's own pool would fight for the same cores.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def of(self, segments: Iterable[Segment]) -> Generator[tuple[int, _Piece]]:
        """The pieces of segments in order, each with its segment's index. A segment has one at least; each is valid until the next one."""
        waiting: deque[tuple[int, Future[_Piece]]] = deque()
        try:
            for index, segment in enumerate(segments):
                for task in self._tasks(segment):
                    waiting.append((index, self._pool.submit(self._run, task)))
                    if len(waiting) >= self._window:
                        yield from self._oldest(waiting)
            while waiting:
                yield from self._oldest(waiting)
        finally:
            for _, future in waiting:
                future.cancel()

    def _oldest(self, waiting: deque[tuple[int, Future[_Piece]]]) -> Iterator[tuple[int, _Piece]]:
        index, future = waiting.popleft()
        piece = future.result()
        yield index, piece
        self._free.put(cast("Scratch", piece.scratch))

    def _run(self, task: _Task) -> _Piece:
        scratch = self._free.get()
        piece = task(scratch)
        piece.scratch = scratch
        return piece

    def _tasks(self, segment: Segment) -> Iterator[_Task]:
        if isinstance(segment, Copy) and segment.size_bytes:
            yield from self._copy_tasks(segment.tensor)
        elif isinstance(segment, Compute) and segment.size_bytes:
            yield from self._compute_tasks(segment)
        else:
            yield lambda scratch: _Piece(memoryview(b""))

    def _compute_tasks(self, segment: Compute) -> Iterator[_Task]:
        factors = self._factors(segment.change)
        for first, last in segment.blocks():
            yield _ComputeTask(self._sources, segment, factors, first, last)

    def _factors(self, change: Change) -> list[Factors]:
        dtype = sum_dtype(TORCH_DTYPES[change.target.dtype])
        return [self._load(delta, dtype) for delta in change.deltas]

    def _copy_tasks(self, tensor: StoredTensor) -> Iterator[_Task]:
        for start in range(0, tensor.spec.size_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, tensor.spec.size_bytes - start)

            def copy(scratch: Scratch, start: int = start, size: int = size) -> _Piece:
                data = _bytes_of(scratch.take("base", torch.uint8, 1, size))
                self._sources.base.read_into(tensor.file, tensor.offset_bytes + start, data)
                return _Piece(data, base=data)

            yield copy

    def _load(self, delta: LowRank, dtype: torch.dtype) -> Factors:
        return Factors(
            a=self._load_rows(delta.a, dtype),
            b=self._load_rows(delta.b, dtype),
            scale=delta.scale,
            row=delta.row,
            transposed=delta.transposed,
        )

    def _load_rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        spec, columns = rows.tensor.spec, rows.tensor.spec.shape[1]
        values = torch.empty((rows.count, columns), dtype=TORCH_DTYPES[spec.dtype])
        _read_elements(self._sources.adapter, rows.tensor, rows.start * columns, values.view(-1))
        return values.to(dtype)


def _read_elements(location: Location, tensor: StoredTensor, first: int, into: Tensor) -> None:
    offset = tensor.offset_bytes + first * tensor.spec.dtype.itemsize_bytes
    location.read_into(tensor.file, offset, _bytes_of(into))


@final
@dataclass(frozen=True, slots=True)
class _ComputeTask:
    """Rows `first … last` of a computed tensor."""

    sources: Sources
    segment: Compute
    factors: Sequence[Factors]
    first: int
    last: int

    def __call__(self, scratch: Scratch) -> _Piece:
        change = self.segment.change
        source = change.source if change.source and change.source.spec.shape == change.target.shape else None
        base = self._read(self.sources.base, source, "base", scratch)
        replacement = self._read(self.sources.adapter, change.replacement, "replacement", scratch)
        result = self._take("result", change.target.dtype, scratch)
        block = Block(first=self.first, base=base, replacement=replacement, result=result)
        record = merge_block(block, self.factors, scratch)
        if self.first == 0 and replacement is None:
            record += factor_record(self.factors)
        return _Piece(_bytes_of(result), None if base is None else _bytes_of(base), record)

    def _take(self, role: str, dtype: DType, scratch: Scratch) -> Tensor:
        rows, columns = self.last - self.first, self.segment.row_elements
        return scratch.take(role, TORCH_DTYPES[dtype], rows, columns)

    def _read(self, location: Location, tensor: StoredTensor | None, role: str, scratch: Scratch) -> Tensor | None:
        if tensor is None:
            return None
        values = self._take(role, tensor.spec.dtype, scratch)
        _read_elements(location, tensor, self.first * self.segment.row_elements, values)
        return values


@final
@dataclass(slots=True)
class _FileWriting:
    """One weights file on its way: writes pieces in order, hashes what was read, and keeps the checksums that a zip wants behind its data."""

    file: OutputFile
    plan: Plan
    pieces: _Pieces
    advance: Advance
    checksums: dict[str, int] = field(default_factory=dict)
    records: list[TensorRecord] = field(default_factory=list)
    largest_delta: float = 0.0

    def run(self, sink: Sink) -> tuple[FileEntry, tuple[TensorRecord, ...]]:
        with (
            _cancelling(sink.create(self.file.path, self.file.size_bytes)) as writer,
            closing(self.pieces.of(self.file.segments)) as stream,
        ):
            for index, pieces in groupby(stream, key=itemgetter(0)):
                segment = self.file.segments[index]
                if isinstance(segment, (Copy, Compute)):
                    self._tensor(segment, (piece for _, piece in pieces), writer)
                else:
                    data = self._frame(segment)
                    writer.write(data)
                    self.advance(len(data))
            return writer.commit(), tuple(self.records)

    def _frame(self, segment: Literal | Descriptor | Directory) -> bytes:
        if isinstance(segment, Literal):
            return segment.data
        layout = self.file.layout
        assert layout is not None  # noqa: S101 - the planner puts such segments into torch zips only
        if isinstance(segment, Descriptor):
            return layout.descriptor(segment.name, self.checksums[segment.name])
        return layout.directory(self.checksums)

    def _tensor(self, segment: Copy | Compute, pieces: Iterator[_Piece], writer: SinkWriter) -> None:
        source = segment.tensor if isinstance(segment, Copy) else segment.change.source
        hasher = None if source is None else tensor_hasher(source.spec)
        checksum, total, was_read = 0, BlockRecord(), False
        for piece in pieces:
            if piece.base is not None and hasher is not None:
                hasher.update(piece.base)
                was_read = True
            writer.write(piece.data)
            if self.file.layout is not None:
                checksum = zlib.crc32(piece.data, checksum)
            total += piece.record or BlockRecord()
            self.advance(len(piece.data))
        if was_read and source is not None and hasher is not None:
            self._check_base(source, Digest(hasher.hexdigest()))
        if isinstance(segment, Compute):
            self._record(segment.change, total)
        self.checksums[_target(segment).name] = checksum

    def _check_base(self, source: StoredTensor, found: Digest) -> None:
        expected = self.plan.base.fingerprint.tensors[source.spec.name]
        if found != expected:
            raise BaseChanged(source.spec.name, str(expected), str(found))

    def _record(self, change: Change, total: BlockRecord) -> None:
        if not total.finite:
            raise NotFinite(change.target.name, change.target.dtype.long_name)
        has_base = change.target.name in self.plan.base.fingerprint.tensors
        kept = "replaced" if change.replacement else "merged" if change.deltas else "converted"
        self.largest_delta = max(self.largest_delta, total.largest_delta)
        self.records.append(
            TensorRecord(
                name=change.target.name,
                action=kept if has_base else "added",  # type: ignore[arg-type]
                base_norm=_rounded(total.base_square**0.5),
                delta_norm=_rounded(total.delta_square**0.5),
                changed=_rounded(total.changed / total.elements if total.elements else 0.0),
                lost=_rounded((total.reached - total.changed) / total.reached if total.reached else 0.0),
            )
        )


def _target(segment: Copy | Compute) -> TensorSpec:
    return segment.tensor.spec if isinstance(segment, Copy) else segment.change.target


def _rounded(value: float) -> float:
    """So many digits that the last bits of a sum, which the processor decides, do not reach the record."""
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
