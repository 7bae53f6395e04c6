"""The history of changes, as a chain of events.

Each event's hash is BLAKE3 over the hash of the one before (64 hex digits; zeros for the first) followed by the canonical JSON of its own
number, time, author, action, subject and detail. A changed, missing, added or moved event breaks the chain. Two things it does not
show: that events are missing at the end, and that somebody has written the whole chain anew. Whoever keeps the last hash elsewhere sees
both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, final

from blake3 import blake3
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.db.tables import EventRow
from registry.errors import Changed
from registry.manifest import Event, canonical_json, to_json

_FIRST = "0" * 64


@final
class Events:
    """The events, oldest first."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def append(self, author: str, at: datetime, action: str, subject: str, detail: Mapping[str, Any]) -> Event:
        """Add an event at the end, in the transaction of the change that it tells of.

        Args:
            author: who did it.
            at: when; aware.
            action: what, as a stable word.
            subject: to what, as people refer to it.
            detail: more about it; anything `to_json` takes.
        """
        last = self._session.execute(
            select(EventRow.number, EventRow.hash).order_by(EventRow.number.desc()).limit(1)
        ).one_or_none()
        number, previous = (last[0] + 1, last[1]) if last else (1, _FIRST)
        row = EventRow(
            number=number,
            at=at,
            author=author,
            action=action,
            subject=subject,
            detail=_plain(to_json(detail)),
            previous_hash=previous,
        )
        row.hash = _hash(row)
        self._session.add(row)
        self._session.flush()
        return _value(row)

    def all(self, subject_prefix: str = "", limit: int | None = None) -> list[Event]:
        """The last `limit` events (None: every one) whose subject starts with the prefix, oldest first."""
        rows = self._session.scalars(
            select(EventRow)
            # not LIKE, which ignores case in SQLite
            .where(func.substr(EventRow.subject, 1, len(subject_prefix)) == subject_prefix)
            .order_by(EventRow.number.desc())
            .limit(limit)
        )
        return [_value(row) for row in rows][::-1]

    def verify(self) -> int:
        """Walk the whole chain.

        Returns:
            How many events it has.

        Raises:
            Changed: names the first event that is not as it was written.
        """
        number, previous = 0, _FIRST
        for row in self._session.scalars(select(EventRow).order_by(EventRow.number).execution_options(yield_per=1000)):
            number += 1
            if row.number != number:
                raise Changed(f"event {number}", "in its place", f"missing; the next is {row.number}")
            if row.previous_hash != previous:
                raise Changed(f"event {number}", previous, row.previous_hash)
            if (found := _hash(row)) != row.hash:
                raise Changed(f"event {number}", row.hash, found)
            previous = row.hash
        return number


def _hash(row: EventRow) -> str:
    fields = {
        "number": row.number,
        "at": to_json(row.at),
        "author": row.author,
        "action": row.action,
        "subject": row.subject,
        "detail": row.detail,
    }
    return blake3(row.previous_hash.encode() + canonical_json(fields)).hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _value(row: EventRow) -> Event:
    return Event(
        number=row.number,
        at=row.at,
        author=row.author,
        action=row.action,
        subject=row.subject,
        detail=row.detail,
        hash=row.hash,
    )
