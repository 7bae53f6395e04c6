"""The registry's use cases: one method a verb, the same verbs as the command line's.

What carries a use case out is imported when it is asked for: listing must not wait until reading, checking and merging are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, final

from registry.errors import (
    Ambiguous,
    InvalidInput,
    InvalidReference,
    NotFound,
    RegistryError,
    UnknownBase,
    UnknownCheckpoint,
    UnknownEnvironment,
)
from registry.manifest import (
    BaseModel,
    Checkpoint,
    Direction,
    Event,
    Merged,
    Metric,
    Note,
    Report,
    Shipment,
)
from registry.refs import AdapterName, CheckpointRef, check_label, check_name
from registry.selection import Grouping, Ranking, best
from registry.settings import Settings
from registry.tensors import DType
from registry.workspace import Progress, Workspace, silent

if TYPE_CHECKING:
    from decimal import Decimal

    from registry.base_models import AddedBase, Verification
    from registry.combining import Combination, Making
    from registry.comparing import Difference
    from registry.examining import Examined
    from registry.extracting import Extract, Extraction
    from registry.filters import Filter
    from registry.merging import MergeResult, Planned
    from registry.mixing import Mixture
    from registry.rearranging import Conversion, Wanted
    from registry.registering import Intake, Registration
    from registry.separating import Separate, Separation
    from registry.sweeping import Swept


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """A checkpoint with what it comes from and what came of it. `report` is None when its files cannot be read; `problem` says why."""

    checkpoint: Checkpoint
    base: BaseModel
    report: Report | None
    problem: RegistryError | None
    merged: tuple[Merged, ...]
    shipments: tuple[Shipment, ...]
    previous: str
    following: str
    children: tuple[str, ...]


@final
class Registry:
    """A registry in this process. Use `registry.connect()` to make one; it is a context manager."""

    def __init__(self, settings: Settings) -> None:
        self._workspace = Workspace(settings)

    @property
    def settings(self) -> Settings:
        """Where everything is."""
        return self._workspace.settings

    def upgrade_database(self) -> None:
        """Bring the database to this package's tables; see `registry.workspace.Workspace.upgrade_database`."""
        self._workspace.upgrade_database()

    def close(self) -> None:
        """Release the database."""
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
        name = AdapterName.parse(adapter) if adapter else None
        with self._workspace.reading() as catalog:
            found = catalog.checkpoints.all(name)
        return [checkpoint for checkpoint in found if where is None or where.matches(checkpoint)]

    def best(
        self,
        checkpoints: Sequence[Checkpoint],
        *,
        metric: str | None = None,
        direction: Direction | None = None,
        per: Grouping | None = None,
        top: int = 1,
    ) -> Ranking:
        """Rank checkpoints by a metric; see `registry.selection.best`."""
        return best(checkpoints, metric=metric, direction=direction, per=per, top=top)

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
            candidates = catalog.checkpoints.all(ref.adapter)
        return best(candidates, metric=ref.value or None).groups[0].checkpoints[0]

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
            shipments = [each for each in catalog.shipments.all() if each.checkpoint == checkpoint.ref]
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

    def history(self, subject: str = "", limit: int | None = None) -> list[Event]:
        """What was changed, by whom, oldest first; of one adapter, checkpoint or base model, or of everything."""
        with self._workspace.reading() as catalog:
            events = catalog.events.all(subject)
        whole = [
            event
            for event in events
            if not subject or event.subject == subject or event.subject.startswith(f"{subject}@")
        ]
        return whole[-limit:] if limit else whole

    def sweep(self, *, older_than: timedelta, dry_run: bool = False) -> Swept:
        """Remove from the store what nothing refers to any more; see `registry.sweeping.sweep`."""
        from registry.sweeping import sweep

        return sweep(self._workspace, older_than=older_than, dry_run=dry_run)

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

    def check(self, checkpoint: Checkpoint, base: str = "", progress: Progress = silent) -> Examined:
        """Compare a checkpoint with the base model it was trained on, or with another one (name, digest, path or URL)."""
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
        from registry import merging, mixing

        mixing.check_bases(checkpoints)
        examined = [self.check(each, progress=progress) for each in checkpoints]
        joint = mixing.together(self._workspace, examined, mixture or mixing.Mixture(), allow_lossy=allow_lossy)
        return merging.plan_merge(self._workspace, joint, dtype)

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
        examined = [self.check(each, progress=progress) for each in checkpoints]
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
        examined = [self.check(each, progress=progress) for each in checkpoints]
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
        """Carry out a plan; see `registry.merging.merge`."""
        from registry import merging

        return merging.merge(self._workspace, planned, out=out, note=note, progress=progress)

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

    def ship(self, subject: Checkpoint | Merged, environment: str, note: str = "") -> Shipment:
        """Record that a checkpoint, or the merged model made of it, went live."""
        with self._workspace.writing() as change:
            merged = subject if isinstance(subject, Merged) else None
            name = subject.checkpoints[0] if isinstance(subject, Merged) else subject.ref
            checkpoint = change.catalog.checkpoints.resolve(CheckpointRef.parse(name))
            shipment = change.catalog.shipments.add(
                check_label(environment), checkpoint, merged, note=note, author=change.author, at=change.at
            )
            change.record("ship", checkpoint.ref, environment=environment, merged=merged.digest.hex if merged else "")
            return shipment

    def shipped(self, environment: str | None = None, at: datetime | None = None) -> list[Shipment]:
        """What is live where, or was at a time.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
        """
        with self._workspace.reading() as catalog:
            _check_environment(catalog.shipments.environments(), environment)
            return catalog.shipments.live(environment, at)

    def shipments(self, environment: str | None = None) -> list[Shipment]:
        """Every shipment, oldest first.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
        """
        with self._workspace.reading() as catalog:
            _check_environment(catalog.shipments.environments(), environment)
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
            _check_environment(shipments.environments(), environment)
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


def _check_environment(known: Sequence[str], environment: str | None) -> None:
    if environment is not None and environment not in known:
        raise UnknownEnvironment(environment, tuple(known))
