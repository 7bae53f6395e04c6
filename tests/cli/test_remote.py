"""The main job over a server, with nothing on this machine but its address and a token."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers
from commands import Ckpt
from waiting import until

import registry
from registry.settings import Settings
from registry.teamwork import Role

ROOT = Path(__file__).parents[2]
COPIED = ("tiny-llama", "--name", "tiny-llama", "--copy")


@dataclass(frozen=True)
class Remote:
    url: str
    home: Path
    admin: str
    reader: str


@contextmanager
def served(home: Path, log: Path) -> Iterator[str]:
    """`ckpt serve` in a process of its own; gives its URL."""
    (port,) = servers.free_ports(1)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CKPT_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve", "--port", str(port)],
            env={**environment, "CKPT_HOME": str(home)}, cwd=ROOT, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or is_alive(url))
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait(120)


def is_alive(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/healthz", timeout=30):
        return True
    return False


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    home = tmp_path / "server"
    with registry.connect(Settings.from_environment({"CKPT_HOME": str(home)})) as direct:
        admin, reader = (direct.create_token(role.value, role).secret for role in (Role.ADMIN, Role.READER))
    with served(home, tmp_path / "server.log") as url:
        yield Remote(url, home, admin, reader)


@pytest.fixture
def there(remote: Remote, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    """The command line with the server and a token in its environment, nothing else."""
    monkeypatch.setenv("CKPT_SERVER", remote.url)
    monkeypatch.setenv("CKPT_TOKEN", remote.admin)
    monkeypatch.delenv("CKPT_USER")
    return ckpt


def test_the_main_job(there: Ckpt, run_folder: Path, tmp_path: Path, remote: Remote) -> None:
    assert there("base", "add", *COPIED, "--json").json["created"] is True
    first, again = there("register", str(run_folder)), there("register", str(run_folder))
    assert [line.split()[1] for line in first.out.splitlines()] == [f"support-bot@v{n}" for n in range(1, 7)]
    assert all(line.startswith("known already as support-bot@v") for line in again.out.splitlines())
    assert there("list", "--best", "--json").json[0]["ref"] == "support-bot@v4"
    assert len(there("list", "--where", "step >= 160", "--json").json) == 3
    assert there("check", "support-bot@best", "--json").json["verdict"] == "pass"
    plan = there("merge", "support-bot@best", "--dry-run", "--json").json
    merged = there("merge", "support-bot@best", "--out", "merged", "--json").json
    assert (merged["created"], len(merged["tensors"])) == (True, 14)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "merged").iterdir()}
    assert all(sizes[file["path"]] == file["size_bytes"] for file in plan["files"])
    assert there("merge", "support-bot@best", "--out", "merged").out.startswith("merged before")
    assert there("merge", "support-bot@v1", "--out", "merged").code == 5
    assert there("ship", merged["digest"][7:17], "--to", "production", "--note", "rc1").code == 0
    assert there("shipped", "production", "--json").json[0]["author"] == "admin"
    assert there("pull", "support-bot@production", "pulled").code == 0
    source = run_folder / "checkpoint-160"
    assert {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    assert "merged into" in there("show", "support-bot@v4").out
    assert not (tmp_path / "home" / "ckpt.db").exists()
    assert not (tmp_path / "home" / "store").exists()


def test_annotating_combining_comparing_and_jobs(there: Ckpt, run_folder: Path) -> None:
    there("base", "add", *COPIED)
    there("register", str(run_folder))
    assert there("note", "support-bot@v4", "right tone").code == 0
    assert there("tag", "support-bot@v4", "team=nlu").code == 0
    assert there("metric", "add", "support-bot@v4", "bleu=0.5").code == 0
    assert there("alias", "set", "support-bot@v4", "candidate").out.startswith(
        "support-bot@candidate is support-bot@v4"
    )
    shown = there("show", "support-bot@candidate").out
    assert all(text in shown for text in ("right tone", "team=nlu", "bleu"))
    assert there("combine", "support-bot@v4", "support-bot@v6", "--as", "both", "--json").json["ref"] == "both@v1"
    assert there("diff", "support-bot@v4", "support-bot@v6", "--json").json["weights"]
    number = there("merge", "support-bot@v4", "--detach").out.strip()
    assert there("jobs", "show", number, "--follow", "--json").json["state"] == "succeeded"
    assert there("jobs", "logs", number).code == 0
    assert there("base", "verify", "tiny-llama").out.startswith("intact")
    assert there("rm", "both@v1", "--yes").code == 0
    assert there("gc", "--dry-run").code == 0
    assert there("verify").code == 0
    assert there("audit", "verify").code == 0
    assert there("history", "support-bot", "--limit", "1", "--json").json[0]["action"] == "merge"


def test_errors_read_as_ever(there: Ckpt, remote: Remote, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = there("show", "support-bot")
    assert (nothing.code, nothing.err.splitlines()[0]) == (3, "error: no adapter 'support-bot'")
    assert there("list", "--where", "step >").code == 2
    assert there("register", "nowhere").code == 3
    assert there("db", "upgrade").code == 2
    monkeypatch.setenv("CKPT_TOKEN", remote.reader)
    refused = there("token", "list")
    assert (refused.code, "takes the role admin" in refused.err) == (9, True)
    monkeypatch.setenv("CKPT_TOKEN", "")
    unknown = there("list")
    assert (unknown.code, "wants a token" in unknown.err, "ckpt login" in unknown.err) == (9, True, True)
    monkeypatch.setenv("CKPT_SERVER", "http://127.0.0.1:1")
    away = there("list")
    assert (away.code, "http://127.0.0.1:1" in away.err) == (9, True)


def test_the_doctor_looks_at_this_machine_and_at_the_server(
    there: Ckpt, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked() -> tuple[int, dict[str, dict[str, str]]]:
        found = there("doctor", "--json")
        return found.code, {each["name"]: each for each in found.json}

    code, names = looked()
    assert (code, names["server"]["found"]) == (0, f"{remote.url} (CKPT_SERVER)")
    assert names["home"]["found"] != names["server: home"]["found"]
    assert names["server: database"]["verdict"] == "ok"
    monkeypatch.setenv("CKPT_TOKEN", remote.reader)
    code, names = looked()
    assert (code, names["server: rights"]["verdict"]) == (0, "warning")
    monkeypatch.setenv("CKPT_TOKEN", "mistyped")
    code, names = looked()
    assert (code, names["server: connection"]["verdict"]) == (5, "problem")
    assert "ckpt login" in names["server: connection"]["advice"]


def test_login_keeps_a_token_and_logout_forgets_it(
    ckpt: Ckpt, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text('# mine\nuser = "ada"\nserver = "http://old"\n')
    wrong = ckpt("login", remote.url, "--token", "ckpt_r_odd")
    assert (wrong.code, (home / "credentials.json").exists()) == (9, False)
    said = ckpt("login", f"{remote.url}/", "--token", remote.reader)
    assert said.out == f"logged in at {remote.url} as reader, reader\n"
    assert stat.S_IMODE((home / "credentials.json").stat().st_mode) == 0o600
    assert (home / "config.toml").read_text() == f'# mine\nuser = "ada"\nserver = "{remote.url}"\n'
    assert ckpt("base", "list", "--json").json == []
    assert ckpt("token", "list").code == 9
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{remote.admin}\n"))
    assert ckpt("login", remote.url).out.endswith("as admin, admin\n")
    assert ckpt("token", "list", "--json").json
    assert ckpt("logout").out == f"logged out of {remote.url}\n"
    assert json.loads((home / "credentials.json").read_text()) == {}
    assert (home / "config.toml").read_text() == '# mine\nuser = "ada"\n'
    assert ckpt("logout").err == "not logged in anywhere\n"
    assert ckpt("login", remote.url, "--token", "ü").code == 2
    assert ckpt("login", remote.url).code == 2  # nothing to read any more
