"""Execute a plan: several threads compute blocks, one writes them in order and hashes all that was read and written.

The bytes do not depend on the number of threads. Memory is a few blocks, whatever the model's size, and the adapter's factors of one tensor.
"""

from __future__ import annotations

import os
import queue
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor

from registry.changes import Change, LowRank, Rows
from registry.errors import BaseChanged, NotFinite, NothingMerged
from registry.fingerprint import tensor_hasher
from registry.locations import Location
from registry.manifest import FileEntry, TensorRecord
from registry.merge.deltas import TORCH_DTYPES, BlockRecord, Factors, add_low_rank, record_block, sum_dtype
from registry.merge.journal import Journal
from registry.merge.plan import BLOCK_BYTES, Compute, Copy, OutputFile, Plan, Segment, Sidecar
from registry.merge.sinks import Sink, SinkWriter
from registry.tensors import StoredTensor
from registry.torchzip import Descriptor, Directory, Literal

Advance = Callable[[int], None]
_SIGNIFICANT_DIGITS = 6


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
    entries: list[FileEntry] = []
    records: list[TensorRecord] = []
    largest = 0.0
    with _Blocks(sources, threads or os.cpu_count() or 1) as blocks:
        for file in plan.files:
            kept = journal.finished(file.path)
            if kept is not None and sink.holds(kept[0]):
                advance(file.size_bytes)
                entry, of_file = kept
            else:
                writing = _FileWriting(file, plan, blocks, advance)
                entry, of_file = writing.run(sink)
                largest = max(largest, writing.largest_delta)
                journal.add(entry, of_file)
            entries.append(entry)
            records.extend(of_file)
    if not any(record.changed for record in records if record.action != "converted"):
        sink.discard()
        journal.finish()
        raise NothingMerged(plan.base.name, largest)
    entries.extend(_write_small(sink, sidecar.path, _sidecar_data(sidecar, sources)) for sidecar in plan.sidecars)
    path, data = provenance(entries, records)
    entries.append(_write_small(sink, path, data))
    sink.publish()
    return Outcome(files=tuple(entries), records=tuple(records))


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
class _Block:
    """A piece of the output in order. `base` are the base's bytes that went into it, `owner` the tensor they belong to."""

    data: memoryview
    owner: StoredTensor | None = None
    base: memoryview | None = None
    record: BlockRecord | None = None
    scratch: _Scratch | None = None


@final
class _Scratch:
    """The buffers that one block needs. They are reused: fresh memory for each block costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, role: str, dtype: torch.dtype, elements: int) -> Tensor:
        """A tensor `[elements]` on a reused buffer; its values are arbitrary."""
        size_bytes = elements * dtype.itemsize
        buffer = self._buffers.get(role)
        if buffer is None or buffer.numel() < size_bytes:
            buffer = self._buffers[role] = torch.empty(max(size_bytes, BLOCK_BYTES), dtype=torch.uint8)
        return buffer[:size_bytes].view(dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.view(torch.uint8).numpy()))


@final
class _Blocks:
    """Computes blocks on a pool of threads and gives them back in order, a few ahead of who takes them."""

    def __init__(self, sources: Sources, threads: int) -> None:
        self._sources = sources
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge")
        self._window = threads + 2
        self._free: queue.SimpleQueue[_Scratch] = queue.SimpleQueue()
        for _ in range(self._window + 1):
            self._free.put(_Scratch())

    def __enter__(self) -> _Blocks:
        # One thread a block: blocks are the parallelism, and torch's own pool would fight for the same cores.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def of(self, segment: Segment) -> Iterator[_Block]:
        """The blocks of a segment in order. Each is valid until the next one is taken."""
        with closing(self._in_order(self._tasks(segment))) as blocks:
            for block in blocks:
                yield block
                if block.scratch is not None:
                    self._free.put(block.scratch)

    def _in_order(self, tasks: Iterator[Callable[[_Scratch], _Block]]) -> Generator[_Block]:
        waiting: deque[Future[_Block]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(self._run, task))
                if len(waiting) >= self._window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _run(self, task: Callable[[_Scratch], _Block]) -> _Block:
        scratch = self._free.get()
        block = task(scratch)
        block.scratch = scratch
        return block

    def _tasks(self, segment: Segment) -> Iterator[Callable[[_Scratch], _Block]]:
        if isinstance(segment, Copy):
            yield from self._copy_tasks(segment.tensor)
        elif isinstance(segment, Compute):
            factors = [self._load(delta, sum_dtype(segment.change.target.dtype)) for delta in segment.change.deltas]
            for first, last in segment.blocks():
                yield _ComputeTask(self._sources, segment, factors, first, last)

    def _copy_tasks(self, tensor: StoredTensor) -> Iterator[Callable[[_Scratch], _Block]]:
        for start in range(0, tensor.spec.size_bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, tensor.spec.size_bytes - start)

            def copy(scratch: _Scratch, start: int = start, size: int = size) -> _Block:
                data = _bytes_of(scratch.take("base", torch.uint8, size))
                self._sources.base.read_into(tensor.file, tensor.offset_bytes + start, data)
                return _Block(data, owner=tensor, base=data)

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

    def __call__(self, scratch: _Scratch) -> _Block:
        change, columns = self.segment.change, self.segment.row_elements
        start, elements = self.first * columns, (self.last - self.first) * columns
        dtype = sum_dtype(change.target.dtype)
        base = self._base_values(change, scratch, start, elements)
        wide = scratch.take("wide", dtype, elements)
        wide.copy_(self._origin_values(change, scratch, base, start, elements))
        delta = None
        if self.factors:
            delta, product = (scratch.take(role, dtype, elements).view(-1, columns) for role in ("delta", "product"))
            add_low_rank(wide.view(-1, columns), self.factors, self.first, total=delta, product=product)
            delta = delta.view(-1) if change.replacement is None else None
        result = scratch.take("result", TORCH_DTYPES[change.target.dtype], elements).copy_(wide)
        record = record_block(base, wide, result, delta)
        raw = _bytes_of(base) if base is not None else None
        return _Block(_bytes_of(result), owner=change.source if base is not None else None, base=raw, record=record)

    def _base_values(self, change: Change, scratch: _Scratch, start: int, elements: int) -> Tensor | None:
        """The base's values of these rows; None when it has none of this shape."""
        if change.source is None or change.source.spec.shape != change.target.shape:
            return None
        values = scratch.take("base", TORCH_DTYPES[change.source.spec.dtype], elements)
        _read_elements(self.sources.base, change.source, start, values)
        return values

    def _origin_values(
        self, change: Change, scratch: _Scratch, base: Tensor | None, start: int, elements: int
    ) -> Tensor:
        if change.replacement is None and base is not None:
            return base
        values = scratch.take("origin", TORCH_DTYPES[change.origin.spec.dtype], elements)
        _read_elements(self.sources.adapter if change.replacement else self.sources.base, change.origin, start, values)
        return values


@dataclass(slots=True)
class _Sum:
    """The records of a tensor's blocks, added up in order."""

    elements: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    changed: int = 0
    nonzero: int = 0
    lost: int = 0
    largest_delta: float = 0.0

    def add(self, record: BlockRecord) -> None:
        self.elements += record.elements
        self.base_square += record.base_square
        self.delta_square += record.delta_square
        self.changed += record.changed
        self.nonzero += record.nonzero
        self.lost += record.lost
        self.largest_delta = max(self.largest_delta, record.largest_delta)


@final
@dataclass(slots=True)
class _FileWriting:
    """One weights file on its way: writes blocks in order, hashes what was read, and keeps the checksums that a zip wants behind its data."""

    file: OutputFile
    plan: Plan
    blocks: _Blocks
    advance: Advance
    checksums: dict[str, int] = field(default_factory=dict)
    records: list[TensorRecord] = field(default_factory=list)
    largest_delta: float = 0.0

    def run(self, sink: Sink) -> tuple[FileEntry, tuple[TensorRecord, ...]]:
        with _cancelling(sink.create(self.file.path, self.file.size_bytes)) as writer:
            for segment in self.file.segments:
                if isinstance(segment, (Copy, Compute)):
                    self._tensor(segment, writer)
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

    def _tensor(self, segment: Copy | Compute, writer: SinkWriter) -> None:
        checksum, total, hasher, owner = 0, _Sum(), None, None
        for block in self.blocks.of(segment):
            if block.owner is not None and block.base is not None:
                owner = block.owner
                hasher = hasher or tensor_hasher(owner.spec)
                hasher.update(block.base)
            writer.write(block.data)
            if self.file.layout is not None:
                checksum = zlib.crc32(block.data, checksum)
            if block.record is not None:
                self._check_finite(segment, block.record)
                total.add(block.record)
            self.advance(len(block.data))
        name = segment.tensor.spec.name if isinstance(segment, Copy) else segment.change.target.name
        self.checksums[name] = checksum
        self._check_base(owner, hasher)
        if isinstance(segment, Compute):
            self.largest_delta = max(self.largest_delta, total.largest_delta)
            self.records.append(self._record(segment.change, total))

    def _check_finite(self, segment: Copy | Compute, record: BlockRecord) -> None:
        if isinstance(segment, Compute) and not record.finite and segment.change.deltas:
            raise NotFinite(segment.change.target.name, segment.change.target.dtype.long_name)

    def _check_base(self, owner: StoredTensor | None, hasher: Any) -> None:
        if owner is None:
            return
        expected, found = self.plan.base.fingerprint.tensors[owner.spec.name], hasher.hexdigest()
        if found != expected.hex:
            raise BaseChanged(owner.spec.name, str(expected), f"blake3:{found}")

    def _record(self, change: Change, total: _Sum) -> TensorRecord:
        has_base = any(tensor.spec.name == change.target.name for tensor in self.plan.base.tensors)
        kept = "replaced" if change.replacement else "merged" if change.deltas else "converted"
        return TensorRecord(
            name=change.target.name,
            action=kept if has_base else "added",  # type: ignore[arg-type]
            base_norm=_rounded(total.base_square**0.5),
            delta_norm=_rounded(total.delta_square**0.5),
            changed=_rounded(total.changed / total.elements if total.elements else 0.0),
            lost=_rounded(total.lost / total.nonzero if total.nonzero else 0.0),
        )


def _rounded(value: float) -> float:
    """So many digits that the last bits of a sum, which the processor decides, do not reach the record."""
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
