"""What is loaded when, what is shipped, and that the drawn tree of errors is the real one."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

from registry import errors

ROOT = Path(__file__).parents[1]


def loaded(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after some code."""
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_is_light() -> None:
    heavy = {"torch", "sqlalchemy", "alembic", "fsspec", "numpy", "safetensors", "yaml"}
    assert not loaded("import registry; registry.Settings.from_environment({})") & heavy


def test_the_service_waits_for_torch_numpy_alembic_and_fsspec() -> None:
    modules = loaded("import registry.service")
    assert "sqlalchemy" in modules
    assert not modules & {"torch", "numpy", "alembic", "fsspec", "safetensors"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A registry with one checkpoint, `bot`."""
    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.register(str(tiny.write_adapter(tmp_path / "bot", base=tiny.write_base(tmp_path / "base"))))
    return tmp_path / "home"


OPEN = "import registry, sys; ckpt = registry.connect(registry.Settings.from_environment({'CKPT_HOME': sys.argv[1]}))\n"


def test_listing_and_showing_need_neither_torch_nor_numpy_nor_a_migration(home: Path) -> None:
    modules = loaded(OPEN + "assert ckpt.details(ckpt.checkpoints()[0]).report", str(home))
    assert not modules & {"torch", "numpy", "alembic", "fsspec", "safetensors"}


def test_planning_a_merge_needs_no_torch(home: Path) -> None:
    assert "torch" not in loaded(OPEN + "assert ckpt.plan(ckpt.resolve('bot')).plan.bytes_computed", str(home))


def test_the_wheel_holds_the_packages_and_the_migrations(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"registry", "cli"}
    migrations = {str(path.relative_to(ROOT / "migrations")) for path in (ROOT / "migrations").rglob("*.py")}
    assert {f"registry/_migrations/{name}" for name in migrations} <= set(names)
    pages = ROOT / "registry/server/pages"
    drawn = {str(path.relative_to(ROOT)) for kind in ("templates", "static") for path in (pages / kind).rglob("*.*")}
    assert {"registry/py.typed", *drawn} <= set(names)


def kinds_of_errors() -> list[type[errors.RegistryError]]:
    return [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.RegistryError)]


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    parents: list[str] = []
    drawn: dict[str, str] = {}
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"\s*([│├└─ ]*)((?:[A-Z]\w+)(?:, [A-Z]\w+)*)(?:  .*)?", line):
            depth = len(match[1]) // 4
            for name in match[2].split(", "):
                drawn[name] = parents[depth - 1] if depth else "Exception"
            parents[depth:] = [match[2].split(", ")[-1]]
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in kinds_of_errors()}


def test_every_error_has_a_code_of_its_own() -> None:
    kinds = kinds_of_errors()
    assert len({kind.code for kind in kinds}) == len(kinds)
