"""Pages of keeping the registry right: the history for everybody; tokens and webhooks for admins."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final
from urllib.parse import urlencode

from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from registry.access import parse_span
from registry.auditing import export
from registry.db.webhooks import ACTIONS
from registry.errors import Conflict, InvalidInput, UnknownToken, UnknownWebhook
from registry.manifest import Event, canonical_json, utc_now
from registry.server.pages.drawing import url_of
from registry.server.pages.moments import in_form, moment
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.teamwork import Role, Token, Webhook
from registry.wording import Words, explain

pages = Pages("admin")

_AT_ONCE, _AT_MOST = 100, 10_000
_DELIVERIES = 50
_JOB = re.compile(r"job (\d{1,10})")
_CHECKPOINT = re.compile(r"[^@\s]+@v\d+")
WEBHOOK_WORDS: Mapping[str, str] = {
    "shipped": "a checkpoint or merged model went live",
    "rolled_back": "what was live before came back",
    "merged": "a model was merged",
    "alias": "an alias was pointed somewhere",
    "registered": "checkpoints were registered",
}


# -- audit


@final
@dataclass(frozen=True, slots=True)
class Line:
    """An event, the page of what it is about (empty where there is none), and its detail as text."""

    event: Event
    url: str
    detail: tuple[tuple[str, str], ...]


@pages.page("GET", "/audit", Role.READER)
def show_audit(visit: Visit) -> Shown:
    """What was changed, by whom, the newest first."""
    subject, author = visit.query.one("subject"), visit.query.one("author")
    since = moment(visit.query.one("since"), "since")
    limit = visit.query.number("limit", _AT_ONCE, range(1, _AT_MOST + 1))
    found = visit.scope.registry.history_page(
        subject, author=author, since=since, limit=limit, namespaces=visit.scope.namespaces
    )
    asked = {"subject": subject, "author": author, "since": in_form(since)}
    following = {**asked, "limit": min(limit + _AT_ONCE, _AT_MOST)}
    more = f"/audit?{urlencode(following)}" if found.cursor and limit < _AT_MOST else ""
    return Shown("audit.html", lines=[_line(event) for event in found.items[::-1]], more=more, asked=asked)


def _line(event: Event) -> Line:
    url = ""
    if job := _JOB.fullmatch(event.subject):
        url = f"/jobs/{job[1]}"
    elif _CHECKPOINT.fullmatch(event.subject):
        url = url_of(event.subject)
    said = {key: value for key, value in event.detail.items() if value not in ("", None, [], {})}
    return Line(event, url, tuple((key.replace("_", " "), _text(value)) for key, value in said.items()))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if len(value) == 64 and value.isalnum() else value
    return ", ".join(map(str, value)) if isinstance(value, list) else canonical_json(value).decode()


@pages.page("GET", "/audit/verify", Role.ADMIN, is_slow=True)
def verify_chain(visit: Visit) -> Shown:
    """Walk the chain of events to its end."""
    state = visit.scope.registry.verify_chain()
    return Shown("_verified.html" if visit.is_partial else "verified.html", state=state)


@pages.page("GET", "/audit/export", Role.ADMIN, is_slow=True)
def export_audit(visit: Visit) -> Response:
    """Every event as JSON lines, closed by a checkpoint, as `ckpt audit export` writes them."""
    registry, now = visit.scope.registry, utc_now()
    folder = tempfile.TemporaryDirectory(prefix="ckpt-")
    target, is_done = Path(folder.name) / "audit.ndjson", False
    try:
        export(registry.export_audit(), target, origin=registry.settings.address, at=now)
        is_done = True
    finally:
        if not is_done:
            folder.cleanup()
    name, headers = f"audit-{now:%Y%m%dT%H%M%SZ}.ndjson", {"Cache-Control": "no-store"}
    return FileResponse(
        target,
        200,
        headers,
        "application/x-ndjson",
        BackgroundTask(folder.cleanup),
        name,
        content_disposition_type="attachment",
    )


# -- tokens


@pages.page("GET", "/tokens", Role.ADMIN)
def list_tokens(visit: Visit) -> Shown:
    """Who may come in, and for what."""
    return _tokens(visit)


def _tokens(visit: Visit, words: Words | None = None) -> Shown:
    said = {name: visit.form.one(name) for name in ("name", "role", "namespaces", "expires")}
    tokens, now = visit.scope.registry.tokens(), utc_now()
    return Shown(
        "tokens.html",
        status=422 if words else 200,
        tokens=[each for each in tokens if _is_good(each, now)],
        ended=[each for each in tokens if not _is_good(each, now)],
        roles=_ROLE_WORDS,
        said=said,
        words=words,
    )


_ROLE_WORDS: Mapping[str, str] = {
    Role.READER: "sees everything",
    Role.WRITER: "registers, annotates, merges",
    Role.SHIPPER: "ships and rolls back, too",
    Role.ADMIN: "tokens, webhooks, the store, too",
}


def _is_good(token: Token, now: datetime) -> bool:
    return token.revoked_at is None and (token.expires_at is None or token.expires_at > now)


@pages.page("POST", "/tokens", Role.ADMIN)
def create_token(visit: Visit) -> Shown:
    """Make a token and show its text, this once."""
    form = visit.form
    try:
        if form.one("role") not in set(Role):
            raise InvalidInput("role", form.one("role")[:80], f"one of {', '.join(Role)}")
        expires = form.one("expires")
        namespaces = [each for each in re.split(r"[\s,]+", form.one("namespaces")) if each]
        span = parse_span(expires) if expires else None
        made = visit.scope.registry.create_token(form.one("name"), Role(form.one("role")), namespaces, span)
    except (InvalidInput, Conflict) as error:
        return _tokens(visit, explain(error))
    return Shown("token_made.html", is_secret=True, made=made)


@pages.page("GET", "/tokens/{number}/revoke", Role.ADMIN)
def ask_to_revoke(visit: Visit) -> Shown:
    """What would end, to be confirmed."""
    return Shown("_token_revoke.html" if visit.is_partial else "token_revoke.html", token=_token(visit))


@pages.page("POST", "/tokens/{number}/revoke", Role.ADMIN)
def revoke_token(visit: Visit) -> Moved:
    """End it."""
    visit.scope.registry.revoke_token(str(_token(visit).id))
    return Moved("/tokens")


def _token(visit: Visit) -> Token:
    text = visit.path["number"]
    found = next((each for each in visit.scope.registry.tokens() if str(each.id) == text), None)
    if found is None:
        raise UnknownToken(text[:80])
    return found


# -- webhooks


@pages.page("GET", "/webhooks", Role.ADMIN)
def list_webhooks(visit: Visit) -> Shown:
    """Who is told of what."""
    return _webhooks(visit)


def _webhooks(visit: Visit, words: Words | None = None) -> Shown:
    return Shown(
        "webhooks.html",
        status=422 if words else 200,
        webhooks=visit.scope.registry.webhooks(),
        actions={action: WEBHOOK_WORDS.get(action, "") for action in ACTIONS.values()},
        said_url=visit.form.one("url"),
        said_actions=visit.form.all("action"),
        words=words,
    )


@pages.page("POST", "/webhooks", Role.ADMIN, is_slow=True)
def add_webhook(visit: Visit) -> Shown:
    """Tell an address from now on, and show the secret of its messages, this once."""
    try:
        made = visit.scope.registry.add_webhook(visit.form.one("url"), visit.form.all("action"))
    except InvalidInput as error:
        return _webhooks(visit, explain(error))
    return Shown("webhook_made.html", is_secret=True, made=made)


@pages.page("GET", "/webhooks/{number}", Role.ADMIN)
def show_webhook(visit: Visit) -> Shown:
    """A webhook with the last messages to it."""
    webhook = _webhook(visit)
    deliveries = visit.scope.registry.deliveries(webhook.id, _DELIVERIES)
    return Shown("webhook.html", webhook=webhook, deliveries=deliveries)


@pages.page("POST", "/webhooks/{number}/test", Role.ADMIN, is_slow=True)
def test_webhook(visit: Visit) -> Moved:
    """Send a message now; its delivery is on the webhook's page."""
    visit.scope.registry.test_webhook(_webhook(visit).id)
    return Moved(f"/webhooks/{visit.path['number']}")


@pages.page("GET", "/webhooks/{number}/remove", Role.ADMIN)
def ask_to_remove_webhook(visit: Visit) -> Shown:
    """What would be forgotten, to be confirmed."""
    return Shown("_webhook_remove.html" if visit.is_partial else "webhook_remove.html", webhook=_webhook(visit))


@pages.page("POST", "/webhooks/{number}/remove", Role.ADMIN)
def remove_webhook(visit: Visit) -> Moved:
    """Forget it."""
    visit.scope.registry.remove_webhook(_webhook(visit).id)
    return Moved("/webhooks")


def _webhook(visit: Visit) -> Webhook:
    text = visit.path["number"]
    found = next((each for each in visit.scope.registry.webhooks() if str(each.id) == text), None)
    if found is None:
        raise UnknownWebhook(text[:80])
    return found
