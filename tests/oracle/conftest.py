"""Tiny base models on disk, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The Hub's client reads these when it is imported, which is before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import tiny
import torch
import trained
from models import make_model
from transformers.utils import logging as transformers_logging

from registry.registering import Registration
from registry.service import Registry

transformers_logging.disable_progress_bar()

BaseMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseMaker:
    """Makes a model directory as `save_pretrained` writes it; the same one for the same arguments. It must not be changed."""
    made: dict[str, Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
        key = f"{family}-{dtype}-{shard}-{changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base") / family
            make_model(family, dtype, **changes).save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a LoRA trained on it: `base` and `bot` in a folder."""
    folder = tmp_path_factory.mktemp("trained")
    trained.train(folder / "bot", trained.write_model(folder / "base"))
    return folder


@pytest.fixture
def registered(runs: Path, tmp_path: Path) -> Iterator[Registry]:
    """A registry that knows them."""
    with tiny.open_registry(tmp_path / "home") as ckpt:
        ckpt.add_base(str(runs / "base"), name="base")
        ckpt.register(str(runs / "bot"), Registration(adapter="bot", base="base"))
        yield ckpt
