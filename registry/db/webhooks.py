"""Webhooks and what is sent to them. Messages are written in the transaction of the change they tell of, and sent later.

A message that does not arrive is tried again after each of `WAITS`, and has failed after the last. `finished_at` of one that is still queued
is when its last try began: trying counts before it is done, so that two workers never send the same at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, final

from sqlalchemy import ColumnElement, and_, delete, func, or_, select
from sqlalchemy.orm import Session

from registry.codec import plain
from registry.db.checkpoints import Checkpoints
from registry.db.merged import MergedModels
from registry.db.shipments import Shipments
from registry.db.tables import TEXT_LENGTH, DeliveryRow, WebhookRow
from registry.errors import UnknownWebhook
from registry.manifest import Checkpoint, Event, Merged, to_json
from registry.refs import CheckpointRef
from registry.teamwork import Delivery, Webhook

WAITS = (
    timedelta(seconds=10),
    timedelta(minutes=1),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
)
DELIVERIES_KEPT = timedelta(days=30)
# What webhooks hear of, by the actions of the history.
ACTIONS: Mapping[str, str] = {
    "ship": "shipped",
    "rollback": "rolled_back",
    "merge": "merged",
    "alias.set": "alias",
    "register": "registered",
}
TEST = "test"
_QUEUED, _DELIVERED, _FAILED = "queued", "delivered", "failed"
_AT_ONCE = 100  # messages that one round of sending takes
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that somebody has taken to send it. `attempt` counts the tries, this one included."""

    id: int
    url: str
    secret: str
    action: str
    payload: Mapping[str, Any]
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of sending: the other side's HTTP status, None when it gave none; `error` is empty when the message arrived."""

    status: int | None
    error: str


@final
class Webhooks:
    """The webhooks, by number, and their messages."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._listening: Mapping[str, list[int]] | None = None

    def add(self, url: str, actions: Sequence[str], secret: str, *, author: str, at: datetime) -> Webhook:
        """Record a webhook.

        Args:
            url: where to send to.
            actions: what it is told of.
            secret: what its messages are signed with.
            author: who wants it.
            at: when; aware.
        """
        row = WebhookRow(url=url, actions=list(actions), secret=secret, created_at=at, author=author)
        self._session.add(row)
        self._session.flush()
        self._listening = None
        return _webhook(row)

    def all(self) -> list[Webhook]:
        """Every webhook, the oldest first."""
        return [_webhook(row) for row in self._session.scalars(select(WebhookRow).order_by(WebhookRow.id))]

    def find(self, number: int) -> Webhook:
        """A webhook by its number.

        Raises:
            UnknownWebhook: there is none.
        """
        return _webhook(self._row(number))

    def remove(self, number: int) -> Webhook:
        """Forget a webhook and its messages; gives what it was.

        Raises:
            UnknownWebhook: there is none.
        """
        row = self._row(number)
        self._session.delete(row)
        self._session.flush()
        self._listening = None
        return _webhook(row)

    def deliveries(self, number: int, limit: int) -> list[Delivery]:
        """The last messages to a webhook, the newest first.

        Raises:
            UnknownWebhook: there is none.
        """
        wanted = select(DeliveryRow).where(DeliveryRow.webhook_id == self._row(number).id)
        return [_delivery(row) for row in self._session.scalars(wanted.order_by(DeliveryRow.id.desc()).limit(limit))]

    def count_past(self, now: datetime) -> int:
        """How many messages have arrived or failed so long ago that nobody asks for them any more."""
        return self._session.scalar(select(func.count()).select_from(DeliveryRow).where(_past(now))) or 0

    def forget_past(self, now: datetime, limit: int) -> int:
        """Forget those, at most so many at once; gives how many."""
        past = list(self._session.scalars(select(DeliveryRow.id).where(_past(now)).limit(limit)))
        self._session.execute(delete(DeliveryRow).where(DeliveryRow.id.in_(past)))
        return len(past)

    # -- telling

    def tell(self, event: Event) -> int:
        """Queue a message about an event for each webhook that wants it; gives how many that are."""
        action = ACTIONS.get(event.action, "")
        listening = self._who_listens().get(action, [])
        if listening:
            payload = {"action": action, **self._payload(event)}
            self._session.add_all([_queued(number, action, payload, event.at) for number in listening])
            self._session.flush()
        return len(listening)

    def _who_listens(self) -> Mapping[str, list[int]]:
        """The numbers of the webhooks by action; read once a transaction, as each event asks."""
        if self._listening is None:
            rows = self._session.execute(select(WebhookRow.id, WebhookRow.actions).order_by(WebhookRow.id)).all()
            self._listening = {
                action: [number for number, wanted in rows if action in wanted] for action in ACTIONS.values()
            }
        return self._listening

    def _payload(self, event: Event) -> dict[str, Any]:
        payload = {
            "event": event.number,
            "at": event.at,
            "subject": event.subject,
            "author": event.author,
            "detail": event.detail,
            "checkpoint": _checkpoint(Checkpoints(self._session).resolve(CheckpointRef.parse(event.subject))),
        }
        if digest := event.detail.get("merged"):
            payload["merged"] = _merged(MergedModels(self._session).resolve(digest))
        if environment := event.detail.get("environment"):
            live = Shipments(self._session).live(environment)
            payload["shipment"] = to_json([each for each in live if each.checkpoint == event.subject][-1])
        found: dict[str, Any] = plain(payload)
        return found

    # -- sending

    def are_due(self, now: datetime) -> bool:
        """Whether there is something to send."""
        return self._session.scalar(select(DeliveryRow.id).where(_due(now)).limit(1)) is not None

    def take(self, now: datetime) -> list[Message]:
        """Messages whose time has come, the oldest first; from now on they are being tried."""
        wanted = (
            select(DeliveryRow, WebhookRow).join_from(DeliveryRow, WebhookRow).where(_due(now)).order_by(DeliveryRow.id)
        )
        rows = self._session.execute(wanted.limit(_AT_ONCE)).all()
        for delivery, _ in rows:
            delivery.attempts += 1
            delivery.finished_at = now
        self._session.flush()
        return [_message(delivery, webhook) for delivery, webhook in rows]

    def take_test(self, number: int, payload: Mapping[str, Any], at: datetime) -> Message:
        """A message that is tried once, at once: it has failed until it is told otherwise.

        Raises:
            UnknownWebhook: there is no webhook of this number.
        """
        webhook, row = self._row(number), _queued(number, TEST, payload, at)
        row.state, row.attempts, row.finished_at = _FAILED, 1, at
        self._session.add(row)
        self._session.flush()
        return _message(row, webhook)

    def settle(self, message: Message, outcome: Outcome, at: datetime) -> Delivery | None:
        """Record what came of a message; None when its webhook was removed meanwhile. What a slower sender says about an earlier try
        does not count, unless it arrived."""
        row = self._session.get(DeliveryRow, message.id)
        if row is None:
            return None
        if row.state != _DELIVERED and (not outcome.error or row.attempts == message.attempt):
            row.status, row.error, row.finished_at = outcome.status, outcome.error[:TEXT_LENGTH], at
            if not outcome.error:
                row.state = _DELIVERED
            elif row.attempts > len(WAITS):
                row.state = _FAILED
            self._session.flush()
        return _delivery(row)

    def _row(self, number: int) -> WebhookRow:
        row = self._session.get(WebhookRow, number) if 0 < number <= _LARGEST_ID else None
        if row is None:
            raise UnknownWebhook(str(number))
        return row


def _due(now: datetime) -> ColumnElement[bool]:
    """Not tried yet, or the wait after the last try is over."""
    again = [
        and_(DeliveryRow.attempts == tries, DeliveryRow.finished_at <= now - wait)
        for tries, wait in enumerate(WAITS, start=1)
    ]
    # Queued after as many tries as there are: a sender died at the last one, which must not count.
    again.append(and_(DeliveryRow.attempts > len(WAITS), DeliveryRow.finished_at <= now - WAITS[-1]))
    return and_(DeliveryRow.state == _QUEUED, or_(DeliveryRow.attempts == 0, *again))


def _past(now: datetime) -> ColumnElement[bool]:
    return and_(DeliveryRow.state != _QUEUED, DeliveryRow.finished_at <= now - DELIVERIES_KEPT)


def _queued(webhook: int, action: str, payload: Mapping[str, Any], at: datetime) -> DeliveryRow:
    return DeliveryRow(
        webhook_id=webhook, action=action, payload=payload, state=_QUEUED, attempts=0, error="", created_at=at
    )


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a checkpoint from others, without its files."""
    return {
        "ref": checkpoint.ref,
        "digest": checkpoint.digest,
        "step": checkpoint.step,
        "base": checkpoint.base,
        "base_name": checkpoint.base_name,
        "method": checkpoint.manifest.method,
        "metrics": {metric.name: metric.value for metric in checkpoint.metrics},
        "tags": checkpoint.tags,
    }


def _merged(merged: Merged) -> dict[str, Any]:
    return {
        "digest": merged.digest,
        "recipe": merged.recipe.digest,
        "base": merged.recipe.base,
        "base_name": merged.base_name,
        "checkpoints": merged.checkpoints,
        "size_bytes": merged.size_bytes,
    }


def _message(delivery: DeliveryRow, webhook: WebhookRow) -> Message:
    return Message(
        id=delivery.id,
        url=webhook.url,
        secret=webhook.secret,
        action=delivery.action,
        payload=delivery.payload,
        attempt=delivery.attempts,
    )


def _webhook(row: WebhookRow) -> Webhook:
    return Webhook(id=row.id, url=row.url, actions=tuple(row.actions), created_at=row.created_at, author=row.author)


def _delivery(row: DeliveryRow) -> Delivery:
    return Delivery(
        id=row.id,
        webhook_id=row.webhook_id,
        action=row.action,
        state=row.state,
        attempts=row.attempts,
        status=row.status,
        error=row.error,
        created_at=row.created_at,
        finished_at=None if row.state == _QUEUED else row.finished_at,
    )
