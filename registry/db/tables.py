"""The tables, typed. Private to `registry.db`: everybody else sees the values of `registry.manifest`.

Every rule that a database can hold is a named constraint, so that the violation of one can be told from another's. Digests are 64 hex
digits. Lengths are in characters; they are checked by constraints because SQLite ignores those of column types. Text is compared and
sorted by its code points everywhere, as Python does it, whatever the language of the database.

Some columns repeat what lies elsewhere, so that a million checkpoints can be listed from indexes: those of `checkpoints` that come from
the manifest, `metrics.is_current`, `tags.number` and `beginning`, `shipments.adapter_id`, `events.about`, `adapters.checkpoints` and all
of `adapter_metrics`.
"""

import math
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, cast, final

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Index,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

from registry.errors import InvalidInput

NAME_LENGTH = 96
LINE_LENGTH = 400
URL_LENGTH = 4096
TEXT_LENGTH = 20_000
BEGINNING_LENGTH = 96


@final
class UtcTime(TypeDecorator[datetime]):
    """An aware time, stored in UTC. Refuses naive ones: nobody could say what they mean."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without its zone: {value}")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        # SQLite gives naive times back
        return value and (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


@final
class Measured(TypeDecorator[float]):
    """Any float, infinities too. NULL stands for NaN, which SQLite cannot hold."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: float | None, dialect: Dialect) -> float:
        return math.nan if value is None else value


@final
class PlainText(TypeDecorator[str]):
    """Text by code points. Refuses NUL, which PostgreSQL cannot hold."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[str]:
        collation = "C" if dialect.name == "postgresql" else None
        length = cast("String", self.impl_instance).length
        return dialect.type_descriptor(String(length, collation=collation))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None and "\0" in value:
            raise InvalidInput("text", ascii(value)[:80], "text cannot have NUL characters")
        return value


Id = Annotated[int, mapped_column(primary_key=True)]
Hex = Annotated[str, mapped_column(PlainText(64))]
Count = Annotated[int, mapped_column(BigInteger)]
Time = Annotated[datetime, mapped_column(UtcTime)]
Document = Annotated[Any, mapped_column(JSON(none_as_null=True))]


def _keep(target: str) -> ForeignKey:
    """A reference that keeps its target from being deleted."""
    return ForeignKey(target, ondelete="RESTRICT")


def _part_of(target: str) -> ForeignKey:
    """A reference of a part, deleted together with its whole."""
    return ForeignKey(target, ondelete="CASCADE")


def _at_most(length: int, *columns: str) -> tuple[CheckConstraint, ...]:
    return tuple(CheckConstraint(f"length({column}) <= {length}", f"{column}_length") for column in columns)


def _hex(*columns: str) -> tuple[CheckConstraint, ...]:
    return tuple(CheckConstraint(f"length({column}) = 64", f"{column}_length") for column in columns)


def _not_negative(*columns: str) -> tuple[CheckConstraint, ...]:
    return tuple(CheckConstraint(f"{column} >= 0", f"{column}_not_negative") for column in columns)


class Table(DeclarativeBase):
    """Root of all tables; holds their metadata."""

    type_annotation_map: ClassVar = {str: PlainText()}
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        }
    )


_CURRENT: Any = {"sqlite_where": text("is_current = 1"), "postgresql_where": text("is_current")}


@final
class AdapterRow(Table):
    """An adapter. `last_version` outlives the checkpoint that had it, so that no version is ever given twice; `checkpoints` counts them."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("namespace", "name"),
        *_at_most(NAME_LENGTH, "namespace", "name"),
        *_not_negative("last_version"),
    )

    id: Mapped[Id]
    namespace: Mapped[str]
    name: Mapped[str]
    last_version: Mapped[int]
    created_at: Mapped[Time]
    checkpoints: Mapped[int]


@final
class BaseRow(Table):
    """A base model. `document` holds the bulky parts: config, files and the table of tensors with their digests."""

    __tablename__ = "bases"
    __table_args__ = (
        UniqueConstraint("name"),
        UniqueConstraint("weights"),
        CheckConstraint("format IN ('safetensors', 'litgpt')", "format_known"),
        *_hex("weights", "architecture"),
        *_at_most(LINE_LENGTH, "name", "arch_version", "author"),
        *_at_most(URL_LENGTH, "url"),
        *_not_negative("parameters", "size_bytes"),
    )

    id: Mapped[Id]
    name: Mapped[str]
    url: Mapped[str]
    in_store: Mapped[bool]
    format: Mapped[str]
    weights: Mapped[Hex]
    architecture: Mapped[Hex]
    arch_version: Mapped[str]
    document: Mapped[Document] = mapped_column(deferred=True)
    parameters: Mapped[Count]
    size_bytes: Mapped[Count]
    created_at: Mapped[Time]
    author: Mapped[str]


@final
class CheckpointRow(Table):
    """A checkpoint. Its manifest, with the list of files, is a document."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        UniqueConstraint("adapter_id", "digest"),
        CheckConstraint("version >= 1", "version_from_one"),
        *_hex("digest"),
        *_at_most(LINE_LENGTH, "arch_version", "run", "author"),
        *_at_most(URL_LENGTH, "source"),
        *_not_negative("step"),
        Index(None, "digest"),
        Index(None, "adapter_id", "step"),
        Index(None, "adapter_id", "run", "version"),
        Index(None, "base_id"),
        Index(None, "run"),
        Index(None, "created_at"),
        Index(None, "step", "id"),
        Index(None, "rank", "id"),
        Index(None, "size_bytes", "id"),
    )

    id: Mapped[Id]
    adapter_id: Mapped[int] = mapped_column(_keep("adapters.id"))
    version: Mapped[int]
    digest: Mapped[Hex]
    base_id: Mapped[int] = mapped_column(_keep("bases.id"))
    arch_version: Mapped[str]
    run: Mapped[str]
    step: Mapped[Count | None]
    source: Mapped[str]
    manifest: Mapped[Document]
    created_at: Mapped[Time]
    author: Mapped[str]
    method: Mapped[str]
    format: Mapped[str]
    dtype: Mapped[str]
    rank: Mapped[Count | None]
    alpha: Mapped[float | None] = mapped_column(Double)
    parameters: Mapped[Count]
    size_bytes: Mapped[Count]


@final
class MetricRow(Table):
    """A number measured on a checkpoint. Append-only: of one name the last counts, which is the current one."""

    __tablename__ = "metrics"
    __table_args__ = (
        CheckConstraint("direction IN ('lower', 'higher')", "direction_known"),
        *_at_most(LINE_LENGTH, "name", "split", "author", "data"),
        *_not_negative("step"),
        Index(None, "checkpoint_id"),
        Index(None, "checkpoint_id", "name", unique=True, **_CURRENT),
        Index(None, "name", "value", "checkpoint_id", **_CURRENT),
    )

    id: Mapped[Id]
    checkpoint_id: Mapped[int] = mapped_column(_part_of("checkpoints.id"))
    name: Mapped[str]
    value: Mapped[float] = mapped_column(Measured, nullable=True)
    step: Mapped[Count | None]
    split: Mapped[str]
    direction: Mapped[str | None]
    recorded_at: Mapped[Time]
    author: Mapped[str]
    is_current: Mapped[bool]
    data: Mapped[str]


@final
class AdapterMetricRow(Table):
    """How many checkpoints of an adapter have a current metric of a name, split, declared direction (empty for none) and data."""

    __tablename__ = "adapter_metrics"
    __table_args__ = (
        CheckConstraint("direction IN ('', 'lower', 'higher')", "direction_known"),
        *_at_most(LINE_LENGTH, "name", "split", "data"),
        *_not_negative("checkpoints", "finite"),
        Index(None, "name"),
    )

    adapter_id: Mapped[int] = mapped_column(_part_of("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    direction: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[str] = mapped_column(primary_key=True)
    checkpoints: Mapped[int]
    finite: Mapped[int]


@final
class NoteRow(Table):
    """A note on a checkpoint. Append-only."""

    __tablename__ = "notes"
    __table_args__ = (
        *_at_most(TEXT_LENGTH, "text"),
        *_at_most(LINE_LENGTH, "author"),
        Index(None, "checkpoint_id"),
    )

    id: Mapped[Id]
    checkpoint_id: Mapped[int] = mapped_column(_part_of("checkpoints.id"))
    text: Mapped[str]
    author: Mapped[str]
    created_at: Mapped[Time]


@final
class TagRow(Table):
    """A key with a value, on a checkpoint. `beginning` is what an index can hold of the value; `number` the number that it is, if it is one."""

    __tablename__ = "tags"
    __table_args__ = (
        UniqueConstraint("checkpoint_id", "key"),
        *_at_most(NAME_LENGTH, "key"),
        *_at_most(TEXT_LENGTH, "value"),
        Index(None, "key", "beginning", "checkpoint_id"),
        Index(None, "key", "number", "checkpoint_id"),
    )

    id: Mapped[Id]
    checkpoint_id: Mapped[int] = mapped_column(_part_of("checkpoints.id"))
    key: Mapped[str]
    value: Mapped[str]
    beginning: Mapped[str]
    number: Mapped[float | None] = mapped_column(Double)


@final
class AliasRow(Table):
    """A movable pointer to a checkpoint of the same adapter."""

    __tablename__ = "aliases"
    __table_args__ = (
        UniqueConstraint("adapter_id", "name"),
        *_at_most(NAME_LENGTH, "name"),
        Index(None, "checkpoint_id"),
    )

    id: Mapped[Id]
    adapter_id: Mapped[int] = mapped_column(_keep("adapters.id"))
    name: Mapped[str]
    checkpoint_id: Mapped[int] = mapped_column(_keep("checkpoints.id"))


@final
class OriginRow(Table):
    """How a checkpoint was made of others; trained ones have none."""

    __tablename__ = "origins"
    __table_args__ = _at_most(NAME_LENGTH, "action")

    checkpoint_id: Mapped[int] = mapped_column(_part_of("checkpoints.id"), primary_key=True)
    action: Mapped[str]
    detail: Mapped[Document]


@final
class ParentRow(Table):
    """A checkpoint that another one was made of; `position` counts from 0 in the order of its origin."""

    __tablename__ = "parents"
    __table_args__ = (*_not_negative("position"), Index(None, "parent_id"))

    checkpoint_id: Mapped[int] = mapped_column(_part_of("checkpoints.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(_keep("checkpoints.id"))


@final
class PolicyRow(Table):
    """What makes a checkpoint of an adapter good enough. The text is what was written; `registry.policies` reads it."""

    __tablename__ = "policies"
    __table_args__ = (*_at_most(TEXT_LENGTH, "text"), *_at_most(LINE_LENGTH, "author"))

    adapter_id: Mapped[int] = mapped_column(_part_of("adapters.id"), primary_key=True)
    text: Mapped[str]
    author: Mapped[str]
    set_at: Mapped[Time]


@final
class BlobRow(Table):
    """An object in the store. `sha256` is empty where it was not computed."""

    __tablename__ = "blobs"
    __table_args__ = (
        UniqueConstraint("digest"),
        CheckConstraint("length(sha256) IN (0, 64)", "sha256_length"),
        *_hex("digest"),
        *_not_negative("size_bytes"),
    )

    id: Mapped[Id]
    digest: Mapped[Hex]
    sha256: Mapped[Hex]
    size_bytes: Mapped[Count]


@final
class CheckpointBlobRow(Table):
    """A blob that a checkpoint needs."""

    __tablename__ = "checkpoint_blobs"
    __table_args__ = (Index(None, "blob_id"),)

    owner_id: Mapped[int] = mapped_column("checkpoint_id", _part_of("checkpoints.id"), primary_key=True)
    blob_id: Mapped[int] = mapped_column(_keep("blobs.id"), primary_key=True)


@final
class BaseBlobRow(Table):
    """A blob that the registry's own copy of a base model needs."""

    __tablename__ = "base_blobs"
    __table_args__ = (Index(None, "blob_id"),)

    owner_id: Mapped[int] = mapped_column("base_id", _part_of("bases.id"), primary_key=True)
    blob_id: Mapped[int] = mapped_column(_keep("blobs.id"), primary_key=True)


@final
class MergedRow(Table):
    """A merged model."""

    __tablename__ = "merged"
    __table_args__ = (
        UniqueConstraint("recipe_digest"),
        *_hex("digest", "recipe_digest"),
        *_at_most(TEXT_LENGTH, "note"),
        *_at_most(LINE_LENGTH, "author"),
        Index(None, "digest"),
        Index(None, "base_id"),
    )

    id: Mapped[Id]
    digest: Mapped[Hex]
    recipe_digest: Mapped[Hex]
    recipe: Mapped[Document]
    base_id: Mapped[int] = mapped_column(_keep("bases.id"))
    files: Mapped[Document]
    note: Mapped[str]
    created_at: Mapped[Time]
    author: Mapped[str]


@final
class MergedBlobRow(Table):
    """A blob that a merged model in the store needs."""

    __tablename__ = "merged_blobs"
    __table_args__ = (Index(None, "blob_id"),)

    owner_id: Mapped[int] = mapped_column("merged_id", _part_of("merged.id"), primary_key=True)
    blob_id: Mapped[int] = mapped_column(_keep("blobs.id"), primary_key=True)


@final
class MergedInputRow(Table):
    """A checkpoint that went into a merged model; `position` counts from 0 in the recipe's order."""

    __tablename__ = "merged_inputs"
    __table_args__ = (*_not_negative("position"), Index(None, "checkpoint_id"))

    merged_id: Mapped[int] = mapped_column(_part_of("merged.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[int] = mapped_column(_keep("checkpoints.id"))
    weight: Mapped[float] = mapped_column(Double)


@final
class MergedLocationRow(Table):
    """A folder that holds a merged model; empty text is the store."""

    __tablename__ = "merged_locations"
    __table_args__ = (UniqueConstraint("merged_id", "url"), *_at_most(URL_LENGTH, "url"))

    id: Mapped[Id]
    merged_id: Mapped[int] = mapped_column(_part_of("merged.id"))
    url: Mapped[str]


@final
class RecipeRow(Table):
    """A recipe that is kept without being carried out: whoever asks for its model gets it computed."""

    __tablename__ = "recipes"
    __table_args__ = (
        UniqueConstraint("digest"),
        *_hex("digest"),
        *_at_most(TEXT_LENGTH, "note"),
        *_at_most(LINE_LENGTH, "author"),
        Index(None, "base_id"),
    )

    id: Mapped[Id]
    digest: Mapped[Hex]
    recipe: Mapped[Document]
    base_id: Mapped[int] = mapped_column(_keep("bases.id"))
    note: Mapped[str]
    created_at: Mapped[Time]
    author: Mapped[str]


@final
class RecipeInputRow(Table):
    """A checkpoint that a kept recipe needs; `position` counts from 0 in the recipe's order."""

    __tablename__ = "recipe_inputs"
    __table_args__ = (*_not_negative("position"), Index(None, "checkpoint_id"))

    recipe_id: Mapped[int] = mapped_column(_part_of("recipes.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[int] = mapped_column(_keep("checkpoints.id"))


@final
class ShipmentRow(Table):
    """What went live where. Append-only; the id is the shipment's number."""

    __tablename__ = "shipments"
    __table_args__ = (
        *_at_most(NAME_LENGTH, "environment"),
        *_at_most(TEXT_LENGTH, "note"),
        *_at_most(LINE_LENGTH, "author"),
        Index(None, "environment"),
        Index(None, "environment", "adapter_id", "id"),
        Index(None, "checkpoint_id"),
        Index(None, "merged_id"),
    )

    id: Mapped[Id]
    environment: Mapped[str]
    adapter_id: Mapped[int]
    checkpoint_id: Mapped[int] = mapped_column(_keep("checkpoints.id"))
    merged_id: Mapped[int | None] = mapped_column(_keep("merged.id"))
    note: Mapped[str]
    author: Mapped[str]
    shipped_at: Mapped[Time]
    restores: Mapped[int | None] = mapped_column(_keep("shipments.id"))


@final
class EventRow(Table):
    """One line of the history. Append-only; see `registry.db.audit` for the hashes. `about` is the subject up to its `@`."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("previous_hash"),
        UniqueConstraint("hash"),
        *_hex("previous_hash", "hash"),
        *_at_most(NAME_LENGTH, "action"),
        *_at_most(LINE_LENGTH, "author"),
        *_at_most(URL_LENGTH, "subject"),
        Index(None, "about", "number"),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[Time]
    author: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    about: Mapped[str]
    detail: Mapped[Document]
    previous_hash: Mapped[Hex]
    hash: Mapped[Hex]


@final
class TokenRow(Table):
    """Who may do what over HTTP. Only the SHA-256 of the token itself is kept; `ending` are its last characters, for people."""

    __tablename__ = "tokens"
    __table_args__ = (
        UniqueConstraint("name"),
        UniqueConstraint("secret_sha256"),
        CheckConstraint("role IN ('reader', 'writer', 'shipper', 'admin')", "role_known"),
        *_hex("secret_sha256"),
        *_at_most(NAME_LENGTH, "name"),
        *_at_most(LINE_LENGTH, "author"),
    )

    id: Mapped[Id]
    name: Mapped[str]
    role: Mapped[str]
    namespaces: Mapped[Document]
    secret_sha256: Mapped[Hex]
    ending: Mapped[str]
    created_at: Mapped[Time]
    author: Mapped[str]
    expires_at: Mapped[Time | None]
    revoked_at: Mapped[Time | None]
    last_used_at: Mapped[Time | None]


@final
class SignInRow(Table):
    """Somebody who has signed in to the pages. Only the SHA-256 of what their browser keeps is kept here; without a token it is the owner."""

    __tablename__ = "sign_ins"
    __table_args__ = (UniqueConstraint("secret_sha256"), *_hex("secret_sha256"), Index(None, "expires_at"))

    id: Mapped[Id]
    secret_sha256: Mapped[Hex]
    token_id: Mapped[int | None] = mapped_column(_part_of("tokens.id"))
    created_at: Mapped[Time]
    expires_at: Mapped[Time]


@final
class LeaseRow(Table):
    """A blob that somebody has shown to have, and is about to record: it is not swept before the time, and may be named by its holder."""

    __tablename__ = "leases"
    __table_args__ = (
        UniqueConstraint("digest", "holder"),
        *_hex("digest"),
        *_at_most(LINE_LENGTH, "holder"),
        Index(None, "expires_at"),
        Index(None, "holder"),
    )

    id: Mapped[Id]
    digest: Mapped[Hex]
    holder: Mapped[str]
    expires_at: Mapped[Time]


@final
class CondemnedRow(Table):
    """A blob that nothing needed when a sweep looked. `is_deleting` once a sweep has decided: from then on nobody may record it."""

    __tablename__ = "condemned"
    __table_args__ = (*_hex("digest"), *_not_negative("size_bytes"))

    digest: Mapped[Hex] = mapped_column(primary_key=True)
    size_bytes: Mapped[Count]
    marked_at: Mapped[Time]
    is_deleting: Mapped[bool]


@final
class JobRow(Table):
    """Work that is done in the background. `what`, `done_bytes`, `total_bytes` are its progress where it has no shards of its own."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", "state_known"),
        *_at_most(NAME_LENGTH, "kind"),
        *_at_most(LINE_LENGTH, "what", "author"),
        *_at_most(URL_LENGTH, "subject"),
        *_not_negative("done_bytes", "total_bytes", "attempts"),
        Index(None, "state"),
    )

    id: Mapped[Id]
    kind: Mapped[str]
    subject: Mapped[str]
    arguments: Mapped[Document]
    state: Mapped[str]
    what: Mapped[str]
    done_bytes: Mapped[Count]
    total_bytes: Mapped[Count]
    result: Mapped[Document | None]
    error: Mapped[Document | None]
    attempts: Mapped[int]
    is_cancel_wanted: Mapped[bool]
    author: Mapped[str]
    created_at: Mapped[Time]
    started_at: Mapped[Time | None]
    finished_at: Mapped[Time | None]


@final
class ShardRow(Table):
    """One output file of a merge that several workers share. `attempt` grows with each claim: who finishes with an older one is too late."""

    __tablename__ = "shards"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'finished')", "state_known"),
        *_at_most(URL_LENGTH, "path"),
        *_at_most(LINE_LENGTH, "worker"),
        *_not_negative("position", "size_bytes", "done_bytes", "attempt"),
    )

    job_id: Mapped[int] = mapped_column(_part_of("jobs.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    size_bytes: Mapped[Count]
    state: Mapped[str]
    attempt: Mapped[int]
    worker: Mapped[str]
    done_bytes: Mapped[Count]
    entry: Mapped[Document | None]
    records: Mapped[Document | None]


@final
class JobLineRow(Table):
    """One line of a job's log. Append-only."""

    __tablename__ = "job_lines"
    __table_args__ = (*_at_most(TEXT_LENGTH, "text"), Index(None, "job_id"))

    id: Mapped[Id]
    job_id: Mapped[int] = mapped_column(_part_of("jobs.id"))
    at: Mapped[Time]
    text: Mapped[str]


@final
class ReplyRow(Table):
    """The answer to a write with an idempotency key, kept in its own transaction. `request` is the digest of what was asked."""

    __tablename__ = "replies"
    __table_args__ = (
        UniqueConstraint("holder", "key"),
        *_hex("request"),
        *_at_most(LINE_LENGTH, "holder", "key"),
        Index(None, "created_at"),
    )

    id: Mapped[Id]
    holder: Mapped[str]
    key: Mapped[str]
    request: Mapped[Hex]
    status: Mapped[int]
    body: Mapped[Document]
    created_at: Mapped[Time]


@final
class WebhookRow(Table):
    """An address that is told of events; each message is signed with the secret."""

    __tablename__ = "webhooks"
    __table_args__ = (*_at_most(URL_LENGTH, "url"), *_at_most(LINE_LENGTH, "secret", "author"))

    id: Mapped[Id]
    url: Mapped[str]
    actions: Mapped[Document]
    secret: Mapped[str]
    created_at: Mapped[Time]
    author: Mapped[str]


@final
class DeliveryRow(Table):
    """A message to a webhook, written in the transaction of the change it tells of."""

    __tablename__ = "deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'delivered', 'failed')", "state_known"),
        *_at_most(NAME_LENGTH, "action"),
        *_at_most(TEXT_LENGTH, "error"),
        *_not_negative("attempts"),
        Index(None, "webhook_id"),
        Index(None, "state"),
    )

    id: Mapped[Id]
    webhook_id: Mapped[int] = mapped_column(_part_of("webhooks.id"))
    action: Mapped[str]
    payload: Mapped[Document]
    state: Mapped[str]
    attempts: Mapped[int]
    status: Mapped[int | None]
    error: Mapped[str]
    created_at: Mapped[Time]
    finished_at: Mapped[Time | None]


@final
class SignatureRow(Table):
    """A signed statement about the content of a checkpoint or merged model, as a Sigstore bundle. `key_sha256` names the public key."""

    __tablename__ = "signatures"
    __table_args__ = (
        UniqueConstraint("subject_digest", "kind", "key_sha256"),
        CheckConstraint("kind IN ('content', 'provenance')", "kind_known"),
        *_hex("subject_digest", "key_sha256"),
        *_at_most(LINE_LENGTH, "author"),
    )

    id: Mapped[Id]
    subject_digest: Mapped[Hex]
    kind: Mapped[str]
    bundle: Mapped[Document]
    key_sha256: Mapped[Hex]
    created_at: Mapped[Time]
    author: Mapped[str]
