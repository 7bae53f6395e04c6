"""Merged models that are never written: their files are computed while they are read, as a whole or any part.

All readers of a process share a few threads, the factors of the tensors in work, and the blocks that were computed last. Memory does not
depend on how many read, save for the blocks that each of them is at.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from typing import final

from registry.base_models import open_base
from registry.changes import Change
from registry.errors import BaseChanged, PathNotFound
from registry.manifest import digest_of
from registry.merge.blocks import Block, ComputedTensor, Sources
from registry.merge.plan import Plan, Sidecar, needed_bytes
from registry.merge.ranges import Fetch, Piece, RangedFile, check_changes_anything
from registry.merge.reading import Scratch
from registry.merging import Planned
from registry.remembered import Remembered
from registry.workspace import Workspace

Bytes = bytes | memoryview
# Of tensors that are ready to be computed, the last ones; a few of them whatever their size, or each of their blocks would begin anew.
_PREPARED_BYTES, _FEWEST_PREPARED = 64 << 20, 4
_MOST_OPEN = 16
# Blocks that are computed ahead, for each thread of all and for one reader: enough to keep the threads busy while blocks are sent.
_AHEAD_OF_ALL, _AHEAD_OF_ONE = 4, 3
# Who reads more than this at once comes by once: its blocks are kept only while somebody else reads the same file.
_PART_BYTES = 32 << 20
_SMALL_BYTES = 1 << 20


@final
class VirtualModels:
    """The merged models of a process that are only read.

    Args:
        workspace: where checkpoints and base models are.
        cache_bytes: what the blocks that are kept may take; as the settings say when None.
        threads: as many at most; the number of cores when None.
    """

    def __init__(self, workspace: Workspace, cache_bytes: int | None = None, threads: int | None = None) -> None:
        self._workspace = workspace
        self._open = Remembered[VirtualModel](_MOST_OPEN, forget=lambda model: model.close())
        allowed = workspace.settings.cache_bytes if cache_bytes is None else cache_bytes
        self._computing = _Computing(allowed, threads or os.cpu_count() or 1)

    def open(self, planned: Planned) -> VirtualModel:
        """The model that a plan makes; one that was opened already is found again.

        Raises:
            BaseChanged: a file of the base is not the recorded one.
            NothingMerged: the factors are all zero.
            PathNotFound: the base is not there any more.
        """
        plan = planned.plan
        files = [[file.path, file.identity] for file in plan.base.files]
        key = digest_of([plan.recipe.digest.hex, plan.base.url, files]).hex
        model = self._open.get(key, lambda: self._opened(key, planned))
        if not model.was_changed:
            return model
        self._open.drop(key)
        return self._open.get(key, lambda: self._opened(key, planned))

    def _opened(self, key: str, planned: Planned) -> VirtualModel:
        base, adapter = open_base(self._workspace, planned.plan.base), planned.together.folder(self._workspace)
        model = VirtualModel(key, planned.plan, Sources(base=base, adapter=adapter), self._computing)
        try:
            model.check()
        except BaseException:
            model.close()
            raise
        return model

    def close(self) -> None:
        """Release everything; who still reads comes to the end."""
        self._open.clear()
        self._computing.close()


@final
class VirtualModel:
    """A merged model as its files, none of which exists.

    `files`: path and size in bytes of each; there is no `merge.json`. `was_changed`: a file of the base was not the recorded one when it was
    looked at. What is open may be that file, so this model is never read again; one that is opened anew may be.
    """

    def __init__(self, key: str, plan: Plan, sources: Sources, computing: _Computing) -> None:
        self._key, self._plan, self._sources, self._computing = key, plan, sources, computing
        prepare = computing.preparing()
        self._weights = {file.path: RangedFile(file, plan, sources, partial(prepare, file.path)) for file in plan.files}
        self._sidecars = {sidecar.path: sidecar for sidecar in plan.sidecars}
        self._identities = {file.path: file.identity for file in plan.base.files}
        self._needed = {path: file.base_files for path, file in self._weights.items()}
        self._needed |= {path: frozenset({path}) for path, each in self._sidecars.items() if each.origin == "base"}
        self._is_near = plan.base.in_store or all(sources.base.local_path(path) for path in self._identities)
        self._lock, self._readers = threading.Lock(), Counter[str]()
        self._is_closed = self.was_changed = False
        self.files: Mapping[str, int] = self._sizes()

    def _sizes(self) -> dict[str, int]:
        found = {file.path: file.size_bytes for file in self._plan.files}
        of_base = {file.path: file.size_bytes for file in self._plan.base.files}
        of_adapter = self._sources.adapter.files()
        for path, sidecar in self._sidecars.items():
            if sidecar.data is not None:
                found[path] = len(sidecar.data)
            else:
                found[path] = (of_adapter if sidecar.from_adapter else of_base)[path]
        return found

    def check(self) -> None:
        """See that there is something to be read.

        Raises:
            BaseChanged: a file of the base is not the recorded one.
            NothingMerged: the factors are all zero.
        """
        self._see_unchanged(frozenset[str]().union(*(self._needed[path] for path in self._weights)))
        with self._in_use(""):
            check_changes_anything(self._plan, self._sources)

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[Bytes]:
        """Bytes `start … end` of a file, in pieces of a few MiB, each valid until the next.

        Args:
            path: one of `files`.
            start, end: in bytes; what is beyond the end is not there.

        Raises:
            PathNotFound: no such file.
            BaseChanged: the base is not what was fingerprinted: at once, or while reading. All that was given away is right.
            NotFinite: while reading: a merged value overflows.
        """
        if path not in self.files:
            raise PathNotFound(path)
        size, needed = self.files[path], self._needed.get(path, frozenset())
        self._see_unchanged(needed)
        return self._reading(path, start, size if end is None else min(end, size), needed)

    def _reading(self, path: str, start: int, end: int, needed: frozenset[str]) -> Generator[Bytes]:
        done = start
        with self._in_use(path), closing(self._pieces(path, start, end)) as pieces:
            for data in pieces:
                done += len(data)
                # What was read before a file changed is right. A far store is asked only at the end: that takes longer than reading a piece.
                if self._is_near or done == end:
                    self._see_unchanged(needed)
                yield data

    def _pieces(self, path: str, start: int, end: int) -> Generator[Bytes]:
        if path in self._weights:
            is_part = end - start <= _PART_BYTES
            fetch = self._computing.fetching(f"{self._key}/{path}", lambda: is_part or self._readers[path] > 1)
            return self._weights[path].read(start, end, fetch)
        return self._small_pieces(self._sidecars[path], start, end)

    def _small_pieces(self, sidecar: Sidecar, start: int, end: int) -> Generator[Bytes]:
        for at in range(start, end, _SMALL_BYTES):
            last = min(at + _SMALL_BYTES, end)
            if sidecar.data is not None:
                yield memoryview(sidecar.data)[at:last]
            else:
                data = memoryview(bytearray(last - at))
                folder = self._sources.adapter if sidecar.from_adapter else self._sources.base
                folder.read_into(sidecar.path, at, data)
                yield data

    def _see_unchanged(self, paths: Iterable[str]) -> None:
        """See that files of the base are the recorded ones."""
        for path in paths:
            try:
                found = self._sources.base.identity(path)
            except PathNotFound:
                found = ""
            self.was_changed = self.was_changed or found != self._identities[path]
            if self.was_changed:
                raise BaseChanged(path, "the file that was recorded", "another one" if found else "none")

    # -- what is open is closed once nobody reads

    @contextmanager
    def _in_use(self, path: str) -> Iterator[None]:
        with self._lock:
            self._readers[path] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[path] -= 1
            self._release()

    def close(self) -> None:
        """Let go of the files as soon as nobody reads them. Whoever reads again opens them for that long."""
        with self._lock:
            self._is_closed = True
        self._release()

    def _release(self) -> None:
        with self._lock:
            if self._is_closed and not self._readers.total():
                self._sources.base.close()
                self._sources.adapter.close()


# A block with the buffers that it lies on, if they are not its own.
_Computed = tuple[Block, Scratch | None]
_Compute = Callable[[RangedFile, Piece], _Computed]


@final
class _Computing:
    """What all models share: threads, buffers, factors, and blocks."""

    def __init__(self, cache_bytes: int, threads: int) -> None:
        self._cache_bytes = cache_bytes
        self._blocks = Remembered[Block](cache_bytes)
        self._tensors = Remembered[ComputedTensor](_PREPARED_BYTES, at_least=_FEWEST_PREPARED)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="virtual")
        self._ahead = threading.BoundedSemaphore(_AHEAD_OF_ALL * threads)
        self._free: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
        self._numbers = count()
        self._lock, self._is_closed = threading.Lock(), False

    def preparing(self) -> Callable[[str, int, Change, Callable[[], ComputedTensor]], ComputedTensor]:
        """Gives the tensors of the files of one opened model: a tensor reads from what that has open."""
        model = next(self._numbers)
        return lambda path, index, change, make: self._tensors.get((model, path, index), make, needed_bytes(change))

    def fetching(self, name: str, keeps: Callable[[], bool]) -> Fetch:
        """Gives the blocks of a file, called so. `keeps`: whether the computed ones are kept for others."""

        def compute(file: RangedFile, piece: Piece) -> _Computed:
            is_kept = file.is_computed(piece) and piece.size_bytes <= self._cache_bytes and keeps()
            return self._shared(name, file, piece) if is_kept else self._fresh(file, piece)

        return partial(self._fetch, compute)

    def _fetch(self, compute: _Compute, file: RangedFile, pieces: Iterable[Piece]) -> Generator[Block]:
        """Blocks in order, a few of them ahead as far as there is room; else the reader's own thread computes them."""
        waiting: deque[Future[_Computed]] = deque()
        rest = iter(pieces)
        piece = next(rest, None)
        try:
            while waiting or piece is not None:
                while piece is not None and len(waiting) < _AHEAD_OF_ONE:
                    future = self._start(compute, file, piece)
                    if future is None:
                        break
                    waiting.append(future)
                    piece = next(rest, None)
                if waiting:
                    yield from self._used(waiting[0].result())
                    waiting.popleft()
                    self._ahead.release()
                elif piece is not None:
                    yield from self._used(compute(file, piece))
                    piece = next(rest, None)
        finally:
            self._give_up(waiting)

    def _start(self, compute: _Compute, file: RangedFile, piece: Piece) -> Future[_Computed] | None:
        with self._lock:
            if self._is_closed or not self._ahead.acquire(blocking=False):
                return None
            return self._pool.submit(compute, file, piece)

    def _used(self, computed: _Computed) -> Iterator[Block]:
        block, scratch = computed
        yield block
        if scratch is not None:
            self._free.put(scratch)

    def _give_up(self, waiting: Collection[Future[_Computed]]) -> None:
        """Nobody reads any more: what is being computed comes to its end, since files may be closed after that."""
        wait([future for future in waiting if not future.cancel()])
        for _ in waiting:
            self._ahead.release()

    def _fresh(self, file: RangedFile, piece: Piece) -> _Computed:
        scratch = self._scratch()
        return file.block(piece, scratch), scratch

    def _shared(self, name: str, file: RangedFile, piece: Piece) -> _Computed:
        """A block that was kept; else it is computed, and kept."""
        computed: list[_Computed] = []

        def make() -> Block:
            computed.append(self._fresh(file, piece))
            block = computed[0][0]
            return Block(_copied(block.data), record=block.record)

        kept = self._blocks.get((name, piece.at), make, max(piece.size_bytes, mmap.PAGESIZE))
        return computed[0] if computed else (kept, None)

    def _scratch(self) -> Scratch:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return Scratch()

    def close(self) -> None:
        """No block is computed ahead any more."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=False)


def _copied(data: memoryview) -> memoryview:
    """Memory of its own, which goes back to the system when it is needed no more; many small pieces would be too many mappings."""
    if len(data) < _SMALL_BYTES:
        return memoryview(bytes(data))
    copy = memoryview(mmap.mmap(-1, len(data)))
    copy[:] = data
    return copy
