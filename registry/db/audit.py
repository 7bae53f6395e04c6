"""The history of changes, as a chain of events.

See `registry.chain` for the hashes. A changed, missing, added or moved event breaks the chain. Two things it does not show: that events are
missing at the end, and that somebody has written the whole chain anew. Whoever keeps the last hash elsewhere sees both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from typing import Any, final

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from registry.chain import FIRST, AuditState, follow, hash_of
from registry.codec import plain
from registry.db.tables import LINE_LENGTH, EventRow
from registry.errors import Changed, InvalidInput
from registry.manifest import Event
from registry.teamwork import Page

MAX_EVENTS = 10_000  # of a page
_LAST = "last event"
_OF_EVERYBODY = ("base.add", "base.move")


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
        number, previous = self._last()
        number += 1
        row = EventRow(
            number=number,
            at=at,
            author=author,
            action=action,
            subject=subject,
            about=about(subject),
            detail=plain(detail),
            previous_hash=previous,
        )
        row.hash = hash_of(previous, _value(row))
        self._session.add(row)
        self._session.info[_LAST] = number, row.hash
        return _value(row)

    def _last(self) -> tuple[int, str]:
        """Number and hash of the last event. Who appends is alone, so it is looked up once for each transaction."""
        kept: tuple[int, str] | None = self._session.info.get(_LAST)
        if kept is not None:
            return kept
        found = self._session.execute(
            select(EventRow.number, EventRow.hash).order_by(EventRow.number.desc()).limit(1)
        ).one_or_none()
        return (found.number, found.hash) if found else (0, FIRST)

    def all(
        self, subject: str = "", limit: int | None = None, *, author: str = "", since: datetime | None = None
    ) -> list[Event]:
        """The last `limit` events (None: every one), oldest first; of a subject, also those of what it is the name of: `bot@v1` of `bot`.

        Args:
            subject: of this one only.
            limit: the most to give.
            author: of this one only.
            since: from then on; aware.
        """
        return self._newest(limit, *_which(subject, author, since))

    def page(
        self,
        subject: str = "",
        *,
        author: str = "",
        since: datetime | None = None,
        cursor: str = "",
        limit: int = 100,
        namespaces: Sequence[str] = (),
    ) -> Page[Event]:
        """The last `limit` of them, oldest first, and where those before are; see `registry.service.Registry.history_page`."""
        if not 1 <= limit <= MAX_EVENTS:
            raise InvalidInput("limit", limit, f"expected 1 to {MAX_EVENTS}")
        which = [*_which(subject, author, since), *_seen(namespaces)]
        if cursor:
            which.append(EventRow.number < _number(cursor))
        found = self._newest(limit + 1, *which)
        shown = tuple(found[-limit:])
        return Page(items=shown, cursor=str(shown[0].number) if len(found) > limit else "")

    def _newest(self, limit: int | None, *which: ColumnElement[bool]) -> list[Event]:
        statement = select(EventRow).where(*which).order_by(EventRow.number.desc()).limit(limit)
        return [_value(row) for row in self._session.scalars(statement)][::-1]

    def after(self, last: Event | None, limit: int) -> list[Event]:
        """The first `limit` of those that follow an event (None: of all), oldest first."""
        statement = select(EventRow).order_by(EventRow.number).limit(limit)
        if last is not None:
            statement = statement.where(EventRow.number > last.number)
        return [_value(row) for row in self._session.scalars(statement)]

    def _rows(self) -> Iterator[EventRow]:
        statement = select(EventRow).order_by(EventRow.number).execution_options(yield_per=1000)
        with closing(self._session.scalars(statement)) as rows:
            yield from rows

    def verify(self) -> AuditState:
        """Walk the whole chain.

        Raises:
            Changed: names the first event that is not as it was written.
        """
        state = AuditState(count=0, hash=FIRST)
        for row in self._rows():
            after = follow(state, _value(row))
            # What is not hashed itself follows from what is.
            if (row.previous_hash, row.about) != (state.hash, about(row.subject)):
                raise Changed(
                    f"event {row.number}", f"{state.hash} {about(row.subject)}", f"{row.previous_hash} {row.about}"
                )
            state = after
        return state


def about(subject: str) -> str:
    """What a subject without its `@` is about, as far as an index holds it: an adapter, a base model, an environment…"""
    return subject.partition("@")[0][:LINE_LENGTH]


def _which(subject: str, author: str, since: datetime | None) -> list[ColumnElement[bool]]:
    which: list[ColumnElement[bool]] = []
    if author:
        which.append(EventRow.author == author)
    if since:
        which.append(EventRow.at >= since)
    if subject:
        # not LIKE, which ignores case in SQLite
        of_subject = or_(EventRow.subject == subject, _starts(EventRow.subject, f"{subject}@"))
        which += [EventRow.about == about(subject), of_subject]
    return which


def _seen(namespaces: Sequence[str]) -> list[ColumnElement[bool]]:
    """That an event is about what may be seen. What concerns everything is for those who see everything."""
    if not namespaces:
        return []
    names_one = func.substr(EventRow.subject, func.length(EventRow.about) + 1, 1) == "@"
    inside = or_(*(_starts(EventRow.about, f"{each}/") for each in namespaces))
    return [or_(EventRow.action.in_(_OF_EVERYBODY), and_(names_one, inside))]


def _starts(column: Any, text: str) -> ColumnElement[bool]:
    begins: ColumnElement[bool] = func.substr(column, 1, len(text)) == text
    return begins


def _number(cursor: str) -> int:
    if not cursor.isdecimal() or not cursor.isascii() or len(cursor) > 9:
        raise InvalidInput("cursor", cursor[:80], "not one of this list: ask for its last page without one")
    return int(cursor)


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
