"""Tokens as text: how one is made, how a mistyped one is told without asking the database, and what is kept of it. Pure.

    ckpt_w_8fJ3…(44 letters and digits)…_0aB4cD

The letter is the role's, for people; what a token may do is in the database. The last six are a checksum over all before them.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from datetime import timedelta
from string import ascii_lowercase, ascii_uppercase, digits

from registry.errors import InvalidInput
from registry.teamwork import Role

_ALPHABET = digits + ascii_uppercase + ascii_lowercase
_SECRET_LENGTH = 44  # 262 bits
_CHECKSUM_LENGTH = 6
_TOKEN = re.compile(rf"(ckpt_[rwsa]_[0-9A-Za-z]{{{_SECRET_LENGTH}}})_([0-9A-Za-z]{{{_CHECKSUM_LENGTH}}})")
_SPAN = re.compile(r"([1-9][0-9]{0,5})([hdwy])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1), "y": timedelta(days=365)}


def new_secret(role: Role) -> str:
    """The text of a new token."""
    body = f"ckpt_{role.value[0]}_{''.join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))}"
    return f"{body}_{_checksum(body)}"


def is_well_formed(text: str) -> bool:
    """Whether a text can be a token: it has the form, and its checksum is right."""
    match = _TOKEN.fullmatch(text)
    return match is not None and match[2] == _checksum(match[1])


def secret_sha256(text: str) -> str:
    """What is kept of a token, as 64 hex digits. Its secret is random enough not to need a slow hash."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_span(text: str) -> timedelta:
    """A span of time as people write it: `12h`, `30d`, `8w`, `1y`.

    Raises:
        InvalidInput: it is none.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise InvalidInput("expires", text, "a number with h, d, w or y after it, such as 30d")
    return int(match[1]) * _UNITS[match[2]]


def _checksum(body: str) -> str:
    rest, found = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM_LENGTH):
        rest, digit = divmod(rest, len(_ALPHABET))
        found = _ALPHABET[digit] + found
    return found
