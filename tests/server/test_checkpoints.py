"""Find, register and annotate over HTTP; keys, tags and namespaces."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
import tiny
from running import ADAPTER_FILES, Server, error, send_checkpoint, send_files

from registry.teamwork import Role


@pytest.fixture
def llama(server: Server, base: Path) -> str:
    server.direct.add_base(str(base), name="llama")
    return "llama"


def test_what_is_registered_over_http_is_what_its_files_are(server: Server, llama: str, adapter: Path) -> None:
    client = server.client("writer")
    answer = send_checkpoint(client, adapter, base=llama, adapter="team/bot", tags={"lang": "de"}, note="first")
    assert answer.status_code == 200, answer.text
    registered = answer.json()
    assert registered["created"]
    found = server.direct.resolve("team/bot@v1")
    assert (found.author, found.step, found.tags, found.notes[0].text) == ("writer", 5, {"lang": "de"}, "first")
    assert found.manifest.method == "lora"
    assert {entry.path for entry in found.manifest.files} == set(ADAPTER_FILES)
    assert all(len(entry.sha256) == 64 for entry in found.manifest.files)
    assert client.get("/checkpoint", params={"ref": "team/bot"}).json() == registered["checkpoint"]
    again = send_checkpoint(client, adapter, base=llama, adapter="team/bot")
    assert not again.json()["created"]
    assert again.json()["checkpoint"]["version"] == 1


def test_a_batch_is_recorded_as_a_whole_or_not_at_all(server: Server, llama: str, tmp_path: Path) -> None:
    client = server.client("writer")
    asked = []
    for seed in range(3):
        folder = tiny.write_adapter(tmp_path / str(seed), base=llama, seed=seed)
        files = send_files(client, folder, *ADAPTER_FILES)
        asked.append({"files": files, "said": {"base": llama, "adapter": "bot"}, "found": {"step": seed}})
    broken = {**asked[2], "said": {"base": "nothing", "adapter": "bot"}}
    refused = client.post("/checkpoints/batch", json=[*asked[:2], broken])
    assert (refused.status_code, error(refused)) == (404, "unknown_base")
    assert server.direct.checkpoints() == []
    answer = client.post("/checkpoints/batch", json=asked)
    assert [each["checkpoint"]["version"] for each in answer.json()] == [1, 2, 3]


def test_what_does_not_fit_its_base_is_refused_with_every_finding(server: Server, tmp_path: Path) -> None:
    server.direct.add_base(str(tiny.write_base(tmp_path / "small")), name="small")
    wide = tiny.write_adapter(tmp_path / "wide", config={"r": 3})
    answer = send_checkpoint(server.client("writer"), wide, base="small", adapter="bot")
    assert answer.status_code == 422
    assert error(answer) == "refused"
    assert answer.json()["error"]["fields"]["report"]["findings"]


def test_files_that_are_no_checkpoint_are_refused(server: Server, llama: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    answer = send_checkpoint(server.client("writer"), tmp_path, base=llama, adapter="bot")
    assert answer.status_code == 422


def test_pages_and_filters(server: Server, llama: str, tmp_path: Path) -> None:
    for step in range(5):
        place = tiny.write_adapter(tmp_path / str(step), base=llama, seed=step)
        said = {"step": step, "metrics": [{"name": "eval_loss", "value": "nan" if step == 2 else step / 10}]}
        assert send_checkpoint(server.client("writer"), place, base=llama, adapter="bot", **said).status_code == 200
    client = server.client("reader")
    first = client.get("/checkpoints", params={"limit": 2}).json()
    assert [each["step"] for each in first["items"]] == [4, 3]
    second = client.get("/checkpoints", params={"limit": 2, "cursor": first["cursor"]}).json()
    assert [each["step"] for each in second["items"]] == [2, 1]
    assert second["items"][0]["metrics"][0]["value"] == "nan"
    some = client.get("/checkpoints", params={"where": "metric.eval_loss < 0.25", "sort": "metric.eval_loss"})
    assert [each["step"] for each in some.json()["items"]] == [0, 1]
    best = client.get("/best", params={"metric": "eval_loss", "per": "run"}).json()
    assert best["groups"][0]["checkpoints"][0]["step"] == 0
    assert best["direction"] == "lower"
    for wrong, code in (
        ({"cursor": "x"}, "invalid_input"),
        ({"where": "step <"}, "invalid_filter"),
        ({"limit": "0"}, "invalid_input"),
        ({"limit": "many"}, "invalid_input"),
        ({"wehre": "step > 1"}, "invalid_input"),
        ({"adapter": "other"}, "unknown_adapter"),
    ):
        answer = client.get("/checkpoints", params=wrong)
        assert (error(answer), answer.status_code) == (code, 404 if "unknown" in code else 400), wrong


def test_annotations(server: Server, bot: str) -> None:
    client = server.client("writer")
    assert client.post("/notes", json={"checkpoint": bot, "text": "good"}).json() == {}
    assert client.post("/tags", json={"checkpoint": bot, "tags": {"a": "1"}}).json() == {}
    measured = {"checkpoint": bot, "metrics": [{"name": "f1", "value": 0.5}]}
    assert client.post("/metrics", json=measured).json() == {}
    assert client.put("/aliases", json={"checkpoint": bot, "name": "champion"}).json() == {"before": None}
    details = client.get("/details", params={"ref": "bot@champion"}).json()
    assert details["checkpoint"]["notes"][0]["author"] == "writer"
    assert details["checkpoint"]["tags"] == {"a": "1"}
    assert details["report"]["findings"] is not None
    assert details["problem"] is None
    actions = [event["action"] for event in client.get("/history", params={"subject": bot}).json()["items"]]
    assert actions == ["register", "note", "tag", "metric", "alias.set"]
    assert client.delete("/aliases", params={"adapter": "bot", "name": "champion"}).json()["version"] == 1
    assert client.delete("/checkpoint", params={"ref": bot}).json() == {}
    assert error(client.get("/checkpoint", params={"ref": bot})) == "unknown_adapter"


# -- keys


def test_a_write_with_a_key_happens_once(server: Server, bot: str) -> None:
    client, asked = server.client("writer"), {"checkpoint": bot, "text": "once"}
    first = client.post("/notes", json=asked, headers={"Idempotency-Key": "k1"})
    again = client.post("/notes", json=asked, headers={"Idempotency-Key": "k1"})
    assert (first.status_code, first.content) == (again.status_code, again.content)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    other = client.post("/notes", json={**asked, "text": "else"}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, error(other)) == (409, "key_reused")
    # a key is somebody's own
    assert server.client("admin").post("/notes", json=asked, headers={"Idempotency-Key": "k1"}).is_success
    notes = server.direct.resolve(bot).notes
    assert [note.author for note in notes] == ["writer", "admin"]
    assert error(client.post("/notes", json=asked, headers={"Idempotency-Key": "a b"})) == "invalid_input"


def test_of_many_requests_with_one_key_one_is_carried_out(server: Server, bot: str) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        client = server.client("writer", **{"Idempotency-Key": "same"})
        answers.append(client.post("/notes", json={"checkpoint": bot, "text": "once"}))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 8
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    assert len(server.direct.resolve(bot).notes) == 1


def test_what_failed_is_tried_again_under_the_same_key(server: Server, bot: str) -> None:
    client = server.client("writer", **{"Idempotency-Key": "k"})
    asked = {"checkpoint": bot, "name": "champion"}
    missing = client.put("/aliases", json={**asked, "checkpoint": "bot@v9"})
    assert missing.status_code == 404
    assert client.put("/aliases", json=asked).is_success


def test_a_job_is_started_once(server: Server, bot: str) -> None:
    client, asked = server.client("writer"), {"kind": "diff", "arguments": {"one": bot, "other": bot}}
    first = client.post("/jobs", json=asked, headers={"Idempotency-Key": "j"})
    again = client.post("/jobs", json=asked, headers={"Idempotency-Key": "j"})
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert len(client.get("/jobs").json()) == 1


# -- tags of answers


def test_what_has_not_changed_is_not_sent_again(server: Server, bot: str) -> None:
    client = server.client("reader")
    first = client.get("/checkpoint", params={"ref": bot})
    fresh = client.get("/checkpoint", params={"ref": bot}, headers={"If-None-Match": first.headers["ETag"]})
    assert (fresh.status_code, fresh.content, fresh.headers["ETag"]) == (304, b"", first.headers["ETag"])
    server.direct.note(server.direct.resolve(bot), "news")
    changed = client.get("/checkpoint", params={"ref": bot}, headers={"If-None-Match": first.headers["ETag"]})
    assert changed.status_code == 200


def test_of_two_who_move_an_alias_one_is_told_that_it_was_moved(
    server: Server, bot: str, llama: str, tmp_path: Path
) -> None:
    client = server.client("writer")
    place = tiny.write_adapter(tmp_path / "two", base=llama, seed=7)
    assert send_checkpoint(client, place, base=llama, adapter="bot").is_success
    server.direct.set_alias(server.direct.resolve("bot@v1"), "champion")
    tag = client.get("/checkpoint", params={"ref": "bot@champion"}).headers["ETag"]
    asked = {"checkpoint": "bot@v2", "name": "champion"}
    assert client.put("/aliases", json=asked, headers={"If-Match": tag}).status_code == 200
    late = client.put("/aliases", json=asked, headers={"If-Match": tag})
    assert (late.status_code, error(late)) == (412, "outdated")


# -- namespaces


@pytest.fixture
def shared(server: Server, llama: str, tmp_path: Path) -> Server:
    """With `nlu/bot` and `vision/bot`, both with an alias, shipped and noted."""
    for number, namespace in enumerate(("nlu", "vision")):
        place = tiny.write_adapter(tmp_path / namespace, base=llama, seed=number)
        assert send_checkpoint(server.client(namespace), place, base=llama, adapter=f"{namespace}/bot").is_success
        found = server.direct.resolve(f"{namespace}/bot")
        server.direct.set_alias(found, "champion")
        server.direct.ship(found, namespace)
    return server


def test_another_namespace_does_not_exist(shared: Server) -> None:
    client = shared.client("nlu")
    foreign = shared.direct.resolve("vision/bot")
    for ref in ("vision/bot", "vision/bot@v1", "vision/bot@champion", "vision/bot@best:x", foreign.digest.hex):
        for path, name in (("checkpoint", "ref"), ("details", "ref"), ("trail", "ref"), ("subject", "ref"), ("check", "ref"),
                           ("files", "subject"), ("signatures", "subject"), ("signable", "subject")):  # fmt: skip
            answer = client.get(f"/{path}", params={name: ref})
            assert answer.status_code == 404, (path, ref)
            nobodys = "vision/nobody@v1" if "/" in ref else "f" * len(ref)
            other = client.get(f"/{path}", params={name: nobodys})
            assert error(answer) == error(other)
            assert "vision" not in answer.json()["error"]["hint"]
    file = client.get("/file", params={"subject": "vision/bot", "path": "adapter_config.json"})
    assert file.status_code == 404
    for method, path, body in (
        ("POST", "/notes", {"checkpoint": "vision/bot", "text": "x"}),
        ("POST", "/tags", {"checkpoint": "vision/bot", "tags": {}}),
        ("POST", "/metrics", {"checkpoint": "vision/bot", "metrics": []}),
        ("PUT", "/aliases", {"checkpoint": "vision/bot", "name": "x"}),
        ("POST", "/plan", {"checkpoints": ["vision/bot"]}),
        ("POST", "/jobs", {"kind": "merge", "arguments": {"checkpoints": ["vision/bot"]}}),
        ("POST", "/jobs", {"kind": "diff", "arguments": {"one": "nlu/bot", "other": "vision/bot"}}),
        ("POST", "/signatures", {"subject": "vision/bot", "bundle": {}}),
    ):
        answer = client.request(method, path, json=body)
        assert answer.status_code == 404, (path, answer.text)
    assert client.delete("/checkpoint", params={"ref": "vision/bot"}).status_code == 404
    assert client.delete("/aliases", params={"adapter": "vision/bot", "name": "champion"}).status_code == 404


def test_lists_show_only_what_is_seen(shared: Server) -> None:
    shared.direct.start("diff", {"one": "vision/bot", "other": "vision/bot"})
    client = shared.client("nlu")
    page = client.get("/checkpoints").json()
    assert [each["adapter"] for each in page["items"]] == ["nlu/bot"]
    assert client.get("/checkpoints", params={"adapter": "vision/bot"}).status_code == 404
    assert [each["checkpoint"] for each in client.get("/shipments").json()] == ["nlu/bot@v1"]
    for environment in ("vision", "nowhere"):  # the same for what is there and what is not
        answers = [
            client.get("/shipments", params={"environment": environment}),
            client.get("/shipments", params={"environment": environment, "history": "true"}),
        ]
        assert [error(answer) for answer in answers] == ["unknown_environment"] * 2
        assert [answer.json()["error"]["fields"]["near"] for answer in answers] == [[], []]
    assert client.get("/jobs").json() == []
    assert client.get("/jobs/1").status_code == client.get("/jobs/1/log").status_code == 404
    assert client.post("/jobs/1/cancel").status_code == 404
    history = client.get("/history").json()["items"]
    assert {event["subject"] for event in history} == {"nlu/bot@v1", "llama"}
    assert client.get("/history", params={"subject": "vision/bot"}).json() == {"items": [], "cursor": ""}


def test_shipping_within_a_namespace(shared: Server) -> None:
    shared.add_token("release", Role.SHIPPER, ["nlu"])
    client = shared.client("release")
    shared.direct.ship(shared.direct.resolve("vision/bot"), "live")
    for seed_of in ("nlu/bot", "vision/bot"):
        asked = {"subject": seed_of, "environment": "live"}
        assert client.post("/shipments", json=asked).status_code == (200 if seed_of == "nlu/bot" else 404)
    assert (
        error(client.post("/rollback", json={"environment": "live"})) == "conflict"
    )  # nothing of theirs was live before
    assert client.post("/rollback", json={"environment": "live", "adapter": "vision/bot"}).status_code == 404
    assert client.post("/rollback", json={"environment": "vision"}).status_code == 404


def test_a_merged_model_is_seen_by_who_sees_all_that_went_into_it(shared: Server) -> None:
    own = shared.direct.merge(shared.direct.plan(shared.direct.resolve("nlu/bot"))).merged.digest.hex
    both = [shared.direct.resolve(name) for name in ("nlu/bot", "vision/bot")]
    mixed = shared.direct.merge(shared.direct.plan(*both)).merged.digest.hex
    client = shared.client("nlu")
    assert [each["digest"] for each in client.get("/merged").json()] == [f"blake3:{own}"]
    assert client.get("/subject", params={"ref": own}).json()["kind"] == "merged"
    for path, name in (("subject", "ref"), ("files", "subject"), ("provenance", "merged")):
        assert client.get(f"/{path}", params={name: mixed}).status_code == 404
    assert [each["digest"] for each in client.get("/details", params={"ref": "nlu/bot"}).json()["merged"]] == [
        f"blake3:{own}"
    ]


def test_nobody_records_in_another_namespace(shared: Server, llama: str, tmp_path: Path) -> None:
    place = tiny.write_adapter(tmp_path / "more", base=llama, seed=9)
    client = shared.client("nlu")
    for name in ("vision/other", "other"):
        answer = send_checkpoint(client, place, base=llama, adapter=name)
        assert (answer.status_code, error(answer)) == (403, "forbidden")
    made = {"checkpoints": ["nlu/bot"], "making": {"adapter": "vision/made"}}
    assert client.post("/jobs", json={"kind": "combine", "arguments": made}).status_code == 403
    unnamed = client.post("/jobs", json={"kind": "combine", "arguments": {"checkpoints": ["nlu/bot"]}})
    assert unnamed.status_code == 400
    elsewhere = {"checkpoints": ["nlu/bot"], "out": "s3://bucket/anywhere"}
    assert client.post("/jobs", json={"kind": "merge", "arguments": elsewhere}).status_code == 403
