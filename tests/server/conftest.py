"""A real server on a loopback port, in this process, and clients with tokens."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Server, serving, settings_of

from registry.server.boundary import JsonLines
from registry.service import Registry
from registry.teamwork import Role


@pytest.fixture(scope="session")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A registry to be copied, and the tokens in it: one for each role, by its name; `nlu` and `vision` are writers of a namespace."""
    home = tmp_path_factory.mktemp("template") / "home"
    with Registry(settings_of(home)) as registry:
        secrets = {role.value: registry.create_token(role.value, role).secret for role in Role}
        for namespace in ("nlu", "vision"):
            secrets[namespace] = registry.create_token(namespace, Role.WRITER, [namespace]).secret
    return home, secrets


@pytest.fixture
def server(tmp_path: Path, with_tokens: tuple[Path, dict[str, str]]) -> Iterator[Server]:
    template, secrets = with_tokens
    shutil.copytree(template, tmp_path / "home")
    with serving(settings_of(tmp_path / "home")) as running:
        running.secrets |= secrets
        yield running


@pytest.fixture
def bot(server: Server, adapter: Path, base: Path) -> str:
    """A checkpoint on the server, as it is asked for; its base model is called llama."""
    server.direct.add_base(str(base), name="llama")
    return server.direct.register(str(adapter)).registered[0].checkpoint.ref


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is written to the log, as it is written."""
    found: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(JsonLines().format(record))

    logger, handler = logging.getLogger("ckpt"), Keeping()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)
