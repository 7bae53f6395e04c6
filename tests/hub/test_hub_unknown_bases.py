"""An adapter that was trained on a copy of one's own names that copy's path: what can be said of it instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hub_clients import CLIENTS, Client
from running import serving, settings_of

from registry.teamwork import Role


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_path_of_the_clients_machine_is_answered_with_the_names_that_would_do(kind: str, tmp_path: Path) -> None:
    with serving(settings_of(tmp_path / "home")) as server:
        base = tiny.write_base(tmp_path / "copy")
        server.add_token("writer", Role.WRITER)
        place = tiny.write_adapter(tmp_path / "adapter", base=base)
        client = Client(kind, server.url, server.secrets["writer"], tmp_path / "hf")
        none = client.run("hf", "upload", "bot", str(place))
        assert none.returncode
        assert f"`ckpt base add PATH --name {base}` records it" in none.stderr
        server.direct.add_base(str(base), name="tiny-llama")
        refused = client.run("hf", "upload", "bot", str(place))
        assert refused.returncode
        assert "adapter_config.json may name tiny-llama instead" in refused.stderr
        tiny.write_adapter(place, base="tiny-llama")
        assert client.run("hf", "upload", "bot", str(place)).returncode == 0
        assert server.direct.resolve("bot").ref == "bot@v1"
