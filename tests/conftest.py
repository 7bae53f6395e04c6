"""What most tests of the library start from: an empty registry, a tiny base model, and an adapter that fits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from merging import Bench

from registry.service import Registry


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[Registry]:
    with tiny.open_registry(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """LoRA of rank 4 on query and value of both layers."""
    return tiny.write_adapter(tmp_path / "bot", base=base)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
