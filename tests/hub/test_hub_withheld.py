"""Repositories that cannot be given although their checkpoint is there: clients say why, instead of blaming the connection."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_clients import CLIENTS, Client
from running import Server, serving, settings_of

from registry.registering import Registration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`soft` cannot be merged, of `lost` the base model's folder is gone."""
    folder = tmp_path_factory.mktemp("withheld")
    with serving(settings_of(folder / "home")) as server:
        for number, (name, method) in enumerate({"soft": "POLY", "lost": "LORA"}.items()):
            base = tiny.write_base(folder / f"{name}-llama", seed=number)
            server.direct.add_base(str(base), name=f"{name}-llama")
            place = tiny.write_adapter(folder / name, base=base, seed=number, config={"peft_type": method})
            server.direct.register(str(place), Registration(adapter=name))
        shutil.rmtree(folder / "lost-llama")
        yield server


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_client_says_why(server: Server, kind: str, tmp_path: Path) -> None:
    told = Client(kind, server.url, "", tmp_path / "hf").does("""
told = {name: [
    failed(api.model_info, f"{name}-merged"),
    failed(hf_hub_download, f"{name}-merged", "model.safetensors"),
    failed(snapshot_download, f"{name}-v1-merged"),
    [api.repo_exists(f"{name}-merged"), api.repo_exists(name)],
] for name in ("soft", "lost")}
""")
    for name, why in (("soft", "mixes its skills by the task of each input"), ("lost", "lost-llama lies at")):
        *errors, exist = told[name]
        for error, text in errors:
            assert error == "RepositoryNotFoundError", text
            assert why in text
        assert exist == [False, True]
