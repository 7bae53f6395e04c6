"""Verifying: what is lost or damaged is named with what needs it, and nothing is touched. The doctor: what is wrong, and what to do."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import tiny

from registry import connect
from registry.caring import StoreCheck
from registry.diagnosing import Diagnosis, Verdict, diagnose_here, with_server
from registry.errors import InvalidInput
from registry.manifest import Checkpoint
from registry.refs import Digest
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings

ANYWHERE = ["embedded", pytest.param("team", marks=pytest.mark.xdist_group("servers"))]


@pytest.fixture(params=ANYWHERE)
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """On SQLite and disk, and on PostgreSQL and S3."""
    environment = {"CKPT_HOME": str(tmp_path / "home"), "CKPT_USER": "ada"}
    if request.param == "team":
        store = request.getfixturevalue("s3_url") + "/store"
        environment |= {"CKPT_DATABASE_URL": request.getfixturevalue("postgres_url"), "CKPT_STORE": store}
    with connect(Settings.from_environment(environment)) as opened:
        yield opened


@pytest.fixture
def bot(ckpt: Registry, adapter: Path) -> Checkpoint:
    return ckpt.register(str(adapter)).registered[0].checkpoint


def weights(checkpoint: Checkpoint) -> Digest:
    name = checkpoint.manifest.weights_file
    return next(entry.digest for entry in checkpoint.manifest.files if entry.path == name)


def blob_path(ckpt: Registry, digest: Digest) -> Path:
    path = ckpt.workspace.store.local_path(digest)
    assert path is not None
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def found(check: StoreCheck) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(damage.what, damage.found, damage.needed_by) for damage in check.damages]


# -- verify


def test_what_is_whole_is_sound(anywhere: Registry, base: Path, adapter: Path) -> None:
    anywhere.add_base(str(base), name="llama", copy=True)
    bot = anywhere.register(str(adapter), Registration(base="llama")).registered[0].checkpoint
    blobs = len({entry.digest for entry in bot.manifest.files}) + len(list(base.iterdir()))
    for read_data in (False, True):
        check = anywhere.verify(read_data=read_data)
        assert check.is_sound
        assert check.objects == blobs
    assert check.read_bytes == sum(size for _, size in anywhere.workspace.store.blobs())


def test_a_missing_blob_is_named_with_everything_that_needs_it(anywhere: Registry, base: Path, adapter: Path) -> None:
    said = Registration(base=str(base))
    bot = anywhere.register(str(adapter), said).registered[0].checkpoint
    anywhere.register(str(adapter), replace(said, adapter="team/other"))
    lost = weights(bot)
    anywhere.workspace.store.delete(lost)
    for read_data in (False, True):
        check = anywhere.verify(read_data=read_data)
        assert found(check) == [(f"blob {lost.hex}", "missing", ("bot@v1", "team/other@v1"))]
    history = anywhere.history()
    assert anywhere.verify() == anywhere.verify()
    assert anywhere.history() == history


def test_a_blob_of_another_size_is_found_without_reading_and_another_byte_by_reading(
    ckpt: Registry, bot: Checkpoint
) -> None:
    path = blob_path(ckpt, weights(bot))
    flip(path)
    assert ckpt.verify().is_sound
    (damage,) = ckpt.verify(read_data=True).damages
    assert damage.expected == str(weights(bot))
    assert damage.found.startswith("blake3:")
    path.write_bytes(b"short")
    (damage,) = ckpt.verify().damages
    assert damage.found == "5 bytes"
    assert path.read_bytes() == b"short"


def test_a_merged_model_and_a_base_that_the_store_lost(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    ckpt.add_base(str(base), copy=True)
    merged = ckpt.merge(ckpt.plan(bot)).merged
    entries = {entry.path: entry for entry in merged.files}
    for digest in (entries["model.safetensors"].digest, entries["config.json"].digest):
        blob_path(ckpt, digest).unlink()
    needs = {damage.what: damage.needed_by for damage in ckpt.verify().damages}
    model = f"merged model {merged.digest.short}"
    assert needs[f"blob {entries['model.safetensors'].digest.hex}"] == (model,)
    assert set(needs[f"blob {entries['config.json'].digest.hex}"]) == {model, "base model base"}


def test_a_base_that_lies_elsewhere(ckpt: Registry, bot: Checkpoint, base: Path) -> None:
    assert ckpt.verify(read_data=True).is_sound
    flip(base / "model.safetensors")
    assert ckpt.verify().is_sound
    (damage,) = ckpt.verify(read_data=True).damages
    assert damage.what.startswith(f"{base}: tensor ")
    assert damage.needed_by == ("base model base",)
    shutil.move(base, base.with_name("moved"))
    (damage,) = ckpt.verify().damages
    assert damage.what == str(base)
    assert "no such file or folder" in damage.found


def test_a_merged_model_that_lies_elsewhere(ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = ckpt.merge(ckpt.plan(bot), out=str(out)).merged
    assert ckpt.verify(read_data=True).is_sound
    flip(out / "model.safetensors")
    assert ckpt.verify().is_sound
    owner = (f"merged model {merged.digest.short}",)
    (damage,) = ckpt.verify(read_data=True).damages
    assert (damage.what, damage.needed_by) == (f"{out}/model.safetensors", owner)
    (out / "model.safetensors").unlink()
    assert found(ckpt.verify()) == [(f"{out}/model.safetensors", "missing", owner)]


def test_subsets_together_are_everything_and_always_the_same(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    for seed in range(4):
        ckpt.register(
            str(tiny.write_adapter(tmp_path / f"bot-{seed}", base=base, seed=seed)), Registration(base=str(base))
        )
    everything = ckpt.verify(read_data=True)
    for digest, _ in list(ckpt.workspace.store.blobs()):
        blob_path(ckpt, digest).unlink()
    parts = [ckpt.verify(subset=f"{number}/3") for number in (1, 2, 3)]
    assert sum(part.objects for part in parts) == everything.objects
    assert [len(part.damages) for part in parts] == [len(ckpt.verify(subset=f"{n}/3").damages) for n in (1, 2, 3)]
    assert sorted(found(ckpt.verify())) == sorted(each for part in parts for each in found(part))


@pytest.mark.parametrize("subset", ["0/3", "4/3", "1", "/", "1/0", "a/b", "-1/3", "1/3/4"])
def test_no_such_subset(ckpt: Registry, subset: str) -> None:
    with pytest.raises(InvalidInput):
        ckpt.verify(subset=subset)


def test_rows_that_contradict_each_other(ckpt: Registry, bot: Checkpoint) -> None:
    with sqlite3.connect(ckpt.settings.home / "ckpt.db") as connection:
        connection.execute("UPDATE blobs SET size_bytes = 7 WHERE digest = ?", (weights(bot).hex,))
    what = {damage.what: damage for damage in ckpt.verify().damages}
    assert what["a record"].found == "7 bytes recorded"
    assert what[f"blob {weights(bot).hex}"].expected == "7 bytes"
    with sqlite3.connect(ckpt.settings.home / "ckpt.db") as connection:
        connection.execute("DELETE FROM checkpoint_blobs")
        connection.execute("UPDATE checkpoints SET digest = ?", ("0" * 64,))
    damages = ckpt.verify().damages
    assert {damage.needed_by for damage in damages} == {("bot@v1",)}
    assert len(damages) == 1 + len(bot.manifest.files)


def test_what_is_removed_and_swept_while_it_is_verified_is_no_damage(ckpt: Registry, bot: Checkpoint) -> None:
    alone = threading.Lock()

    def sweep(what: str, done_bytes: int, total_bytes: int) -> None:
        with alone, tiny.open_registry(ckpt.settings.home) as other:
            if other.checkpoints():
                other.remove(bot)
                other.sweep(grace=timedelta(0))

    assert ckpt.verify(read_data=True, progress=sweep).is_sound
    assert not ckpt.checkpoints()


# -- the doctor


def by_name(diagnoses: list[Diagnosis]) -> dict[str, Diagnosis]:
    return {each.name: each for each in diagnoses}


def test_a_healthy_registry(anywhere: Registry) -> None:
    diagnoses = anywhere.diagnose()
    names = by_name(diagnoses)
    assert {"home", "store", "database", "database_url", "tables", "clock of the database", "jobs", "tokens"} <= set(
        names
    )
    assert {each.name for each in diagnoses if each.verdict is Verdict.PROBLEM} == set()
    assert all(each.advice for each in diagnoses if each.verdict is not Verdict.OK)
    assert all(each.found for each in diagnoses)


def test_the_doctor_says_where_each_setting_comes_from_and_shows_no_password(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text('user = "ada"\n')
    url = "postgresql://ckpt:secret@db.example:5433/ckpt?password=secret"
    settings = Settings.from_environment({"CKPT_HOME": str(home), "CKPT_DATABASE_URL": url})
    names = by_name(diagnose_here(settings))
    assert names["user"].found == "ada (config.toml)"
    assert names["database_url"].found == "postgresql://db.example:5433/ckpt (CKPT_DATABASE_URL)"
    assert names["store"].found == f"{(home / 'store').as_uri()} (default)"
    embedded = Settings.from_environment({"CKPT_HOME": str(home)})
    assert by_name(diagnose_here(embedded))["database_url"].found == f"sqlite:///{home}/ckpt.db (default)"
    assert names["settings"].verdict is Verdict.WARNING
    assert "CKPT_STORE" in names["settings"].advice


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    environment = {"CKPT_HOME": str(tmp_path), "CKPT_SERVER": "http://ckpt.example", "CKPT_DATABASE_URL": "sqlite:///x"}
    warnings = [each.found for each in diagnose_here(Settings.from_environment(environment)) if each.advice]
    assert any("both set" in each for each in warnings)
    settings = Settings.from_environment({"CKPT_HOME": str(tmp_path), "CKPT_TOKEN": "ckpt_r_x"})
    assert any("CKPT_TOKEN" in each.found for each in diagnose_here(settings))


def test_a_database_that_cannot_be_reached_does_not_end_the_examination(tmp_path: Path) -> None:
    environment = {"CKPT_HOME": str(tmp_path), "CKPT_DATABASE_URL": "postgresql://postgres@127.0.0.1:1/none"}
    with connect(Settings.from_environment(environment)) as ckpt:
        names = by_name(ckpt.diagnose())
    assert names["database"].verdict is Verdict.PROBLEM
    assert "compiled kernel" in names
    assert "versions" in names


def test_a_database_that_is_to_be_upgraded(postgres: object, tmp_path: Path) -> None:
    import servers

    assert isinstance(postgres, servers.Server)
    url = servers.create_database(postgres)
    try:
        with connect(Settings.from_environment({"CKPT_HOME": str(tmp_path), "CKPT_DATABASE_URL": url})) as ckpt:
            database = by_name(ckpt.diagnose())["database"]
    finally:
        servers.drop_database(url)
    assert database.verdict is Verdict.PROBLEM
    assert "ckpt db upgrade" in database.found + database.advice


def test_credentials_that_others_can_read(tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_text("{}")
    settings = Settings.from_environment({"CKPT_HOME": str(tmp_path)})
    os.chmod(tmp_path / "credentials.json", 0o644)
    assert "chmod 600" in by_name(diagnose_here(settings))["credentials"].advice
    os.chmod(tmp_path / "credentials.json", 0o600)
    assert "credentials" not in by_name(diagnose_here(settings))


def test_work_that_nobody_takes_up_is_pointed_out(ckpt: Registry, base: Path) -> None:
    ckpt.add_base(str(base))
    ckpt.start("verify_base", {"base": "base"})
    assert by_name(ckpt.diagnose())["jobs"].verdict is Verdict.OK
    with sqlite3.connect(ckpt.settings.home / "ckpt.db") as connection:
        connection.execute("UPDATE jobs SET created_at = '2026-01-01 00:00:00.000000'")
    assert "ckpt worker" in by_name(ckpt.diagnose())["jobs"].advice


def test_a_client_and_its_server_of_different_versions() -> None:
    def package(found: str) -> Diagnosis:
        return Diagnosis(name="ckpt-registry", verdict=Verdict.OK, found=found)

    assert [each.name for each in with_server([package("1.0")], [package("1.0")])] == [
        "ckpt-registry",
        "server: ckpt-registry",
    ]
    assert with_server([package("1.0")], [package("2.0")])[-1].verdict is Verdict.WARNING
