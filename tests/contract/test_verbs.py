"""One list of verbs: the remote registry has them all, called the same way, and this suite uses every one."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from registry.client import RemoteRegistry
from registry.service import Registry

HERE = Path(__file__).parent


def verbs(kind: type) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(found)
        for name, found in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") or name in ("__enter__", "__exit__")
    }


def called(signature: inspect.Signature) -> list[tuple[str, object, object]]:
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def test_both_have_the_same_verbs_with_the_same_parameters() -> None:
    here, there = verbs(Registry), verbs(RemoteRegistry)
    assert there.keys() == here.keys()
    assert {name: called(there[name]) for name in there} == {name: called(here[name]) for name in here}


def test_both_give_the_same() -> None:
    """But for what stands for a plan, and what can only fail from afar."""
    here, there = verbs(Registry), verbs(RemoteRegistry)
    odd = {name for name in here if here[name].return_annotation != there[name].return_annotation}
    assert odd == {"plan", "signed_by", "__enter__"}


def test_every_verb_is_in_the_suite() -> None:
    text = "".join(path.read_text() for path in HERE.glob("*.py"))
    used = set(re.findall(r"\.(\w+)\b", text))
    assert {name for name in verbs(Registry) if not name.startswith("_")} <= used


def test_the_remote_registry_loads_neither_torch_nor_the_database_nor_the_server() -> None:
    code = "import registry.client, registry.client_intake, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "httpx" in loaded
    assert not loaded & {"torch", "sqlalchemy", "alembic", "fastapi", "starlette", "uvicorn", "numpy", "fsspec"}
