"""Whatever a page offers to copy can be run: commands are those of the command line, and Python is Python."""

from __future__ import annotations

import html
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from typer.testing import CliRunner
from visiting import Site

from cli.app import make_app

PAGES = (
    "/",
    "/checkpoints",
    "/checkpoints/support-bot@v9",
    "/checkpoints/support-mix",
    "/checkpoints/vision/caption@v2",
    "/adapters/support-bot",
    "/adapters/support-mix",
    "/compare",
    "/bases",
    "/bases/tiny-llama",
    "/jobs",
    "/shipped",
    "/audit",
    "/tokens",
)


def offered(page: str) -> list[str]:
    """What is to be copied from a page, and what is set as code within its sentences."""
    copied = [html.unescape(text) for text in re.findall(r'data-copy="([^"]*)"', page)]
    return [*copied, *(html.unescape(text) for text in re.findall(r"<code>(ckpt [^<]*)</code>", page))]


def commands(texts: list[str]) -> Iterator[list[str]]:
    for line in "\n".join(texts).splitlines():
        if line.startswith("ckpt "):
            yield shlex.split(line)[1:]


def fault(words: list[str]) -> str:
    """What the command line has against a command, from its help: no such command, or no such option."""
    asked = CliRunner().invoke(make_app(words[0]), [*words, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
    unknown = [word for word in words if word.startswith("--") and f"{word} " not in asked.output]
    return asked.output if asked.exit_code else ", ".join(unknown)


def test_every_command_on_a_page_is_one(site: Site) -> None:
    merged = f"/merged/{site.direct.merged()[0].digest.hex}"
    client = site.visitor("admin")
    found = {}
    for path in (*PAGES, merged):
        for words in commands(offered(client.get(path).text)):
            found[shlex.join(words)] = path
    assert len(found) > 20
    assert {(path, command): why for command, path in found.items() if (why := fault(shlex.split(command)))} == {}


def test_whoever_starts_is_told_commands_that_are_there(empty_site: Site) -> None:
    client = empty_site.visitor("")
    paths = ("/", "/checkpoints", "/bases", "/shipped", "/jobs", "/compare", "/merge", "/tokens")
    found = [words for path in paths for words in commands(offered(client.get(path).text))]
    assert len(found) > 6
    assert [why for words in found if (why := fault(words))] == []


def test_python_on_a_page_compiles(site: Site) -> None:
    client = site.visitor("reader")
    code = [
        text
        for path in ("/checkpoints/support-bot@v9", "/bases/tiny-llama")
        for text in offered(client.get(path).text)
        if re.match(r"import |from |model = ", text)
    ]
    assert len(code) >= 3
    for text in code:
        compile(text, "page", "exec")


def test_curl_fetches_what_it_says(site: Site, tmp_path: Path) -> None:
    page = site.visitor("reader").get("/checkpoints/support-bot@v9").text
    script = next(text for text in offered(page) if text.startswith("curl "))
    folder = tmp_path / "fetched"
    folder.mkdir()
    environment = {**os.environ, "CKPT_TOKEN": site.secrets["reader"]}
    subprocess.run(["sh", "-ec", script], cwd=folder, env=environment, check=True, capture_output=True, timeout=60)
    (file,) = folder.iterdir()
    found = site.direct.resolve("support-bot@v9").manifest
    entry = next(each for each in found.files if each.path == found.weights_file)
    assert (file.name, blake3(file.read_bytes()).hexdigest()) == ("adapter_model.safetensors", entry.digest.hex)


@pytest.mark.parametrize(("role", "words"), [("reader", ()), ("writer", ("sign",)), ("shipper", ("sign", "ship"))])
def test_nobody_is_offered_what_they_may_not(site: Site, role: str, words: tuple[str, ...]) -> None:
    page = site.visitor(role).get("/checkpoints/support-bot@v9").text
    found = {command[0] for command in commands(offered(page))}
    assert found & {"sign", "ship"} == set(words)
