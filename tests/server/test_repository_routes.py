"""Repositories over HTTP: files and ranges of them, computed or not, and what a token of some namespaces sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from running import Server, error

from registry.registering import Registration

FILE = "/repository/file"


@pytest.mark.parametrize(("id_", "path"), [("bot", "adapter_model.safetensors"), ("bot-merged", "model.safetensors")])
def test_a_file_and_ranges_of_it_are_sent(server: Server, bot: str, id_: str, path: str) -> None:
    client = server.client("reader")
    found = client.get("/repository", params={"id": id_}).json()
    (size, etag) = next((each["size_bytes"], each["etag"]) for each in found["files"] if each["path"] == path)
    asked = {"id": id_, "revision": found["commit"], "path": path}
    whole = client.get(FILE, params=asked)
    assert (whole.status_code, len(whole.content), whole.headers["ETag"]) == (200, size, f'"{etag}"')
    tagged = {"Range": "bytes=5-99", "If-Range": f'"{etag}"'}
    part = client.get(FILE, params=asked, headers=tagged)
    assert (part.status_code, part.content) == (206, whole.content[5:100])
    assert part.headers["Content-Range"] == f"bytes 5-99/{size}"
    assert client.get(FILE, params=asked, headers={**tagged, "If-Range": '"other"'}).content == whole.content
    assert client.get(FILE, params=asked, headers={"If-None-Match": f'"{etag}"'}).status_code == 304
    beyond = client.get(FILE, params=asked, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, error(beyond)) == (416, "range_not_satisfiable")
    assert beyond.headers["Content-Range"] == f"bytes */{size}"


def test_what_is_not_there_is_not_found(server: Server, bot: str) -> None:
    client = server.client("reader")
    for asked, code in (
        ({"id": "nobody", "path": "x"}, "unknown_repository"),
        ({"id": "bot", "revision": "v9", "path": "x"}, "unknown_revision"),
        ({"id": "bot", "path": "../config.json"}, "path_not_found"),
        ({"id": "bot-merged", "path": "merge.json"}, "path_not_found"),
    ):
        answer = client.get(FILE, params=asked)
        assert (answer.status_code, error(answer)) == (404, code)


def test_what_is_in_another_namespace_does_not_exist(server: Server, base: Path, tmp_path: Path) -> None:
    server.direct.add_base(str(base), name="llama")
    made = {}
    for seed, name in enumerate(("nlu/bot", "vision/bot"), 1):
        place = tiny.write_adapter(tmp_path / name, base=base, seed=seed)
        made[name] = server.direct.register(str(place), Registration(adapter=name)).registered[0].checkpoint
    both = server.direct.save_recipe(server.direct.plan(*made.values()))
    nlu, vision = server.client("nlu"), server.client("vision")
    assert [each["id"] for each in nlu.get("/repositories").json()] == ["nlu/bot", "nlu/bot-merged", "llama"]
    for id_ in ("nlu/bot", "nlu/bot-merged", "nlu/bot-v1-merged", both.id):
        for path in ("/repository", "/repository/refs", FILE):
            asked = {"id": id_, **({"path": "config.json"} if path == FILE else {})}
            answer = vision.get(path, params=asked)
            assert (answer.status_code, error(answer)) == (404, "unknown_repository")
            assert "nlu" not in answer.text.replace(id_, "")
    assert nlu.get("/repository", params={"id": "nlu/bot-merged"}).status_code == 200
    assert nlu.get("/recipes").json() == []
    answer = nlu.post("/recipes", json={"checkpoints": ["nlu/bot", "vision/bot"]})
    assert (answer.status_code, error(answer)) == (404, "unknown_adapter")
    kept = nlu.post("/recipes", json={"checkpoints": ["nlu/bot"], "note": "ours"})
    assert (kept.status_code, kept.json()["kind"], kept.json()["is_stored"]) == (200, "merged", False)
    assert [each["note"] for each in nlu.get("/recipes").json()] == ["ours"]
    assert vision.get("/recipes").json() == []
