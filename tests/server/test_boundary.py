"""What surrounds requests: errors in one shape, hosts, origins, limits, wrong tokens, logs without secrets, figures."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from running import Server, error, serving, settings_of
from waiting import until

from registry.access import new_secret
from registry.errors import InvalidSetting, StorageFailed
from registry.server.app import Listening, check_start
from registry.server.authority import Authority, Throttle
from registry.service import Registry
from registry.teamwork import Principal, Role


def test_errors_have_one_shape_wherever_they_come_from(server: Server) -> None:
    client = server.client("writer")
    answers = {
        "no_such_route": server.client().get(f"{server.url}/nowhere"),
        "method_not_allowed": client.patch("/me"),
        "invalid_reference": client.get("/checkpoint", params={"ref": "a b"}),
        "invalid_input": client.get("/checkpoint"),
        "unknown_adapter": client.get("/checkpoint", params={"ref": "bot"}),
        "unknown_job": client.get("/jobs/77"),
        "forbidden": client.get("/tokens"),
        "unauthenticated": server.client().get("/me"),
    }
    for code, answer in answers.items():
        assert error(answer) == code
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"checkpoint": 1, "text": "x"}',
        b'{"checkpoint": "bot"}',
        b"[" * 100_000,
        b'{"checkpoint": NaN}',
        b"\xff",
    ],
)
def test_bodies_that_cannot_be_read_are_told_so(server: Server, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.client("writer").post("/notes", content=body, headers=headers)
    assert (answer.status_code, error(answer)) == (400, "invalid_input")


def test_a_body_has_to_say_that_it_is_json(server: Server) -> None:
    # a page of another site can send text without asking, but no JSON
    answer = server.client("writer").post("/notes", content=b'{"checkpoint": "bot", "text": "x"}')
    assert (answer.status_code, error(answer)) == (400, "invalid_input")


def test_text_that_no_database_holds_is_told_so(server: Server, bot: str) -> None:
    client = server.client("writer")
    for text in ("nul \0", "\ud800"):
        body = json.dumps({"checkpoint": bot, "text": text}).encode()
        answer = client.post("/notes", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, error(answer)) == (400, "invalid_input")


def test_a_body_has_a_largest_size(server: Server) -> None:
    client = server.client("writer")
    long = client.post("/notes", json={"checkpoint": "bot", "text": "x" * (5 << 20)})
    assert (long.status_code, error(long)) == (413, "too_large")
    unsaid = client.post(
        "/notes", content=(b" " * (1 << 20) for _ in range(6)), headers={"Content-Type": "application/json"}
    )
    assert (unsaid.status_code, error(unsaid)) == (413, "too_large")


def test_headers_have_a_largest_size(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 431")


def test_what_was_not_foreseen_tells_nothing_of_the_inside(server: Server, bot: str, lines: list[str]) -> None:
    with closing(sqlite3.connect(server.home / "ckpt.db")) as database:
        database.execute("DROP TABLE signatures")
    answer = server.client("reader").get("/signatures", params={"subject": bot})
    assert (answer.status_code, error(answer)) == (500, "unforeseen")
    assert "sqlite" not in answer.text
    # the log has it, under the same name
    (line,) = (json.loads(line) for line in lines if "trace" in line)
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert "no such table" in line["trace"]


# -- names and origins


@pytest.mark.parametrize("host", ["evil.example.org", "localhost.evil.example.org", "", "[::"])
def test_another_name_for_this_machine_is_not_answered_to(server: Server, host: str) -> None:
    answer = server.client().get(f"{server.url}/healthz", headers={"Host": host})
    assert (answer.status_code, error(answer)) == (421, "unknown_host")


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_this_machines_names_are(server: Server, host: str) -> None:
    assert server.client().get(f"{server.url}/healthz", headers={"Host": host}).is_success


def test_a_name_can_be_allowed(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path), Listening(hosts=["ckpt.example.org"])) as server:
        assert server.client().get(f"{server.url}/healthz", headers={"Host": "ckpt.example.org"}).is_success


def test_pages_of_others_change_nothing(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path)) as server:
        asked = {"name": "eve", "role": "admin"}
        own = server.url
        for headers, is_own in (
            ({"Origin": "https://evil.example.org"}, False),
            ({"Origin": "null"}, False),
            ({"Sec-Fetch-Site": "cross-site"}, False),
            ({"Sec-Fetch-Site": "same-site"}, False),
            ({"Origin": own, "Sec-Fetch-Site": "same-origin"}, True),
        ):
            answer = server.client().post("/tokens", json=asked, headers=headers)
            assert answer.is_success is is_own, headers
        assert server.client().get("/me", headers={"Sec-Fetch-Site": "cross-site"}).status_code != 403


def test_without_tokens_only_this_machine_may_reach_it() -> None:
    assert Listening(needs_none=True).is_loopback
    assert Listening(host="::1", needs_none=True).is_loopback
    for host in ("0.0.0.0", "192.168.1.2", "ckpt.example.org", "::", ""):
        with pytest.raises(InvalidSetting):
            Listening(host=host, needs_none=True)


def test_where_others_reach_it_a_token_is_needed_from_the_start(tmp_path: Path) -> None:
    with serving(settings_of(tmp_path), Listening(host="0.0.0.0")) as server:
        assert server.client().get("/me").status_code == 401


def test_security_headers(server: Server) -> None:
    for answer in (
        server.client("reader").get("/me"),
        server.client().get(f"{server.url}/docs"),
        server.client().get("/me"),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] in ("no-store", "no-cache", "private, no-cache")
        assert "server" not in answer.headers


# -- wrong tokens


def test_guessing_is_slowed_down_but_good_tokens_go_on(server: Server) -> None:
    good = server.client("reader")
    assert good.get("/me").is_success
    for _ in range(10):
        assert server.client(Authorization=f"Bearer {new_secret(Role.ADMIN)}").get("/me").status_code == 401
    answer = server.client(Authorization=f"Bearer {new_secret(Role.ADMIN)}").get("/me")
    assert (answer.status_code, error(answer)) == (429, "too_many_tries")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert good.get("/me").is_success


def test_behind_a_proxy_each_caller_is_counted_alone(server: Server) -> None:
    def guess(caller: str) -> int:
        headers = {"Authorization": f"Bearer {new_secret(Role.ADMIN)}", "X-Forwarded-For": caller}
        return server.client(**headers).get("/me").status_code

    assert [guess("203.0.113.9") for _ in range(11)] == [401] * 10 + [429]
    assert guess("127.0.0.1, 203.0.113.9") == 429  # what a caller says of himself does not count
    assert guess("203.0.113.10") == 401
    figures = server.client(**{"X-Forwarded-For": "203.0.113.10"}).get(f"{server.url}/metrics")
    assert figures.status_code == 401


def test_the_throttle_forgets_and_stays_small() -> None:
    now = [0.0]
    throttle = Throttle(lambda: now[0])
    for _ in range(10):
        throttle.failed("203.0.113.1")
        throttle.failed("2001:db8::1")
    for address in ("203.0.113.1", "2001:db8::2"):
        with pytest.raises(Exception, match="too_many_tries"):
            throttle.check(address)
    throttle.check("203.0.113.2")
    now[0] = 61
    throttle.check("203.0.113.1")
    for number in range(20_000):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle._failures) <= 10_000


def test_a_revoked_token_is_good_for_a_second_at_most(server: Server) -> None:
    client = server.client("reader")
    assert client.get("/me").is_success
    assert server.client("admin").delete("/tokens/reader").is_success
    time.sleep(1.1)
    assert client.get("/me").status_code == 401


class Slow:
    """A registry whose answers take longer to arrive than a token is believed."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.settings = registry, registry.settings

    def authenticate(self, secret: str) -> Principal:
        found = self.registry.authenticate(secret)
        time.sleep(1.1)
        return found


def test_a_token_is_believed_from_when_it_was_looked_up(ckpt: Registry) -> None:
    secret = ckpt.create_token("ada", Role.READER).secret
    authority = Authority(Slow(ckpt), is_loopback=True)  # type: ignore[arg-type]
    assert authority.principal(secret, "127.0.0.1").name == "ada"
    assert authority.known(secret) is None  # it may have been revoked meanwhile


def test_the_use_of_a_token_is_written_down_beside(server: Server) -> None:
    assert server.client("reader").get("/me").is_success
    server.app.state.kitchen.authority.uses.write()

    def used() -> set[str]:
        return {token.name for token in server.direct.tokens() if token.last_used_at is not None}

    until(used)  # its own thread may just be at it
    assert used() == {"reader"}


# -- logs and figures


def requests(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines if '"request"' in line]


def test_each_request_is_a_line_without_secrets(server: Server, lines: list[str], bot: str) -> None:
    client = server.client("writer")
    client.post("/notes", json={"checkpoint": bot, "text": "confidential"}, headers={"X-Request-Id": "abc-1"})
    client.get("/checkpoints", params={"where": "note ~ 'classified'"})
    client.get("/checkpoint", params={"ref": bot}, headers={"X-Request-Id": 'bad "id"'})
    until(lambda: len(requests(lines)) == 3)  # a line is written when its answer is sent
    found = requests(lines)
    assert [line["route"] for line in found] == ["/notes", "/checkpoints", "/checkpoint"]
    assert (found[0]["request_id"], found[0]["principal"], found[0]["status"]) == ("abc-1", "writer", 200)
    assert found[2]["request_id"] != 'bad "id"'
    written = "\n".join(lines)
    assert not any(text in written for text in (server.secrets["writer"], "confidential", "classified"))


def test_figures(server: Server, bot: str) -> None:
    client = server.client("reader")
    client.get("/me")
    server.client().get(f"{server.url}/wp-login.php")
    server.client("writer").put(f"/blobs/{'0' * 64}", content=b"x" * 1000)
    text = server.client().get(f"{server.url}/metrics").text
    assert 'ckpt_requests_total{method="GET",route="/me",status="200"} 1.0' in text
    assert 'ckpt_requests_total{method="other",route="(none)",status="404"} 1.0' in text
    assert "ckpt_uploaded_bytes_total 1000.0" in text
    assert "ckpt_checkpoints 1.0" in text
    assert 'ckpt_jobs{state="queued"} 0.0' in text or "ckpt_jobs" in text


def test_it_is_ready_when_database_and_store_answer(server: Server) -> None:
    assert server.client().get(f"{server.url}/readyz").json() == {"status": "ready"}


def test_it_is_not_ready_when_the_database_is_away(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, CKPT_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    with serving(settings) as server:
        assert server.client().get(f"{server.url}/healthz").is_success
        answer = server.client().get(f"{server.url}/readyz")
        assert (answer.status_code, error(answer)) == (503, "storage_failed")
        assert answer.headers["Retry-After"]
        with pytest.raises(StorageFailed):
            check_start(settings)


def test_many_at_once(server: Server, bot: str) -> None:
    statuses: list[int] = []

    def ask() -> None:
        client = server.client("writer")
        asked = [{"checkpoint": bot, "text": f"{number}"} for number in range(10)]
        statuses.extend(client.post("/notes", json=each).status_code for each in asked)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 160
    assert len(server.direct.resolve(bot).notes) == 160
