"""What most tests of the library start from: an empty registry, a tiny base model, and an adapter that fits it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hypothesis import settings
from merging import Bench

from registry.service import Registry

# How long an example takes is the machine's affair. Where a change is judged, everybody must get the same examples; elsewhere, new ones.
settings.register_profile("ckpt", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ckpt")


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
