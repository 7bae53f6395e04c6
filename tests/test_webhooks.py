"""Webhooks: who is told, what reaches a real receiver, what is tried again, and where messages may not go."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry import connect
from registry.db.webhooks import Message, Outcome
from registry.errors import InvalidInput, UnknownWebhook
from registry.manifest import Checkpoint, Metric, utc_now
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.webhooks import _is_public, _send, deliver_due, verify

ALL = ("shipped", "rolled_back", "merged", "alias", "registered")


@dataclass
class Receiver:
    """An HTTP server that remembers what it is told, and answers as it is told to: the statuses one by one, then 204."""

    url: str = ""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.got.append((dict(self.headers), body))
            status, headers, answer = told.answers.pop(0) if told.answers else (204, {}, b"")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        told.url = f"http://127.0.0.1:{server.server_port}/hook?team=nlu"
        yield told
        server.shutdown()
        thread.join()


@pytest.fixture(params=["sqlite", "postgres"])
def ckpt(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """On both databases, with the loopback allowed."""
    environment = {"CKPT_HOME": str(tmp_path / "home"), "CKPT_USER": "ada", "CKPT_WEBHOOK_ALLOW": "other, 127.0.0.0/8"}
    if request.param == "postgres":
        environment["CKPT_DATABASE_URL"] = request.getfixturevalue("postgres_url")
    with connect(Settings.from_environment(environment)) as opened:
        yield opened


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Registry]:
    """Nothing is allowed that is not on the Internet."""
    with tiny.open_registry(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def bot(ckpt: Registry, base: Path, adapter: Path) -> Checkpoint:
    said = Registration(adapter="bot", step=5, metrics=(Metric(name="eval_loss", value=float("nan")),), base=str(base))
    return ckpt.register(str(adapter), said).registered[0].checkpoint


def deliver(ckpt: Registry, now: datetime | None = None) -> int:
    return deliver_due(ckpt._workspace, now)


# -- who is told of what


def test_each_action_tells_those_who_want_it(
    ckpt: Registry, bot: Checkpoint, receiver: Receiver, tmp_path: Path
) -> None:
    ckpt.add_webhook(receiver.url, ALL)
    ckpt.add_webhook(receiver.url, ("alias",))
    twin = tiny.write_adapter(tmp_path / "twin", base=bot.base_name, seed=2)
    other = ckpt.register(str(twin), Registration(adapter="bot", base=bot.base_name)).registered[0].checkpoint
    ckpt.ship(bot, "production")
    ckpt.ship(other, "production", "better")
    ckpt.rollback("production")
    ckpt.set_alias(bot, "candidate")
    ckpt.tag(bot, {"team": "nlu"})
    assert deliver(ckpt) == 6
    told = sorted(receiver.bodies, key=lambda body: body["id"])
    assert [body["action"] for body in told] == ["registered", "shipped", "shipped", "rolled_back", "alias", "alias"]
    assert [body["subject"] for body in told] == ["bot@v2", "bot@v1", "bot@v2", "bot@v1", "bot@v1", "bot@v1"]
    assert told[2]["shipment"]["note"] == "better"
    assert told[3]["shipment"]["restores"] == told[1]["shipment"]["number"]
    assert told[3]["detail"] == {"environment": "production", "before": "bot@v2"}
    assert {body["author"] for body in told} == {"ada"}
    assert told[1]["checkpoint"]["digest"] == str(bot.digest)
    assert told[1]["checkpoint"]["metrics"] == {"eval_loss": "nan"}
    assert told[1]["event"] == ckpt.history("bot@v1")[1].number
    assert deliver(ckpt) == 0


def test_a_merge_tells_of_the_model(strict: Registry, base: Path, adapter: Path) -> None:
    bot = strict.register(str(adapter), Registration(adapter="bot")).registered[0].checkpoint
    with strict._workspace.writing() as change:
        change.catalog.webhooks.add("https://example.com", ("merged", "shipped"), "s", author="ada", at=change.at)
    merged = strict.merge(strict.plan(bot)).merged
    strict.ship(merged, "production")
    with strict._workspace.writing() as change:
        told = [message.payload for message in change.catalog.webhooks.take(utc_now())]
    assert [each["action"] for each in told] == ["merged", "shipped"]
    for each in told:
        assert each["merged"]["digest"] == str(merged.digest)
        assert each["merged"]["checkpoints"] == ["bot@v1"]
    assert told[1]["shipment"]["merged"] == str(merged.digest)


def test_a_change_that_is_taken_back_tells_nobody(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    hook = ckpt.add_webhook(receiver.url, ALL).webhook

    def fail_after_shipping() -> None:
        with ckpt._workspace.writing():
            ckpt.ship(bot, "production")
            ckpt.set_alias(bot, "candidate")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_after_shipping()
    assert ckpt.deliveries(hook.id) == []
    assert deliver(ckpt) == 0
    ckpt.ship(bot, "production")
    assert [each.action for each in ckpt.deliveries(hook.id)] == ["shipped"]


# -- what arrives


def test_the_signature_and_the_headers(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    made = ckpt.add_webhook(receiver.url, ("shipped",))
    assert made.secret.startswith("whsec_")
    assert made.secret not in repr(ckpt.webhooks())
    ckpt.ship(bot, "production")
    deliver(ckpt)
    ((headers, body),) = receiver.got
    stamp, signature = headers["X-Ckpt-Timestamp"], headers["X-Ckpt-Signature"]
    assert verify(made.secret, stamp, body, signature)
    assert not verify(made.secret, str(int(stamp) + 1), body, signature)
    assert not verify(made.secret, stamp, body + b" ", signature)
    assert not verify("whsec_other", stamp, body, signature)
    assert not verify(made.secret, stamp, body, "sha256=é")
    assert abs(int(stamp) - utc_now().timestamp()) < 60
    assert headers["X-Ckpt-Event"] == "shipped"
    assert headers["X-Ckpt-Delivery"] == str(json.loads(body)["id"])
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == receiver.url.split("/")[2]
    (delivery,) = ckpt.deliveries(made.webhook.id)
    assert (delivery.state, delivery.status, delivery.attempts, delivery.error) == ("delivered", 204, 1, "")
    assert delivery.finished_at is not None


def test_a_message_is_tried_again_until_it_has_failed(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    hook = ckpt.add_webhook(receiver.url, ("shipped",)).webhook
    receiver.answers = [(500, {}, b"out of\x00 \n<b>order</b>" + b"x" * 5000)] * 6
    ckpt.ship(bot, "production")
    now = ckpt.deliveries(hook.id)[0].created_at
    assert deliver(ckpt, now) == 1
    for tried, wait in enumerate((10, 60, 5 * 60, 30 * 60, 2 * 3600), start=1):
        (delivery,) = ckpt.deliveries(hook.id)
        assert (delivery.state, delivery.attempts, delivery.status) == ("queued", tried, 500)
        assert delivery.error.startswith("HTTP 500: out of <b>order</b>xxx")
        assert len(delivery.error) <= 220
        assert delivery.finished_at is None
        assert deliver(ckpt, now + timedelta(seconds=wait - 1)) == 0
        now += timedelta(seconds=wait)
        assert deliver(ckpt, now) == 1
    (delivery,) = ckpt.deliveries(hook.id)
    assert (delivery.state, delivery.attempts, delivery.finished_at) == ("failed", 6, now)
    assert deliver(ckpt, now + timedelta(days=2)) == 0
    assert len(receiver.got) == 6


def test_it_arrives_at_the_second_try(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    hook = ckpt.add_webhook(receiver.url, ("shipped",)).webhook
    receiver.answers = [(503, {}, b"")]
    ckpt.ship(bot, "production")
    now = utc_now()
    deliver(ckpt, now)
    assert deliver(ckpt, now + timedelta(seconds=9)) == 0
    assert deliver(ckpt, now + timedelta(seconds=10)) == 1
    (delivery,) = ckpt.deliveries(hook.id)
    assert (delivery.state, delivery.attempts, delivery.status) == ("delivered", 2, 204)
    assert receiver.bodies[0] == receiver.bodies[1]


def test_nobody_there_is_an_error_too(ckpt: Registry, bot: Checkpoint) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        hook = ckpt.add_webhook(f"http://127.0.0.1:{silent.getsockname()[1]}/hook", ("shipped",)).webhook
        ckpt.ship(bot, "production")
        deliver(ckpt)
    (delivery,) = ckpt.deliveries(hook.id)
    assert (delivery.state, delivery.status) == ("queued", None)
    assert delivery.error


def test_two_senders_never_send_the_same(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    ckpt.add_webhook(receiver.url, ("alias",))
    for number in range(12):
        ckpt.set_alias(bot, f"a{number}")
    senders = [threading.Thread(target=deliver, args=(ckpt,)) for _ in range(4)]
    for each in senders:
        each.start()
    for each in senders:
        each.join()
    assert sorted(body["detail"]["alias"] for body in receiver.bodies) == sorted(f"a{number}" for number in range(12))


def test_what_a_sender_took_and_never_settled_is_sent_later(
    ckpt: Registry, bot: Checkpoint, receiver: Receiver
) -> None:
    ckpt.add_webhook(receiver.url, ("shipped",))
    ckpt.ship(bot, "production")
    now = utc_now()
    for wait in (0, 10, 60, 300, 1800, 7200, 7200):
        now += timedelta(seconds=wait)
        with ckpt._workspace.writing() as change:
            assert len(change.catalog.webhooks.take(now)) == 1
    assert deliver(ckpt, now + timedelta(hours=2)) == 1
    assert len(receiver.got) == 1


def test_a_late_word_about_an_earlier_try_counts_only_when_it_arrived(ckpt: Registry, bot: Checkpoint) -> None:
    hook = ckpt.add_webhook("http://127.0.0.1:9/", ("shipped",)).webhook
    ckpt.ship(bot, "production")
    now = utc_now()
    with ckpt._workspace.writing() as change:
        webhooks = change.catalog.webhooks
        (first,), (second,) = webhooks.take(now), webhooks.take(now + timedelta(minutes=1))
        webhooks.settle(second, Outcome(status=None, error="second"), now)
        webhooks.settle(first, Outcome(status=None, error="first"), now)
    assert ckpt.deliveries(hook.id)[0].error == "second"
    with ckpt._workspace.writing() as change:
        change.catalog.webhooks.settle(first, Outcome(status=200, error=""), now)
        change.catalog.webhooks.settle(second, Outcome(status=500, error="HTTP 500"), now)
    assert ckpt.deliveries(hook.id)[0].state == "delivered"


def test_a_message_of_a_webhook_that_is_gone(ckpt: Registry, bot: Checkpoint) -> None:
    hook = ckpt.add_webhook("http://127.0.0.1:9/", ("shipped",)).webhook
    ckpt.ship(bot, "production")
    with ckpt._workspace.writing() as change:
        (message,) = change.catalog.webhooks.take(utc_now())
    ckpt.remove_webhook(hook.id)
    with ckpt._workspace.writing() as change:
        assert change.catalog.webhooks.settle(message, Outcome(status=200, error=""), utc_now()) is None


def test_a_test_is_sent_at_once_and_once(ckpt: Registry, receiver: Receiver) -> None:
    hook = ckpt.add_webhook(receiver.url, ("merged",)).webhook
    receiver.answers = [(418, {}, b"")]
    failed = ckpt.test_webhook(hook.id)
    assert (failed.action, failed.state, failed.status, failed.attempts) == ("test", "failed", 418, 1)
    assert deliver(ckpt, utc_now() + timedelta(days=1)) == 0
    assert ckpt.test_webhook(hook.id).state == "delivered"
    assert [each.state for each in ckpt.deliveries(hook.id)] == ["delivered", "failed"]
    assert [each.state for each in ckpt.deliveries(hook.id, 1)] == ["delivered"]
    assert receiver.bodies[1]["action"] == "test"


# -- keeping


def test_what_is_long_over_is_forgotten(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    hook, other = (ckpt.add_webhook(receiver.url, (action,)).webhook for action in ("alias", "shipped"))
    long_ago = utc_now() - timedelta(days=30, minutes=1)
    ckpt.ship(bot, "production")
    fail(ckpt, long_ago)
    for day, name in enumerate(("old", "older", "new")):
        ckpt.set_alias(bot, name)
        assert deliver(ckpt, utc_now() if name == "new" else long_ago - timedelta(days=day)) == 1
    ckpt.set_alias(bot, "waiting")
    assert ckpt.sweep(dry_run=True).deliveries == 3
    assert len(ckpt.deliveries(hook.id)) == 4
    assert ckpt.sweep().deliveries == 3
    assert [each.state for each in ckpt.deliveries(hook.id)] == ["queued", "delivered"]
    assert ckpt.deliveries(other.id) == []
    event = ckpt.history()[-1]
    assert (event.action, event.subject, event.detail) == ("sweep", "webhooks", {"deliveries": 3})
    assert ckpt.sweep().deliveries == 0
    assert ckpt.history()[-1] == event


def fail(ckpt: Registry, at: datetime) -> None:
    """Let each try of what waits fail; the last at this time."""
    for seconds in (9370, 9360, 9300, 9000, 7200, 0):
        now = at - timedelta(seconds=seconds)
        with ckpt.workspace.writing() as change:
            (message,) = change.catalog.webhooks.take(now)
            change.catalog.webhooks.settle(message, Outcome(status=500, error="HTTP 500"), now)


def test_messages_are_forgotten_a_part_at_a_time(ckpt: Registry, bot: Checkpoint, receiver: Receiver) -> None:
    ckpt.add_webhook(receiver.url, ("alias",))
    for number in range(5):
        ckpt.set_alias(bot, f"a{number}")
    deliver(ckpt)
    later = utc_now() + timedelta(days=31)
    with ckpt.workspace.writing() as change:
        webhooks = change.catalog.webhooks
        assert webhooks.count_past(later) == 5
        assert [webhooks.forget_past(later, 2) for _ in range(4)] == [2, 2, 1, 0]


def test_list_and_remove(ckpt: Registry, receiver: Receiver, bot: Checkpoint) -> None:
    one = ckpt.add_webhook(receiver.url, ("merged", "shipped")).webhook
    two = ckpt.add_webhook(receiver.url, ("alias",)).webhook
    assert ckpt.webhooks() == [one, two]
    assert (one.url, one.actions, one.author) == (receiver.url, ("shipped", "merged"), "ada")
    ckpt.ship(bot, "production")
    assert ckpt.remove_webhook(one.id) == one
    assert ckpt.webhooks() == [two]
    assert deliver(ckpt) == 0
    told = [(event.action, event.detail) for event in ckpt.history() if event.action.startswith("webhook")]
    assert told[0] == ("webhook.add", {"host": "127.0.0.1", "actions": ["shipped", "merged"]})
    assert told[2] == ("webhook.remove", {"host": "127.0.0.1"})
    for act in (ckpt.remove_webhook, ckpt.test_webhook, ckpt.deliveries):
        for number in (one.id, 0, -1, 1 << 40):
            with pytest.raises(UnknownWebhook):
                act(number)  # type: ignore[operator]


@pytest.mark.parametrize("actions", [(), ("tag",), ("shipped", "test")])
def test_actions_that_nobody_is_told_of(strict: Registry, actions: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput):
        strict.add_webhook("https://93.184.216.34/", actions)


# -- where messages may not go


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost:8000/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:10.0.0.1]/", "http://[::127.0.0.1]/", "http://[2002:7f00:1::]/", "http://[64:ff9b::a00:1]/", "http://[64:ff9b:1::1]/",
        "http://169.254.169.254/latest/meta-data", "http://[fe80::1]/", "http://[fd00:ec2::254]/", "http://10.1.2.3/", "http://172.16.0.1/",
        "http://192.168.1.1/", "http://100.64.0.1/", "http://0.0.0.0/", "http://[::]/", "http://224.0.0.1/", "http://[ff02::1]/",
        "http://255.255.255.255/", "http://198.18.0.1/", "http://240.0.0.1/",
        "ftp://93.184.216.34/", "file:///etc/passwd", "gopher://93.184.216.34/", "93.184.216.34", "http://", "", "https://me:secret@93.184.216.34/",
        "https://93.184.216.34/#x", "http://no-such-host.invalid/", "http://[::1", "http://93.184.216.34:99999/",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(strict: Registry, url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        strict.add_webhook(url, ("shipped",))
    assert caught.value.field == "url"
    assert strict.webhooks() == []


@pytest.mark.parametrize(
    "url",
    ["https://93.184.216.34/hook", "http://[2606:2800:220:1:248:1893:25c8:1946]/", "http://[64:ff9b::5db8:d822]/"],
)
def test_public_addresses_are_taken(strict: Registry, url: str) -> None:
    assert strict.add_webhook(url, ("shipped",)).webhook.url == url


@pytest.mark.parametrize(
    ("address", "is_public"),
    [("8.8.8.8", True), ("2001:4860:4860::8888", True), ("2002:808:808::", True), ("2001:0:808:808:0:0:7f7f:7f7f", False)],
)  # fmt: skip
def test_what_is_public(address: str, is_public: bool) -> None:
    assert _is_public(ipaddress.ip_address(address)) is is_public


def test_a_name_is_judged_by_its_addresses_when_sending(tmp_path: Path, receiver: Receiver) -> None:
    """Also one that was fine when it was added: names may move."""
    port = receiver.url.split(":")[2].split("/")[0]
    with _open(tmp_path, "localhost") as allowing:
        hook = allowing.add_webhook(f"http://localhost:{port}/", ("shipped",)).webhook
        assert allowing.test_webhook(hook.id).state == "delivered"
        assert receiver.got[0][0]["Host"] == f"localhost:{port}"
    with _open(tmp_path, "") as strict:
        delivery = strict.test_webhook(hook.id)
    assert (delivery.state, delivery.status) == ("failed", None)
    assert "not a public address" in delivery.error
    assert len(receiver.got) == 1


@contextmanager
def _trickling() -> Iterator[str]:
    """A server that sends one byte of a header every tenth of a second."""
    done = threading.Event()

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not done.wait(0.1):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            done.set()
            thread.join()


def _open(home: Path, allowed: str) -> Registry:
    return connect(Settings.from_environment({"CKPT_HOME": str(home), "CKPT_WEBHOOK_ALLOW": allowed}))


def test_a_redirect_is_not_followed(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers = [(307, {"Location": "http://127.0.0.1/internal"}, b"")]
    with _open(tmp_path, "127.0.0.1") as ckpt:
        hook = ckpt.add_webhook(receiver.url, ("shipped",)).webhook
        delivery = ckpt.test_webhook(hook.id)
    assert (delivery.state, delivery.status, delivery.error) == ("failed", 307, "a redirect, which is not followed")
    assert len(receiver.got) == 1


def test_proxies_of_the_environment_are_not_asked(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with _open(tmp_path, "127.0.0.1") as ckpt:
        assert ckpt.test_webhook(ckpt.add_webhook(receiver.url, ("shipped",)).webhook.id).state == "delivered"


def test_an_answer_that_trickles_does_not_hold_the_sender() -> None:
    """A byte now and then never runs into a limit between bytes; the limit is for the whole."""
    with _trickling() as url:
        message = Message(id=1, url=url, secret="s", action="test", payload={}, attempt=1)
        outcome = asyncio.run(asyncio.wait_for(_send(message, ["127.0.0.1"], seconds=0.5), 60))
    assert outcome == Outcome(status=None, error="no answer within 0.5 seconds")
