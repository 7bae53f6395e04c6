"""Who has signed in to the pages."""

from __future__ import annotations

from datetime import datetime
from typing import final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.db.tables import SignInRow, TokenRow
from registry.db.tokens import principal_of
from registry.errors import Unauthenticated
from registry.teamwork import Principal


@final
class SignIns:
    """Those who have signed in, by the SHA-256 of what their browser keeps."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, sha256: str, token_sha256: str | None, *, at: datetime, expires_at: datetime) -> None:
        """Somebody has signed in. Those whose time is over are forgotten meanwhile.

        Args:
            sha256: of what the browser keeps, 64 hex digits.
            token_sha256: of the token that was shown; None for the registry's owner.
            at: now.
            expires_at: until when it is good.
        """
        self._session.execute(delete(SignInRow).where(SignInRow.expires_at <= at))
        token = None
        if token_sha256 is not None:
            token = self._session.scalar(select(TokenRow.id).where(TokenRow.secret_sha256 == token_sha256))
            if token is None:
                raise Unauthenticated("the token is not known here")
        self._session.add(SignInRow(secret_sha256=sha256, token_id=token, created_at=at, expires_at=expires_at))
        self._session.flush()

    def principal(self, sha256: str, now: datetime, owner: Principal) -> Principal:
        """Who it is. Whoever signed in with a token is only as good as that token is now.

        Args:
            sha256: of what the browser keeps, 64 hex digits.
            now: when it has to be good.
            owner: who it is without a token.

        Raises:
            Unauthenticated: nobody, or not any more.
        """
        row = self._session.scalar(select(SignInRow).where(SignInRow.secret_sha256 == sha256))
        if row is None or row.expires_at <= now:
            raise Unauthenticated("you are signed out: sign in again")
        if row.token_id is None:
            return owner
        return principal_of(self._session.get_one(TokenRow, row.token_id), now)

    def remove(self, sha256: str) -> None:
        """Somebody has signed out."""
        self._session.execute(delete(SignInRow).where(SignInRow.secret_sha256 == sha256))
