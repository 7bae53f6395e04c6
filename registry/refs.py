"""Names, references and digests: parse and format. Pure text, no look-ups.

Accepted wherever a checkpoint is asked for:

    support-bot                     its newest checkpoint
    team/support-bot@v12            a version
    support-bot@candidate           an alias, or an environment (what is live there)
    support-bot@step:500            the newest checkpoint of that step
    support-bot@run:lr-1e-4         the newest checkpoint of a run, by its name or number (`run:3`: the third one registered)
    support-bot@best:eval_loss      the best by a metric (`@best` alone: the metric that all share)
    3f9c2a7                         a prefix of a digest, at least 6 hex digits
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self

from registry.errors import InvalidInput, InvalidReference

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
_HEX = re.compile(r"[0-9a-f]{6,64}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{stem}{digit}" for stem in ("com", "lpt") for digit in range(1, 10))]
)


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A BLAKE3 digest of 32 bytes, as 64 lower-case hex digits. `str()` gives `blake3:…`."""

    hex: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.hex):
            raise InvalidInput("digest", self.hex, "expected 64 hex digits")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `blake3:<64 hex>` or the bare hex digits.

        Raises:
            InvalidInput: the text is neither.
        """
        return cls(text.removeprefix("blake3:"))

    def __str__(self) -> str:
        return f"blake3:{self.hex}"

    @property
    def short(self) -> str:
        """The first 12 hex digits, for people."""
        return self.hex[:12]


@dataclass(frozen=True, slots=True, order=True)
class AdapterName:
    """`name` or `namespace/name`."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            InvalidReference: a part is empty, too long (96), reserved, or has other characters than letters, digits, `.`, `_`, `-`.
        """
        namespace, slash, name = text.rpartition("/")
        if "/" in namespace or (slash and not namespace):
            raise InvalidReference(text, "expected name or namespace/name")
        for part in (namespace, name) if namespace else (name,):
            check_name(part, text)
        if not namespace and _HEX.fullmatch(name):
            raise InvalidReference(text, "a name of hex digits alone reads as a digest")
        return cls(namespace, name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def check_name(part: str, whole: str | None = None) -> str:
    """One name part: letters, digits and inner `.`, `_`, `-`; at most 96 characters; not a device name of Windows.

    Raises:
        InvalidReference: it is not.
    """
    if not _NAME.fullmatch(part) or ".." in part:
        raise InvalidReference(whole or part, "use letters, digits and . _ - between them, at most 96")
    if part.lower().split(".")[0] in _WINDOWS_DEVICES:
        raise InvalidReference(whole or part, f"{part!r} is a device name on Windows")
    return part


def nearest_name(text: str, kind: str) -> AdapterName:
    """The name most like a folder's: what names cannot have becomes `-`; `kind` goes before what would read as something else."""
    parts = [_clean(part) for part in text.split("/")[-2:]]
    try:
        return AdapterName.parse("/".join(parts))
    except InvalidReference:
        return AdapterName.parse(f"{kind}-{parts[-1]}".rstrip("-"))


def _clean(text: str) -> str:
    kept = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]", "-", text))
    return kept.strip("._-")[:80].rstrip("._-")


def check_label(text: str) -> str:
    """A name for an alias or environment: as a name, and not readable as a version or selector.

    Raises:
        InvalidReference: it is not.
    """
    check_name(text)
    if _VERSION.fullmatch(text) or text in {"best", "latest"}:
        raise InvalidReference(text, "reads as a version or selector")
    return text


Selector = Literal["newest", "version", "label", "step", "run", "best"]


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A parsed reference: a digest prefix, or an adapter with a selector and its value."""

    adapter: AdapterName | None = None
    selector: Selector = "newest"
    value: str = ""
    digest_prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read any of the forms in the module's docstring.

        Raises:
            InvalidReference: none of them.
        """
        bare = text.removeprefix("blake3:")
        if "@" not in text and _HEX.fullmatch(bare):
            return cls(digest_prefix=bare)
        name, at, selector = text.partition("@")
        adapter = AdapterName.parse(name)
        if not at:
            return cls(adapter)
        return cls(adapter, *_parse_selector(selector, text))

    @property
    def version(self) -> int:
        """The number of a `version` selector."""
        return int(self.value)

    def __str__(self) -> str:
        if self.digest_prefix:
            return self.digest_prefix
        shown = {
            "newest": "",
            "version": f"@v{self.value}",
            "label": f"@{self.value}",
            "step": f"@step:{self.value}",
            "run": f"@run:{self.value}",
            "best": f"@best:{self.value}" if self.value else "@best",
        }
        return f"{self.adapter}{shown[self.selector]}"


def _parse_selector(text: str, whole: str) -> tuple[Selector, str]:
    kind, colon, value = text.partition(":")
    if match := _VERSION.fullmatch(text):
        return "version", match[1]
    if text == "latest":
        return "newest", ""
    if kind == "best":
        if colon and not value:
            raise InvalidReference(whole, "@best: needs a metric")
        return "best", value
    if kind == "step" and colon:
        if not re.fullmatch(r"[0-9]{1,12}", value):
            raise InvalidReference(whole, "@step: needs a number")
        return "step", str(int(value))
    if kind == "run" and value:
        return "run", value
    if colon:
        raise InvalidReference(
            whole, f"unknown selector {kind!r}; there are vN, step:N, run:NAME, best:METRIC, an alias"
        )
    return "label", check_name(text, whole)
