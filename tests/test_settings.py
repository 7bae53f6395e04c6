"""Settings: the environment first, then the file in the home, then defaults inside the home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from registry.errors import InvalidSetting
from registry.locations import local_folder
from registry.settings import Settings


def settings(home: Path, **variables: str) -> Settings:
    return Settings.from_environment({"CKPT_HOME": str(home), **variables})


def test_everything_lies_in_the_home_unless_told_otherwise(tmp_path: Path) -> None:
    home = tmp_path / "my home #1%20?"
    found = settings(home, CKPT_USER="ada")
    assert found.home == home
    assert make_url(found.database_url).database == str(home / "ckpt.db")
    assert local_folder(found.store_url) == home / "store"
    assert found.author == "ada"


def test_reading_settings_creates_nothing(tmp_path: Path) -> None:
    settings(tmp_path / "home")
    assert not list(tmp_path.iterdir())


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('store = "s3://file"\nuser = "file"\n')
    found = settings(tmp_path, CKPT_STORE="s3://environment", CKPT_DATABASE_URL="")
    assert (found.store_url, found.author) == ("s3://environment", "file")
    assert found.database_url.startswith("sqlite:///")


@pytest.mark.parametrize("text", ["stoer = 's3://x'", "store = 5", "store = ", "[store]\nurl = 'x'"])
def test_a_file_that_says_something_unknown_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(InvalidSetting, match=r"config\.toml"):
        settings(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidSetting):
        settings(tmp_path)


@pytest.mark.parametrize("home", ["~", "relative", "~nobody-by-this-name/x"])
def test_a_home_is_always_absolute(home: str) -> None:
    assert Settings.from_environment({"CKPT_HOME": home}).home.is_absolute()


def test_memory_for_computed_blocks(tmp_path: Path) -> None:
    assert settings(tmp_path).cache_bytes == 256 << 20
    (tmp_path / "config.toml").write_text('cache_bytes = "5"\n')
    assert settings(tmp_path).cache_bytes == 5
    assert settings(tmp_path, CKPT_CACHE_BYTES="0").cache_bytes == 0


@pytest.mark.parametrize("text", ["256M", "-1", "1.5", "\u0663"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSetting):
        settings(tmp_path, CKPT_CACHE_BYTES=text)


@pytest.mark.parametrize("store", ["s3://", "s3:///", "s3a:///"])
def test_a_store_on_s3_has_a_bucket(tmp_path: Path, store: str) -> None:
    with pytest.raises(InvalidSetting, match="expected a bucket"):
        settings(tmp_path, CKPT_STORE=store)
    assert settings(tmp_path, CKPT_STORE="s3://bucket/team").store_url == "s3://bucket/team"


def test_somebody_is_asking_even_without_a_name(tmp_path: Path) -> None:
    assert settings(tmp_path).author


@pytest.mark.parametrize(
    "variables",
    [{}, {"HF_HOME": "/data/hf"}, {"HF_HUB_CACHE": "~/hub"}, {"XDG_CACHE_HOME": "/data/cache"}, {"HF_HOME": "/a", "HF_HUB_CACHE": "/b"}],
)  # fmt: skip
def test_the_cache_of_the_hub_is_where_its_client_has_it(variables: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "HUGG"))}
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, check=True)
    assert str(Settings.from_environment(variables).hub_cache) == theirs.stdout.decode().strip()
