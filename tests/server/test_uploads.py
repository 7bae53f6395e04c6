"""Files on their way in: whole, in parts, cut off, wrong; and what nobody learns by asking."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import tiny
from blake3 import blake3
from running import Server, error, send_checkpoint, send_files, serving, settings_of
from waiting import until

from registry.refs import Digest
from registry.teamwork import Role


def hex_of(data: bytes) -> str:
    return blake3(data).hexdigest()


def offered(client: httpx.Client, *blobs: bytes) -> list[str]:
    """Which of some blobs the server wants."""
    files = [{"digest": hex_of(data), "size_bytes": len(data)} for data in blobs]
    answer = client.post("/blobs/missing", json={"files": files})
    assert answer.status_code == 200, answer.text
    return [text.removeprefix("blake3:") for text in answer.json()["missing"]]


def is_stored(server: Server, data: bytes) -> bool:
    return Digest(hex_of(data)) in dict(server.direct.workspace.store.blobs())


def leftovers(server: Server) -> list[Path]:
    return [path for path in (server.home / "store/staging").rglob("*") if path.is_file()]


def test_what_was_sent_is_not_wanted_again(server: Server) -> None:
    client, data = server.client("writer"), os.urandom(100_000)
    assert offered(client, data) == [hex_of(data)]
    answer = client.put(f"/blobs/{hex_of(data)}", content=data)
    assert answer.json()["size_bytes"] == 100_000
    assert len(answer.json()["sha256"]) == 64
    assert offered(client, data) == []
    assert client.put(f"/blobs/{hex_of(data)}", content=data).is_success
    # who has not sent it does not learn that it is here
    assert offered(server.client("shipper"), data) == [hex_of(data)]


def test_a_private_file_is_wanted_from_others_and_may_not_be_named_by_them(
    server: Server, base: Path, tmp_path: Path
) -> None:
    server.direct.add_base(str(base), name="llama")
    place = tiny.write_adapter(tmp_path / "a", base="llama")
    assert send_checkpoint(server.client("vision"), place, base="llama", adapter="vision/bot").is_success
    data = (place / "adapter_model.safetensors").read_bytes()
    assert offered(server.client("nlu"), data) == [hex_of(data)]
    assert offered(server.client("writer"), data) == []  # who sees everything
    (config,) = send_files(server.client("nlu"), place, "adapter_config.json")
    weights = {"path": "adapter_model.safetensors", "size_bytes": len(data), "digest": hex_of(data)}
    body = {"files": [config, weights], "said": {"base": "llama", "adapter": "nlu/bot"}}
    answer = server.client("nlu").post("/checkpoints", json=body)
    assert (answer.status_code, error(answer)) == (409, "blob_swept")
    assert answer.json()["error"]["fields"]["digests"] == [hex_of(data)]
    # naming what nobody has at all is told in the same words
    nothing = {**weights, "digest": "0" * 64}
    assert error(server.client("nlu").post("/checkpoints", json={**body, "files": [config, nothing]})) == "blob_swept"


def test_bytes_of_another_digest_are_not_kept(server: Server) -> None:
    client, data = server.client("writer"), b"something"
    answer = client.put(f"/blobs/{hex_of(b'something else')}", content=data)
    assert (answer.status_code, error(answer)) == (409, "damaged_blob")
    assert list(server.direct.workspace.store.blobs()) == []
    assert offered(client, b"something else") == [hex_of(b"something else")]
    assert leftovers(server) == []
    assert error(client.put("/blobs/XYZ", content=data)) == "invalid_input"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_cut_off_is_not_kept(server: Server, lines: list[str], is_chunked: bool) -> None:
    data = os.urandom(300_000)
    head = f"PUT /api/v1/blobs/{hex_of(data)} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.secrets['writer']}\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if is_chunked else f"Content-Length: {len(data)}\r\n\r\n"
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        sent = data[:200_000]
        connection.sendall(b"%x\r\n%s\r\n" % (len(sent), sent) if is_chunked else sent)
    until(lambda: any('"PUT"' in line for line in lines))  # the server is through with it
    assert leftovers(server) == []
    assert list(server.direct.workspace.store.blobs()) == []
    assert offered(server.client("writer"), data) == [hex_of(data)]


def test_a_whole_blob_has_a_largest_size(server: Server) -> None:
    client = server.client("writer")
    answer = client.put(f"/blobs/{'0' * 64}", content=(b"x" * (1 << 20) for _ in range(65)))
    assert (answer.status_code, error(answer)) == (413, "too_large")
    assert leftovers(server) == []


def test_a_large_file_comes_in_parts_and_goes_on_after_a_cut(server: Server) -> None:
    client, data = server.client("writer"), os.urandom(250_000)
    parts = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    upload = f"/uploads/{hex_of(data)}"
    assert client.get(upload).json() == {"parts": {}}
    for number in (3, 1):
        assert client.put(f"{upload}/parts/{number}", content=parts[number - 1]).is_success
    assert client.get(upload).json() == {"parts": {"1": 100_000, "3": 50_000}}
    assert server.client("shipper").get(upload).json() == {"parts": {}}  # whose own it is not
    early = client.post(f"{upload}/complete", json={"size_bytes": len(data), "parts": 3})
    assert (early.status_code, error(early)) == (409, "conflict")


def test_parts_are_put_together_and_their_room_is_given_back(server: Server) -> None:
    client, data = server.client("writer"), os.urandom(250_000)
    upload = f"/uploads/{hex_of(data)}"
    assert client.put(f"{upload}/parts/1", content=b"a first try").is_success  # and replaced by another
    for number, start in enumerate(range(0, len(data), 100_000), 1):
        assert client.put(f"{upload}/parts/{number}", content=data[start : start + 100_000]).is_success
    done = client.post(f"{upload}/complete", json={"size_bytes": len(data), "parts": 3})
    assert done.status_code == 200, done.text
    assert is_stored(server, data)
    assert offered(client, data) == []
    assert not is_stored(server, data[:100_000])
    assert client.get(upload).json() == {"parts": {}}
    server.direct.sweep(grace=timedelta(0))
    assert is_stored(server, data)  # it is kept for who is about to record it
    assert not is_stored(server, b"a first try")


def test_parts_of_something_else_are_dropped(server: Server) -> None:
    client, data = server.client("writer"), os.urandom(1000)
    upload = f"/uploads/{hex_of(data)}"
    client.put(f"{upload}/parts/1", content=data[:-1] + b"?")
    answer = client.post(f"{upload}/complete", json={"size_bytes": 1000, "parts": 1})
    assert (answer.status_code, error(answer)) == (409, "damaged_blob")
    assert client.get(upload).json() == {"parts": {}}
    assert error(client.put(f"{upload}/parts/0", content=b"")) == "invalid_input"


def test_a_part_that_something_needs_stays(server: Server, bot: str) -> None:
    found = server.direct.resolve(bot)
    entry = next(each for each in found.manifest.files if each.path.endswith("safetensors"))
    with server.direct.workspace.store.open(entry.digest) as stream:
        part = stream.read()
    client, data = server.client("writer"), part + b"more"
    upload = f"/uploads/{hex_of(data)}"
    client.put(f"{upload}/parts/1", content=part)
    client.put(f"{upload}/parts/2", content=b"more")
    assert client.post(f"{upload}/complete", json={"size_bytes": len(data), "parts": 2}).is_success
    assert is_stored(server, part)
    assert not is_stored(server, b"more")


def test_a_base_model_is_recorded_with_the_files_that_were_sent(server: Server, base: Path, tmp_path: Path) -> None:
    with tiny.open_registry(tmp_path / "laptop") as laptop:
        found = laptop.add_base(str(base), name="llama").base
    client = server.client("writer")
    files = send_files(client, base, *(file.path for file in found.files))
    from registry.codec import plain

    answer = client.post("/bases", json={"base": plain(found), "copied": files})
    assert answer.status_code == 200, answer.text
    recorded = server.direct.base("llama")
    assert (recorded.in_store, recorded.digest, recorded.author) == (True, found.digest, "writer")
    assert server.direct.verify_base(recorded).is_intact
    assert client.get("/base", params={"name": "llama"}).json()["fingerprint"] == plain(found.fingerprint)
    forged = {**plain(found), "fingerprint": {**plain(found.fingerprint), "weights": "blake3:" + "0" * 64}}
    assert client.post("/bases", json={"base": forged, "copied": files}).status_code == 409


@pytest.mark.parametrize(
    "url", ["/etc", "file:///etc", "http://169.254.169.254/latest", "https://example.org/m", "zip::s3://b/x"]
)
def test_the_server_goes_only_to_object_stores_for_others(server: Server, url: str) -> None:
    answer = server.client("writer").post("/bases/at", json={"url": url})
    assert (answer.status_code, error(answer)) == (400, "invalid_input")


def test_uploads_into_a_team_store(tmp_path: Path, postgres_url: str, s3_url: str, base: Path) -> None:
    settings = settings_of(tmp_path / "home", CKPT_DATABASE_URL=postgres_url, CKPT_STORE=f"{s3_url}/store")
    with serving(settings) as server:
        server.add_token("writer", Role.WRITER)
        server.direct.add_base(str(base), name="llama")
        client, data = server.client("writer"), os.urandom(11 << 20)
        upload = f"/uploads/{hex_of(data)}"
        for number, start in enumerate(range(0, len(data), 6 << 20), 1):
            assert client.put(f"{upload}/parts/{number}", content=data[start : start + (6 << 20)]).is_success
        assert client.post(f"{upload}/complete", json={"size_bytes": len(data), "parts": 2}).is_success
        assert is_stored(server, data)
        assert not is_stored(server, data[: 6 << 20])
        place = tiny.write_adapter(tmp_path / "bot", base="llama")
        assert send_checkpoint(client, place, base="llama", adapter="team/bot").is_success
        key = {"Idempotency-Key": "k"}
        for _ in range(2):
            assert client.post("/notes", json={"checkpoint": "team/bot", "text": "x"}, headers=key).is_success
        assert len(server.direct.resolve("team/bot").notes) == 1
