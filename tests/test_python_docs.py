"""The Python API's page tells the truth: its blocks run, prints show what is behind them, and the docstrings that it refers to are complete."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from commands import EXAMPLE

import registry
from registry import errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.M | re.S)
_PRINT = re.compile(r"^ *print\(.*\)  # (.*)$", flags=re.M)

PUBLIC = (
    "registry",
    "registry.service",
    "registry.evaluating",
    "registry.evaluation_data",
    "registry.evaluation_programs",
    "registry.inference",
    "registry.inference.conversation",
    "registry.integrations.transformers",
    "registry.integrations.lightning",
    "registry.intake",
    "registry.outbox",
    "registry.policies",
    "registry.reporting",
    "registry.result_files",
    "registry.resuming",
    "registry.retention",
    "registry.trying",
    "registry.watching",
)


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")  # a reader's interpreter shows what libraries deprecate, and goes on
def test_every_block_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_HOME", str(tmp_path / "home"))
    for name in ("CKPT_DATABASE_URL", "CKPT_STORE", "CKPT_SERVER", "CKPT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    known: dict[str, object] = {}
    for number, block in enumerate(_BLOCK.findall(PAGE.read_text()), 1):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(block, f"block {number} of {PAGE.name}", "exec", dont_inherit=True), known)
        expected = "".join(_shown(line) for line in _PRINT.findall(block))
        assert re.fullmatch(expected, shown.getvalue()), f"{block}\nprinted\n{shown.getvalue()}"


def _shown(line: str) -> str:
    """The pattern of what a print shows: three dots are anything, again and again."""
    return "(?:.+\n)+" if line == "…" else f"{re.escape(line)}\n"


def test_it_is_typed() -> None:
    """The test of the wheel sees that this goes along with the package."""
    assert (Path(registry.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_are_complete(name: str) -> None:
    """Each public thing has one; the arguments that it names are there, all of them or none; and what it raises exists."""
    problems = [problem for place, found in _public(import_module(name)) for problem in _problems(place, found)]
    assert not problems, "\n".join(problems)


def _public(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        yield f"{module.__name__}.{name}", found
        if inspect.isclass(found):
            for inner, member in vars(found).items():
                if not inner.startswith("_"):
                    plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    if inspect.isfunction(plain):
                        yield f"{module.__name__}.{name}.{inner}", plain


def _problems(place: str, found: object) -> Iterator[str]:
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        return
    text = inspect.getdoc(found) if found.__doc__ else None
    if not text:
        yield f"{place}: no docstring"
        return
    named = [name.strip() for row in _section(text, "Args") for name in row.split(",")]
    if named and (missing := set(named) ^ _parameters(found)):
        yield f"{place}: Args and parameters differ in {sorted(missing)}"
    for name in (name.strip() for row in _section(text, "Raises") for name in row.split(",")):
        if not hasattr(errors, name):
            yield f"{place}: raises {name}, which registry.errors has not"


def _section(text: str, title: str) -> list[str]:
    """What stands before the colons of a section's lines."""
    match = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, flags=re.M)
    return re.findall(r"^    ([A-Za-z_][\w, ]*):", match[1], flags=re.M) if match else []


def _parameters(found: object) -> set[str]:
    assert callable(found)
    return {
        name for name in inspect.signature(found).parameters if name not in ("self", "cls") and not name.startswith("_")
    }


def test_the_page_names_only_what_is_there() -> None:
    """Dotted names of the registry in the text lead somewhere."""
    text = _BLOCK.sub("", PAGE.read_text())
    for path in re.findall(r"`(registry(?:\.\w+)+)", text):
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path
    for block in _BLOCK.findall(PAGE.read_text()):
        ast.parse(block)
