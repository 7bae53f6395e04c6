"""What makes a checkpoint of an adapter good enough, as it was written."""

from __future__ import annotations

from datetime import datetime
from typing import final

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from registry.db.lookup import is_adapter, unknown_adapter
from registry.db.tables import AdapterRow, PolicyRow
from registry.errors import UnknownPolicy
from registry.policies import KeptPolicy
from registry.refs import AdapterName


@final
class Policies:
    """The policies, one at most for each adapter."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def set(self, adapter: AdapterName, text: str, *, author: str, at: datetime) -> KeptPolicy | None:
        """Set an adapter's policy; gives the one before.

        Raises:
            UnknownAdapter: no adapter of this name.
        """
        owner = self._session.scalar(select(AdapterRow.id).where(is_adapter(adapter)))
        if owner is None:
            raise unknown_adapter(self._session, adapter)
        before = self.find(adapter)
        self._session.merge(PolicyRow(adapter_id=owner, text=text, author=author, set_at=at))
        self._session.flush()
        return before

    def find(self, adapter: AdapterName) -> KeptPolicy | None:
        """An adapter's policy, None where it has none."""
        return next(map(_value, self._session.execute(_kept().where(is_adapter(adapter)))), None)

    def all(self) -> list[KeptPolicy]:
        """Every policy, by adapter."""
        return [_value(row) for row in self._session.execute(_kept().order_by(AdapterRow.namespace, AdapterRow.name))]

    def remove(self, adapter: AdapterName) -> KeptPolicy:
        """Take an adapter's policy away; gives it.

        Raises:
            UnknownPolicy: it has none.
        """
        before = self.find(adapter)
        if before is None:
            raise UnknownPolicy(str(adapter))
        owner = self._session.scalar(select(AdapterRow.id).where(is_adapter(adapter)))
        self._session.delete(self._session.get_one(PolicyRow, owner))
        self._session.flush()
        return before


def _kept() -> Select[str, str, str, str, datetime]:
    return select(AdapterRow.namespace, AdapterRow.name, PolicyRow.text, PolicyRow.author, PolicyRow.set_at).join_from(
        PolicyRow, AdapterRow
    )


def _value(row: tuple[str, str, str, str, datetime]) -> KeptPolicy:
    namespace, name, text, author, set_at = row
    return KeptPolicy(adapter=AdapterName(namespace, name), text=text, author=author, set_at=set_at)
