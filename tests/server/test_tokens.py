"""Tokens as text, in the registry and on the command line; how a server is started."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from registry.access import is_well_formed, new_secret, parse_span, secret_sha256
from registry.errors import InvalidInput, InvalidReference, NameTaken, Unauthenticated, UnknownToken
from registry.service import Registry
from registry.teamwork import Role

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("role", list(Role))
def test_a_token_tells_what_it_is(role: Role) -> None:
    text = new_secret(role)
    assert re.fullmatch(rf"ckpt_{role.value[0]}_[0-9A-Za-z]{{44}}_[0-9A-Za-z]{{6}}", text)
    assert is_well_formed(text)
    assert text != new_secret(role)


@given(st.integers(0, 57), st.sampled_from("09AZaz_-é"))
def test_a_mistyped_token_is_told_by_its_checksum(place: int, letter: str) -> None:
    text = new_secret(Role.WRITER)
    wrong = text[:place] + letter + text[place + 1 :]
    assert is_well_formed(wrong) == (wrong == text)
    assert not is_well_formed(text[:-1])
    assert not is_well_formed(f" {text}")


def test_spans_of_time() -> None:
    assert parse_span("12h") == timedelta(hours=12)
    assert parse_span("30d") == timedelta(days=30)
    assert parse_span("8w") == timedelta(weeks=8)
    assert parse_span("1y") == timedelta(days=365)
    for wrong in ("", "30", "d", "0d", "-1d", "1.5d", "30 d", "9999999d", "1m"):
        with pytest.raises(InvalidInput):
            parse_span(wrong)


def test_only_the_hash_of_a_token_is_kept(ckpt: Registry) -> None:
    made = ckpt.create_token("ada", Role.SHIPPER, ["nlu", "a"], timedelta(days=1))
    assert (made.token.namespaces, made.token.role, made.token.author) == (("a", "nlu"), Role.SHIPPER, "ada")
    assert ckpt.authenticate(made.secret).name == "ada"
    ckpt.close()
    everything = (ckpt.settings.home / "ckpt.db").read_bytes() + b"".join(
        path.read_bytes() for path in ckpt.settings.home.glob("ckpt.db-wal")
    )
    assert made.secret.encode() not in everything
    assert made.secret[7:51].encode() not in everything
    assert secret_sha256(made.secret).encode() in everything


def test_tokens_end(ckpt: Registry) -> None:
    short = ckpt.create_token("short", Role.READER, expires_in=timedelta(milliseconds=20))
    kept = ckpt.create_token("kept", Role.READER)
    time.sleep(0.05)
    with pytest.raises(Unauthenticated):
        ckpt.authenticate(short.secret)
    assert ckpt.revoke_token(str(kept.token.id)).revoked_at is not None
    first = ckpt.tokens()[1].revoked_at
    assert ckpt.revoke_token("kept").revoked_at == first  # again changes nothing
    for secret in (kept.secret, new_secret(Role.ADMIN), "ckpt", ""):
        with pytest.raises(Unauthenticated):
            ckpt.authenticate(secret)
    with pytest.raises(UnknownToken) as missing:
        ckpt.revoke_token("kep")
    assert missing.value.near == ("kept",)
    with pytest.raises(UnknownToken):
        ckpt.revoke_token("9" * 30)


def test_names_of_tokens(ckpt: Registry) -> None:
    ckpt.create_token("ada", Role.READER)
    with pytest.raises(NameTaken):
        ckpt.create_token("ada", Role.ADMIN)
    for name, error in (
        ("7", InvalidInput),
        ("a b", InvalidReference),
        ("", InvalidReference),
        ("a" * 97, InvalidReference),
    ):
        with pytest.raises(error):
            ckpt.create_token(name, Role.READER)
    with pytest.raises(InvalidInput):
        ckpt.create_token("bob", Role.READER, expires_in=timedelta(0))
    with pytest.raises(InvalidReference):
        ckpt.create_token("bob", Role.READER, ["a/b"])
    assert [event.action for event in ckpt.history()] == ["token.create"]


def test_a_name_that_is_taken_is_told_by_name(ckpt: Registry) -> None:
    ckpt.create_token("ada", Role.READER)
    ckpt.revoke_token("ada")
    with pytest.raises(NameTaken) as taken:
        ckpt.create_token("ada", Role.ADMIN)
    assert (taken.value.subject, taken.value.reason) == ("token ada", "there is, or was, one of this name")


# -- the command line


@pytest.fixture
def ckpt_command(tmp_path: Path) -> Run:
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cli", *words]
        return subprocess.run(command, env=_environment(tmp_path, **environment), capture_output=True, text=True)

    return run


def _environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CKPT_")}
    return {**kept, "CKPT_HOME": str(home), "CKPT_USER": "owner", **more}


def test_tokens_on_the_command_line(ckpt_command: Run) -> None:
    made = ckpt_command("token", "create", "ada", "--role", "writer", "--namespace", "nlu", "--expires", "30d")
    assert made.returncode == 0, made.stderr
    assert is_well_formed(made.stdout.strip())
    shown = ckpt_command("token", "list").stdout
    assert "ada" in shown
    assert "nlu" in shown
    assert made.stdout.strip() not in ckpt_command("token", "list", "--json").stdout
    assert ckpt_command("token", "revoke", "ada").returncode == 0
    assert "revoked" in ckpt_command("token", "list").stdout
    assert ckpt_command("token", "create", "bob", "--role", "king").returncode == 2
    assert ckpt_command("token", "create", "bob", "--role", "reader", "--expires", "soon").returncode == 2
    assert ckpt_command("token", "revoke", "nobody").returncode == 3


def test_a_server_is_started_and_stopped(tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    command = [sys.executable, "-m", "cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=_environment(tmp_path), stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or _answers(f"{url}/readyz"))
        assert process.poll() is None
        assert httpx.get(f"{url}/api/v1/me", timeout=60).json()["role"] == "admin"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) in (0, -signal.SIGTERM)
        said = process.stderr.read() if process.stderr else ""
        assert "there is no token yet" in said
        assert '"route": "/me"' in said
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=60).is_success
    except httpx.TransportError:
        return False


def test_a_server_is_not_started_where_it_would_let_everybody_in(ckpt_command: Run) -> None:
    refused = ckpt_command("serve", "--no-auth", "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "only this machine" in refused.stderr
    assert ckpt_command("serve", CKPT_SERVER="http://127.0.0.1:1").returncode == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_that_is_taken_is_told(ckpt_command: Run, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = ckpt_command("serve", "--host", host, "--port", str(taken.getsockname()[1]))
    assert ran.returncode == 2
    assert "cannot listen there: Address already in use" in ran.stderr
    assert "serving on" not in ran.stderr


def test_an_address_of_another_machine_is_told(ckpt_command: Run) -> None:
    for host in ("203.0.113.7", "nothing.invalid"):
        ran = ckpt_command("serve", "--host", host, "--port", "8000")
        assert (ran.returncode, "cannot listen there" in ran.stderr) == (2, True)


def test_a_team_server_wants_its_tables(ckpt_command: Run, postgres: servers.Server) -> None:
    url = servers.create_database(postgres)
    refused = ckpt_command("serve", CKPT_DATABASE_URL=url)
    assert refused.returncode == 5
    assert "ckpt db upgrade" in refused.stderr
