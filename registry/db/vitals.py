"""How the database is: its clock, what it is, and how many of what people tend to forget."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import final

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from registry.db.tables import JobRow, TokenRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Background work that is not done: how many jobs wait, since when the oldest does, and how many run."""

    queued: int
    oldest: datetime | None
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens that are valid now: in all, of admins, and those that never expire."""

    valid: int
    admins: int
    endless: int


@final
class Vitals:
    """One database's."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_sqlite = session.get_bind().dialect.name == "sqlite"

    def now(self) -> datetime:
        """The database's time, the same for all machines; within one transaction it goes on."""
        if self._is_sqlite:
            found = str(self._session.scalar(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')")))
            return datetime.fromisoformat(found).replace(tzinfo=UTC)
        moment: datetime = self._session.scalars(select(func.clock_timestamp())).one()
        return moment.astimezone(UTC)

    def server(self) -> str:
        """`SQLite 3.45.1`, `PostgreSQL 15.6`."""
        if self._is_sqlite:
            return f"SQLite {self._session.scalar(text('SELECT sqlite_version()'))}"
        return f"PostgreSQL {str(self._session.scalar(text('SHOW server_version'))).split()[0]}"

    def revision(self) -> str:
        """Of the tables."""
        return str(self._session.scalar(text("SELECT version_num FROM alembic_version")))

    def backlog(self) -> Backlog:
        """Of the job engine."""
        queued, oldest = self._session.execute(
            select(func.count(), func.min(JobRow.created_at)).where(JobRow.state == "queued")
        ).one()
        running = self._session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "running"))
        return Backlog(queued=queued, oldest=oldest, running=running or 0)

    def workers(self) -> int | None:
        """How many workers gave a sign of life in the last minute; None where there are none by nature (SQLite)."""
        if self._is_sqlite or not self._session.scalar(
            text("SELECT to_regclass('procrastinate.procrastinate_workers') IS NOT NULL")
        ):
            return None
        alive = "SELECT count(*) FROM procrastinate.procrastinate_workers WHERE last_heartbeat > now() - interval '1 minute'"
        return int(self._session.scalar(text(alive)) or 0)

    def tokens(self, now: datetime) -> Tokens:
        """Those that would be let in at a time."""
        rows = self._session.execute(
            select(TokenRow.role, TokenRow.expires_at).where(
                TokenRow.revoked_at.is_(None), (TokenRow.expires_at.is_(None)) | (TokenRow.expires_at > now)
            )
        ).all()
        return Tokens(
            valid=len(rows),
            admins=sum(role == "admin" for role, _ in rows),
            endless=sum(expires_at is None for _, expires_at in rows),
        )
