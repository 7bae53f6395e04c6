"""Tell other systems what happened: signed messages over HTTP, tried again until they arrive.

A message is a POST of JSON. Its signature is the HMAC-SHA256, with the webhook's secret, of the header `X-Ckpt-Timestamp` (seconds since 1970),
a dot and the body; see `verify`. Addresses come from people and may mean anything, so a name is looked up once, every address that it has
must be a public one, and the connection goes to one of those; redirects are not followed. What lies inside one's own network must be allowed
by the setting `CKPT_WEBHOOK_ALLOW`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from registry.codec import plain
from registry.db.webhooks import ACTIONS, TEST, Message, Outcome
from registry.errors import InvalidInput
from registry.manifest import canonical_json, utc_now
from registry.teamwork import Delivery, NewWebhook, Webhook
from registry.workspace import Workspace

TIMEOUT_SECONDS = 10.0
_READ_BYTES = 1024  # of an answer
_SHOWN_CHARACTERS = 200  # of an answer, in the log
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def verify(secret: str, timestamp: str, body: bytes, signature: str) -> bool:
    """Whether a message was signed with a secret. Receivers should also refuse a timestamp that is long past.

    Args:
        secret: as `ckpt webhook add` showed it.
        timestamp: the header `X-Ckpt-Timestamp`.
        body: what was sent, byte for byte.
        signature: the header `X-Ckpt-Signature`.
    """
    return hmac.compare_digest(_signature(secret, timestamp, body).encode(), signature.encode())


def _signature(secret: str, timestamp: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


# -- keeping


def add_webhook(workspace: Workspace, url: str, actions: Sequence[str]) -> NewWebhook:
    """Record an address that is told of events from now on.

    Args:
        url: http or https, of a public address unless the settings allow another.
        actions: `shipped`, `rolled_back`, `merged`, `alias`, `registered`.

    Raises:
        InvalidInput: the address or an action is not acceptable.
    """
    known = tuple(ACTIONS.values())
    for action in actions:
        if action not in known:
            raise InvalidInput("action", action, f"expected one of {', '.join(known)}")
    if not actions:
        raise InvalidInput("action", "", f"name what it is told of: {', '.join(known)}")
    try:
        asyncio.run(_within(TIMEOUT_SECONDS, _find_target(url, workspace.settings.webhook_allow)))
    except _NotSent as error:
        raise InvalidInput("url", url, str(error)) from error
    secret = f"whsec_{secrets.token_urlsafe(32)}"
    wanted = tuple(action for action in known if action in actions)
    with workspace.writing() as change:
        webhook = change.catalog.webhooks.add(url, wanted, secret, author=change.author, at=change.at)
        # The address itself may hold a secret, and everybody reads the history.
        change.record("webhook.add", f"webhook {webhook.id}", host=httpx.URL(url).host, actions=wanted)
    return NewWebhook(webhook=webhook, secret=secret)


def remove_webhook(workspace: Workspace, number: int) -> Webhook:
    """Forget a webhook and the log of its messages; those that are queued are not sent any more.

    Raises:
        UnknownWebhook: none has this number.
    """
    with workspace.writing() as change:
        webhook = change.catalog.webhooks.remove(number)
        change.record("webhook.remove", f"webhook {number}", host=httpx.URL(webhook.url).host)
        return webhook


# -- sending


def deliver_due(workspace: Workspace, now: datetime | None = None) -> int:
    """Send every message whose time has come, several at once, and record what came of them. Several workers may do this at a time.

    Args:
        now: the present; that of the database's clock when None.

    Returns:
        How many messages were tried.
    """
    tried = 0
    with workspace.reading() as catalog:
        if not catalog.webhooks.are_due(now or catalog.jobs.now()):
            return 0
    while messages := _take(workspace, now):
        outcomes = _send_all(messages, workspace.settings.webhook_allow)
        with workspace.writing() as change:
            for message, outcome in zip(messages, outcomes, strict=True):
                change.catalog.webhooks.settle(message, outcome, now or change.catalog.jobs.now())
        tried += len(messages)
    return tried


def _take(workspace: Workspace, now: datetime | None) -> list[Message]:
    with workspace.writing() as change:
        return change.catalog.webhooks.take(now or change.catalog.jobs.now())


def send_test(workspace: Workspace, number: int) -> Delivery:
    """Send a message with the action `test`, once, now; says in the log and here what came of it.

    Raises:
        UnknownWebhook: none has this number.
    """
    with workspace.writing() as change:
        payload = {
            "action": TEST,
            "at": change.at,
            "subject": f"webhook {number}",
            "author": change.author,
            "detail": {},
        }
        message = change.catalog.webhooks.take_test(number, plain(payload), change.at)
    (outcome,) = _send_all([message], workspace.settings.webhook_allow)
    with workspace.writing() as change:
        # It may have been removed just now; then nothing is left to record.
        settled = change.catalog.webhooks.settle(message, outcome, change.catalog.jobs.now())
        return settled or change.catalog.webhooks.deliveries(number, 1)[0]


def _send_all(messages: Sequence[Message], allowed: Sequence[str]) -> list[Outcome]:
    async def send() -> list[Outcome]:
        return await asyncio.gather(*(_send(message, allowed) for message in messages))

    return asyncio.run(send())


async def _send(message: Message, allowed: Sequence[str], seconds: float = TIMEOUT_SECONDS) -> Outcome:
    try:
        status, text = await _within(seconds, _post(message, allowed))
    except _NotSent as error:
        return Outcome(status=None, error=str(error))
    if 200 <= status < 300:
        return Outcome(status=status, error="")
    what = "a redirect, which is not followed" if 300 <= status < 400 else f"HTTP {status}"
    return Outcome(status=status, error=f"{what}: {text}" if text else what)


class _NotSent(Exception):
    """Why there is no answer, for people."""


async def _within(seconds: float, work: Any) -> Any:
    """The whole of some work within a time, however slowly the other side trickles."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise _NotSent(f"no answer within {seconds:g} seconds") from None


async def _post(message: Message, allowed: Sequence[str]) -> tuple[int, str]:
    """Status and beginning of the answer, of the first address that can be connected with."""
    target = await _find_target(message.url, allowed)
    body = canonical_json({"id": message.id, **message.payload})
    timestamp = str(int(utc_now().timestamp()))
    headers = {
        "Host": target.host_header,
        "Content-Type": "application/json",
        "User-Agent": "ckpt-registry",
        "X-Ckpt-Event": message.action,
        "X-Ckpt-Delivery": str(message.id),
        "X-Ckpt-Timestamp": timestamp,
        "X-Ckpt-Signature": _signature(message.secret, timestamp, body),
    }
    problem: Exception | None = None
    # The environment's proxies would look the name up again.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=TIMEOUT_SECONDS) as client:
        for url in target.pinned:
            request = client.build_request(
                "POST", url, content=body, headers=headers, extensions={"sni_hostname": target.host}
            )
            try:
                return await _answer(client, request)
            except httpx.ConnectError as error:
                problem = error
            except (httpx.HTTPError, OSError) as error:
                raise _NotSent(str(error) or type(error).__name__) from error
    raise _NotSent(str(problem))


async def _answer(client: httpx.AsyncClient, request: httpx.Request) -> tuple[int, str]:
    response = await client.send(request, stream=True)
    try:
        return response.status_code, await _beginning(response)
    finally:
        await response.aclose()


async def _beginning(response: httpx.Response) -> str:
    found = b""
    async for block in response.aiter_raw(_READ_BYTES):
        found += block
        if len(found) >= _READ_BYTES:
            break
    text = found[:_READ_BYTES].decode(errors="replace")
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:_SHOWN_CHARACTERS]


# -- where to


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a message goes: the URL with each address in place of the name, and the name for the header and for TLS."""

    pinned: tuple[httpx.URL, ...]
    host: str
    host_header: str


async def _find_target(text: str, allowed: Sequence[str]) -> _Target:
    """Look an address up, once, and see that messages may go there.

    Raises:
        _NotSent: they may not, or there is no such host.
    """
    url = _parse(text)
    host, port = url.raw_host.decode(), url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _NotSent(f"{host} cannot be looked up: {error}") from error
    addresses = [ipaddress.ip_address(str(where[0]).partition("%")[0]) for *_, where in found]
    for address in addresses:
        if not _may_reach(host, address, allowed):
            shown = "" if host == str(address) else f"{host} is "
            raise _NotSent(f"{shown}{address}, which is not a public address; CKPT_WEBHOOK_ALLOW can allow it")
    pinned = tuple(url.copy_with(host=str(address)) for address in dict.fromkeys(addresses))
    return _Target(pinned, host, url.netloc.decode())


def _parse(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise _NotSent(str(error)) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise _NotSent("expected an address that begins with https:// or http://")
    if url.port is not None and not 0 < url.port < 1 << 16:
        raise _NotSent("there is no such port")
    if url.userinfo or url.fragment:
        raise _NotSent("an address with a user or a fragment is not taken; messages are signed instead")
    return url


def _may_reach(host: str, address: _Address, allowed: Sequence[str]) -> bool:
    return _is_public(address) or any(_allows(rule, host, address) for rule in allowed)


def _allows(rule: str, host: str, address: _Address) -> bool:
    """Whether a rule, a host's name or a network, lets an address be reached."""
    try:
        return address in ipaddress.ip_network(rule, strict=False)
    except ValueError:
        return rule.lower().rstrip(".") == host.lower().rstrip(".")


def _is_public(address: _Address) -> bool:
    """Whether an address is one of the Internet's, and so is every IPv4 address that it stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _within_ipv6(address)
        if address in _NAT64 or address.ipv4_mapped:
            return all(map(_is_public, inner))
        if not all(map(_is_public, inner)):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _within_ipv6(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to: mapped, 6to4, Teredo and NAT64."""
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]
