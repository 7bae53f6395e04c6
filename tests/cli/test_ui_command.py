"""`ckpt ui`: the pages without a set-up, for whoever started it and nobody else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import servers
from commands import interruptible
from waiting import until

ROOT = Path(__file__).parents[2]


@dataclass
class Ui:
    process: subprocess.Popen[str]
    url: str
    home: Path
    log: Path

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("CKPT_")}
    return {**kept, "CKPT_HOME": str(home), "CKPT_USER": "ada", **more}


@contextmanager
def running(home: Path, log: Path, *words: str, **more: str) -> Iterator[Ui]:
    """`ckpt ui` in a process of its own, once it has told its address."""
    with log.open("w") as output:
        process = subprocess.Popen(
            interruptible("ui", *words),
            env=environment(home, **more), cwd=ROOT, stdout=output, stderr=output, text=True,
        )  # fmt: skip
    try:
        until(lambda: address(log) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield Ui(process, address(log), home, log)
    finally:
        process.kill()
        process.wait()


def address(log: Path) -> str:
    """What was told, empty until it was told to the end."""
    told = re.search(r"the registry is at (\S+)\n", log.read_text())
    return told[1] if told else ""


def browser(tmp_path: Path) -> tuple[str, Path]:
    """A browser that writes down what it is started with, and what it finds there."""
    seen, program = tmp_path / "seen", tmp_path / "browser"
    program.write_text(
        f'#!/bin/sh\necho "$1" > {seen}.part\ncat "${{1#file://}}" >> {seen}.part\nmv {seen}.part {seen}\n'
    )
    program.chmod(0o700)
    return f"{program} %s &", seen


def seen_by(seen: Path) -> list[str]:
    until(seen.exists)
    return seen.read_text().splitlines()


def test_one_browser_is_let_in_as_the_owner_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with running(tmp_path / "home", tmp_path / "log", "--no-browser") as ui:
        origin = ui.url.partition("/sign-in")[0]
        with httpx.Client(timeout=60) as owner, httpx.Client(timeout=60) as other:
            assert other.get(f"{origin}/jobs").headers["location"].startswith("/sign-in")
            assert other.get(f"{origin}/api/v1/checkpoints").status_code == 401
            assert owner.get(ui.url).headers["location"] == "/"
            page = owner.get(f"{origin}/jobs")
            assert page.status_code == 200
            assert "ada" in page.text
            other.get(ui.url)  # the key was used
            assert other.get(f"{origin}/jobs").status_code == 303
        assert ui.end() == 0
        assert ui.log.read_text().endswith("closed\n")
        assert "Traceback" not in ui.log.read_text()


def test_the_browser_is_led_in_by_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    started_with, seen = browser(tmp_path)
    (port,) = servers.free_ports(1)
    with running(tmp_path / "home", tmp_path / "log", "--port", str(port), BROWSER=started_with) as ui:
        address, page = seen_by(seen)
        assert ui.url.startswith(f"http://127.0.0.1:{port}/sign-in?key=")
        assert address.startswith("file://")  # the key cannot be read from the list of processes
        assert ui.url in page
        file = Path(address.removeprefix("file://"))
        assert file.stat().st_mode & 0o077 == 0
        assert ui.end() == 0
        assert not file.exists()


def run(home: Path, *words: str, code: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", code, *words] if code else ["-m", "cli", "ui", *words]
    return subprocess.run(
        [sys.executable, *program], env=environment(home, **more), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_server_that_is_set_has_pages_of_its_own(tmp_path: Path) -> None:
    started_with, seen = browser(tmp_path)
    found = run(tmp_path / "home", CKPT_SERVER="https://ckpt.example.org", BROWSER=started_with)
    assert found.returncode == 0
    assert "the registry is at https://ckpt.example.org" in found.stderr
    assert seen_by(seen)[0] == "https://ckpt.example.org"
    assert not (tmp_path / "home").exists()


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with servers.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = run(tmp_path / "home", "--port", str(port))
    assert found.returncode == 2
    assert f"port {port}: cannot listen there" in found.stderr


@pytest.mark.parametrize("package", ["jinja2", "fastapi"])
def test_without_the_server_extra_it_says_what_to_install(tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from cli.app import main; main(['ui'])"
    found = run(tmp_path / "home", code=code)
    assert found.returncode == 2
    assert f"this needs {package}, which is not installed" in found.stderr
    assert "pip install 'ckpt-registry[server]'" in found.stderr
