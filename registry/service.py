"""The registry's use cases: one method a verb, the same verbs as the command line's.

What carries a use case out is imported when it is asked for: listing must not wait until reading, checking and merging are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from registry.codec import from_json
from registry.db.listing import Scope
from registry.errors import (
    Ambiguous,
    InvalidInput,
    InvalidReference,
    NotFound,
    RegistryError,
    Unauthenticated,
    UnknownBase,
    UnknownCheckpoint,
    UnknownPolicy,
)
from registry.manifest import (
    BaseModel,
    Checkpoint,
    Direction,
    Event,
    FileEntry,
    Merged,
    Metric,
    Note,
    Report,
    Shipment,
    utc_now,
)
from registry.refs import AdapterName, CheckpointRef, check_label, check_name
from registry.remembered import Remembered
from registry.results import Details as Details
from registry.selection import Grouping, Ranking
from registry.settings import Settings
from registry.teamwork import NewToken, Principal, Role, Token
from registry.tensors import DType
from registry.workspace import Progress, Workspace, silent

if TYPE_CHECKING:
    from decimal import Decimal

    from registry.base_models import AddedBase, Verification
    from registry.caring import StoreCheck
    from registry.chain import AuditState
    from registry.combining import Combination, Making
    from registry.comparing import Difference
    from registry.curves import Point
    from registry.diagnosing import Diagnosis
    from registry.examining import Examined
    from registry.extracting import Extract, Extraction
    from registry.filters import Filter
    from registry.inference import Device, LoadedDType
    from registry.merging import MergeResult, Planned
    from registry.mixing import Mixture
    from registry.policies import KeptPolicy, Selection
    from registry.rearranging import Conversion, Wanted
    from registry.registering import Intake, Registration
    from registry.repositories import Repositories
    from registry.results import AdapterLine, KeptRecipe, Repository, RepositoryLine, RepositoryRef
    from registry.retention import Retained
    from registry.separating import Separate, Separation
    from registry.sweeping import Swept
    from registry.teamwork import (
        Delivery,
        Job,
        JobLine,
        NewToken,
        NewWebhook,
        Page,
        Role,
        Signature,
        Token,
        Webhook,
    )


_EVENTS_AT_ONCE = 1000


@final
class Registry:
    """A registry in this process. Use `registry.connect()` to make one; it is a context manager."""

    def __init__(self, settings: Settings) -> None:
        self._workspace = Workspace(settings)
        self._kept: Remembered[Repositories] = Remembered(1, forget=lambda found: found.close())

    @property
    def settings(self) -> Settings:
        """Where everything is."""
        return self._workspace.settings

    @property
    def workspace(self) -> Workspace:
        """The parts it works with; for whoever builds on it, as servers and workers do."""
        return self._workspace

    def signed_by(self, author: str) -> Registry:
        """The same registry, for somebody else: what is recorded through it has that author. Closing it is left to the first."""
        other = copy(self)
        other._workspace = self._workspace.signed_by(author)
        return other

    def upgrade_database(self) -> None:
        """Bring the database to this package's tables; see `registry.workspace.Workspace.upgrade_database`."""
        self._workspace.upgrade_database()

    def close(self) -> None:
        """Release the database, and what is open of repositories."""
        self._kept.clear()
        self._workspace.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- register

    def register(self, path: str, said: Registration | None = None, *, progress: Progress = silent) -> Intake:
        """Register a checkpoint or a whole run; see `registry.registering.register`."""
        from registry.registering import Registration, register

        return register(self._workspace, path, said or Registration(), progress=progress)

    # -- find

    def checkpoints(self, adapter: str = "", where: Filter | None = None) -> list[Checkpoint]:
        """Checkpoints by adapter and version, filtered.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        with self._workspace.reading() as catalog:
            return catalog.checkpoints.passing(_scope(adapter, where))

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
        """A part of the checkpoints that pass a filter, the newest first; see `registry.db.checkpoints.Checkpoints.page`.

        Args:
            adapter: of this one only.
            where: which of them.
            sort: another order, as `registry.selection.sort_checkpoints` takes it.
            cursor: where to go on, as the page before said.
            limit: the most to give, up to 1000.
            namespaces: those that may be seen; none: all.

        Raises:
            UnknownAdapter: no adapter of this name, or it may not be seen.
            InvalidInput: the order, the cursor or the limit is not acceptable.
        """
        with self._workspace.reading() as catalog:
            return catalog.checkpoints.page(_scope(adapter, where, namespaces), sort=sort, cursor=cursor, limit=limit)

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
        """The best checkpoints by a metric, of those that pass a filter; the same as `registry.selection.best` of them all.

        Args:
            adapter, where, namespaces: as `page`.
            metric, direction, per, top: as `registry.selection.best`.

        Raises:
            UnknownAdapter: no adapter of this name, or it may not be seen.
            UnknownMetric, DirectionUnknown, InvalidInput: as `registry.selection.best`.
        """
        with self._workspace.reading() as catalog:
            return catalog.checkpoints.rank(
                _scope(adapter, where, namespaces), metric=metric, direction=direction, per=per, top=top
            )

    def best(self, adapter: str, metric: str | None = None, *, direction: Direction | None = None) -> Checkpoint:
        """The adapter's best checkpoint by a metric; the same as the first that `rank` gives.

        Args:
            adapter: its name.
            metric: by which; the adapter's main one unless told otherwise.
            direction: whether lower or higher is better, where that is not known.

        Raises:
            UnknownAdapter: no adapter of this name.
            UnknownMetric, DirectionUnknown, MixedData, InvalidInput: as `registry.selection.best`.
        """
        return self.rank(adapter, metric=metric, direction=direction).groups[0].checkpoints[0]

    def adapters(self, search: str = "", limit: int = 50, namespaces: Sequence[str] = ()) -> list[AdapterLine]:
        """The adapters, those that a checkpoint was last added to first.

        Args:
            search: only those with this text in their names, in any case.
            limit: the most to give, up to 1000.
            namespaces: those that may be seen; none: all.

        Raises:
            InvalidInput: the limit is not acceptable.
        """
        with self._workspace.reading() as catalog:
            return catalog.overview.adapters(search, limit, namespaces)

    def series(self, adapter: str, metric: str) -> list[Point]:
        """The finite values of a metric over an adapter's steps: by run, and then by step; by version where a checkpoint has no step.

        Raises:
            UnknownAdapter: no adapter of this name.
            UnknownMetric: no checkpoint of it has a finite value of the metric.
        """
        with self._workspace.reading() as catalog:
            return catalog.overview.series(AdapterName.parse(adapter), metric)

    def metric_names(self, adapter: str = "", namespaces: Sequence[str] = ()) -> list[str]:
        """The metrics that checkpoints have, the most common first.

        Args:
            adapter: of this one only.
            namespaces: those that may be seen; none: all.

        Raises:
            UnknownAdapter: no adapter of this name, or it may not be seen.
        """
        with self._workspace.reading() as catalog:
            return catalog.overview.metric_names(AdapterName.parse(adapter) if adapter else None, namespaces)

    def resolve(self, text: str) -> Checkpoint:
        """The checkpoint that a reference means.

        Raises:
            InvalidReference: not a reference.
            UnknownAdapter, UnknownCheckpoint, UnknownMetric, DirectionUnknown: nothing answers to it.
            Ambiguous: a digest prefix that fits several.
        """
        ref = CheckpointRef.parse(text)
        with self._workspace.reading() as catalog:
            if ref.selector != "best":
                return catalog.checkpoints.resolve(ref)
            ranking = catalog.checkpoints.rank(Scope(ref.adapter), metric=ref.value or None)
        return ranking.groups[0].checkpoints[0]

    def subject(self, text: str) -> Checkpoint | Merged:
        """The checkpoint, or merged model (by a prefix of its digest), that a text means.

        Raises:
            Ambiguous: the prefix fits both.
            InvalidReference, NotFound: as `resolve`.
        """
        ref = CheckpointRef.parse(text)
        if not ref.digest_prefix:
            return self.resolve(text)
        found: list[Checkpoint | Merged] = []
        with self._workspace.reading() as catalog:
            for look_up in (
                lambda: catalog.checkpoints.resolve(ref),
                lambda: catalog.merged.resolve(ref.digest_prefix),
            ):
                try:
                    found.append(look_up())
                except NotFound:
                    continue
        if not found:
            raise UnknownCheckpoint(text)
        if len(found) > 1:
            raise Ambiguous(text, [f"{type(item).__name__.lower()} {item.digest.short}" for item in found])
        return found[0]

    def details(self, checkpoint: Checkpoint) -> Details:
        """A checkpoint with its compatibility and lineage."""
        with self._workspace.reading() as catalog:
            base = catalog.bases.find(checkpoint.base.hex)
            merged = catalog.merged.of(checkpoint)
            shipments = catalog.shipments.of(checkpoint)
            previous, following = catalog.checkpoints.neighbours(checkpoint)
            children = catalog.checkpoints.children(checkpoint)
        report, problem = self._glance(checkpoint, base)
        return Details(
            checkpoint=checkpoint,
            base=base,
            report=report,
            problem=problem,
            merged=tuple(merged),
            shipments=tuple(shipments),
            previous=previous,
            following=following,
            children=tuple(children),
        )

    def _glance(self, checkpoint: Checkpoint, base: BaseModel) -> tuple[Report | None, RegistryError | None]:
        """The part of a check that headers alone can tell; values are not read, nor is the base's folder."""
        from registry.compatibility import Facts, compare
        from registry.formats import read_adapter

        try:
            adapter = read_adapter(self._workspace.folder_of(checkpoint))
            return compare(checkpoint, adapter, base, Facts())[1], None
        except RegistryError as error:
            return None, error

    def diff(self, one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> Difference:
        """What differs between two checkpoints of one base model; see `registry.comparing.compare`."""
        from registry.comparing import compare

        return compare(self._workspace, one, other, progress)

    # -- annotate

    def note(self, checkpoint: Checkpoint, text: str) -> None:
        """Add a note.

        Raises:
            InvalidInput: no text.
        """
        if not text.strip():
            raise InvalidInput("note", text, "a note needs text")
        with self._workspace.writing() as change:
            note = Note(text=text, author=change.author, created_at=change.at)
            change.catalog.checkpoints.add_note(checkpoint, note)
            change.record("note", checkpoint.ref, text=text)

    def tag(self, checkpoint: Checkpoint, tags: Mapping[str, str], remove: Sequence[str] = ()) -> None:
        """Set tags, and take others away.

        Raises:
            NotFound: a tag to take away is not there; nothing is changed then.
        """
        with self._workspace.writing() as change:
            for key, value in tags.items():
                change.catalog.checkpoints.set_tag(checkpoint, check_name(key), value)
            for key in remove:
                change.catalog.checkpoints.remove_tag(checkpoint, key)
            change.record("tag", checkpoint.ref, set=dict(tags), removed=list(remove))

    def add_metrics(self, checkpoint: Checkpoint, metrics: Sequence[Metric]) -> None:
        """Record measured numbers; of one name the last counts."""
        with self._workspace.writing() as change:
            for metric in metrics:
                change.catalog.checkpoints.add_metric(checkpoint, metric, change.author, change.at)
            change.record("metric", checkpoint.ref, **{metric.name: metric.value for metric in metrics})

    def set_alias(self, checkpoint: Checkpoint, name: str) -> Checkpoint | None:
        """Point an alias of the checkpoint's adapter to it; gives back where it pointed before."""
        with self._workspace.writing() as change:
            before = change.catalog.checkpoints.set_alias(checkpoint, check_label(name))
            change.record("alias.set", checkpoint.ref, alias=name, before=before.ref if before else "")
            return before

    def remove_alias(self, adapter: str, name: str) -> Checkpoint:
        """Take an alias away; gives back where it pointed."""
        with self._workspace.writing() as change:
            before = change.catalog.checkpoints.remove_alias(AdapterName.parse(adapter), name)
            change.record("alias.remove", before.ref, alias=name)
            return before

    def remove(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint from the registry.

        Raises:
            InUse: it has an alias, was shipped, or is an input of a merge; names them all.
        """
        with self._workspace.writing() as change:
            change.catalog.checkpoints.remove(checkpoint)
            change.record("remove", checkpoint.ref, digest=checkpoint.digest.hex)

    # -- keep right

    def history(
        self, subject: str = "", limit: int | None = None, *, author: str = "", since: datetime | None = None
    ) -> list[Event]:
        """What was changed, by whom, oldest first; of one adapter, checkpoint or base model, or of everything.

        Args:
            subject: of this one only.
            limit: the last so many; None: all.
            author: by this one only.
            since: from then on; aware.
        """
        with self._workspace.reading() as catalog:
            return catalog.events.all(subject, limit, author=author, since=since)

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
        """A part of the history, oldest first: the last so many, or those before a page.

        Args:
            subject, author, since: as `history`.
            cursor: those before, as the page that follows said.
            limit: the most to give, up to 10000.
            namespaces: those that may be seen; none: all.

        Raises:
            InvalidInput: the cursor or the limit is not acceptable.
        """
        with self._workspace.reading() as catalog:
            return catalog.events.page(
                subject, author=author, since=since, cursor=cursor, limit=limit, namespaces=namespaces
            )

    def verify_chain(self) -> AuditState:
        """Walk the chain of events to its end.

        Raises:
            Changed: names the first event that is not as it was written.
        """
        with self._workspace.reading() as catalog:
            return catalog.events.verify()

    def export_audit(self) -> Iterator[Event]:
        """Every event, oldest first; `registry.auditing` checks them and writes them down.

        However slowly they are taken, no transaction waits meanwhile.
        """
        last: Event | None = None
        is_more = True
        while is_more:
            with self._workspace.reading() as catalog:
                found = catalog.events.after(last, _EVENTS_AT_ONCE)
            yield from found
            is_more = len(found) == _EVENTS_AT_ONCE
            last = found[-1] if found else None

    def verify(self, *, read_data: bool = False, subset: str = "", progress: Progress = silent) -> StoreCheck:
        """See that everything the registry needs is there; see `registry.caring.verify`. Changes nothing."""
        from registry.caring import verify

        return verify(self._workspace, read_data=read_data, subset=subset, progress=progress)

    def diagnose(self) -> list[Diagnosis]:
        """How this registry is, and what to do about it; see `registry.diagnosing.diagnose`."""
        from registry.diagnosing import diagnose

        return diagnose(self._workspace)

    def sweep(self, *, grace: timedelta = timedelta(hours=24), dry_run: bool = False) -> Swept:
        """Remove from the store what nothing has needed for a while; see `registry.sweeping.sweep`."""
        from registry.sweeping import sweep

        return sweep(self._workspace, grace=grace, dry_run=dry_run)

    # -- base models

    def add_base(
        self, url: str, *, name: str = "", arch_version: str = "", copy: bool = False, progress: Progress = silent
    ) -> AddedBase:
        """Fingerprint and record a base model; see `registry.base_models.add_base`."""
        from registry import base_models

        return base_models.add_base(
            self._workspace, url, name=name, arch_version=arch_version, copy=copy, progress=progress
        )

    def bases(self) -> list[BaseModel]:
        """Every base model, by name."""
        with self._workspace.reading() as catalog:
            return catalog.bases.all()

    def base(self, text: str) -> BaseModel:
        """A base model by name or a prefix of its digest.

        Raises:
            UnknownBase, Ambiguous: none, or several.
        """
        with self._workspace.reading() as catalog:
            return catalog.bases.find(text)

    def verify_base(self, base: BaseModel, progress: Progress = silent) -> Verification:
        """Read a base model whole and compare it with its fingerprint."""
        from registry import base_models

        return base_models.verify_base(self._workspace, base, progress)

    # -- check and merge

    def check(self, checkpoint: Checkpoint, base: str = "", progress: Progress = silent) -> Report:
        """Compare a checkpoint with the base model it was trained on, or with another one (name, digest, path or URL)."""
        return self._examine(checkpoint, base, progress=progress).report

    def _examine(self, checkpoint: Checkpoint, base: str = "", *, progress: Progress = silent) -> Examined:
        from registry import base_models, examining

        wanted = base or checkpoint.base.hex
        found = base_models.find_base(self._workspace, wanted, progress=progress)
        return examining.examine(self._workspace, checkpoint, found, progress)

    def plan(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture | None = None,
        dtype: DType | None = None,
        allow_lossy: bool = False,
        progress: Progress = silent,
    ) -> Planned:
        """What merging checkpoints into their base would do.

        Args:
            checkpoints: at least one; all trained on one base model.
            mixture: how they are weighed together. Default: equal shares.
            dtype: of the result; None to keep each tensor's own.
            allow_lossy: merge even what can only be merged in part; the report tells what is lost.
            progress: told what is read.

        Raises:
            Refused: a check found a reason not to, or they do not go together.
            InvalidRecipe: the mixture makes no sense.
        """
        from registry.merging import plan

        return plan(self._workspace, checkpoints, mixture, dtype=dtype, allow_lossy=allow_lossy, progress=progress)

    def combine(
        self,
        *checkpoints: Checkpoint,
        mixture: Mixture | None = None,
        rank: int | None = None,
        making: Making | None = None,
        progress: Progress = silent,
    ) -> Combination:
        """Make a new adapter of several; see `registry.combining.combine`."""
        from registry import combining, mixing

        mixing.check_bases(checkpoints)
        examined = [self._examine(each, progress=progress) for each in checkpoints]
        wanted = mixture or mixing.Mixture()
        return combining.combine(self._workspace, examined, wanted, rank=rank, making=making, progress=progress)

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
        """One new adapter for each value of an option; see `registry.combining.candidates`."""
        from registry import combining, mixing

        mixing.check_bases(checkpoints)
        examined = [self._examine(each, progress=progress) for each in checkpoints]
        return combining.candidates(
            self._workspace, examined, mixture, option, values, rank=rank, making=making, progress=progress
        )

    def trail(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """The checkpoints of a run up to one, that one included, by step."""
        with self._workspace.reading() as catalog:
            return catalog.checkpoints.trail(checkpoint)

    def merge(
        self, planned: Planned, *, out: str | None = None, note: str = "", progress: Progress = silent
    ) -> MergeResult:
        """Carry out a plan; see `registry.merging.merge`. What goes into the store of a team is done by its workers, and followed here.

        Raises:
            Cancelled: somebody has stopped the job.
        """
        from registry import merging

        if self.settings.is_shared and out is None:
            job = self.follow_job(self.start_merge(planned, note).id, progress)
            return from_json(merging.MergeResult, job.result)
        return merging.merge(self._workspace, planned, out=out, note=note, progress=progress)

    # -- repositories

    def load(
        self,
        checkpoint: Checkpoint | str,
        *,
        merged: bool = False,
        device: Device = "auto",
        dtype: LoadedDType = "auto",
    ) -> Any:
        """A model in memory, ready to be called. Nothing is written but copies of files that are not on this machine, once, to `home`.

        Args:
            checkpoint: which, or a reference to it.
            merged: merge it into the base, in memory; else the adapter is on the base as it is.
            device: cpu, cuda or mps; `auto` takes a GPU where there is one.
            dtype: float32, bfloat16 or float16; `auto` is that of the base model's files.

        Returns:
            For a base of transformers, its model: a `peft.PeftModel` with the adapter active, or merged, a plain one. For a base of litgpt, a
            `litgpt.GPT`, with the adapter working on its layers, or merged.

        Raises:
            InvalidReference, NotFound, Ambiguous: as `resolve`.
            MissingPackage: transformers and peft, or litgpt, are not installed.
            OutOfMemory: it does not fit.
            PathNotFound, BaseChanged: the base model is not where or not what it was.
            Refused: the checkpoint does not fit its base, or cannot be merged.
        """
        from registry.inference import load_model

        found = self.resolve(checkpoint) if isinstance(checkpoint, str) else checkpoint
        return load_model(self, found, merged=merged, device=device, dtype=dtype)

    def repositories(self, search: str = "", limit: int = 100, namespaces: Sequence[str] = ()) -> list[RepositoryLine]:
        """What clients of the Hugging Face Hub find here: adapters, their merged models, base models and recipes; the latest first.

        Args:
            search: only those with this text in their ids, in any case.
            limit: the most to give, up to 100 000.
            namespaces: those that may be seen; none: all.

        Raises:
            InvalidInput: the limit is not acceptable.
        """
        return self._shelf().listed(search, limit, namespaces)

    def repository(self, id_: str, revision: str = "main", namespaces: Sequence[str] = ()) -> Repository:
        """What an id means at a revision, as clients of the Hub ask for it; see `registry.repository_ids`.

        Args:
            id_: an adapter's name, `name-merged`, `name-v3`, `name-v3-merged`, a base model's name, `base-…` or `merged-…`.
            revision: `main`, a commit, or what may follow the `@` of a reference.
            namespaces: those that may be seen; none: all.

        Raises:
            UnknownRepository: nothing answers to the id, or it cannot be merged; tells why.
            UnknownRevision: it has no such revision, or a commit can be made no longer.
            Conflict: the id means two things.
            Ambiguous: the beginning of a digest fits several.
            UnknownMetric, DirectionUnknown: the best cannot be told.
            Unreachable: the base model of a merged one is not where it was recorded.
        """
        return self._shelf().find(id_, revision, namespaces)

    def repository_refs(self, id_: str, namespaces: Sequence[str] = ()) -> list[RepositoryRef]:
        """The names that a repository's states have: `main`, aliases, environments; and versions.

        Raises:
            UnknownRepository, Conflict, Ambiguous, Unreachable: as `repository`.
        """
        return self._shelf().refs(id_, namespaces)

    def read_file(
        self, repository: Repository, path: str, start: int = 0, end: int | None = None
    ) -> Iterator[bytes | memoryview]:
        """Bytes `start … end` of a file of a repository, in pieces of a few MiB, each valid until the next.

        Args:
            repository: whose.
            path: one of its files.
            start, end: in bytes; what is beyond the end is not there.

        Raises:
            PathNotFound: it has no such file.
            UnknownRepository, UnknownRevision: it is gone.
            Unreachable: its base model is not where it was recorded.
            Changed: a file of the base model is not the recorded one: at once, or while reading.
            NotFinite: while reading: a merged value overflows.
        """
        return self._shelf().read(repository, path, start, end)

    def save_recipe(self, planned: Planned, note: str = "") -> Repository:
        """Keep the recipe of a plan without carrying it out: whoever asks for its model gets it computed.

        One that is kept already stays as it is.
        """
        from registry.repositories import save_recipe

        return self.repository(save_recipe(self._workspace, planned, note).repository)

    def recipes(self) -> list[KeptRecipe]:
        """The recipes that are kept, the oldest first."""
        with self._workspace.reading() as catalog:
            return catalog.recipes.all()

    def remove_recipe(self, recipe: str) -> KeptRecipe:
        """Keep a recipe no longer; gives what it was. Its model is computed no more, unless it was carried out, and what it is made of may
        be removed as far as nothing else needs it.

        Args:
            recipe: the id of its repository, or its digest's first digits.

        Raises:
            UnknownRecipe: none such is kept.
            Ambiguous: several are.
        """
        from registry.repositories import remove_recipe

        return remove_recipe(self._workspace, recipe)

    def _shelf(self) -> Repositories:
        from registry.repositories import Repositories

        return self._kept.get("repositories", lambda: Repositories(self._workspace))

    # -- background work

    def start(self, kind: str, arguments: Mapping[str, Any], subject: str = "") -> Job:
        """Have something done in the background: by the server's process, or by the team's workers.

        Args:
            kind: the verb, one of `registry.ordering.ORDERS`.
            arguments: its arguments as JSON, as the order of that kind has them.
            subject: what it is about, for people; taken from the arguments when empty.

        Raises:
            InvalidInput: no such kind, or not its arguments.
            NotFound, Ambiguous, InvalidReference: what they name is not there.
            Refused, InvalidRecipe, Unreachable: as `plan` and `start_merge`, when a merge is to be done.
        """
        from registry import ordering

        return ordering.prepared(self._workspace, self, kind, arguments, subject)()

    def start_merge(self, planned: Planned, note: str = "") -> Job:
        """Have a plan carried out in the background, into the store; see `registry.ordering.order_merge`."""
        from registry import ordering

        return ordering.order_merge(self._workspace, planned, note)

    def jobs(self, state: str = "", limit: int = 50) -> list[Job]:
        """The last jobs (in one state), the newest first.

        Raises:
            InvalidInput: no such state.
        """
        from registry.teamwork import JobState

        if state and state not in set(JobState):
            raise InvalidInput("state", state, f"one of {', '.join(JobState)}")
        with self._workspace.reading() as catalog:
            return catalog.jobs.all(state, limit)

    def job(self, number: int) -> Job:
        """A job by its number.

        Raises:
            UnknownJob: there is none.
        """
        with self._workspace.reading() as catalog:
            return catalog.jobs.find(number)

    def job_log(self, number: int) -> list[JobLine]:
        """What a job went through, oldest first.

        Raises:
            UnknownJob: there is none.
        """
        with self._workspace.reading() as catalog:
            return catalog.jobs.lines(number)

    def cancel_job(self, number: int) -> Job:
        """Stop a job; see `registry.db.jobs.Jobs.cancel`.

        Raises:
            UnknownJob: there is none.
            Conflict: it is over.
        """
        with self._workspace.writing() as change:
            job = change.catalog.jobs.cancel(number, change.author)
            change.record("job.cancel", f"job {number}", kind=job.kind, about=job.subject)
            return job

    def retry_job(self, number: int) -> Job:
        """Try a job again that failed or was cancelled; what is finished of it is kept.

        Raises:
            UnknownJob: there is none.
            Conflict: it neither failed nor was cancelled.
        """
        with self._workspace.writing() as change:
            job = change.catalog.jobs.retry(number, change.author)
            change.record("job.retry", f"job {number}", kind=job.kind, about=job.subject)
            return job

    def follow_job(self, number: int, progress: Progress = silent) -> Job:
        """Wait until a job is over, and give it.

        Raises:
            UnknownJob: there is none.
            Cancelled: it was stopped.
            RegistryError: what the job itself raised, where it failed.
        """
        from registry.following import follow

        return follow(self.job, number, progress)

    def merged(self) -> list[Merged]:
        """Every merged model, oldest first."""
        with self._workspace.reading() as catalog:
            return catalog.merged.all()

    def pull(self, subject: Checkpoint | Merged, target: Path, progress: Progress = silent) -> None:
        """Write a checkpoint's or merged model's exact files into a new folder; see `registry.pulling.pull`."""
        from registry.pulling import pull

        pull(self._workspace, subject, target, progress)

    # -- convert and extract

    def convert(self, text: str, wanted: Wanted, progress: Progress = silent) -> Conversion:
        """Carry a checkpoint or a model to the other layout; see `registry.converting` and `registry.rearranging`.

        Args:
            text: a checkpoint, a merged model's digest, a base model's name, or a model's folder.
            wanted: what to make of it.
            progress: told of the bytes that are done.

        Raises:
            NotFound: nothing answers to the text.
        """
        from registry import converting, rearranging

        wanted.check()
        try:
            subject: Checkpoint | Merged | None = self.subject(text)
            missing: RegistryError = UnknownBase(text)
        except (NotFound, InvalidReference) as error:
            subject, missing = None, error
        if isinstance(subject, Checkpoint):
            return converting.convert_adapter(self._workspace, subject, wanted, progress)
        try:
            model = rearranging.find_model(self._workspace, text)
        except UnknownBase:
            raise missing from None
        return rearranging.convert_model(self._workspace, model, wanted, progress)

    def extract(self, base: str, tuned: str, wanted: Extract, progress: Progress = silent) -> Extraction:
        """Make a LoRA of what fine-tuning a whole model changed; see `registry.extracting.extract`.

        Args:
            base: the base model's name, digest or place.
            tuned: the fine-tuned model: a base model's name, a merged model's digest, or a folder.
            wanted: what to make.
            progress: told of the bytes that are done.
        """
        from registry import base_models, extracting, rearranging

        wanted.check()
        found = base_models.find_base(self._workspace, base, progress=progress)
        return extracting.extract(
            self._workspace, found, rearranging.find_model(self._workspace, tuned), wanted, progress
        )

    def separate(self, wanted: Separate, progress: Progress = silent) -> Separation:
        """Take an adapter out of files that hold its whole model; see `registry.separating.separate`."""
        from registry import separating

        return separating.separate(self._workspace, wanted, progress)

    # -- ship

    def ship(self, subject: Checkpoint | Merged, environment: str, note: str = "", *, override: str = "") -> Shipment:
        """Record that a checkpoint, or the merged model made of it, went live.

        Args:
            subject: what; of a merged model its first checkpoint counts.
            environment: where.
            note: kept with the record.
            override: why it is shipped although the adapter's policy is against it; recorded where it is.

        Raises:
            BelowPolicy: the adapter's policy guards the environment, and the checkpoint fails it.
        """
        from registry.choosing import check_good_enough, objections

        with self._workspace.writing() as change:
            merged = subject if isinstance(subject, Merged) else None
            name = subject.checkpoints[0] if isinstance(subject, Merged) else subject.ref
            checkpoint = change.catalog.checkpoints.resolve(CheckpointRef.parse(name))
            failed = objections(change.catalog, checkpoint, environment)
            check_good_enough(failed, checkpoint, environment, override)
            said = f"{note} (against the policy: {override.strip()})".strip() if failed else note
            shipment = change.catalog.shipments.add(
                check_label(environment), checkpoint, merged, note=said, author=change.author, at=change.at
            )
            against = {"override": override.strip(), "failures": failed} if failed else {}
            change.record(
                "ship", checkpoint.ref, environment=environment, merged=merged.digest.hex if merged else "", **against
            )
            return shipment

    def shipped(self, environment: str | None = None, at: datetime | None = None) -> list[Shipment]:
        """What is live where, or was at a time.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
        """
        with self._workspace.reading() as catalog:
            if environment is not None:
                catalog.shipments.require(environment)
            return catalog.shipments.live(environment, at)

    def shipments(self, environment: str | None = None) -> list[Shipment]:
        """Every shipment, oldest first.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
        """
        with self._workspace.reading() as catalog:
            if environment is not None:
                catalog.shipments.require(environment)
            return catalog.shipments.all(environment)

    def rollback(self, environment: str, adapter: str = "", note: str = "") -> tuple[Shipment, Shipment]:
        """Bring back what was live before; repeated, it walks further back. Gives what was live and what is now.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
            Ambiguous: several adapters are live there and none was named.
            Conflict: nothing was live before.
        """
        with self._workspace.writing() as change:
            shipments = change.catalog.shipments
            shipments.require(environment)
            live = sorted({each.checkpoint.partition("@")[0] for each in shipments.live(environment)})
            if not adapter and len(live) > 1:
                raise Ambiguous(environment, live)
            current, target = shipments.rollback_target(environment, AdapterName.parse(adapter or live[0]))
            checkpoint = change.catalog.checkpoints.resolve(CheckpointRef.parse(target.checkpoint))
            merged = change.catalog.merged.resolve(target.merged.hex) if target.merged else None
            restored = shipments.add(
                environment, checkpoint, merged, note=note, author=change.author, at=change.at, restores=target.number
            )
            change.record("rollback", checkpoint.ref, environment=environment, before=current.checkpoint)
            return current, restored

    # -- choose by policy

    def set_policy(self, adapter: str, text: str) -> KeptPolicy | None:
        """Say what makes a checkpoint of an adapter good enough; see `registry.policies`. Gives what was said before.

        Raises:
            InvalidInput: the text is no policy.
            UnknownAdapter: no adapter of this name.
        """
        from registry.policies import parse_policy

        parse_policy(text)
        name = AdapterName.parse(adapter)
        with self._workspace.writing() as change:
            before = change.catalog.policies.set(name, text, author=change.author, at=change.at)
            change.record("policy.set", str(name), policy=text, before=before.text if before else "")
            return before

    def policy(self, adapter: str) -> KeptPolicy:
        """The policy of an adapter.

        Raises:
            UnknownPolicy: it has none.
        """
        with self._workspace.reading() as catalog:
            found = catalog.policies.find(AdapterName.parse(adapter))
        if found is None:
            raise UnknownPolicy(adapter)
        return found

    def policies(self) -> list[KeptPolicy]:
        """Every policy, by adapter."""
        with self._workspace.reading() as catalog:
            return catalog.policies.all()

    def remove_policy(self, adapter: str) -> KeptPolicy:
        """Take the policy of an adapter away; gives it.

        Raises:
            UnknownPolicy: it has none.
        """
        name = AdapterName.parse(adapter)
        with self._workspace.writing() as change:
            before = change.catalog.policies.remove(name)
            change.record("policy.remove", str(name), policy=before.text)
            return before

    def select(self, adapter: str, policy: str = "") -> Selection:
        """Judge the checkpoints of an adapter by a policy, its own where none is given; see `registry.policies.select`.

        Raises:
            UnknownAdapter: no adapter of this name.
            UnknownPolicy: it has no policy, and none was given.
            MixedData: the objective was measured on different data.
        """
        from registry.policies import parse_policy, select

        checkpoints = self.checkpoints(adapter)
        return select(parse_policy(policy or self.policy(adapter).text), checkpoints)

    def keep(self, adapter: str, rule: str, *, dry_run: bool = True) -> Retained:
        """Remove the checkpoints of an adapter that are not worth keeping; see `registry.retention`.

        Args:
            adapter: whose.
            rule: what is worth keeping.
            dry_run: only say what would be removed.

        Raises:
            InvalidInput: the rule is none, or keeps no checkpoint at all.
            UnknownAdapter: no adapter of this name.
            UnknownMetric, DirectionUnknown, MixedData: the best cannot be told.
        """
        from registry.choosing import keep

        return keep(self._workspace, adapter, rule, dry_run=dry_run)

    # -- let others in

    def create_token(
        self, name: str, role: Role, namespaces: Sequence[str] = (), expires_in: timedelta | None = None
    ) -> NewToken:
        """Make a token for the server's callers. Its text is given here and nowhere else: only its SHA-256 is kept.

        Args:
            name: whose it is; signs what is recorded with it.
            role: what it may do.
            namespaces: those it is limited to; none: all.
            expires_in: how long it is good; None: until it is revoked.

        Raises:
            NameTaken: there is, or was, one of this name.
            InvalidReference, InvalidInput: the name or a namespace is not acceptable, or the time is none.
        """
        from registry.access import new_secret, secret_sha256

        if check_name(name).isdecimal():
            raise InvalidInput("name", name, "reads as a token's number")
        if expires_in is not None and expires_in <= timedelta(0):
            raise InvalidInput("expires", str(expires_in), "would be over at once")
        secret = new_secret(role)
        with self._workspace.writing() as change:
            token = Token(
                id=0,
                name=name,
                role=role,
                namespaces=tuple(sorted({check_name(each) for each in namespaces})),
                ending=secret[-4:],
                created_at=change.at,
                author=change.author,
                expires_at=None if expires_in is None else change.at + expires_in,
            )
            token = change.catalog.tokens.add(token, secret_sha256(secret))
            change.record("token.create", f"token {name}", role=role.value, namespaces=list(token.namespaces))
        return NewToken(token=token, secret=secret)

    def tokens(self) -> list[Token]:
        """Every token, revoked ones too, the oldest first; never their texts."""
        with self._workspace.reading() as catalog:
            return catalog.tokens.all()

    def revoke_token(self, name_or_id: str) -> Token:
        """End a token, at once.

        Raises:
            UnknownToken: none has this name or number.
        """
        with self._workspace.writing() as change:
            token = change.catalog.tokens.revoke(name_or_id, change.at)
            change.record("token.revoke", f"token {token.name}")
            return token

    def authenticate(self, secret: str) -> Principal:
        """Whose token this is. A mistyped one is told by its checksum, without the database.

        Raises:
            Unauthenticated: no such token, or it is revoked or has expired.
        """
        from registry.access import is_well_formed, secret_sha256

        if not is_well_formed(secret):
            raise Unauthenticated("this is not a token: a part is missing, or mistyped")
        with self._workspace.reading() as catalog:
            return catalog.tokens.principal(secret_sha256(secret), utc_now())

    # -- tell others

    def add_webhook(self, url: str, actions: Sequence[str]) -> NewWebhook:
        """Tell an address of events from now on; see `registry.webhooks.add_webhook`."""
        from registry.webhooks import add_webhook

        return add_webhook(self._workspace, url, actions)

    def webhooks(self) -> list[Webhook]:
        """Every webhook, the oldest first."""
        with self._workspace.reading() as catalog:
            return catalog.webhooks.all()

    def remove_webhook(self, number: int) -> Webhook:
        """Forget a webhook; see `registry.webhooks.remove_webhook`."""
        from registry.webhooks import remove_webhook

        return remove_webhook(self._workspace, number)

    def test_webhook(self, number: int) -> Delivery:
        """Send a webhook a message now, to see whether it arrives; see `registry.webhooks.send_test`."""
        from registry.webhooks import send_test

        return send_test(self._workspace, number)

    def deliveries(self, number: int, limit: int = 50) -> list[Delivery]:
        """The last messages to a webhook, the newest first.

        Raises:
            UnknownWebhook: none has this number.
        """
        with self._workspace.reading() as catalog:
            return catalog.webhooks.deliveries(number, limit)

    # -- sign

    def sign(self, subject: Checkpoint | Merged, key: Path, progress: Progress = silent) -> Signature:
        """Sign the content of a checkpoint or merged model; see `registry.signing.sign`."""
        from registry.signing import sign

        return sign(self._workspace, subject, key, progress)

    def sign_provenance(self, merged: Merged, key: Path, progress: Progress = silent) -> Signature:
        """Sign the statement of what a merged model was made of; see `registry.signing.sign_provenance`."""
        from registry.signing import sign_provenance

        return sign_provenance(self._workspace, merged, key, progress)

    def add_signature(
        self,
        subject: Checkpoint | Merged,
        bundle: Mapping[str, Any],
        *,
        key: Path | bytes | None = None,
        progress: Progress = silent,
    ) -> Signature:
        """Keep a signature that was made elsewhere; see `registry.signing.add_signature`."""
        from registry.signing import add_signature

        return add_signature(self._workspace, subject, bundle, key=key, progress=progress)

    def verify_signature(self, subject: Checkpoint | Merged, key: Path, progress: Progress = silent) -> Signature:
        """Read a checkpoint or merged model whole and compare it with its signature; see `registry.signing.verify_signature`."""
        from registry.signing import verify_signature

        return verify_signature(self._workspace, subject, key, progress)

    def signatures(self, subject: Checkpoint | Merged) -> list[Signature]:
        """Every signature of a checkpoint or merged model, the oldest first."""
        with self._workspace.reading() as catalog:
            return catalog.signatures.of(subject.digest)

    def signable_files(self, subject: Checkpoint | Merged, progress: Progress = silent) -> tuple[FileEntry, ...]:
        """The files of a checkpoint or merged model, each with its SHA-256; see `registry.signing.signable_files`."""
        from registry.signing import signable_files

        return signable_files(self._workspace, subject, progress)

    def provenance(self, merged: Merged, progress: Progress = silent) -> dict[str, Any]:
        """What a merged model was made of, and how: an in-toto statement with a SLSA provenance; see `registry.signing.provenance`."""
        from registry.signing import provenance

        return provenance(self._workspace, merged, progress)


def _scope(adapter: str, where: Filter | None, namespaces: Sequence[str] = ()) -> Scope:
    return Scope(AdapterName.parse(adapter) if adapter else None, where, tuple(namespaces))
