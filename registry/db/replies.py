"""Answers to writes that carried a key, so that the same request again gives the same answer and changes nothing twice."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.db.needs import REPLIES_KEPT
from registry.db.tables import ReplyRow
from registry.errors import KeyReused


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer that was given: its HTTP status and its body."""

    status: int
    body: Any


@final
class Replies:
    """The kept answers, by who asked and the key he gave."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, holder: str, key: str, request: str, now: datetime) -> Reply | None:
        """The answer to a request that was made before, or None.

        Args:
            holder: who asks.
            key: his for this request.
            request: the digest of what is asked, 64 hex digits.
            now: the database's time; what is too old is forgotten.

        Raises:
            KeyReused: the key stands for another request.
        """
        mine = (ReplyRow.holder == holder, ReplyRow.key == key)
        row = self._session.scalar(select(ReplyRow).where(*mine))
        if row is None:
            return None
        if row.created_at <= now - REPLIES_KEPT:
            self._session.execute(delete(ReplyRow).where(*mine))
            return None
        if row.request != request:
            raise KeyReused(key, "stands for another request of yours")
        return Reply(status=row.status, body=row.body)

    def add(self, holder: str, key: str, request: str, reply: Reply, now: datetime) -> None:
        """Keep an answer, in the transaction of what it tells of."""
        self._session.add(
            ReplyRow(holder=holder, key=key, request=request, status=reply.status, body=reply.body, created_at=now)
        )
        self._session.flush()
