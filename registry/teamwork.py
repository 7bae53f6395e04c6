"""The frozen values of working together: who may do what, background work, who is told, and lists in pages.

Nothing here reads or writes. Every time is aware and in UTC; every size is in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from registry.refs import AdapterName, Digest

T = TypeVar("T")


class Role(StrEnum):
    """What somebody may do; each may also do what those before it may."""

    READER = "reader"
    WRITER = "writer"
    SHIPPER = "shipper"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what another one is needed for."""
        roles = list(Role)
        return roles.index(self) >= roles.index(needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is asking. `namespaces` limit which adapters are seen and changed; none means no limit."""

    name: str
    role: Role
    namespaces: tuple[str, ...] = ()

    def sees(self, adapter: AdapterName) -> bool:
        """Whether an adapter is within its namespaces."""
        return not self.namespaces or adapter.namespace in self.namespaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as it is kept: never its text, only its last characters, `ending`. `id` is how to revoke it."""

    id: int
    name: str
    role: Role
    namespaces: tuple[str, ...]
    ending: str
    created_at: datetime
    author: str
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token just made. `secret` is its text, shown this once."""

    token: Token
    secret: str


class JobState(StrEnum):
    """Where background work stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One output file of a merge that workers share. `attempt` counts claims; `worker` is who claimed it last."""

    position: int
    path: str
    size_bytes: int
    state: str
    attempt: int
    worker: str
    done_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work in the background.

    `kind` is the verb, `subject` what it is about as a reference, `arguments` everything it follows from. `what`, `done_bytes` and
    `total_bytes` are its progress. `result` is the JSON of what the verb gives, `error` that of what it raised (`code` and its fields).
    """

    id: int
    kind: str
    subject: str
    arguments: Mapping[str, Any]
    state: JobState
    what: str
    done_bytes: int
    total_bytes: int
    result: Any
    error: Mapping[str, Any] | None
    attempts: int
    is_cancel_wanted: bool
    author: str
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLine:
    """One line of a job's log."""

    at: datetime
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """An address that is told of events. `actions` are those it wants: shipped, merged, alias, registered."""

    id: int
    url: str
    actions: tuple[str, ...]
    created_at: datetime
    author: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWebhook:
    """A webhook just made. `secret` is what its messages are signed with, shown this once."""

    webhook: Webhook
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A message to a webhook. `status` is what the other side answered last, None when it did not; `error` says why not."""

    id: int
    webhook_id: int
    action: str
    state: str
    attempts: int
    status: int | None
    error: str
    created_at: datetime
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signed statement about some content. `kind` is `content` or `provenance`; `bundle` the Sigstore bundle; `key` names the public key."""

    subject: Digest
    kind: str
    key: str
    bundle: Mapping[str, Any]
    created_at: datetime
    author: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """A part of a list. `cursor` asks for what follows; empty text at the end."""

    items: tuple[T, ...]
    cursor: str = ""
