"""Visitors of a server's pages."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from running import Server

from registry.service import Registry


@dataclass
class Site:
    """A running server and those who visit it. `secrets` are tokens by name: one for each role, and `nlu`, a writer of that namespace."""

    server: Server
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def direct(self) -> Registry:
        return self.server.direct

    def visitor(self, name: str = "admin") -> httpx.Client:
        """A browser of sorts, signed in with a token by its name; of nobody for an empty name."""
        client = httpx.Client(base_url=self.url, timeout=30)
        self.server.clients.append(client)
        if name:
            answer = client.post("/sign-in", data={"token": self.secrets[name], "next": "/"})
            assert answer.status_code == 303, answer.text
        return client
