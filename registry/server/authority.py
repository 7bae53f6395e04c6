"""Who asks: by a token, or, on a machine that has the registry to itself, without one."""

from __future__ import annotations

import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from registry.access import secret_sha256
from registry.db.tokens import USE_NOTED_EVERY
from registry.errors import Forbidden, RegistryError, TooManyTries, Unauthenticated
from registry.manifest import utc_now
from registry.service import Registry
from registry.teamwork import Principal, Role

log = logging.getLogger("ckpt.server")

_TRUSTED_SECONDS = 1.0  # a revoked token works no longer than this
_MOST_FAILURES, _FAILURES_SECONDS = 10, 60.0
_MOST_REMEMBERED = 10_000
_NOTE_SECONDS = 10.0


@final
class Throttle:
    """Counts the wrong tokens of each address, and tells when one has tried too often. Remembers a bounded number of addresses."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def check(self, address: str) -> None:
        """Let an address try.

        Raises:
            TooManyTries: it has failed too often in the last minute.
        """
        with self._lock:
            times = self._recent(_network(address))
            if len(times) >= _MOST_FAILURES:
                wait = int(times[0] + _FAILURES_SECONDS - self._now()) + 1
                raise TooManyTries("too many wrong tokens from this address", max(1, wait))

    def failed(self, address: str) -> None:
        """Count a wrong token."""
        key = _network(address)
        with self._lock:
            times = self._recent(key)
            times.append(self._now())
            self._failures[key] = times
            self._failures.move_to_end(key)
            while len(self._failures) > _MOST_REMEMBERED:
                self._failures.popitem(last=False)

    def _recent(self, key: str) -> deque[float]:
        times = self._failures.get(key) or deque(maxlen=_MOST_FAILURES)
        while times and times[0] <= self._now() - _FAILURES_SECONDS:
            times.popleft()
        return times


def _network(address: str) -> str:
    """An address as it is counted: of IPv6, where one caller has many, the network."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


@dataclass(slots=True)
class _Good:
    """A token that was good lately: whose, and until when that is believed."""

    principal: Principal
    until: float


@final
class Authority:
    """Decides who asks.

    Args:
        registry: whose tokens are asked for.
        is_loopback: only this machine can reach the server. Until there is a token, nobody needs one then.
        needs_none: nobody needs one, whatever there is.
    """

    def __init__(self, registry: Registry, *, is_loopback: bool, needs_none: bool = False) -> None:
        self._registry, self._is_loopback, self._needs_none = registry, is_loopback, needs_none
        self._owner = Principal(name=registry.settings.author, role=Role.ADMIN)
        self._throttle, self._lock = Throttle(), threading.Lock()
        self._good: OrderedDict[str, _Good] = OrderedDict()
        self._looked_at = 0.0
        self._has_tokens = False
        self.uses = Uses(registry)

    def known(self, secret: str) -> Principal | None:
        """Whose token this is, if that was found out within the last second. Waits for nothing."""
        good = self._good.get(secret_sha256(secret)) if secret else None
        if good is None or good.until <= time.monotonic():
            return None
        self.uses.note(good.principal.name)
        return good.principal

    def principal(self, secret: str, address: str) -> Principal:
        """Whose token this is; without one, whose machine.

        Args:
            secret: the token's text; empty for none.
            address: where the request comes from.

        Raises:
            Unauthenticated: the token is not good, or is missing and needed.
            TooManyTries: wrong ones came too often from there.
        """
        if not secret:
            if self.is_open() and is_this_machine(address):
                return self._owner
            raise Unauthenticated("this server wants a token")
        key, asked_at = secret_sha256(secret), time.monotonic()
        if key not in self._good:  # who was let in before is not kept out by others behind the same address
            self._throttle.check(address)
        try:
            principal = self._registry.authenticate(secret)
        except Unauthenticated:
            with self._lock:
                self._good.pop(key, None)
            self._throttle.failed(address)
            raise
        self._remember(key, _Good(principal, asked_at + _TRUSTED_SECONDS))
        self.uses.note(principal.name)
        return principal

    def _remember(self, key: str, good: _Good) -> None:
        with self._lock:
            self._good[key] = good
            self._good.move_to_end(key)
            while len(self._good) > _MOST_REMEMBERED:
                self._good.popitem(last=False)

    def is_open(self) -> bool:
        """Whether nobody needs a token."""
        if self._needs_none:
            return True
        if not self._is_loopback or self._has_tokens:
            return False
        now = time.monotonic()
        if self._looked_at <= now - _TRUSTED_SECONDS:
            with self._registry.workspace.reading() as catalog:
                self._has_tokens = catalog.tokens.exist()
            self._looked_at = now
        return not self._has_tokens


def is_this_machine(address: str) -> bool:
    """Whether a request came from the machine itself; not one that a proxy passed on, which says for whom."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def require(principal: Principal, role: Role) -> None:
    """See that somebody may do what a role is needed for. What concerns everything is not for those who see a part.

    Raises:
        Forbidden: he may not.
    """
    if not principal.role.covers(role):
        raise Forbidden(f"this takes the role {role}; {principal.name} has {principal.role}")
    if role is Role.ADMIN and principal.namespaces:
        raise Forbidden(f"this concerns everything; {principal.name} is limited to {', '.join(principal.namespaces)}")


@final
class Uses:
    """Writes down now and then which tokens were used; no request waits for it, and losing some harms nobody."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._noted: dict[str, float] = {}
        self._pending: set[str] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="token uses", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Write down what is left, and end."""
        self._over.set()
        self._thread.join()

    def note(self, name: str) -> None:
        """A token was used."""
        now = time.monotonic()
        if now - self._noted.get(name, -math.inf) >= USE_NOTED_EVERY.total_seconds():
            with self._lock:
                self._noted[name] = now
                self._pending.add(name)

    def _run(self) -> None:
        while not self._over.wait(_NOTE_SECONDS):
            self.write()
        self.write()

    def write(self) -> None:
        """Write down what was noted."""
        with self._lock:
            names, self._pending = self._pending, set()
        if not names:
            return
        try:
            with self._registry.workspace.writing() as change:
                change.catalog.tokens.note_use(sorted(names), utc_now())
        except RegistryError as error:
            log.warning("the use of tokens is not written down: %s", error)
