"""Shipments: what went live where, and what a rollback brings back."""

from __future__ import annotations

from datetime import datetime
from typing import final

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db.lookup import checkpoint_id, near, ref
from registry.db.merged import merged_row_id
from registry.db.tables import AdapterRow, BaseRow, CheckpointRow, MergedRow, ShipmentRow
from registry.errors import Conflict, UnknownEnvironment
from registry.manifest import Checkpoint, Merged, Shipment
from registry.refs import AdapterName, Digest


@final
class Shipments:
    """The shipments, oldest first. In an environment one shipment of each adapter is live: the last."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def environments(self) -> list[str]:
        """Every environment that something was shipped to, by name."""
        return sorted(self._session.scalars(select(ShipmentRow.environment).distinct()))

    def all(self, environment: str | None = None) -> list[Shipment]:
        """Every shipment (to one environment), with `until` filled in."""
        statement = (
            select(ShipmentRow, AdapterRow, CheckpointRow.version, CheckpointRow.digest, BaseRow, MergedRow.digest)
            .join_from(ShipmentRow, CheckpointRow)
            .join(AdapterRow)
            .join(BaseRow, CheckpointRow.base_id == BaseRow.id)
            .outerjoin(MergedRow, ShipmentRow.merged_id == MergedRow.id)
            .order_by(ShipmentRow.id.desc())
        )
        if environment is not None:
            statement = statement.where(ShipmentRow.environment == environment)
        found: list[Shipment] = []
        until: dict[tuple[str, int], datetime] = {}
        for row, adapter, version, digest, base, merged in self._session.execute(statement):
            found.append(
                Shipment(
                    number=row.id,
                    environment=row.environment,
                    checkpoint=ref(adapter.namespace, adapter.name, version),
                    checkpoint_digest=Digest(digest),
                    merged=Digest(merged) if merged else None,
                    base=Digest(base.weights),
                    base_name=base.name,
                    note=row.note,
                    author=row.author,
                    shipped_at=row.shipped_at,
                    restores=row.restores,
                    until=until.get((row.environment, adapter.id)),
                )
            )
            until[row.environment, adapter.id] = row.shipped_at
        return found[::-1]

    def live(self, environment: str | None = None, at: datetime | None = None) -> list[Shipment]:
        """What is live, or was at a time: the last shipment of each environment and adapter until then."""
        last = {
            (shipment.environment, _adapter(shipment)): shipment
            for shipment in self.all(environment)
            if at is None or shipment.shipped_at <= at
        }
        return [last[key] for key in sorted(last)]

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
        if restores is not None and restores not in self._of(environment, checkpoint.adapter):
            raise Conflict(f"shipment {restores}", f"not one of {checkpoint.adapter} to {environment}")
        row = ShipmentRow(
            environment=environment,
            checkpoint_id=checkpoint_id(self._session, checkpoint),
            merged_id=merged and merged_row_id(self._session, merged),
            note=note,
            author=author,
            shipped_at=at,
            restores=restores,
        )
        self._session.add(row)
        self._session.flush()
        return next(shipment for shipment in self.all(environment) if shipment.number == row.id)

    def rollback_target(self, environment: str, adapter: AdapterName) -> tuple[Shipment, Shipment]:
        """What is live, and what was live before it first went live.

        A shipment that was itself a rollback counts as the one it brought back, so that repeated rollbacks walk further back instead of
        to and fro.

        Raises:
            UnknownEnvironment: nothing was ever shipped there.
            Conflict: nothing of this adapter was live before.
        """
        environments = self.environments()
        if environment not in environments:
            raise UnknownEnvironment(environment, near(environment, environments))
        numbered = self._of(environment, adapter)

        def original(shipment: Shipment) -> Shipment:
            return shipment if shipment.restores is None else original(numbered[shipment.restores])

        current = next(reversed(numbered.values()), None)
        earlier = [number for number in numbered if current and number < original(current).number]
        if current is None or not earlier:
            raise Conflict(f"{adapter} in {environment}", "nothing was live there before")
        return current, original(numbered[earlier[-1]])

    def _of(self, environment: str, adapter: AdapterName) -> dict[int, Shipment]:
        """The shipments of an adapter to an environment by their numbers, oldest first."""
        return {each.number: each for each in self.all(environment) if _adapter(each) == str(adapter)}


def _adapter(shipment: Shipment) -> str:
    return shipment.checkpoint.partition("@")[0]
