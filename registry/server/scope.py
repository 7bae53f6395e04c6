"""The registry as somebody may see and change it. What is outside their namespaces does not exist for them, not even by a hint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, final

from registry.errors import (
    Ambiguous,
    Forbidden,
    NotFound,
    UnknownAdapter,
    UnknownCheckpoint,
    UnknownEnvironment,
    UnknownJob,
    UnknownMerged,
    UnknownRecipe,
)
from registry.manifest import Checkpoint, Merged, Shipment
from registry.refs import AdapterName, CheckpointRef
from registry.results import KeptRecipe, Repository
from registry.service import Registry
from registry.teamwork import Job, Principal

T = TypeVar("T", Checkpoint, Merged, KeptRecipe)
_U = TypeVar("_U")
_MOST_LOOKED_AT = 100_000


@final
class Scope:
    """A registry, signed with the name of who asks, within their namespaces."""

    def __init__(self, registry: Registry, principal: Principal) -> None:
        self.registry = registry.signed_by(principal.name)
        self.principal = principal

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Those that are seen; none: all."""
        return self.principal.namespaces

    # -- look up

    def checkpoint(self, text: str) -> Checkpoint:
        """The checkpoint that a reference means.

        Raises:
            InvalidReference: not a reference.
            UnknownAdapter, UnknownCheckpoint, UnknownMetric, DirectionUnknown, Ambiguous: as `Registry.resolve`.
        """
        if not self.namespaces:
            return self.registry.resolve(text)
        ref = CheckpointRef.parse(text)
        if ref.adapter is not None:
            self.adapter(str(ref.adapter))
            return self.discreetly(lambda: self.registry.resolve(text))
        return _only(text, self._seen(self._by_prefix, text), UnknownCheckpoint(text))

    def subject(self, text: str) -> Checkpoint | Merged:
        """The checkpoint or merged model that a text means; errors as `Registry.subject`."""
        if not self.namespaces:
            return self.registry.subject(text)
        if not (prefix := CheckpointRef.parse(text).digest_prefix):
            return self.checkpoint(text)
        found: list[Checkpoint | Merged] = [*self._seen(self._by_prefix, text), *self._seen(self._merged, prefix)]
        return _only(text, found, UnknownCheckpoint(text))

    def merged(self, text: str) -> Merged:
        """The merged model that a digest's first digits mean.

        Raises:
            UnknownMerged, Ambiguous: none, or several.
        """
        if not self.namespaces:
            return self._merged(text)
        return _only(text, self._seen(self._merged, text), UnknownMerged(text))

    def repository(self, id_: str, revision: str = "main") -> Repository:
        """A repository at a revision.

        Raises:
            UnknownRepository, UnknownRevision, Conflict, Ambiguous, UnknownMetric, DirectionUnknown, Unreachable: as `Registry.repository`.
        """
        return self.registry.repository(id_, revision, self.namespaces)

    def recipe(self, text: str) -> KeptRecipe:
        """The kept recipe that a repository's id, or a digest's first digits, mean.

        Raises:
            UnknownRecipe, Ambiguous: none, or several.
        """
        if not self.namespaces:
            return self._recipe(text)
        return _only(text, self._seen(self._recipe, text), UnknownRecipe(text))

    def recipes(self) -> list[KeptRecipe]:
        """The kept recipes, the oldest first."""
        return [each for each in self.registry.recipes() if self.sees(each)]

    def adapter(self, name: str) -> AdapterName:
        """An adapter's name, if it may be seen.

        Raises:
            UnknownAdapter: it may not.
        """
        found = AdapterName.parse(name)
        if not self.principal.sees(found):
            raise UnknownAdapter(name)
        return found

    def job(self, number: int) -> Job:
        """A job by its number.

        Raises:
            UnknownJob: there is none that may be seen.
        """
        job = self.registry.job(number)
        if not self.sees_job(job):
            raise UnknownJob(str(number))
        return job

    def _by_prefix(self, text: str) -> Checkpoint:
        return self.registry.resolve(text)

    def _merged(self, text: str) -> Merged:
        with self.registry.workspace.reading() as catalog:
            return catalog.merged.resolve(text)

    def _recipe(self, text: str) -> KeptRecipe:
        with self.registry.workspace.reading() as catalog:
            return catalog.recipes.find(text)

    def _seen(self, look_up: Callable[[str], T], text: str) -> list[T]:
        """What a prefix means, of what may be seen."""
        try:
            found = [look_up(text)]
        except NotFound:
            return []
        except Ambiguous as error:
            found = [look_up(match.partition(" ")[0]) for match in error.matches]
        return [each for each in found if self.sees(each)]

    def discreetly(self, look_up: Callable[[], _U]) -> _U:
        """Look something up; the similar names that an error offers are only those that may be seen."""
        try:
            return look_up()
        except (UnknownAdapter, UnknownCheckpoint) as error:
            raise type(error)(error.name, [name for name in error.near if self.sees_ref(name)]) from None
        except UnknownEnvironment as error:
            raise UnknownEnvironment(error.name, () if self.namespaces else error.near) from None

    # -- see

    def sees(self, subject: Checkpoint | Merged | KeptRecipe) -> bool:
        """Whether a checkpoint may be seen; of a merged model or a recipe, all that goes into it."""
        if isinstance(subject, Checkpoint):
            return self.principal.sees(subject.adapter)
        return all(map(self.sees_ref, subject.checkpoints))

    def sees_ref(self, ref: str) -> bool:
        """Whether the adapter of a reference may be seen."""
        return not self.namespaces or self.principal.sees(AdapterName.parse(ref.partition("@")[0]))

    def sees_job(self, job: Job) -> bool:
        """Whether all that a job works on may be seen, or it is theirs."""
        if not self.namespaces or job.author == self.principal.name:
            return True
        return all(self._sees_name(name) for name in names_in(job.kind, job.arguments))

    def _sees_name(self, name: str) -> bool:
        try:
            self.subject(name)
        except NotFound:
            return name in {base.name for base in self.registry.bases()}
        return True

    def shipments(self, environment: str, look_up: Callable[[], Iterable[Shipment]]) -> list[Shipment]:
        """Those of some shipments that may be seen.

        Args:
            environment: where to, when there has to be one; else empty.
            look_up: gives the shipments.

        Raises:
            UnknownEnvironment: none to this environment.
        """
        seen = [each for each in self.discreetly(look_up) if self.sees_ref(each.checkpoint)]
        if environment and self.namespaces and not seen:
            raise UnknownEnvironment(environment)
        return seen

    def last(self, look: Callable[[int], Sequence[_U]], sees: Callable[[_U], bool], limit: int) -> list[_U]:
        """The last so many of a list that may be seen.

        Args:
            look: gives the last so many, seen or not.
            sees: whether one may be seen.
            limit: the most to give.
        """
        asked = limit
        while True:
            found = look(asked)
            seen = [each for each in found if sees(each)]
            if len(seen) >= limit or len(found) < asked or asked >= _MOST_LOOKED_AT:
                return seen
            asked *= 8

    # -- change

    def may_change(self, name: str) -> None:
        """See that something may be recorded under an adapter's name.

        Raises:
            Forbidden: it is in another namespace.
        """
        if not self.principal.sees(AdapterName.parse(name)):
            raise Forbidden(
                f"{self.principal.name} may record only in {', '.join(self.namespaces)}: {name} is not there"
            )


def names_in(kind: str, arguments: object) -> list[str]:
    """What a job's arguments name: checkpoints, merged models, base models."""
    given = arguments if isinstance(arguments, dict) else {}
    single = [given[key] for key in ("one", "other", "text", "tuned") if isinstance(given.get(key), str)]
    several = given.get("checkpoints")
    return [*single, *(each for each in (several if isinstance(several, list) else []) if isinstance(each, str))]


def _only(text: str, found: Sequence[_U], missing: NotFound) -> _U:
    if not found:
        raise missing
    if len(found) > 1:
        raise Ambiguous(text, [_name(each) for each in found])
    return found[0]


def _name(subject: object) -> str:
    if isinstance(subject, Checkpoint):
        return f"{subject.ref} {subject.digest.short}"
    if isinstance(subject, KeptRecipe):
        return f"merged-{subject.recipe.digest.hex}"
    return f"merged {subject.digest.short}" if isinstance(subject, Merged) else str(subject)
