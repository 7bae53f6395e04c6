"""Execute a plan. A thread for each file hashes its pieces and writes them in order, several files at once; it computes them itself, or has them
computed by threads of a pool where there are more cores than files.

The bytes do not depend on the number of threads. Memory is a few pieces for each, whatever the model's size, and the factors of the tensors
in work.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import final

from registry.changes import Change
from registry.errors import BaseChanged, NotFinite, NothingMerged
from registry.fingerprint import tensor_hasher
from registry.locations import OfObjects, Origin, StoredObject
from registry.manifest import FileEntry, TensorRecord
from registry.merge.blocks import Block, ComputedTensor, Sources, torch_in_one_thread
from registry.merge.journal import Journal
from registry.merge.plan import BLOCK_BYTES, Compute, Copy, OutputFile, Plan, Segment, Sidecar
from registry.merge.reading import Scratch
from registry.merge.records import NOTHING, BlockRecord
from registry.merge.sinks import Sink, SinkWriter
from registry.merge.sums import FactorReader
from registry.refs import Digest
from registry.tensors import StoredTensor
from registry.torchzip import Descriptor, Directory, Literal

Advance = Callable[[int], None]
Provenance = Callable[[Sequence[FileEntry], Sequence[TensorRecord]], tuple[str, bytes]]
_SIGNIFICANT_DIGITS = 6
# Pieces under way besides those in work: enough to keep all threads busy while one waits for its turn.
_AHEAD = 2
# Files written at once: more would only take memory.
_MOST_FILES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was written: every file with its digest, and what happened to every tensor that was computed."""

    files: tuple[FileEntry, ...]
    records: tuple[TensorRecord, ...]


def execute(
    plan: Plan,
    sources: Sources,
    sink: Sink,
    journal: Journal,
    *,
    provenance: Provenance,
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
        threads: as many at most; the number of cores when None.

    Raises:
        BaseChanged: a tensor of the base is not what was fingerprinted.
        NothingMerged: no element would differ from the base's.
        NotFinite: a merged value overflows.
        StorageFailed: the sink does not take the bytes.
    """
    sink.prepare(plan.size_bytes)
    try:
        with torch_in_one_thread() if plan.needs_torch else nullcontext():
            entries, records = _Weights(plan, sources, sink, journal, advance).write(threads or os.cpu_count() or 1)
    except (NothingMerged, NotFinite):  # trying again would not help
        sink.discard()
        journal.finish()
        raise
    return finish(plan, sources, sink, entries, records, provenance=provenance)


def finish(
    plan: Plan,
    sources: Sources,
    sink: Sink,
    written: Sequence[FileEntry],
    records: Sequence[TensorRecord],
    *,
    provenance: Provenance,
) -> Outcome:
    """Write what belongs to a model besides its weights, which are written, and publish it.

    Raises:
        StorageFailed: the sink does not take the bytes.
    """
    entries = [
        *written,
        *(_write_small(sink, sidecar.path, _sidecar_data(sidecar, sources)) for sidecar in plan.sidecars),
    ]
    path, data = provenance(entries, records)
    entries.append(_write_small(sink, path, data))
    sink.publish()
    return Outcome(files=tuple(entries), records=tuple(records))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOutcome:
    """A weights file that was written by itself. `largest_delta` is the largest change of one element in it."""

    entry: FileEntry
    records: tuple[TensorRecord, ...]
    largest_delta: float


def execute_file(
    plan: Plan,
    path: str,
    sources: Sources,
    sink: Sink,
    *,
    advance: Advance = lambda done_bytes: None,
    threads: int | None = None,
) -> FileOutcome:
    """Write one weights file of a plan, as `execute` does: for processes that share the files of a model. Nothing is published.

    Args:
        path: which file.
        plan, sources, sink, advance, threads: as for `execute`. What `advance` raises stops the file.

    Raises:
        BaseChanged, NotFinite, StorageFailed: as `execute`.
    """
    file = next(each for each in plan.files if each.path == path)
    with (
        torch_in_one_thread() if plan.needs_torch else nullcontext(),
        _Pieces(sources, 1, threads or os.cpu_count() or 1) as pieces,
    ):
        writing = _FileWriting(file, plan, pieces, advance)
        entry, records = writing.run(sink)
    return FileOutcome(entry=entry, records=records, largest_delta=writing.largest_delta)


def check_merged(plan: Plan, records: Iterable[TensorRecord], largest_delta: float) -> None:
    """See that a merge changed anything at all.

    Raises:
        NothingMerged: no element differs from the base's.
    """
    if not any(record.changed for record in records if record.action != "converted"):
        raise NothingMerged(plan.base.name, largest_delta)


_Written = tuple[FileEntry, tuple[TensorRecord, ...]]


@final
class _Weights:
    """The weights files of a plan on their way."""

    def __init__(self, plan: Plan, sources: Sources, sink: Sink, journal: Journal, advance: Advance) -> None:
        self._plan, self._sources, self._sink, self._journal = plan, sources, sink, journal
        self._advance, self._lock = advance, threading.Lock()
        self._largest_delta = 0.0

    def write(self, threads: int) -> tuple[list[FileEntry], list[TensorRecord]]:
        """Write all files, or take over what an earlier try finished; in the plan's order."""
        written = {file.path: kept for file in self._plan.files if (kept := self._kept(file))}
        rest = [file for file in self._plan.files if file.path not in written]
        lanes = min(threads, len(rest), _MOST_FILES)
        if rest:
            with _Pieces(self._sources, len(rest), threads) as pieces, ThreadPoolExecutor(lanes, "file") as pool:
                writing = {pool.submit(self._write_file, file, pieces): file for file in rest}
                try:
                    for future in as_completed(writing):
                        written[writing[future].path] = future.result()
                except BaseException:
                    pieces.stop()
                    pool.shutdown(cancel_futures=True)
                    raise
        found = [written[file.path] for file in self._plan.files]
        records = [record for _, of_file in found for record in of_file]
        check_merged(self._plan, records, self._largest_delta)
        return [entry for entry, _ in found], records

    def _kept(self, file: OutputFile) -> _Written | None:
        kept = self._journal.finished(file.path)
        if kept is None or not self._sink.holds(kept[0]):
            return None
        self._advance(file.size_bytes)
        return kept

    def _write_file(self, file: OutputFile, pieces: _Pieces) -> _Written:
        writing = _FileWriting(file, self._plan, pieces, self._tell)
        written = writing.run(self._sink)
        with self._lock:
            # Before this thread begins with another file: a process that is killed then has finished this one.
            self._journal.add(*written)
            self._largest_delta = max(self._largest_delta, writing.largest_delta)
            pieces.finish_file()
        return written

    def _tell(self, done_bytes: int) -> None:
        with self._lock:
            self._advance(done_bytes)


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


_Task = Callable[[Scratch], Block]
# A piece that was computed, with the buffers that it lies on.
_Piece = tuple[Block, Scratch]


@final
class _Pieces:
    """Computes pieces, and gives them to each file in order. A file's thread computes them itself until there are fewer files left than threads;
    then the idle ones compute a few ahead for it."""

    def __init__(self, sources: Sources, files: int, threads: int) -> None:
        self._sources, self._factors = sources, FactorReader(sources.adapter)
        self._files, self._threads = files, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        self._is_stopped = False

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def objects(self, file: OutputFile) -> dict[str, StoredObject]:
        """What a file is copied from, by the base's path, where an S3 store has it. To be asked for before the first piece is read: what is
        copied later must still be what was read."""
        base = self._sources.base
        if not isinstance(base, OfObjects):
            return {}
        paths = {segment.tensor.file for segment in file.segments if isinstance(segment, Copy) and segment.size_bytes}
        return {path: found for path in sorted(paths) if (found := base.stored_object(path)) is not None}

    def finish_file(self) -> None:
        """One file fewer is to be written."""
        self._files -= 1

    def stop(self) -> None:
        """No file gets another piece."""
        self._is_stopped = True

    @property
    def _window(self) -> int:
        """How many pieces are computed ahead for a file; 0 while no thread is idle."""
        files = min(self._files, _MOST_FILES)
        return -(-(self._threads - files) // files) + _AHEAD if 0 < files < self._threads else 0

    def of(self, segments: Iterable[Segment]) -> Generator[tuple[int, Block]]:
        """The pieces of segments in order, each with its segment's index. A segment has one at least; each is valid until the next one."""
        tasks = ((index, task) for index, segment in enumerate(segments) for task in self._tasks(segment))
        for index, (block, scratch) in self._in_order(tasks):
            yield index, block
            self._free.put(scratch)
            if self._is_stopped:
                raise CancelledError

    def _in_order(self, tasks: Iterable[tuple[int, _Task]]) -> Generator[tuple[int, _Piece]]:
        waiting: deque[tuple[int, Future[_Piece]]] = deque()
        try:
            for index, task in tasks:
                window = self._window
                if not window and not waiting:
                    yield index, self._run(task)
                    continue
                waiting.append((index, self._pool.submit(self._run, task)))
                if len(waiting) >= window:
                    oldest, future = waiting.popleft()
                    yield oldest, future.result()
            while waiting:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _run(self, task: _Task) -> _Piece:
        try:
            scratch = self._free.get_nowait()
        except queue.Empty:
            scratch = Scratch()
        return task(scratch), scratch

    def _tasks(self, segment: Segment) -> Iterator[_Task]:
        if isinstance(segment, Copy) and segment.size_bytes:
            yield from self._copy_tasks(segment.tensor)
        elif isinstance(segment, Compute) and segment.size_bytes:
            yield from self._compute_tasks(segment)
        else:
            yield lambda scratch: Block(memoryview(b""))

    def _compute_tasks(self, segment: Compute) -> Iterator[_Task]:
        tensor = _Prepared(lambda: ComputedTensor(segment.change, self._sources, self._factors))
        for first, last in segment.blocks():

            def compute(scratch: Scratch, first: int = first, last: int = last) -> Block:
                return tensor.get().block(first, last, scratch)

            yield compute

    def _copy_tasks(self, tensor: StoredTensor) -> Iterator[_Task]:
        for start in range(0, tensor.spec.size_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, tensor.spec.size_bytes - start)

            def copy(scratch: Scratch, start: int = start, size: int = size) -> Block:
                data = scratch.take("base", size)
                self._sources.base.read_into(tensor.file, tensor.offset_bytes + start, data)
                return Block(data, base=data)

            yield copy


@final
class _Prepared:
    """A tensor that is prepared by the first thread that comes to one of its blocks."""

    def __init__(self, make: Callable[[], ComputedTensor]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: ComputedTensor | None = None

    def get(self) -> ComputedTensor:
        """The tensor; waits while another thread prepares it."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


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
    objects: dict[str, StoredObject] = field(default_factory=dict)

    def run(self, sink: Sink) -> tuple[FileEntry, tuple[TensorRecord, ...]]:
        self.objects = self.pieces.objects(self.file)
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

    def _tensor(self, segment: Copy | Compute, pieces: Iterator[Block], writer: SinkWriter) -> None:
        source = segment.tensor if isinstance(segment, Copy) else segment.change.source
        hasher = None if source is None else tensor_hasher(source.spec)
        checksum, total, was_read, origin = 0, NOTHING, False, self._origin(segment)
        for piece in pieces:
            if piece.base is not None and hasher is not None:
                hasher.update(piece.base)
                was_read = True
            writer.write(piece.data, origin)
            origin = origin and origin.after(len(piece.data))
            if self.file.layout is not None:
                checksum = zlib.crc32(piece.data, checksum)
            total += piece.record
            self.advance(len(piece.data))
        if was_read and source is not None and hasher is not None:
            self._check_base(source, Digest(hasher.hexdigest()))
        if isinstance(segment, Compute):
            self._record(segment.change, total)
        self.checksums[segment.target.name] = checksum

    def _origin(self, segment: Copy | Compute) -> Origin | None:
        if not isinstance(segment, Copy) or segment.tensor.file not in self.objects:
            return None
        return Origin(self.objects[segment.tensor.file], segment.tensor.offset_bytes)

    def _check_base(self, source: StoredTensor, found: Digest) -> None:
        expected = self.plan.base.fingerprint.tensors[source.spec.name]
        if found != expected:
            raise BaseChanged(source.spec.name, str(expected), str(found))

    def _record(self, change: Change, total: BlockRecord) -> None:
        if not total.finite:
            raise NotFinite(change.target.name, change.target.dtype.long_name)
        has_base = change.target.name in self.plan.base.fingerprint.tensors
        kept = "replaced" if change.replacement else "merged" if change.steps else "converted"
        self.largest_delta = max(self.largest_delta, total.largest_delta)
        self.records.append(
            TensorRecord(
                name=change.target.name,
                action=kept if has_base else "added",  # type: ignore[arg-type]
                base_norm=_rounded(total.base_square**0.5),
                delta_norm=_rounded(total.delta_square**0.5),
                changed=_rounded(total.changed / total.elements if total.elements else 0.0),
                coefficients=total.coefficients,
                lost=_rounded((total.reached - total.changed) / total.reached if total.reached else 0.0),
            )
        )


def _rounded(value: float) -> float:
    """So many digits that the last bits of a sum, which the processor decides, do not reach the record."""
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
