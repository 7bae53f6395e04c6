"""Run the server in a thread, and talk to it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from blake3 import blake3

from registry import connect
from registry.server.app import Listening, create_app
from registry.server.app import serving as run_by
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role


@dataclass
class Server:
    """A running server. `direct` is its registry without HTTP; `secrets` are tokens by name."""

    url: str
    home: Path
    direct: Registry
    app: Any
    secrets: dict[str, str] = field(default_factory=dict)
    clients: list[httpx.Client] = field(default_factory=list)

    def add_token(self, name: str, role: Role, namespaces: Sequence[str] = ()) -> str:
        self.secrets[name] = self.direct.create_token(name, role, namespaces).secret
        return self.secrets[name]

    def client(self, name: str = "", **headers: str) -> httpx.Client:
        """A client with a token, by its name; without one for an empty name."""
        if name:
            headers["Authorization"] = f"Bearer {self.secrets[name]}"
        made = httpx.Client(base_url=f"{self.url}/api/v1", headers=headers, timeout=30)
        self.clients.append(made)
        return made


@contextmanager
def serving(settings: Settings, listening: Listening | None = None) -> Iterator[Server]:
    app = create_app(settings, listening)
    # With the protocol named, asyncio turns off the delay of small packets, as it does for addresses of its own.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    running = run_by(app, "127.0.0.1", 0)
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    with connect(settings) as direct:
        assert isinstance(direct, Registry)
        found = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", settings.home, direct, app)
        try:
            yield found
        finally:
            for client in found.clients:
                client.close()
            running.should_exit = True
            thread.join(120)
            listener.close()


def send_files(client: httpx.Client, folder: Path, *paths: str) -> list[dict[str, Any]]:
    """Send files as a client does; gives their entries."""
    entries = []
    for path in paths:
        data = (folder / path).read_bytes()
        digest = blake3(data).hexdigest()
        assert client.put(f"/blobs/{digest}", content=data).status_code == 200
        entries.append({"path": path, "size_bytes": len(data), "digest": digest})
    return entries


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def send_checkpoint(client: httpx.Client, folder: Path, *, base: str, adapter: str, **said: Any) -> httpx.Response:
    """Send an adapter's files and register them."""
    entries = send_files(client, folder, *ADAPTER_FILES)
    body = {"files": entries, "said": {"base": base, "adapter": adapter, **said}, "found": {"step": 5}}
    return client.post("/checkpoints", json=body)


def error(answer: httpx.Response) -> str:
    """The code of the error that an answer is; checks its shape."""
    found = answer.json()["error"]
    assert set(found) == {"code", "message", "hint", "fields", "request_id"}
    assert found["request_id"] == answer.headers["X-Request-Id"]
    code: str = found["code"]
    return code


def settings_of(home: Path, **environment: str) -> Settings:
    return Settings.from_environment({"CKPT_HOME": str(home), "CKPT_USER": "owner", **environment})
