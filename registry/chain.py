"""The chain that events form: the hash of each, and what is wrong with a sequence of them. Pure.

An event's hash is BLAKE3 over the hash of the one before (64 hex digits; zeros for the first) followed by the canonical JSON of its own
number, time, author, action, subject and detail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from registry.errors import Changed
from registry.manifest import Event, canonical_json, to_json

FIRST = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditState:
    """How far a sound chain goes: how many events, and the hash of the last one. Whoever keeps both sees whether it was written anew."""

    count: int
    hash: str


def hash_of(previous: str, event: Event) -> str:
    """The hash that an event must have after one with the hash `previous`."""
    fields = {
        "number": event.number,
        "at": to_json(event.at),
        "author": event.author,
        "action": event.action,
        "subject": event.subject,
        "detail": event.detail,
    }
    return blake3(previous.encode() + canonical_json(fields)).hexdigest()


def follow(state: AuditState, event: Event) -> AuditState:
    """The chain with one event more.

    Raises:
        Changed: it is not the next one, or not as it was written.
    """
    number = state.count + 1
    if event.number != number:
        raise Changed(f"event {number}", "in its place", f"missing; the next is {event.number}")
    if (expected := hash_of(state.hash, event)) != event.hash:
        raise Changed(f"event {number}", f"the hash {expected}", event.hash)
    return AuditState(count=number, hash=event.hash)


def walk(events: Iterable[Event], state: AuditState | None = None) -> AuditState:
    """Follow a chain from its first event, or on from a state of it, to its end.

    Raises:
        Changed: names the first event that is not as it was written.
    """
    state = state or AuditState(count=0, hash=FIRST)
    for event in events:
        state = follow(state, event)
    return state
