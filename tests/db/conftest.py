"""A database for each test, SQLite's and PostgreSQL's in turn, and the base model that checkpoints refer to."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from registry.db.catalog import Catalog
from registry.db.schema import open_engine, prepare, writing
from registry.manifest import BaseFile, BaseFormat, BaseModel, Fingerprint
from registry.tensors import DType, StoredTensor, TensorSpec

sys.path.insert(0, str(Path(__file__).parents[1]))
from factories import NOON, digest

BaseMaker = Callable[..., BaseModel]


def _base(name: str = "meta/base", weights: str = "base", **changes: Any) -> BaseModel:
    tensor = StoredTensor(TensorSpec("lm_head.weight", DType.BF16, (8, 4)), "model.safetensors", 96)
    defaults: dict[str, Any] = {
        "url": "/models/base",
        "in_store": False,
        "format": BaseFormat.SAFETENSORS,
        "fingerprint": Fingerprint(
            architecture=digest("architecture"), weights=digest(weights), tensors={"lm_head.weight": digest("head")}
        ),
        "arch_version": "",
        "config": {"model_type": "llama", "limit": [0.0, float("inf")]},
        "files": (BaseFile(path="model.safetensors", size_bytes=160, identity="1:2:160:3"),),
        "tensors": (tensor,),
        "created_at": NOON,
        "author": "ada",
    }
    return BaseModel(name=name, **{**defaults, **changes})


@pytest.fixture
def base() -> BaseMaker:
    return _base


@pytest.fixture(scope="session")
def make_base() -> BaseMaker:
    """The same, for fixtures that last longer than a test."""
    return _base


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    engine = prepare(f"sqlite:///{folder / 'ckpt.db'}", folder / "backups")
    with writing(engine) as session:
        Catalog(session).bases.add(_base())
    engine.dispose()
    return folder / "ckpt.db"


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    """An up-to-date database with the base model `meta/base`."""
    return Path(shutil.copy(template, tmp_path / "ckpt.db"))


@pytest.fixture
def sqlite(database: Path) -> Iterator[Engine]:
    """SQLite, for what is its own."""
    engine = open_engine(f"sqlite:///{database}")
    yield engine
    engine.dispose()


@pytest.fixture
def postgresql(postgres_url: str) -> Iterator[Engine]:
    """PostgreSQL, for what is its own."""
    engine = open_engine(postgres_url)
    with writing(engine) as session:
        Catalog(session).bases.add(_base())
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Either, for what they have in common: a database with the base model `meta/base`."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


@pytest.fixture
def url(engine: Engine) -> str:
    """The engine's."""
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture
def catalog(engine: Engine) -> Iterator[Catalog]:
    with writing(engine) as session:
        yield Catalog(session)
