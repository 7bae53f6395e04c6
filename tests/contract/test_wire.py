"""A server seen over a bad line: what is written once stays once, what was sent or fetched in part is gone on with."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import servers
import tiny
from cutting import Cut, Line, bad_line
from sites import Site

import registry
from registry import client_files
from registry.client import RemoteRegistry
from registry.errors import (
    Forbidden,
    InvalidInput,
    InvalidSetting,
    RegistryError,
    ServerFailed,
    Unauthenticated,
    Unreachable,
)
from registry.extracting import Extract
from registry.manifest import BaseFormat, Metric
from registry.rearranging import Wanted
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.teamwork import Role

ON_BASE = Registration(base="base")


@pytest.fixture
def ckpt(server: Site) -> Registry:
    """The server over a good line, with a base model `base`."""
    return server.connect("ada")


@pytest.fixture
def base(ckpt: Registry, tmp_path: Path) -> None:
    ckpt.add_base(str(tiny.write_base(tmp_path / "base", shards=2)), name="base", copy=True)


def over(server: Site, line: Line, patience_seconds: float = 60.0) -> RemoteRegistry:
    """The server over a bad line, for somebody who gives up after that time."""
    own = settings(server.home, line.url, server.secrets["bob"])
    return server.opened.enter_context(RemoteRegistry(own, patience_seconds=patience_seconds))


@pytest.mark.usefixtures("base")
def test_a_lost_answer_is_asked_for_again_and_nothing_happens_twice(
    server: Site, ckpt: Registry, tmp_path: Path
) -> None:
    place = str(tiny.write_adapter(tmp_path / "bot"))
    with bad_line(server.url) as line:
        bad = over(server, line)
        line.cuts = [Cut(f"{verb} /api/v1/{path}") for verb, path in (
            ("POST", "checkpoints"), ("POST", "notes"), ("POST", "metrics"), ("POST", "tags"), ("PUT", "aliases"),
            ("POST", "shipments"), ("POST", "blobs/missing"), ("POST", "jobs"), ("DELETE", "aliases"), ("PUT", "blobs"),
        )]  # fmt: skip
        (found,) = bad.register(place, ON_BASE).registered
        bot = found.checkpoint
        bad.note(bot, "once")
        bad.tag(bot, {"a": "1"})
        bad.add_metrics(bot, [Metric(name="acc", value=1.0)])
        assert bad.set_alias(bot, "candidate") is None
        shipment = bad.ship(bot, "production")
        assert bad.remove_alias("bot", "candidate").ref == bot.ref
        bad.merge(bad.plan(bot))
        assert [cut.times for cut in line.cuts] == [0] * len(line.cuts)
    assert shipment.number == 1
    seen = ckpt.resolve("bot")
    assert (seen.version, [note.text for note in seen.notes], len(seen.metrics)) == (1, ["once"], 1)
    assert len(ckpt.shipments()) == len(ckpt.jobs()) == len(ckpt.merged()) == 1
    actions = [event.action for event in ckpt.history("bot")]
    assert actions == ["register", "note", "tag", "metric", "alias.set", "ship", "alias.remove", "merge"]


@pytest.mark.usefixtures("base")
def test_reads_are_asked_for_again(server: Site, ckpt: Registry) -> None:
    with bad_line(server.url) as line:
        line.cuts = [Cut("GET", times=2), Cut("GET", received=20)]
        assert [base.name for base in over(server, line).bases()] == ["base"]
        assert len(line.asked) == 4


@pytest.mark.usefixtures("base")
def test_a_server_that_is_started_anew_is_waited_for(server: Site) -> None:
    (port,) = servers.free_ports(1)
    with bad_line(server.url, port) as line:
        client = server.connect("bob", line.url)
        assert client.bases()
        line.cuts = [Cut("GET")]
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.bases)
        time.sleep(2.5)  # longer than one that never was there would be waited for
        with bad_line(server.url, port):
            assert asked.result(120)


@pytest.mark.usefixtures("base")
def test_a_removal_whose_answer_is_lost_is_no_error(server: Site, ckpt: Registry, tmp_path: Path) -> None:
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "bot")), ON_BASE).registered
    with bad_line(server.url) as line:
        line.cuts = [Cut("DELETE /api/v1/checkpoint")]
        over(server, line).remove(found.checkpoint)
    assert ckpt.checkpoints() == []


@pytest.mark.usefixtures("base")
def test_an_answer_that_took_longer_than_patience_lasts_is_asked_for_again_too(server: Site) -> None:
    with bad_line(server.url) as line:
        line.cuts = [Cut("GET /api/v1/bases", late_seconds=1.6)]
        assert [each.name for each in over(server, line, 1.5).bases()] == ["base"]
        assert len(line.asked) == 2


def write_large(folder: Path, size_bytes: int) -> Path:
    """A base model with one tensor of some size."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {**tiny.base_tensors(), "model.large.weight": np.frombuffer(os.urandom(size_bytes), dtype=np.float32)}
    place = tiny.write_base(folder)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def test_an_upload_that_was_cut_goes_on_with_the_parts_that_are_missing(
    server: Site, ckpt: Registry, tmp_path: Path
) -> None:
    place = write_large(tmp_path / "large", 3 * client_files.PART_BYTES)
    told: list[tuple[str, int, int]] = []
    with bad_line(server.url) as line:
        line.cuts = [Cut("PUT /api/v1/uploads", sent=1 << 20), Cut("POST /api/v1/uploads")]
        bad = over(server, line)
        added = bad.add_base(str(place), name="large", copy=True, progress=lambda *each: told.append(each))
        sent = [each for each in line.asked if each.startswith("PUT /api/v1/uploads")]
        assert len(sent) == 5  # four parts, one of them twice
    sums = {what: sum(done for each, done, _ in told if each == what) for what, _, _ in told}
    assert sums["sending"] == next(total for what, _, total in told if what == "sending") > 3 * client_files.PART_BYTES
    assert added.base.in_store
    assert ckpt.verify_base(added.base).is_intact


def test_an_upload_is_resumed_by_another_process(server: Site, ckpt: Registry, tmp_path: Path) -> None:
    place = write_large(tmp_path / "large", 3 * client_files.PART_BYTES)
    with bad_line(server.url) as line:
        line.cuts = [Cut("PUT /api/v1/uploads", sent=0, times=0), Cut("POST /api/v1/uploads", times=1000)]
        with pytest.raises(ServerFailed):
            over(server, line, 0.5).add_base(str(place), name="large", copy=True)
    with bad_line(server.url) as line:
        over(server, line).add_base(str(place), name="large", copy=True)
        assert [each for each in line.asked if each.startswith("PUT /api/v1/uploads")] == []
    assert ckpt.base("large").in_store


@pytest.mark.usefixtures("base")
def test_a_download_that_is_cut_goes_on_where_it_was(server: Site, ckpt: Registry, tmp_path: Path) -> None:
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "bot")), ON_BASE).registered
    with bad_line(server.url) as line:
        line.cuts = [Cut("GET /api/v1/file?", received=1000), Cut("GET /api/v1/file?", received=500, times=3)]
        told: list[int] = []
        over(server, line).pull(found.checkpoint, tmp_path / "out", lambda what, done, total: told.append(done))
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "bot")
    assert sum(told) == found.checkpoint.manifest.size_bytes


@pytest.mark.usefixtures("base")
def test_what_has_come_before_a_cut_is_kept_for_the_next_try(server: Site, ckpt: Registry, tmp_path: Path) -> None:
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "bot")), ON_BASE).registered
    with bad_line(server.url) as line:
        line.cuts = [Cut("GET /api/v1/file?", received=700), Cut("GET /api/v1/file?", times=1000)]
        with pytest.raises(ServerFailed):
            over(server, line, 0.5).pull(found.checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.*.partial")
    assert sum(len(data) for data in tiny.contents(partial).values()) > 0
    ckpt.pull(found.checkpoint, tmp_path / "out")
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "bot")
    assert not partial.exists()


@pytest.mark.usefixtures("base")
def test_what_was_kept_is_not_believed(ckpt: Registry, tmp_path: Path) -> None:
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "bot")), ON_BASE).registered
    checkpoint = found.checkpoint
    partial = tmp_path / f".out.{checkpoint.digest.short}.partial"
    partial.mkdir()
    (partial / "adapter_config.json").write_bytes(b"#")
    with pytest.raises(RegistryError) as caught:
        ckpt.pull(checkpoint, tmp_path / "out")
    assert caught.value.code == "changed"
    ckpt.pull(checkpoint, tmp_path / "out")
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "bot")


def settings(folder: Path, server: str, token: str = "") -> Settings:
    return Settings.from_environment({"CKPT_HOME": str(folder), "CKPT_SERVER": server, "CKPT_TOKEN": token})


def test_no_server_is_told_soon(tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    with (
        registry.connect(settings(tmp_path, f"http://127.0.0.1:{port}")) as nobody,
        pytest.raises(ServerFailed) as caught,
    ):
        nobody.bases()
    assert caught.value.url == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://", "http://[::1"])
def test_what_is_no_server_is_told(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidSetting):
        registry.connect(settings(tmp_path, url))


def test_another_server_is_told(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if "bases" in self.path else 404)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        with registry.connect(settings(tmp_path, f"http://127.0.0.1:{other.server_port}")) as odd:
            for ask in (odd.bases, odd.merged):
                with pytest.raises(ServerFailed):
                    ask()
        other.shutdown()


def test_a_token_is_wanted_and_its_role_counts(server: Site, tmp_path: Path) -> None:
    with registry.connect(settings(tmp_path, server.url)) as nobody, pytest.raises(Unauthenticated):
        nobody.bases()
    with registry.connect(settings(tmp_path, server.url, "ckpt_r_wrong")) as wrong, pytest.raises(Unauthenticated):
        wrong.bases()
    reader = server.connect("reader")
    assert reader.bases() == []
    with pytest.raises(Forbidden):
        reader.start("verify_base", {"base": "base"})
    with pytest.raises(Forbidden):
        reader.tokens()
    assert reader.authenticate(server.secrets["reader"]).role is Role.READER


def test_what_makes_no_sense_over_a_server_says_what_to_do(ckpt: Registry, tmp_path: Path) -> None:
    for act in (
        lambda: ckpt.workspace,
        ckpt.upgrade_database,
        lambda: ckpt.signed_by("eve"),
        lambda: ckpt.page(namespaces=["a"]),
    ):
        with pytest.raises(InvalidInput) as caught:
            act()
        assert caught.value.reason


def test_secrets_are_in_no_representation(server: Site, ckpt: Registry) -> None:
    assert server.secrets["ada"] not in repr(ckpt.settings)


def test_a_base_on_a_clients_machine_can_be_registered_on_but_not_merged_into(ckpt: Registry, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    (found,) = ckpt.register(str(tiny.write_adapter(tmp_path / "bot", base="base"))).registered
    base.rename(tmp_path / "not-where-the-server-looks")
    for ask in (ckpt.check, ckpt.plan, lambda each: ckpt.verify_base(ckpt.base(each.base_name))):
        with pytest.raises(Unreachable) as caught:
            ask(found.checkpoint)
        assert caught.value.fields == {"subject": "base", "reason": str(base)}


@pytest.mark.usefixtures("base")
def test_folders_of_this_machine_are_told_from_what_the_server_has(ckpt: Registry, tmp_path: Path) -> None:
    tuned = str(tiny.write_base(tmp_path / "tuned", seed=3))
    with pytest.raises(InvalidInput) as caught:
        ckpt.extract("base", tuned, Extract(rank=2, name="drawn"))
    assert (caught.value.value, "base add" in caught.value.reason) == (tuned, True)
    with pytest.raises(InvalidInput):
        ckpt.convert(tuned, Wanted(layout=BaseFormat.LITGPT, name="other"))
    with pytest.raises(InvalidInput):
        ckpt.convert("base", Wanted(layout=BaseFormat.LITGPT, name="other", out=tmp_path / "out"))
    with pytest.raises(InvalidInput):
        ckpt.extract("base", "base", Extract(rank=2, out=tmp_path / "out"))
