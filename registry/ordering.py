"""Order background work: what each kind of job is asked with, the checkpoints it is pinned to, and its place in the queue.

The arguments of a job are those of the verb, as plain JSON. What they name is looked up when the job is ordered, so that it works on what was
meant then; and nothing in them is a place on whichever machine happens to do the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from registry.base_models import check_reachable
from registry.codec import from_json
from registry.combining import Making
from registry.db.jobs import MERGE
from registry.errors import DamagedBlob, InvalidInput, InvalidReference, NotFound
from registry.locations import local_folder
from registry.manifest import BaseFormat, BaseModel, Checkpoint, Merged, to_json
from registry.merging import MergeResult, Planned
from registry.mixing import Mixture
from registry.teamwork import Job
from registry.tensors import DType
from registry.workspace import Change, Workspace

_ALLOW_LOSSY = "allow_lossy"


class Finder(Protocol):
    """Who knows what references mean: `registry.service.Registry`."""

    def resolve(self, text: str) -> Checkpoint:
        """The checkpoint that a reference means."""

    def subject(self, text: str) -> Checkpoint | Merged:
        """The checkpoint or merged model that a text means."""

    def base(self, text: str) -> BaseModel:
        """The base model that a text means."""

    def plan(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture | None = None,
        dtype: DType | None = None,
        allow_lossy: bool = False,
    ) -> Planned:
        """What merging checkpoints into their base would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOrder:
    """`Registry.plan` and `Registry.merge`. `out` is a URL that every machine reaches; None for the store."""

    checkpoints: tuple[str, ...]
    mixture: Mixture | None = None
    dtype: DType | None = None
    allow_lossy: bool = False
    note: str = ""
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineOrder:
    """`Registry.combine`."""

    checkpoints: tuple[str, ...]
    mixture: Mixture | None = None
    rank: int | None = None
    making: Making | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatesOrder:
    """`Registry.candidates`. `values` are decimal numbers, as text or number."""

    checkpoints: tuple[str, ...]
    mixture: Mixture
    option: str
    values: tuple[str | int | float, ...]
    rank: int | None = None
    making: Making | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedLayout:
    """`registry.rearranging.Wanted`, without places."""

    layout: BaseFormat
    name: str
    base: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOrder:
    """`Registry.convert`."""

    text: str
    wanted: WantedLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedLora:
    """`registry.extracting.Extract`, without places."""

    rank: int
    name: str
    modules: tuple[str, ...] = ()
    saved: tuple[str, ...] | None = None
    dtype: DType = DType.F32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractOrder:
    """`Registry.extract`."""

    base: str
    tuned: str
    wanted: WantedLora


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffOrder:
    """`Registry.diff`."""

    one: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyBaseOrder:
    """`Registry.verify_base`."""

    base: str


Order = MergeOrder | CombineOrder | CandidatesOrder | ConvertOrder | ExtractOrder | DiffOrder | VerifyBaseOrder
ORDERS: Mapping[str, type[Any]] = {
    MERGE: MergeOrder,
    "combine": CombineOrder,
    "candidates": CandidatesOrder,
    "convert": ConvertOrder,
    "extract": ExtractOrder,
    "diff": DiffOrder,
    "verify_base": VerifyBaseOrder,
}


def read_order(kind: str, arguments: Mapping[str, Any]) -> Order:
    """The arguments of a job, checked.

    Raises:
        InvalidInput: no such kind, or not its arguments.
    """
    if kind not in ORDERS:
        raise InvalidInput("kind", kind, f"one of {', '.join(ORDERS)}")
    _refuse_places(arguments)
    order: Order = from_json(ORDERS[kind], arguments)
    return order


def _refuse_places(arguments: Mapping[str, Any]) -> None:
    """Files of the machine that does the work are nobody's business."""
    wanted = arguments.get("wanted")
    inner = wanted if isinstance(wanted, Mapping) else {}
    for name in ("out", "config"):
        if inner.get(name) is not None:
            raise InvalidInput(name, inner[name], "a job records its result under a name: leave the place out")
    out = arguments.get("out")
    if out is not None and (not isinstance(out, str) or local_folder(out) is not None):
        raise InvalidInput("out", out, "the machine that does the work may be any: a URL that all of them reach")


def pinned(order: Order, finder: Finder) -> Order:
    """An order that means the same tomorrow: checkpoints with their versions.

    Raises:
        NotFound, Ambiguous, InvalidReference: what it names is not there.
    """
    if isinstance(order, (MergeOrder, CombineOrder, CandidatesOrder)):
        return replace(order, checkpoints=tuple(finder.resolve(each).ref for each in order.checkpoints))
    if isinstance(order, DiffOrder):
        return replace(order, one=finder.resolve(order.one).ref, other=finder.resolve(order.other).ref)
    if isinstance(order, VerifyBaseOrder):
        return replace(order, base=finder.base(order.base).name)
    if isinstance(order, ExtractOrder):
        return replace(order, base=finder.base(order.base).name, tuned=_recorded(order.tuned, finder))
    return replace(order, text=_recorded(order.text, finder))


def _recorded(text: str, finder: Finder) -> str:
    """What the registry knows by a text, and nothing that merely lies somewhere."""
    try:
        found = finder.subject(text)
    except (NotFound, InvalidReference) as error:
        try:
            return finder.base(text).name
        except NotFound:
            raise error from None
    return found.ref if isinstance(found, Checkpoint) else found.digest.hex


def subject_of(order: Order) -> str:
    """What a job is about, for people."""
    if isinstance(order, (MergeOrder, CombineOrder, CandidatesOrder)):
        return ", ".join(order.checkpoints)
    if isinstance(order, DiffOrder):
        return f"{order.one}, {order.other}"
    if isinstance(order, ConvertOrder):
        return order.text
    return order.tuned if isinstance(order, ExtractOrder) else order.base


def prepared(
    workspace: Workspace, finder: Finder, kind: str, arguments: Mapping[str, Any], subject: str = ""
) -> Callable[[], Job]:
    """Everything about ordering a job that takes time: reading the arguments, looking up what they name, planning a merge.

    Returns:
        What puts the job into the queue; quick, and part of the transaction that it is called in.

    Raises:
        as `registry.service.Registry.start`.
    """
    order = pinned(read_order(kind, arguments), finder)
    if isinstance(order, MergeOrder) and order.out is None:
        inputs = [finder.resolve(each) for each in order.checkpoints]
        planned = finder.plan(*inputs, mixture=order.mixture, dtype=order.dtype, allow_lossy=order.allow_lossy)
        return partial(order_merge, workspace, planned, order.note)
    return partial(place_order, workspace, kind, order, subject)


def place_order(workspace: Workspace, kind: str, order: Order, subject: str = "") -> Job:
    """Put a job that is one task into the queue."""
    with workspace.writing() as change:
        job = change.catalog.jobs.add(kind, subject or subject_of(order), to_json(order), author=change.author)
        return _recorded_start(change, job)


def _recorded_start(change: Change, job: Job) -> Job:
    change.record("job.start", f"job {job.id}", kind=job.kind, about=job.subject)
    return job


def merge_order(planned: Planned, note: str = "") -> MergeOrder:
    """What a planned merge follows from."""
    recipe, inputs = planned.plan.recipe, planned.together.checkpoints
    options = {key: value for key, value in recipe.options.items() if key != _ALLOW_LOSSY}
    return MergeOrder(
        checkpoints=tuple(each.ref for each in inputs),
        mixture=Mixture(
            method=recipe.method,
            weights=tuple(item.weight for item in recipe.inputs),
            options=options,  # type: ignore[arg-type]
        ),
        dtype=recipe.dtype,
        allow_lossy=_ALLOW_LOSSY in recipe.options,
        note=note,
    )


def order_merge(workspace: Workspace, planned: Planned, note: str = "") -> Job:
    """Have a merge into the store done; where workers share the work, file by file.

    A recipe whose result is in the store already, or under way, is not done again.

    Raises:
        Unreachable: the base model lies where not every worker can read it.
    """
    plan, recipe = planned.plan, planned.plan.recipe.digest
    order = merge_order(planned, note)
    arguments = {**to_json(order), "recipe": recipe.hex}
    if workspace.settings.is_shared:
        check_reachable(workspace.settings, plan.base)
    with workspace.writing() as change:
        jobs, about = change.catalog.jobs, (MERGE, subject_of(order), arguments)
        known = change.catalog.merged.find(recipe)
        if known is not None and _lies_in_store(workspace, known):
            result = MergeResult(merged=known, location="", created=False, report=planned.report)
            return jobs.add_finished(*about, result, author=change.author, total_bytes=plan.size_bytes)
        if under_way := jobs.merge_under_way(recipe.hex):
            return under_way
        files = [(file.path, file.size_bytes) for file in plan.files] if workspace.settings.is_shared else []
        job = jobs.add(*about, author=change.author, total_bytes=plan.size_bytes, files=files)
        return _recorded_start(change, job)


def _lies_in_store(workspace: Workspace, merged: Merged) -> bool:
    """Whether every file of a merged model is in the store."""
    try:
        sizes = [workspace.store.size(entry.digest) for entry in merged.files]
    except DamagedBlob:
        return False
    return "" in merged.locations and sizes == [entry.size_bytes for entry in merged.files]
