"""A team's day, from nothing: the services of the compose file, and one user at another machine with a URL and a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose
import httpx
import numpy as np
import pytest
import tiny
from compose import Stack, eventually
from safetensors.numpy import load_file, save_file
from throttle import asks_from, nothing

from registry.access import new_secret
from registry.teamwork import Role

pytestmark = pytest.mark.xdist_group("team")  # one set of services for all

SHARDS, ROWS = 4, 5 << 16  # of 20 MiB each, which S3 takes in two parts


class User:
    """Somebody with the command line, a URL and a token, and nothing else."""

    def __init__(self, stack: Stack, folder: Path, token: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CKPT_", "AWS_"))}
        place = {"CKPT_SERVER": f"http://127.0.0.1:{stack.port}", "CKPT_TOKEN": token}
        self.environment = {**kept, **place, "CKPT_HOME": str(folder / "home"), "PYTHONPATH": str(compose.ROOT)}
        self.folder = folder

    def ckpt(self, *words: str, code: int = 0) -> str:
        """What a command printed."""
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def json(self, *words: str) -> Any:
        """What a command printed for programs."""
        return json.loads(self.ckpt(*words, "--json"))


@pytest.fixture(scope="module")
def user(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    made = stack.run("server", "token", "create", "ada", "--role", "admin", "--json")
    assert made.returncode == 0, made.stderr
    return User(stack, tmp_path_factory.mktemp("laptop"), json.loads(made.stdout)["secret"])


@pytest.fixture(scope="module")
def big_base(user: User) -> Path:
    """A model of 80 MiB in four files: one large matrix in each, beside the tiny ones that adapters change."""
    folder = tiny.write_base(user.folder / "big", shards=SHARDS)
    random = np.random.default_rng(0)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        name = f"extra.{number}.weight"
        save_file({**load_file(path), name: random.random((ROWS, tiny.WIDTH), np.float32)}, path, {"format": "pt"})
        index["weight_map"][name] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def registered(user: User, big_base: Path) -> User:
    """The base in the store, a run on it registered over HTTP."""
    user.ckpt("base", "add", str(big_base), "--name", "big", "--copy")
    tiny.write_run(user.folder / "support-bot", base=big_base)
    assert len(user.json("register", "support-bot", "--base", "big")) == 4
    return user


def test_the_services_are_healthy(stack: Stack) -> None:
    for name in ("server", "worker-1", "worker-2"):
        assert eventually(lambda name=name: stack.is_healthy(name)), stack.log(name)  # type: ignore[misc]
    assert eventually(lambda: stack.is_healthy("s3"))


def test_a_merge_goes_on_when_a_worker_is_killed_and_the_model_is_the_same_to_the_byte(
    stack: Stack, registered: User
) -> None:
    assert eventually(lambda: stack.is_healthy("worker-1") and stack.is_healthy("worker-2"))
    stack.way_to_s3.holds = asks_from(16 << 20)
    job = registered.json("merge", "support-bot@v1", "--detach")
    assert eventually(lambda: len(_working(registered, job["id"])) == 2)
    assert stack.stop("worker-1", signal.SIGKILL) == -signal.SIGKILL
    stack.way_to_s3.holds = nothing
    assert eventually(lambda: registered.json("jobs", "show", str(job["id"]))["state"] == "succeeded"), stack.log(
        "worker-2"
    )
    stack.start("worker-1")
    here = registered.folder / "here"
    _merge_alone(registered, here)
    merged = registered.json("jobs", "show", str(job["id"]))["result"]["merged"]
    registered.ckpt("pull", merged["digest"].removeprefix("blake3:"), str(registered.folder / "pulled"))
    assert _contents(registered.folder / "pulled") == _contents(here)


def _working(user: User, job: int) -> set[str]:
    """The workers that are in the middle of a file."""
    shards = user.json("jobs", "show", str(job))["shards"]
    return {shard["worker"] for shard in shards if shard["state"] == "running" and shard["done_bytes"]}


def _merge_alone(user: User, out: Path) -> None:
    """The same merge in an embedded registry on this machine."""
    own = {**user.environment, "CKPT_HOME": str(user.folder / "alone")}
    for name in ("CKPT_SERVER", "CKPT_TOKEN"):
        own.pop(name)
    for words in (("register", "support-bot", "--base", "big"), ("merge", "support-bot@v1", "--out", str(out))):
        subprocess.run([sys.executable, "-m", "cli", *words], env=own, cwd=user.folder, check=True, capture_output=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ship_and_pull_what_is_live(registered: User) -> None:
    registered.ckpt("ship", "support-bot@best:eval_loss", "--to", "production", "--note", "first")
    (live,) = registered.json("shipped")
    assert live["checkpoint"] == "support-bot@v3"
    assert live["author"] == "ada"
    registered.ckpt("pull", "support-bot@production", "live")
    assert (registered.folder / "live/adapter_model.safetensors").read_bytes() == (
        registered.folder / "support-bot/checkpoint-100/adapter_model.safetensors"
    ).read_bytes()
    shutil.rmtree(registered.folder / "live")


def test_a_reader_may_look_and_no_more(stack: Stack, registered: User) -> None:
    secret = registered.json("token", "create", "eve", "--role", "reader")["secret"]
    eve = User(stack, registered.folder, secret)
    assert len(eve.json("list")) == 4
    eve.ckpt("note", "support-bot", "hello", code=9)
    registered.ckpt("token", "revoke", "eve")
    assert eventually(lambda: _is_refused(eve))  # a token that was good is trusted for a second


def _is_refused(user: User) -> bool:
    command = [sys.executable, "-m", "cli", "list"]
    return (
        subprocess.run(command, env=user.environment, cwd=user.folder, capture_output=True, check=False).returncode == 9
    )


def test_wrong_tokens_are_counted_for_each_caller_behind_the_proxy(stack: Stack) -> None:
    def guess(caller: str) -> int:
        headers = {"Authorization": f"Bearer {new_secret(Role.ADMIN)}", "X-Forwarded-For": caller}
        return httpx.get(f"http://127.0.0.1:{stack.port}/api/v1/me", headers=headers).status_code

    assert [guess("203.0.113.9") for _ in range(11)][-1] == 429
    assert guess("203.0.113.10") == 401


def test_everything_is_in_order_afterwards(stack: Stack, registered: User) -> None:
    for words in (("verify", "--read-data"), ("audit", "verify"), ("doctor",)):
        registered.ckpt(*words)
    assert "secret" not in stack.log("server")


def test_a_worker_that_is_asked_to_stop_stops(stack: Stack) -> None:
    # One that only starts just ends.
    assert eventually(lambda: " started: " in stack.log("worker-2")), stack.log("worker-2")
    assert stack.stop("worker-2") == 0
    stack.start("worker-2")
