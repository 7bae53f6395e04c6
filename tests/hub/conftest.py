"""A server whose registry has adapters of several namespaces, and the Hub's own clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_clients import CLIENTS, Client, add_large
from running import Server, serving, settings_of

from registry.manifest import Metric
from registry.registering import Registration
from registry.teamwork import Role


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that is only read from.

    `bot` has v1 to v3 of one run, the second in production and called candidate; `nlu/intent` and `vision/caption` have one each. All were
    trained on `tiny-llama`. `large` was trained on `large-llama`, whose file has 64 MB.
    Tokens: one for each role, and `nlu`, a writer of that namespace.
    """
    folder = tmp_path_factory.mktemp("hub")
    with serving(settings_of(folder / "home")) as server:
        base = tiny.write_base(folder / "tiny-llama", shards=2)
        server.direct.add_base(str(base), name="tiny-llama", copy=True)
        for number, step in enumerate((10, 20, 30), 1):
            said = Registration(
                adapter="bot", run="first", step=step, metrics=(Metric(name="eval_loss", value=1 / number, step=step),)
            )
            place = tiny.write_adapter(folder / f"bot-{step}", base=base, seed=number)
            (place / "README.md").write_text(f"# Bot {number}\n")
            checkpoint = server.direct.register(str(place), said).registered[0].checkpoint
            if number == 2:
                server.direct.set_alias(checkpoint, "candidate")
                server.direct.ship(checkpoint, "production", "first")
                server.direct.note(checkpoint, "The best so far.\nReally.")
        for number, name in enumerate(("nlu/intent", "vision/caption"), 7):
            place = tiny.write_adapter(folder / name, base=base, seed=number)
            server.direct.register(str(place), Registration(adapter=name))
        add_large(server.direct, folder, "large")
        for role in Role:
            server.add_token(role.value, role)
        server.add_token("nlu", Role.WRITER, ["nlu"])
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, filled: Server, tmp_path: Path) -> Client:
    """Each of the clients, as a reader."""
    return Client(request.param, filled.url, filled.secrets["reader"], tmp_path / "hf")
