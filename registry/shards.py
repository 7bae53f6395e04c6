"""Merges that several workers share, file by file: each plans for itself, writes its files, and whoever comes after the last puts them together.

Planning anew is what makes a plan need no way over the wire: the same recipe gives the same plan, and it is seen here that it does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import final

from registry.db.jobs import Claim, Written
from registry.errors import Changed, DamagedBlob
from registry.merging import MergeResult, Planned, merge_file, put_together, record_merge
from registry.ordering import MergeOrder, read_order
from registry.service import Registry
from registry.teamwork import Job

_MOST_PLANS = 4


@final
class Plans:
    """The plans of the last few jobs, so that a process that writes several files of a merge plans it once."""

    def __init__(self) -> None:
        self._plans: OrderedDict[int, Planned] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, registry: Registry, job: Job) -> Planned:
        """The plan of a merge.

        Raises:
            Changed: it is not the plan that the job was made for.
            Refused, NotFound, StorageFailed: as `Registry.plan`.
        """
        with self._lock:
            if job.id not in self._plans:
                self._plans[job.id] = _plan(registry, job)
                while len(self._plans) > _MOST_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(job.id)
            return self._plans[job.id]


def _plan(registry: Registry, job: Job) -> Planned:
    order = read_order(job.kind, job.arguments)
    assert isinstance(order, MergeOrder)  # noqa: S101 - no other job has files of its own
    inputs = [registry.resolve(each) for each in order.checkpoints]
    planned = registry.plan(*inputs, mixture=order.mixture, dtype=order.dtype, allow_lossy=order.allow_lossy)
    found, expected = planned.plan.recipe.digest.hex, str(job.arguments["recipe"])
    if found != expected:
        raise Changed(f"the recipe of job {job.id}", expected, found)
    files = [(file.path, file.size_bytes) for file in planned.plan.files]
    if files != (wanted := [(shard.path, shard.size_bytes) for shard in job.shards]):
        raise Changed(f"the plan of job {job.id}", str(wanted), str(files))
    return planned


def write_shard(
    registry: Registry, job: Job, claim: Claim, plans: Plans, advance: Callable[[str, int, int], None], threads: int
) -> bool:
    """Write one file of a merge into the store, and record it. False when it belongs to somebody else by now.

    Args:
        registry: signs with whoever wants the merge.
        job: the merge.
        claim: which file, and that it is ours.
        plans: where plans are kept.
        advance: told of progress; what it raises stops the file.
        threads: as many at most.

    Raises:
        BaseChanged, NotFinite, Changed: the merge cannot be done.
        StorageFailed, BlobSwept: it can, a little later.
    """
    planned = plans.of(registry, job)
    path = next(shard.path for shard in job.shards if shard.position == claim.shard)
    total = planned.plan.size_bytes
    outcome = merge_file(
        registry.workspace,
        planned,
        path,
        advance=lambda done_bytes: advance("merging", done_bytes, total),
        threads=threads,
    )
    written = Written(entry=outcome.entry, records=outcome.records, largest_delta=outcome.largest_delta)
    with registry.workspace.writing() as change:
        registry.workspace.check_stored([written.entry])
        return change.catalog.jobs.finish_shard(claim, written)


def publish(registry: Registry, job: Job, claim: Claim, plans: Plans) -> MergeResult | None:
    """Put the files of a merge together and record the model, and with it that the job is done.

    Returns:
        The model; None when there is none: the job is somebody else's by now, or cancelled, or files have to be written again.

    Raises:
        NothingMerged, Changed: the merge cannot be done.
        StorageFailed, BlobSwept: it can, a little later.
    """
    workspace, planned = registry.workspace, plans.of(registry, job)
    with workspace.reading() as catalog:
        files = catalog.jobs.written(job.id)
    if missing := [file.entry.path for file in files if not _is_there(registry, file)]:
        with workspace.writing() as change:
            if change.catalog.jobs.holds(claim):
                change.catalog.jobs.redo(job.id, missing)
        return None
    outcome = put_together(
        workspace,
        planned,
        [(file.entry, file.records) for file in files],
        max((file.largest_delta for file in files), default=0.0),
    )
    with workspace.writing() as change:
        if not change.catalog.jobs.is_wanted(claim):
            return None
        result = record_merge(workspace, planned, outcome, str(job.arguments.get("note", "")))
        change.catalog.jobs.finish(claim, result)
        return result


def _is_there(registry: Registry, file: Written) -> bool:
    """Whether a file that was finished is in the store still."""
    try:
        return registry.workspace.store.size(file.entry.digest) == file.entry.size_bytes
    except DamagedBlob:
        return False
