"""The registry that a server has, with the same verbs as one in this process.

What lies on this machine is read, checked and hashed here, and keys never leave it; everything else is the server's work. As in
`registry.service`, what only some verbs need is imported when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, final

from registry.client_choosing import Choosing
from registry.client_keeping import Keeping
from registry.client_looking import Looking
from registry.client_repositories import Repositories
from registry.client_wire import LONG_SECONDS, PATIENCE_SECONDS, Wire, check_namespaces, files_of, name_of
from registry.codec import from_json, plain
from registry.errors import InvalidInput, InvalidReference, NotFound, PathNotFound, UnknownBase, Unreachable
from registry.failures import from_document
from registry.following import follow
from registry.manifest import (
    BaseModel,
    Checkpoint,
    Direction,
    Event,
    Merged,
    Metric,
    Report,
    Shipment,
)
from registry.progress import Progress, silent
from registry.results import Details, MergeResult, Outline
from registry.selection import Grouping, Ranking
from registry.settings import Settings
from registry.teamwork import (
    Job,
    JobLine,
    Page,
)
from registry.tensors import DType

if TYPE_CHECKING:
    from decimal import Decimal

    from registry.base_folders import AddedBase
    from registry.base_models import Verification
    from registry.combining import Combination, Making
    from registry.comparing import Difference
    from registry.extracting import Extract, Extraction
    from registry.filters import Filter
    from registry.inference import Device, LoadedDType
    from registry.intake import Intake, Registration
    from registry.mixing import Mixture
    from registry.rearranging import Conversion, Wanted
    from registry.separating import Separate, Separation
    from registry.service import Registry

T = TypeVar("T")
_MOST_AT_ONCE = 1000


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePlanned:
    """What a merge would do, as the server sees it. `order` is what the server is to be asked with to do it."""

    outline: Outline
    order: Mapping[str, Any]

    @property
    def report(self) -> Report:
        """What the check of all inputs found."""
        return self.outline.report


@final
class RemoteRegistry(Keeping, Looking, Choosing, Repositories):
    """A registry behind a server; `registry.connect()` makes one where the settings name a server. It is a context manager.

    All verbs are those of `registry.service.Registry` and are told there. Beside what they raise, there are `ServerFailed` and `AccessDenied`.
    """

    def __init__(self, settings: Settings, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._settings = settings
        self._wire = Wire(settings.server, settings.token, patience_seconds)

    @property
    def settings(self) -> Settings:
        """Where the server is, and who asks."""
        return self._settings

    @property
    def workspace(self) -> NoReturn:
        """Not from here: the database and the store are the server's.

        Raises:
            InvalidInput: always.
        """
        self._elsewhere("its database and store are the server's")

    def signed_by(self, author: str) -> NoReturn:
        """Not from here: whose token it is signs what is recorded.

        Raises:
            InvalidInput: always.
        """
        self._elsewhere(f"what is recorded is signed by whose token it is, not by {author}")

    def upgrade_database(self) -> None:
        """Not from here.

        Raises:
            InvalidInput: always.
        """
        self._elsewhere("run `ckpt db upgrade` where the server runs")

    def _elsewhere(self, advice: str) -> NoReturn:
        raise InvalidInput("CKPT_SERVER", self._settings.server, advice)

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    def __enter__(self) -> RemoteRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- register

    def register(self, path: str, said: Registration | None = None, *, progress: Progress = silent) -> Intake:
        """Register a checkpoint or a whole run that lies here; see `registry.client_intake.register`."""
        from registry.client_intake import register
        from registry.intake import Registration

        return register(self._wire, self._settings, path, said or Registration(), progress)

    # -- find

    def checkpoints(self, adapter: str = "", where: Filter | None = None) -> list[Checkpoint]:
        """Checkpoints by adapter and version, filtered."""
        found: list[Checkpoint] = []
        cursor = ""
        while True:
            page = self.page(adapter, where, cursor=cursor, limit=_MOST_AT_ONCE)
            found += page.items
            cursor = page.cursor
            if not cursor:
                return sorted(found, key=lambda each: (each.adapter, each.version))

    def page(
        self,
        adapter: str = "",
        where: Filter | None = None,
        *,
        sort: str = "",
        cursor: str = "",
        limit: int = 50,
        namespaces: Sequence[str] = (),
    ) -> Page[Checkpoint]:
        """A part of the checkpoints that pass a filter, the newest first."""
        check_namespaces(namespaces)
        asked = {"adapter": adapter, "where": where and str(where), "sort": sort, "cursor": cursor, "limit": limit}
        return self._wire.get(Page[Checkpoint], "/checkpoints", asked)

    def rank(
        self,
        adapter: str = "",
        where: Filter | None = None,
        *,
        metric: str | None = None,
        direction: Direction | None = None,
        per: Grouping | None = None,
        top: int = 1,
        namespaces: Sequence[str] = (),
    ) -> Ranking:
        """The best checkpoints by a metric, of those that pass a filter."""
        check_namespaces(namespaces)
        asked = {"metric": metric, "direction": direction, "per": per, "top": top}
        return self._wire.get(Ranking, "/best", {"adapter": adapter, "where": where and str(where), **asked})

    def best(self, adapter: str, metric: str | None = None, *, direction: Direction | None = None) -> Checkpoint:
        """The adapter's best checkpoint by a metric."""
        return self.rank(adapter, metric=metric, direction=direction).groups[0].checkpoints[0]

    def resolve(self, text: str) -> Checkpoint:
        """The checkpoint that a reference means."""
        return self._wire.get(Checkpoint, "/checkpoint", {"ref": text})

    def subject(self, text: str) -> Checkpoint | Merged:
        """The checkpoint, or merged model (by a prefix of its digest), that a text means."""
        found = self._wire.get(dict[str, Any], "/subject", {"ref": text})
        return from_json(Merged, found["value"]) if found["kind"] == "merged" else from_json(Checkpoint, found["value"])

    def details(self, checkpoint: Checkpoint) -> Details:
        """A checkpoint with its compatibility and lineage."""
        found = self._wire.get(dict[str, Any], "/details", {"ref": checkpoint.ref})
        problem, report = found["problem"], found["report"]
        return Details(
            checkpoint=from_json(Checkpoint, found["checkpoint"]),
            base=from_json(BaseModel, found["base"]),
            report=None if report is None else from_json(Report, report),
            problem=None if problem is None else from_document(problem, self._wire.url),
            merged=from_json(tuple[Merged, ...], found["merged"]),
            shipments=from_json(tuple[Shipment, ...], found["shipments"]),
            previous=found["previous"],
            following=found["following"],
            children=tuple(found["children"]),
        )

    def diff(self, one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> Difference:
        """What differs between two checkpoints of one base model."""
        from registry.comparing import Difference

        return self._done(Difference, "diff", {"one": one.ref, "other": other.ref}, progress)

    # -- annotate

    def note(self, checkpoint: Checkpoint, text: str) -> None:
        """Add a note."""
        self._write("POST", "/notes", {"checkpoint": checkpoint.ref, "text": text})

    def tag(self, checkpoint: Checkpoint, tags: Mapping[str, str], remove: Sequence[str] = ()) -> None:
        """Set tags, and take others away."""
        self._write("POST", "/tags", {"checkpoint": checkpoint.ref, "tags": tags, "remove": list(remove)})

    def add_metrics(self, checkpoint: Checkpoint, metrics: Sequence[Metric]) -> None:
        """Record measured numbers; of one name the last counts."""
        self._write("POST", "/metrics", {"checkpoint": checkpoint.ref, "metrics": list(metrics)})

    def set_alias(self, checkpoint: Checkpoint, name: str) -> Checkpoint | None:
        """Point an alias of the checkpoint's adapter to it; gives back where it pointed before."""
        found = self._write("PUT", "/aliases", {"checkpoint": checkpoint.ref, "name": name})
        return found["before"] and from_json(Checkpoint, found["before"])

    def remove_alias(self, adapter: str, name: str) -> Checkpoint:
        """Take an alias away; gives back where it pointed."""
        return self._wire.write(Checkpoint, "DELETE", "/aliases", query={"adapter": adapter, "name": name})

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint from the registry."""
        self._wire.write(dict[str, Any], "DELETE", "/checkpoint", query={"ref": checkpoint.ref})

    def _write(self, method: str, path: str, document: Mapping[str, Any]) -> dict[str, Any]:
        return self._wire.write(dict[str, Any], method, path, document)

    def history(
        self, subject: str = "", limit: int | None = None, *, author: str = "", since: datetime | None = None
    ) -> list[Event]:
        """What was changed, by whom, oldest first."""
        pages: list[tuple[Event, ...]] = []
        cursor, left = "", math.inf if limit is None else limit
        while left and (cursor or not pages):
            at_once = int(min(left, _MOST_AT_ONCE))
            page = self.history_page(subject, author=author, since=since, cursor=cursor, limit=at_once)
            pages.append(page.items)
            cursor, left = page.cursor, left - len(page.items)
        return [event for items in reversed(pages) for event in items]

    def history_page(
        self,
        subject: str = "",
        *,
        author: str = "",
        since: datetime | None = None,
        cursor: str = "",
        limit: int = 100,
        namespaces: Sequence[str] = (),
    ) -> Page[Event]:
        """A part of the history, oldest first: the last so many, or those before a page."""
        check_namespaces(namespaces)
        asked = {"subject": subject, "author": author, "since": since, "cursor": cursor, "limit": limit}
        return self._wire.get(Page[Event], "/history", asked)

    # -- base models

    def add_base(
        self, url: str, *, name: str = "", arch_version: str = "", copy: bool = False, progress: Progress = silent
    ) -> AddedBase:
        """Fingerprint a base model here and record it; see `registry.client_intake.add_base`."""
        from registry.client_intake import add_base

        return add_base(
            self._wire, self._settings, url, name=name, arch_version=arch_version, copy=copy, progress=progress
        )

    def bases(self) -> list[BaseModel]:
        """Every base model, by name."""
        return self._wire.get(list[BaseModel], "/bases")

    def base(self, text: str) -> BaseModel:
        """A base model by name or a prefix of its digest."""
        return self._wire.get(BaseModel, "/base", {"name": text})

    def verify_base(self, base: BaseModel, progress: Progress = silent) -> Verification:
        """Read a base model whole, where the server can, and compare it with its fingerprint."""
        from registry.base_models import Verification

        with _reaching(base.name):
            return self._done(Verification, "verify_base", {"base": base.name}, progress)

    # -- check and merge

    def check(self, checkpoint: Checkpoint, base: str = "", progress: Progress = silent) -> Report:
        """Compare a checkpoint with the base model it was trained on, or with another one (name, digest, or a path here)."""
        if base:
            from registry.client_intake import find_base

            base = find_base(self._wire, self._settings, base, progress=progress).digest.hex
        with _reaching(base or checkpoint.base_name):
            asked = {"ref": checkpoint.ref, "base": base}
            return self._wire.get(Report, "/check", asked, patience_seconds=LONG_SECONDS)

    def plan(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture | None = None,
        dtype: DType | None = None,
        allow_lossy: bool = False,
        progress: Progress = silent,
    ) -> RemotePlanned:
        """What merging checkpoints into their base would do."""
        asked = {
            "checkpoints": [each.ref for each in checkpoints],
            "mixture": mixture,
            "dtype": dtype,
            "allow_lossy": allow_lossy,
        }
        with _reaching(checkpoints[0].base_name if checkpoints else ""):
            outline = self._wire.write(Outline, "POST", "/plan", asked, patience_seconds=LONG_SECONDS)
        return RemotePlanned(outline=outline, order=plain(asked))

    def combine(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture | None = None,
        rank: int | None = None,
        making: Making | None = None,
        progress: Progress = silent,
    ) -> Combination:
        """Make a new adapter of several."""
        from registry.combining import Combination

        asked = {"checkpoints": _refs(checkpoints), "mixture": mixture, "rank": rank, "making": making}
        return self._done(Combination, "combine", asked, progress)

    def candidates(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture,
        option: str,
        values: Sequence[Decimal],
        rank: int | None = None,
        making: Making | None = None,
        progress: Progress = silent,
    ) -> list[Combination]:
        """One new adapter for each value of an option."""
        from registry.combining import Combination

        asked = {
            "checkpoints": _refs(checkpoints),
            "mixture": mixture,
            "option": option,
            "values": [str(value) for value in values],
            "rank": rank,
            "making": making,
        }
        return self._done(list[Combination], "candidates", asked, progress)

    def trail(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """The checkpoints of a run up to one, that one included, by step."""
        return self._wire.get(list[Checkpoint], "/trail", {"ref": checkpoint.ref})

    def merge(
        self, planned: RemotePlanned, *, out: str | None = None, note: str = "", progress: Progress = silent
    ) -> MergeResult:
        """Have a plan carried out, into the server's store, and follow it. A folder of this machine gets a copy of the result."""
        from registry.client_files import is_copied
        from registry.locations import local_folder

        folder = None if out is None else local_folder(out)
        if folder is not None:
            is_copied(folder, planned.outline.recipe)  # before anything long
        if out is not None and folder is None:
            return self._done(MergeResult, "merge", {**planned.order, "note": note, "out": out}, progress)
        job = self.follow_job(self.start_merge(planned, note).id, progress)
        result = from_json(MergeResult, job.result)
        if folder is None:
            return result
        if is_copied(folder, planned.outline.recipe):
            return replace(result, location=str(folder), created=False, records=())
        self.pull(result.merged, folder, progress)
        return replace(result, location=str(folder), created=True)

    # -- background work

    def load(
        self,
        checkpoint: Checkpoint | str,
        *,
        merged: bool = False,
        device: Device = "auto",
        dtype: LoadedDType = "auto",
    ) -> Any:
        """A model in this machine's memory, ready to be called."""
        from registry.inference import load_model

        found = self.resolve(checkpoint) if isinstance(checkpoint, str) else checkpoint
        return load_model(cast("Registry", self), found, merged=merged, device=device, dtype=dtype)

    def start(self, kind: str, arguments: Mapping[str, Any], subject: str = "") -> Job:
        """Have something done in the background."""
        return self._wire.write(Job, "POST", "/jobs", {"kind": kind, "arguments": arguments, "subject": subject})

    def start_merge(self, planned: RemotePlanned, note: str = "") -> Job:
        """Have a plan carried out in the background, into the server's store."""
        return self.start("merge", {**planned.order, "note": note})

    def _done(self, kind: type[T], verb: str, arguments: Mapping[str, Any], progress: Progress) -> T:
        """What a verb gives that the server does in the background."""
        return from_json(kind, self.follow_job(self.start(verb, arguments).id, progress).result)

    def jobs(self, state: str = "", limit: int = 50) -> list[Job]:
        """The last jobs (in one state), the newest first."""
        return self._wire.get(list[Job], "/jobs", {"state": state, "limit": limit})

    def job(self, number: int) -> Job:
        """A job by its number."""
        return self._wire.get(Job, f"/jobs/{number}")

    def job_log(self, number: int) -> list[JobLine]:
        """What a job went through, oldest first."""
        return self._wire.get(list[JobLine], f"/jobs/{number}/log")

    def cancel_job(self, number: int) -> Job:
        """Stop a job."""
        return self._wire.write(Job, "POST", f"/jobs/{number}/cancel")

    def retry_job(self, number: int) -> Job:
        """Try a job again that failed or was cancelled; what is finished of it is kept."""
        return self._wire.write(Job, "POST", f"/jobs/{number}/retry")

    def follow_job(self, number: int, progress: Progress = silent) -> Job:
        """Wait until a job is over, and give it."""
        return follow(self.job, number, progress, f"{self._wire.url} job")

    def merged(self) -> list[Merged]:
        """Every merged model, oldest first."""
        return self._wire.get(list[Merged], "/merged")

    def pull(self, subject: Checkpoint | Merged, target: Path, progress: Progress = silent) -> None:
        """Write a checkpoint's or merged model's exact files into a new folder. What has come before a cut is kept for the next try."""
        from registry.client_files import fetch

        fetch(self._wire, name_of(subject), files_of(subject), target, progress)

    # -- convert and extract

    def convert(self, text: str, wanted: Wanted, progress: Progress = silent) -> Conversion:
        """Carry a checkpoint to the other layout, on the server; a folder of this machine gets a copy of the result."""
        from registry.rearranging import Conversion

        wanted.check()
        with _known_there(text):
            subject = self._checkpoint(text)
        if subject is None:
            raise InvalidInput(
                "ref",
                text,
                "a whole model is converted where its files are: `ckpt pull` it, then convert the folder there",
            )
        if wanted.config is not None:
            raise InvalidInput("--config", str(wanted.config), "an adapter's conversion takes none")
        _check_target(wanted.out, wanted.name)
        asked = {"layout": wanted.layout, "name": wanted.name, "base": wanted.base}
        made = self._done(Conversion, "convert", {"text": subject.ref, "wanted": asked}, progress)
        if wanted.out is None or made.registered is None:
            return made
        self.pull(made.registered.checkpoint, wanted.out, progress)
        return replace(made, place=str(wanted.out))

    def _checkpoint(self, text: str) -> Checkpoint | None:
        """The checkpoint that a text means; None where it means a whole model."""
        try:
            found = self.subject(text)
        except (NotFound, InvalidReference) as missing:
            try:
                self.base(text)
            except UnknownBase:
                raise missing from None
            return None
        return found if isinstance(found, Checkpoint) else None

    def extract(self, base: str, tuned: str, wanted: Extract, progress: Progress = silent) -> Extraction:
        """Make a LoRA of what fine-tuning a whole model changed, on the server; a folder of this machine gets a copy of the result."""
        from registry.extracting import Extraction

        wanted.check()
        _check_target(wanted.out, wanted.name)
        asked = {
            "rank": wanted.rank,
            "name": wanted.name,
            "modules": wanted.modules,
            "saved": wanted.saved,
            "dtype": wanted.dtype,
        }
        with _known_there(base, tuned):
            made = self._done(Extraction, "extract", {"base": base, "tuned": tuned, "wanted": asked}, progress)
        if wanted.out is None or made.registered is None:
            return made
        self.pull(made.registered.checkpoint, wanted.out, progress)
        return replace(made, place=str(wanted.out))

    def separate(self, wanted: Separate, progress: Progress = silent) -> Separation:
        """Take an adapter out of files of this machine that hold its whole model."""
        from registry.client_intake import separate

        return separate(self._wire, self._settings, wanted, progress)

    # -- ship

    def ship(self, subject: Checkpoint | Merged, environment: str, note: str = "", *, override: str = "") -> Shipment:
        """Record that a checkpoint, or the merged model made of it, went live."""
        asked = {"subject": name_of(subject), "environment": environment, "note": note, "override": override}
        return self._wire.write(Shipment, "POST", "/shipments", asked)

    def shipped(self, environment: str | None = None, at: datetime | None = None) -> list[Shipment]:
        """What is live where, or was at a time."""
        return self._wire.get(list[Shipment], "/shipments", {"environment": environment, "at": at})

    def shipments(self, environment: str | None = None) -> list[Shipment]:
        """Every shipment, oldest first."""
        return self._wire.get(list[Shipment], "/shipments", {"environment": environment, "history": True})

    def rollback(self, environment: str, adapter: str = "", note: str = "") -> tuple[Shipment, Shipment]:
        """Bring back what was live before; gives what was live and what is now."""
        found = self._write("POST", "/rollback", {"environment": environment, "adapter": adapter, "note": note})
        return from_json(Shipment, found["before"]), from_json(Shipment, found["now"])


def _refs(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [each.ref for each in checkpoints]


def _check_target(out: Path | None, name: str) -> None:
    """See that a result can be recorded on the server, and be brought to a folder here."""
    if not name:
        raise InvalidInput("--as", "", "a server records what it makes: say --as NAME; --out DIR brings a copy here")
    if out is not None:
        from registry.disk import check_free

        check_free(out)


@contextmanager
def _reaching(base: str) -> Iterator[None]:
    """What is asked of the server needs a base model; one that lies on somebody's machine it cannot read."""
    try:
        yield
    except PathNotFound as error:
        raise Unreachable(base, error.name) from error


@contextmanager
def _known_there(*texts: str) -> Iterator[None]:
    """What is asked of the server names models that it has; a folder of this machine is none of them."""
    try:
        yield
    except (NotFound, InvalidReference):
        folders = [text for text in texts if Path(text).expanduser().is_dir()]
        if not folders:
            raise
        advice = (
            "a server has no folder of this machine: `ckpt base add PATH --copy` brings it there, then say its name"
        )
        raise InvalidInput("model", folders[0], advice) from None
