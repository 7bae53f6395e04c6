"""Signing in to the pages: with a token, or, for the owner of the machine, with a key that is good once.

What the browser keeps is a random text; the database has its SHA-256. Whoever signed in with a token is only as good as that token is.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from datetime import timedelta
from typing import final
from urllib.parse import quote, urlsplit

from registry.access import secret_sha256
from registry.errors import Unauthenticated
from registry.server.authority import Authority
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.service import Registry
from registry.teamwork import Principal, Role

COOKIE = "ckpt_sign_in"
LASTS = timedelta(days=7)
_KEY_SECONDS = 600.0


@final
class SignIns:
    """Lets visitors in and out.

    Args:
        registry: whose tokens are shown.
        authority: knows tokens, and who tries too often.
    """

    def __init__(self, registry: Registry, authority: Authority) -> None:
        self._registry, self._authority = registry, authority
        self._owner = Principal(name=registry.settings.author, role=Role.ADMIN)
        self._keys: dict[str, float] = {}
        self._lock = threading.Lock()

    def invite(self) -> str:
        """A key that lets one visitor in as the owner, once, within ten minutes."""
        key = secrets.token_urlsafe(32)
        with self._lock:
            self._keys[_sha256(key)] = time.monotonic() + _KEY_SECONDS
        return key

    def enter(self, token: str, address: str) -> str:
        """Sign in with a token. Gives what the browser is to keep.

        Raises:
            Unauthenticated, TooManyTries: as `Authority.principal`.
        """
        if not token:
            raise Unauthenticated("a token is needed to sign in")
        self._authority.principal(token, address)
        return self._keep(secret_sha256(token))

    def enter_with_key(self, key: str) -> str:
        """Sign in as the owner, with a key. Gives what the browser is to keep.

        Raises:
            Unauthenticated: the key is none, was used, or is too old.
        """
        with self._lock:
            until = self._keys.pop(_sha256(key), 0.0)
        if until <= time.monotonic():
            raise Unauthenticated("this address was used already, or is too old: `ckpt ui` gives another")
        return self._keep(None)

    def _keep(self, token_sha256: str | None) -> str:
        kept = secrets.token_urlsafe(32)
        with self._registry.workspace.writing() as change:
            change.catalog.sign_ins.add(_sha256(kept), token_sha256, at=change.at, expires_at=change.at + LASTS)
        return kept

    def principal(self, kept: str) -> Principal:
        """Who it is whose browser keeps this.

        Raises:
            Unauthenticated: nobody, or not any more.
        """
        with self._registry.workspace.reading() as catalog:
            return catalog.sign_ins.principal(_sha256(kept), catalog.vitals.now(), self._owner)

    def leave(self, kept: str) -> None:
        """Sign out."""
        with self._registry.workspace.writing() as change:
            change.catalog.sign_ins.remove(_sha256(kept))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def own_url(text: str) -> str:
    """An address of ours to go on at; anything else becomes the first page."""
    parts = urlsplit(text)
    is_own = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.scheme and not parts.netloc
    return text if is_own and text.isprintable() else "/"


def sign_in_url(wanted: str) -> str:
    """Where to sign in, to go on at what was wanted."""
    return f"/sign-in?next={quote(own_url(wanted), safe='')}" if own_url(wanted) != "/" else "/sign-in"


def pages_of(sign_ins: SignIns) -> Pages:
    """The pages to sign in and out by."""
    pages = Pages("sign-in")

    @pages.page("GET", "/sign-in", None)
    def show_sign_in(visit: Visit) -> Shown | Moved:
        if key := visit.query.one("key"):
            try:
                return Moved("/", sign_ins.enter_with_key(key))
            except Unauthenticated as error:
                return Shown("sign_in.html", status=401, next="/", problem=str(error.reason))
        return Shown("sign_in.html", next=own_url(visit.query.one("next")))

    @pages.page("POST", "/sign-in", None)
    def sign_in(visit: Visit) -> Moved | Shown:
        wanted = own_url(visit.form.one("next"))
        try:
            return Moved(wanted, sign_ins.enter(visit.form.one("token"), visit.address))
        except Unauthenticated as error:
            return Shown("sign_in.html", status=401, next=wanted, problem=str(error.reason))

    @pages.page("POST", "/sign-out", None)
    def sign_out(visit: Visit) -> Moved:
        if visit.kept:
            sign_ins.leave(visit.kept)
        return Moved("/sign-in", "")

    return pages
