"""What answers to the ids of repositories and their revisions, without loading more of it than that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, final

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session, aliased

from registry.db.listing import Scope
from registry.db.lookup import is_adapter, newest_of_adapter, starts_with
from registry.db.tables import AdapterMetricRow, AdapterRow, AliasRow, BaseRow, CheckpointRow, ShipmentRow
from registry.manifest import BaseFile
from registry.refs import AdapterName, CheckpointRef, Digest

_id = CheckpointRow.id
NameKind = Literal["alias", "environment", "version"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBase:
    """A base model without its table of tensors; fields as of `registry.manifest.BaseModel`."""

    name: str
    digest: Digest
    url: str
    in_store: bool
    files: tuple[BaseFile, ...]
    created_at: datetime
    author: str


class Named(NamedTuple):
    """A name that a checkpoint of an adapter has, with its digest and that of its base model's weights."""

    kind: NameKind
    name: str
    digest: Digest
    base: Digest


class Newest(NamedTuple):
    """An adapter with facts about its newest checkpoint."""

    adapter: AdapterName
    method: str
    created_at: datetime
    author: str


@final
class Repositories:
    """Adapters and base models, as somebody may see them: `namespaces` are those that may be seen, none for all."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # -- adapters

    def has_adapter(self, name: AdapterName, namespaces: Sequence[str] = (), version: int | None = None) -> bool:
        """Whether there is an adapter (with a version) that may be seen."""
        found = select(CheckpointRow.id).join(AdapterRow).where(*Scope(name, namespaces=namespaces).adapters()).limit(1)
        wanted = found if version is None else found.where(CheckpointRow.version == version)
        return self._session.scalar(wanted) is not None

    def has_label(self, adapter: AdapterName, name: str) -> bool:
        """Whether an adapter has an alias or an environment of a name."""
        label = _answering(CheckpointRef(adapter, "label", name))
        found = select(_id).join(AdapterRow).where(is_adapter(adapter), *label).limit(1)
        return self._session.scalar(found) is not None

    def versions_starting(self, adapter: AdapterName, prefix: str) -> list[int]:
        """The versions of an adapter whose digests begin with some hex digits."""
        return list(
            self._session.scalars(
                select(CheckpointRow.version)
                .join(AdapterRow)
                .where(is_adapter(adapter), starts_with(CheckpointRow.digest, prefix))
                .order_by(CheckpointRow.version)
            )
        )

    def names(self, adapter: AdapterName) -> list[Named]:
        """Every name that a checkpoint of an adapter has; what is live in an environment has the environment's."""
        named = self._named(AliasRow.name, is_adapter(adapter)).join(AliasRow, AliasRow.checkpoint_id == _id)
        later = aliased(ShipmentRow)
        is_last = ~exists().where(
            later.adapter_id == ShipmentRow.adapter_id,
            later.environment == ShipmentRow.environment,
            later.id > ShipmentRow.id,
        )
        live = self._named(ShipmentRow.environment, is_adapter(adapter), is_last).join(
            ShipmentRow, ShipmentRow.checkpoint_id == _id
        )
        numbered = self._named(CheckpointRow.version, is_adapter(adapter))
        kinds: tuple[tuple[NameKind, Select[Any, str, str]], ...] = (
            ("alias", named),
            ("environment", live),
            ("version", numbered),
        )
        return [
            Named(kind, f"v{name}" if kind == "version" else name, Digest(digest), Digest(base))
            for kind, found in kinds
            for name, digest, base in self._session.execute(found)
        ]

    @staticmethod
    def _named(name: Any, *conditions: ColumnElement[bool]) -> Select[Any, str, str]:
        return (
            select(name, CheckpointRow.digest, BaseRow.weights)
            .select_from(CheckpointRow)
            .join(AdapterRow, AdapterRow.id == CheckpointRow.adapter_id)
            .join(BaseRow, BaseRow.id == CheckpointRow.base_id)
            .where(*conditions)
            .order_by(name)
        )

    def newest(self, namespaces: Sequence[str] = ()) -> list[Newest]:
        """Every adapter."""
        newest = newest_of_adapter()
        rows = self._session.execute(
            select(
                AdapterRow.namespace,
                AdapterRow.name,
                CheckpointRow.method,
                CheckpointRow.created_at,
                CheckpointRow.author,
            )
            .join_from(AdapterRow, CheckpointRow, _id == newest)
            .where(*Scope(namespaces=namespaces).adapters())
        )
        return [
            Newest(AdapterName(row.namespace, row.name), row.method, created_at=row.created_at, author=row.author)
            for row in rows
        ]

    # -- base models

    def bases_named(self, name: str) -> list[KnownBase]:
        """The base model of a name, if there is one."""
        return list(self._bases(BaseRow.name == name))

    def bases_starting(self, prefix: str) -> list[KnownBase]:
        """Those whose weights' digests begin with some hex digits."""
        return list(self._bases(starts_with(BaseRow.weights, prefix)))

    def bases(self) -> list[KnownBase]:
        """Every base model, the newest first."""
        return list(self._bases())

    def _bases(self, *conditions: ColumnElement[bool]) -> Iterator[KnownBase]:
        rows = self._session.execute(
            select(
                BaseRow.name,
                BaseRow.weights,
                BaseRow.url,
                BaseRow.in_store,
                BaseRow.document["files"].label("files"),
                BaseRow.created_at,
                BaseRow.author,
            )
            .where(*conditions)
            .order_by(BaseRow.id.desc())
        )
        for row in rows:
            yield KnownBase(
                name=row.name,
                digest=Digest(row.weights),
                url=row.url,
                in_store=row.in_store,
                files=tuple(BaseFile(**entry) for entry in row.files),
                created_at=row.created_at,
                author=row.author,
            )

    def answers(self, base: Digest, wanted: CheckpointRef, namespaces: Sequence[str] = ()) -> bool:
        """Whether a checkpoint trained on a base model answers to a selector, or to the beginning of a digest."""
        base_id = select(BaseRow.id).where(BaseRow.weights == base.hex).scalar_subquery()
        # A label has few checkpoints, a base model most of them: a sum keeps SQLite from walking through the latter.
        trained = (CheckpointRow.base_id + 0 if wanted.selector == "label" else CheckpointRow.base_id) == base_id
        seen = Scope(namespaces=namespaces).adapters()
        found = select(_id).join(AdapterRow).where(trained, *seen, *_answering(wanted)).limit(1)
        return self._session.scalar(found) is not None


def _answering(wanted: CheckpointRef) -> list[ColumnElement[bool]]:
    """Conditions on a checkpoint, of any adapter. By a metric, the best is one of those that have it."""
    if wanted.digest_prefix:
        return [starts_with(CheckpointRow.digest, wanted.digest_prefix)]
    match wanted.selector:
        case "version":
            return [CheckpointRow.version == wanted.version]
        case "step":
            return [CheckpointRow.step == int(wanted.value)]
        case "run":
            return [CheckpointRow.run == wanted.value]
        case "label":
            named = select(AliasRow.checkpoint_id).where(AliasRow.name == wanted.value)
            shipped = select(ShipmentRow.checkpoint_id).where(ShipmentRow.environment == wanted.value)
            return [_id.in_(named.union(shipped))]
        case "best" if wanted.value:
            of_metric = (AdapterMetricRow.name == wanted.value, AdapterMetricRow.checkpoints > 0)
            return [AdapterRow.id.in_(select(AdapterMetricRow.adapter_id).where(*of_metric))]
        case _:
            return []
