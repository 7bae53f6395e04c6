"""Who may do what over HTTP."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import final

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from registry.db.lookup import near
from registry.db.tables import TokenRow
from registry.errors import NameTaken, Unauthenticated, UnknownToken
from registry.teamwork import Principal, Role, Token

USE_NOTED_EVERY = timedelta(minutes=1)
_LARGEST_ID = (1 << 31) - 1


@final
class Tokens:
    """The tokens, by name and number. None is ever deleted, so that a name in the history stays the same person's."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, token: Token, sha256: str) -> Token:
        """Record a token; its `id` is given by the database.

        Args:
            token: what is known of it.
            sha256: of its text, 64 hex digits.

        Raises:
            NameTaken: there is one of this name.
        """
        if self._session.scalar(select(TokenRow.id).where(TokenRow.name == token.name)) is not None:
            raise NameTaken(f"token {token.name}", "there is, or was, one of this name")
        row = TokenRow(
            name=token.name,
            role=token.role.value,
            namespaces=list(token.namespaces),
            secret_sha256=sha256,
            ending=token.ending,
            created_at=token.created_at,
            author=token.author,
            expires_at=token.expires_at,
            revoked_at=None,
            last_used_at=None,
        )
        self._session.add(row)
        self._session.flush()
        return _value(row)

    def all(self) -> list[Token]:
        """Every token, the oldest first."""
        return [_value(row) for row in self._session.scalars(select(TokenRow).order_by(TokenRow.id))]

    def exist(self) -> bool:
        """Whether there ever was one."""
        return self._session.scalar(select(TokenRow.id).limit(1)) is not None

    def revoke(self, text: str, at: datetime) -> Token:
        """End a token, by its name or number. One that is revoked already stays as it is.

        Raises:
            UnknownToken: none has this name or number.
        """
        row = self._session.scalar(select(TokenRow).where(_called(text)))
        if row is None:
            names = self._session.scalars(select(TokenRow.name).order_by(TokenRow.id.desc()).limit(200))
            raise UnknownToken(text, near(text, names))
        row.revoked_at = row.revoked_at or at
        self._session.flush()
        return _value(row)

    def principal(self, sha256: str, now: datetime) -> Principal:
        """Whose token it is.

        Args:
            sha256: of the token's text, 64 hex digits.
            now: when it has to be good.

        Raises:
            Unauthenticated: it is unknown, expired or revoked.
        """
        row = self._session.scalar(select(TokenRow).where(TokenRow.secret_sha256 == sha256))
        if row is None or not hmac.compare_digest(row.secret_sha256, sha256):
            raise Unauthenticated("the token is not known here")
        return principal_of(row, now)

    def secret_sha256(self, name: str) -> str:
        """What is kept of a token's text.

        Raises:
            Unauthenticated: there is none of this name.
        """
        found = self._session.scalar(select(TokenRow.secret_sha256).where(TokenRow.name == name))
        if found is None:
            raise Unauthenticated("the token is not known here")
        return found

    def note_use(self, names: Sequence[str], at: datetime) -> None:
        """Write down that tokens were used, unless that was done in the last minute."""
        stale = or_(TokenRow.last_used_at.is_(None), TokenRow.last_used_at <= at - USE_NOTED_EVERY)
        for row in self._session.scalars(select(TokenRow).where(TokenRow.name.in_(names), stale)):
            row.last_used_at = at


def principal_of(row: TokenRow, now: datetime) -> Principal:
    """Whose token it is.

    Raises:
        Unauthenticated: it is expired or revoked.
    """
    if row.revoked_at is not None:
        raise Unauthenticated(f"the token {row.name} was revoked")
    if row.expires_at is not None and row.expires_at <= now:
        raise Unauthenticated(f"the token {row.name} has expired")
    return Principal(name=row.name, role=Role(row.role), namespaces=tuple(row.namespaces))


def _called(text: str) -> ColumnElement[bool]:
    if text.isascii() and text.isdecimal() and int(text) <= _LARGEST_ID:
        return or_(TokenRow.id == int(text), TokenRow.name == text)
    return TokenRow.name == text


def _value(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        role=Role(row.role),
        namespaces=tuple(row.namespaces),
        ending=row.ending,
        created_at=row.created_at,
        author=row.author,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
