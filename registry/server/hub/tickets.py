"""Addresses that somebody may use once they were given to him: clients send large files without their token, as they would to a bucket.

A ticket names whose it is and until when it is good, signed for one method and path with what the database keeps of the token. So any process
of the server can tell, and a token that was revoked or has expired takes its tickets with it.
"""

from __future__ import annotations

import hmac
import re
import time

from registry.access import secret_sha256
from registry.errors import Unauthenticated
from registry.manifest import utc_now
from registry.service import Registry
from registry.teamwork import Principal

TICKET = "ticket"
_GOOD_SECONDS = 24 * 3600
_FORM = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})\.(.{1,200})")


def ticket(principal: Principal, secret: str, method: str, path: str) -> str:
    """A ticket for what has just been asked with a token.

    Args:
        principal: whose token it is.
        secret: the token's text.
        method, path: what may be asked for; the path as it is quoted in the address.
    """
    until = int(time.time()) + _GOOD_SECONDS
    return f"{until}.{_signed(secret_sha256(secret), until, method, path)}.{principal.name}"


def holder(registry: Registry, text: str, method: str, path: str) -> Principal:
    """Whose ticket it is.

    Raises:
        Unauthenticated: it is none, or for something else, or too old; or its token is not good any more.
    """
    match = _FORM.fullmatch(text)
    if match is None or int(match[1]) < time.time():
        raise Unauthenticated("the address that the upload was given is not good any more")
    with registry.workspace.reading() as catalog:
        key = catalog.tokens.secret_sha256(match[3])
        if not hmac.compare_digest(match[2], _signed(key, int(match[1]), method, path)):
            raise Unauthenticated("the address that the upload was given is for something else")
        return catalog.tokens.principal(key, utc_now())


def _signed(key: str, until: int, method: str, path: str) -> str:
    return hmac.digest(bytes.fromhex(key), f"{until} {method} {path}".encode(), "sha256").hex()
