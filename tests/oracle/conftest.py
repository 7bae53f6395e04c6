"""Tiny base models on disk, made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The Hub's client reads these when it is imported, which is before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from models import make_model
from transformers.utils import logging as transformers_logging

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
