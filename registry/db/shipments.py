"""Shipments: what went live where, and what a rollback brings back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, final

from sqlalchemy import ColumnElement, Select, exists, func, select
from sqlalchemy.orm import Session, aliased

from registry.db.lookup import checkpoint_id, is_adapter, ref
from registry.db.merged import merged_row_id
from registry.db.tables import AdapterRow, BaseRow, CheckpointRow, MergedRow, ShipmentRow
from registry.errors import Conflict, UnknownEnvironment
from registry.manifest import Checkpoint, Merged, Shipment
from registry.refs import AdapterName, Digest
from registry.results import EnvironmentLine


@final
class Shipments:
    """The shipments, oldest first. In an environment one shipment of each adapter is live: the last."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def environments(self) -> list[str]:
        """Every environment that something was shipped to, by name."""
        return sorted(self._session.scalars(select(ShipmentRow.environment).distinct()))

    def require(self, environment: str) -> None:
        """See that something was shipped to an environment.

        Raises:
            UnknownEnvironment: nothing ever was; carries those that there are.
        """
        if not self._session.scalar(select(exists().where(ShipmentRow.environment == environment))):
            raise UnknownEnvironment(environment, tuple(self.environments()))

    def all(self, environment: str | None = None) -> list[Shipment]:
        """Every shipment (to one environment), with `until` filled in."""
        return self._load(*_to(environment))

    def of(self, checkpoint: Checkpoint) -> list[Shipment]:
        """Those of a checkpoint."""
        return self._load(ShipmentRow.checkpoint_id == checkpoint_id(self._session, checkpoint))

    def live(self, environment: str | None = None, at: datetime | None = None) -> list[Shipment]:
        """What is live, or was at a time: the last shipment of each environment and adapter until then."""
        later = aliased(ShipmentRow)
        until_then = [] if at is None else [ShipmentRow.shipped_at <= at]
        later_until_then = [] if at is None else [later.shipped_at <= at]
        last = ~exists().where(*_after(later), *later_until_then).correlate(ShipmentRow)
        found = self._load(*_to(environment), *until_then, last)
        return sorted(found, key=lambda shipment: (shipment.environment, _adapter(shipment)))

    def newest(self, most: int, namespaces: Sequence[str] = ()) -> list[EnvironmentLine]:
        """Each environment, by name, with those that went live there last of what is (in some namespaces), so many at most."""
        live = select(func.max(ShipmentRow.id).label("id"), ShipmentRow.environment)
        if namespaces:
            seen = select(AdapterRow.id).where(AdapterRow.namespace.in_(namespaces))
            live = live.where(ShipmentRow.adapter_id.in_(seen))
        last = live.group_by(ShipmentRow.environment, ShipmentRow.adapter_id).subquery()
        place = func.row_number().over(partition_by=last.c.environment, order_by=last.c.id.desc()).label("place")
        count = func.count().over(partition_by=last.c.environment).label("there")
        places = select(last.c.id, place, count).subquery()
        first = self._session.execute(select(places.c.id, places.c.there).where(places.c.place <= most))
        counts, found = dict(first.all()), defaultdict[str, list[Shipment]](list)
        for each in self._load(ShipmentRow.id.in_(list(counts))):
            found[each.environment].insert(0, each)
        return [
            EnvironmentLine(name=name, newest=tuple(newest), others=counts[newest[0].number] - len(newest))
            for name, newest in sorted(found.items())
        ]

    def _load(self, *conditions: ColumnElement[bool]) -> list[Shipment]:
        later = aliased(ShipmentRow)
        until = (
            select(later.shipped_at)
            .where(*_after(later))
            .order_by(later.id)
            .limit(1)
            .correlate(ShipmentRow)
            .scalar_subquery()
        )
        rows = self._session.execute(
            select(
                ShipmentRow,
                AdapterRow.namespace,
                AdapterRow.name.label("adapter"),
                CheckpointRow.version,
                CheckpointRow.digest,
                BaseRow.weights.label("base"),
                BaseRow.name.label("base_name"),
                MergedRow.digest.label("merged"),
                until.label("until"),
            )
            .join_from(ShipmentRow, CheckpointRow)
            .join(AdapterRow)
            .join(BaseRow, CheckpointRow.base_id == BaseRow.id)
            .outerjoin(MergedRow, ShipmentRow.merged_id == MergedRow.id)
            .where(*conditions)
            .order_by(ShipmentRow.id)
        )
        return [_value(row) for row in rows]

    def add(
        self,
        environment: str,
        checkpoint: Checkpoint,
        merged: Merged | None = None,
        *,
        note: str,
        author: str,
        at: datetime,
        restores: int | None = None,
    ) -> Shipment:
        """Record that a checkpoint, or a merged model made of it, went live.

        Args:
            environment: where to.
            checkpoint: what.
            merged: the merged model in whose shape it went live, if so.
            note: why.
            author: by whom.
            at: when; aware.
            restores: number of the earlier shipment that this one brings back.

        Raises:
            UnknownCheckpoint, UnknownMerged: not recorded.
            Conflict: `restores` is no shipment of this adapter to this environment.
        """
        if restores is not None:
            self._numbered(environment, checkpoint.adapter, restores)
        row_id = checkpoint_id(self._session, checkpoint)
        row = ShipmentRow(
            environment=environment,
            adapter_id=select(CheckpointRow.adapter_id).where(CheckpointRow.id == row_id).scalar_subquery(),
            checkpoint_id=row_id,
            merged_id=merged and merged_row_id(self._session, merged),
            note=note,
            author=author,
            shipped_at=at,
            restores=restores,
        )
        self._session.add(row)
        self._session.flush()
        return self._load(ShipmentRow.id == row.id)[0]

    def rollback_target(self, environment: str, adapter: AdapterName) -> tuple[Shipment, Shipment]:
        """What is live, and what was live before it first went live.

        A shipment that was itself a rollback counts as the one it brought back, so that repeated rollbacks walk further back instead of
        to and fro.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
            Conflict: nothing of this adapter was live before.
        """
        self.require(environment)
        of_line = self._line(environment, adapter)
        current = self._session.scalar(of_line)
        earlier = current and self._session.scalar(of_line.where(ShipmentRow.id < self._original(current).id))
        if current is None or earlier is None:
            raise Conflict(f"{adapter} in {environment}", "nothing was live there before")
        (shown,), (target,) = (self._load(ShipmentRow.id == row.id) for row in (current, self._original(earlier)))
        return shown, target

    def _original(self, row: ShipmentRow) -> ShipmentRow:
        """The shipment that a rollback brought back, or one that was none itself."""
        while row.restores is not None:
            row = self._session.scalars(select(ShipmentRow).where(ShipmentRow.id == row.restores)).one()
        return row

    def _numbered(self, environment: str, adapter: AdapterName, number: int) -> ShipmentRow:
        found = self._session.scalar(self._line(environment, adapter).where(ShipmentRow.id == number))
        if found is None:
            raise Conflict(f"shipment {number}", f"not one of {adapter} to {environment}")
        return found

    @staticmethod
    def _line(environment: str, adapter: AdapterName) -> Select[ShipmentRow]:
        """The last shipment of an adapter to an environment."""
        adapter_id = select(AdapterRow.id).where(is_adapter(adapter)).scalar_subquery()
        return (
            select(ShipmentRow)
            .where(ShipmentRow.environment == environment, ShipmentRow.adapter_id == adapter_id)
            .order_by(ShipmentRow.id.desc())
            .limit(1)
        )


def _to(environment: str | None) -> list[ColumnElement[bool]]:
    return [] if environment is None else [ShipmentRow.environment == environment]


def _after(later: type[ShipmentRow]) -> tuple[ColumnElement[bool], ...]:
    """That a shipment took over from the one around."""
    return (
        later.environment == ShipmentRow.environment,
        later.adapter_id == ShipmentRow.adapter_id,
        later.id > ShipmentRow.id,
    )


def _value(found: Any) -> Shipment:
    row: ShipmentRow = found.ShipmentRow
    return Shipment(
        number=row.id,
        environment=row.environment,
        checkpoint=ref(found.namespace, found.adapter, found.version),
        checkpoint_digest=Digest(found.digest),
        merged=Digest(found.merged) if found.merged else None,
        base=Digest(found.base),
        base_name=found.base_name,
        note=row.note,
        author=row.author,
        shipped_at=row.shipped_at,
        restores=row.restores,
        until=found.until,
    )


def _adapter(shipment: Shipment) -> str:
    return shipment.checkpoint.partition("@")[0]
