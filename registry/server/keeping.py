"""Routes of who may come in, who is told, what is signed, and of keeping the registry right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any

from registry.caring import StoreCheck
from registry.chain import AuditState
from registry.diagnosing import Diagnosis
from registry.errors import InvalidInput
from registry.manifest import Event
from registry.server.bases import OfSubject
from registry.server.bodies import SentSignature, SweepWanted, TokenWanted, WebhookWanted
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.sweeping import Swept
from registry.teamwork import Delivery, NewToken, NewWebhook, Principal, Role, Signature, Token, Webhook

routes = Routes("keeping")
Number = Annotated[int, "A webhook's number.", range(1, 1 << 31)]
_MOST_SECONDS = 3_153_600_000.0  # a century


@routes.route("GET", "/me", Role.READER)
def get_me(scope: Scope) -> Principal:
    """Whose token this is, and what it may do."""
    return scope.principal


@routes.route("POST", "/tokens", Role.ADMIN, status=201)
def create_token(scope: Scope, body: TokenWanted) -> NewToken:
    """Make a token. Its text is in this answer and nowhere else; a key does not bring it back."""
    seconds = body.expires_seconds
    return scope.registry.create_token(
        body.name, body.role, body.namespaces, None if seconds is None else _span("expires_seconds", seconds)
    )


@routes.route("GET", "/tokens", Role.ADMIN)
def list_tokens(scope: Scope) -> list[Token]:
    """Every token, never its text."""
    return scope.registry.tokens()


@routes.route("DELETE", "/tokens/{name}", Role.ADMIN, is_keyed=True)
def revoke_token(scope: Scope, name: Annotated[str, "A token's name or number."]) -> Token:
    """End a token."""
    return scope.registry.revoke_token(name)


@routes.route("POST", "/webhooks", Role.ADMIN, status=201)
def add_webhook(scope: Scope, body: WebhookWanted) -> NewWebhook:
    """Tell an address of events from now on. The secret is in this answer and nowhere else; a key does not bring it back."""
    return scope.registry.add_webhook(body.url, body.actions)


@routes.route("GET", "/webhooks", Role.ADMIN)
def list_webhooks(scope: Scope) -> list[Webhook]:
    """Every webhook."""
    return scope.registry.webhooks()


@routes.route("DELETE", "/webhooks/{number}", Role.ADMIN, is_keyed=True)
def remove_webhook(scope: Scope, number: Number) -> Webhook:
    """Forget a webhook."""
    return scope.registry.remove_webhook(number)


@routes.route("POST", "/webhooks/{number}/test", Role.ADMIN)
def send_webhook_test(scope: Scope, number: Number) -> Delivery:
    """Send a message now, to see whether it arrives."""
    return scope.registry.test_webhook(number)


@routes.route("GET", "/webhooks/{number}/deliveries", Role.ADMIN)
def list_deliveries(
    scope: Scope, number: Number, limit: Annotated[int, "The last so many.", range(1, 1001)] = 50
) -> list[Delivery]:
    """The last messages to a webhook, the newest first."""
    return scope.registry.deliveries(number, limit)


# -- sign


@routes.route("GET", "/signatures", Role.READER)
def list_signatures(scope: Scope, subject: OfSubject) -> list[Signature]:
    """The signatures of a checkpoint or merged model."""
    return scope.registry.signatures(scope.subject(subject))


@routes.route("POST", "/signatures", Role.WRITER)
def record_signature(scope: Scope, body: SentSignature) -> Signature:
    """Keep a signature that was made elsewhere; it has to be one of this content. The same again changes nothing."""
    return scope.registry.add_signature(scope.subject(body.subject), body.bundle)


@routes.route("GET", "/provenance", Role.READER)
def get_provenance(scope: Scope, merged: Annotated[str, "A merged model's digest."]) -> Mapping[str, Any]:
    """What a merged model was made of, and how: an in-toto statement with a SLSA provenance."""
    return scope.registry.provenance(scope.merged(merged))


# -- keep right


@routes.route("GET", "/audit/verify", Role.ADMIN)
def verify_audit(scope: Scope) -> AuditState:
    """Walk the chain of events to its end."""
    return scope.registry.verify_chain()


@routes.route("GET", "/audit/export", Role.ADMIN)
def export_audit(scope: Scope) -> Iterator[Event]:
    """Every event, oldest first, sent while they are read."""
    return scope.registry.export_audit()


@routes.route("POST", "/sweep", Role.ADMIN)
def sweep(scope: Scope, body: SweepWanted) -> Swept:
    """Mark what nothing needs, and delete what was marked long enough ago."""
    return scope.registry.sweep(grace=_span("grace_seconds", body.grace_seconds), dry_run=body.dry_run)


@routes.route("GET", "/verify", Role.ADMIN)
def verify_store(
    scope: Scope,
    read_data: Annotated[bool, "Read every byte, too."] = False,
    subset: Annotated[str, "A part of it, such as 1/10."] = "",
) -> StoreCheck:
    """See that everything the registry needs is there. Changes nothing."""
    return scope.registry.verify(read_data=read_data, subset=subset)


@routes.route("GET", "/doctor", Role.ADMIN)
def diagnose(scope: Scope) -> list[Diagnosis]:
    """How the registry is, and what to do about it."""
    return scope.registry.diagnose()


def _span(field: str, seconds: float) -> timedelta:
    if not 0 <= seconds <= _MOST_SECONDS:  # so that NaN is none either
        raise InvalidInput(field, seconds, "a number of seconds, at most a century")
    return timedelta(seconds=seconds)
