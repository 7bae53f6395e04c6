"""The whole team set-up of `docker-compose.yml`, once for all of these tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import compose


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[compose.Stack]:
    with compose.running(tmp_path_factory.mktemp("team")) as found:
        yield found
