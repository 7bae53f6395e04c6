"""What goes wrong, as the Hub's clients understand it: what there is not, who may not see it, lines that break."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import tiny
from contract.cutting import Cut, bad_line
from hub_clients import Client, add_large
from running import Server
from waiting import until

from registry.registering import Registration
from registry.server.hub import RULES
from registry.teamwork import Role

WEIGHTS = "adapter_model.safetensors"
# Who may what; a rule that is not here fails the test.
NEEDED = {
    "GET /api/models": "reader",
    "GET /api/models/{repo}": "reader",
    "GET /api/models/{repo}/revision/{rev}": "reader",
    "GET /api/models/{repo}/auth-check": "reader",
    "GET /api/models/{repo}/tree/{rev}/{path*}": "reader",
    "POST /api/models/{repo}/paths-info/{rev}": "reader",
    "GET /api/models/{repo}/refs": "reader",
    "GET /api/models/{repo}/commits/{rev}": "reader",
    "GET /api/datasets/{path*}": "reader",
    "GET /api/spaces/{path*}": "reader",
    "GET /api/whoami-v2": "reader",
    "HEAD /{repo}/resolve/{rev}/{path*}": "reader",
    "GET /{repo}/resolve/{rev}/{path*}": "reader",
}


def ask(server: Server, method: str, path: str, token: str = "reader", **headers: str) -> httpx.Response:
    if token:
        headers["Authorization"] = f"Bearer {server.secrets.get(token, token)}"
    return httpx.request(method, server.url + path, headers=headers, timeout=60)


def test_what_there_is_not_has_its_own_error_for_each(client: Client) -> None:
    told = client.does("""
told = [
    failed(api.model_info, "nobody"),
    failed(api.model_info, "bot", revision="v9"),
    failed(hf_hub_download, "bot", "no.txt"),
    failed(hf_hub_download, "nobody", "no.txt"),
    failed(hf_hub_download, "bot", "README.md", revision="nothing"),
    failed(lambda: list(api.list_repo_tree("bot", "no/folder"))),
    failed(api.model_info, "bot", revision="f" * 40),
    failed(api.list_repo_refs, "nobody-merged"),
    failed(api.dataset_info, "bot"),
    failed(hf_hub_download, "bot", "README.md", repo_type="dataset"),
]
""")
    kinds = [kind for kind, _ in told]
    assert kinds[:2] == ["RepositoryNotFoundError", "RevisionNotFoundError"]
    assert kinds[2] in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    assert kinds[3:5] == ["RepositoryNotFoundError", "RevisionNotFoundError"]
    assert kinds[5] in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    assert kinds[6:] == ["RevisionNotFoundError", *["RepositoryNotFoundError"] * 3]
    assert "only models" in told[8][1]


def test_what_is_in_another_namespace_does_not_exist(client: Client, filled: Server) -> None:
    theirs = replace(client, token=filled.secrets["nlu"])
    told = theirs.does("""
told = [
    api.model_info("nlu/intent").id,
    api.model_info("nlu/intent-merged").id,
    failed(api.model_info, "vision/caption")[0],
    failed(api.model_info, "bot-merged")[0],
    failed(hf_hub_download, "vision/caption-v1-merged", "config.json")[0],
    sorted(each.id for each in api.list_models()),
    [each["name"] for each in api.whoami()["orgs"]],
]
""")
    gone = "RepositoryNotFoundError"
    assert told[:5] == ["nlu/intent", "nlu/intent-merged", gone, gone, gone]
    assert not [name for name in told[5] if name.startswith(("bot", "vision"))]
    assert told[6] == ["nlu"]


def test_a_bad_token_is_told_from_none(client: Client, filled: Server) -> None:
    script = 'told = failed(api.model_info, "bot")'
    kind, text = replace(client, token="ckpt_wrong").does(script)
    assert kind == "HfHubHTTPError"
    assert "Invalid credentials" in text
    kind, text = replace(client, token="").does(script)
    assert kind == "RepositoryNotFoundError"
    assert "authenticated" in text


@pytest.mark.parametrize("id_", ["large-llama", "large-merged"])
def test_a_download_goes_on_after_a_cut(client: Client, filled: Server, id_: str) -> None:
    # Clients keep what they have got in whole chunks of 10 MiB: the second try has to ask for the rest alone.
    with bad_line(filled.url) as line:
        path = f"GET /{id_}/resolve/"
        line.cuts.append(Cut(path, received=52 << 20, times=2))
        told = replace(client, url=line.url).does(f"""
failed(hf_hub_download, {id_!r}, "model.safetensors")  # the old client leaves it to its user to try again
told = hf_hub_download({id_!r}, "model.safetensors")
""")
        assert len([first for first in line.asked if first.startswith(path)]) == 2
    whole = ask(filled, "GET", f"/{id_}/resolve/main/model.safetensors").content
    assert len(whole) > 64e6
    assert Path(told).read_bytes() == whole


def test_a_download_comes_in_several_ranges_at_once(filled: Server, tmp_path: Path) -> None:
    client = Client("hub-0.36", filled.url, filled.secrets["reader"], tmp_path / "hf")
    with bad_line(filled.url) as line:
        near = replace(client, url=line.url)
        script = 'told = hf_hub_download("large-merged", "model.safetensors")'
        told = near.does(script, HF_HUB_ENABLE_HF_TRANSFER="1")
        assert len(line.asked) > 6
    whole = ask(filled, "GET", "/large-merged/resolve/main/model.safetensors").content
    assert Path(told).read_bytes() == whole


def test_what_is_in_the_cache_is_not_asked_for_again(client: Client, filled: Server) -> None:
    with bad_line(filled.url) as line:
        near = replace(client, url=line.url)
        script = 'told = snapshot_download("bot", revision="production")'
        near.does(script)
        asked = len(line.asked)
        near.does(script)
        again = [first for first in line.asked[asked:] if "agent-harnesses" not in first]
        assert again[0].startswith("GET /api/models/bot/revision/production")
        assert len(again) <= 2
        asked = len(line.asked)
        commit = filled.direct.resolve("bot@v2").digest.hex[:40]
        near.does(f'told = [hf_hub_download("bot", {WEIGHTS!r}, revision={commit!r})]')
        assert not [first for first in line.asked[asked:] if "agent-harnesses" not in first]


# -- without a client


def test_every_rule_is_in_the_table() -> None:
    known = {f"{rule.method} {rule.pattern}": rule.role.value for rule in RULES}
    assert {name: role for name, role in known.items() if name in NEEDED} == NEEDED
    assert all(role == "writer" for name, role in known.items() if name not in NEEDED)


def test_nobody_gets_anything_without_a_token(filled: Server) -> None:
    for rule in RULES:
        path = rule.pattern.replace("{repo}", "bot").replace("{rev}", "main").replace("/{path*}", "/README.md")
        answer = ask(filled, rule.method, path, token="")
        assert answer.status_code == 401, rule.pattern
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("name", [role.value for role in Role])
def test_whoever_has_a_token_may_read(filled: Server, name: str) -> None:
    assert ask(filled, "GET", "/api/whoami-v2", name).json()["name"] == name
    assert ask(filled, "HEAD", "/bot/resolve/main/README.md", name).status_code == 200


def test_a_head_says_what_a_file_is(filled: Server) -> None:
    data = (filled.home.parent / "bot-20" / WEIGHTS).read_bytes()
    checkpoint = filled.direct.resolve("bot@v2")
    answer = ask(filled, "HEAD", f"/bot/resolve/production/{WEIGHTS}")
    assert (answer.status_code, answer.headers["Content-Length"], answer.content) == (200, str(len(data)), b"")
    assert answer.headers["X-Repo-Commit"] == checkpoint.digest.hex[:40]
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert len(answer.headers["ETag"].strip('"')) in (40, 64)
    assert "X-Xet-Hash" not in answer.headers


@pytest.mark.parametrize("id_", ["bot", "bot-merged"])
def test_ranges_are_answered_exactly(filled: Server, id_: str) -> None:
    name = WEIGHTS if id_ == "bot" else "model-00001-of-00002.safetensors"
    path = f"/{id_}/resolve/v2/{name}"
    whole = ask(filled, "GET", path)
    data, tag = whole.content, whole.headers["ETag"]
    part = ask(filled, "GET", path, Range="bytes=100-299")
    assert (part.status_code, part.content) == (206, data[100:300])
    assert part.headers["Content-Range"] == f"bytes 100-299/{len(data)}"
    assert ask(filled, "GET", path, Range="bytes=100-").content == data[100:]
    assert ask(filled, "GET", path, Range="bytes=-9").content == data[-9:]
    assert ask(filled, "GET", path, Range="bytes=0-9", **{"If-Range": tag}).status_code == 206
    assert ask(filled, "GET", path, Range="bytes=0-9", **{"If-Range": '"other"'}).content == data
    assert ask(filled, "HEAD", path, Range="bytes=0-9").headers["Content-Length"] == "10"
    assert ask(filled, "GET", path, **{"If-None-Match": tag}).status_code == 304
    beyond = ask(filled, "GET", path, Range=f"bytes={len(data)}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")


def test_errors_say_what_the_clients_look_for(filled: Server) -> None:
    answer = ask(filled, "GET", "/bot/resolve/v2/none.txt")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert answer.headers["X-Repo-Commit"] == filled.direct.resolve("bot@v2").digest.hex[:40]
    assert answer.json() == {"error": answer.headers["X-Error-Message"]}
    answer = ask(filled, "GET", "/api/models/bot/revision/refs%2Fpr%2F1")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    answer = ask(filled, "GET", "/api/models/k%C3%B6nig")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert "könig" in answer.json()["error"]
    for path in ("/api/models/bot/nothing/here", "/bot/resolve"):
        assert ask(filled, "GET", path).status_code == 404
    assert ask(filled, "GET", "/api/models/bot/tree/main?cursor=x").status_code == 400


def test_long_trees_come_in_pages(filled: Server) -> None:
    found, path = [], "/api/models/bot/tree/main?recursive=true&limit=2"
    while path:
        answer = ask(filled, "GET", path)
        found += [each["path"] for each in answer.json()]
        path = answer.links["next"]["url"].removeprefix(filled.url) if "next" in answer.links else ""
    assert found == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_what_is_deprecated_says_so(filled: Server) -> None:
    checkpoint = filled.direct.resolve("vision/caption")
    filled.direct.tag(checkpoint, {"deprecated": "wrong data,\nsee v2"})
    answer = ask(filled, "GET", "/api/models/vision/caption")
    assert answer.headers["X-HF-Warning"] == (
        "deprecated; vision/caption: vision/caption@v1 is deprecated: wrong data, see v2"
    )
    filled.direct.tag(checkpoint, {}, ["deprecated"])


@pytest.mark.parametrize("name", ["bot-v3", "ckpt/bot"])
def test_a_name_that_means_two_things_is_refused(filled: Server, tmp_path: Path, name: str) -> None:
    assert ask(filled, "GET", f"/api/models/{name}").status_code == 200
    tiny.write_adapter(tmp_path / "twice", base=filled.home.parent / "tiny-llama", seed=99)
    intake = filled.direct.register(str(tmp_path / "twice"), Registration(adapter=name))
    answer = ask(filled, "GET", f"/api/models/{name}")
    assert answer.status_code == 409
    assert name in answer.json()["error"]
    filled.direct.remove(intake.registered[0].checkpoint)


def test_browsers_are_shown_the_pages(filled: Server) -> None:
    def goes_to(path: str) -> str:
        answer = ask(filled, "GET", path, Accept="text/html")
        return answer.headers["Location"] if answer.status_code == 303 else str(answer.status_code)

    assert goes_to("/bot") == "/adapters/bot"
    assert goes_to("/nlu/intent") == "/adapters/nlu/intent"
    assert goes_to("/bot/tree/candidate") == "/checkpoints/bot%40v2"
    assert goes_to("/bot/blob/v1/README.md") == "/checkpoints/bot%40v1"
    assert goes_to("/bot-merged/tree/v2") == "/checkpoints/bot%40v2"
    assert goes_to("/tiny-llama") == "/bases/tiny-llama"
    assert goes_to("/nobody") == "404"
    assert ask(filled, "GET", "/bot").status_code == 404


# -- readers who stand still, and readers who go


@contextmanager
def standing_still(server: Server, id_: str, count: int) -> Iterator[None]:
    """So many have asked for a file of 64 MB and read no further than its headers."""
    with ExitStack() as lines:
        for _ in range(count):
            line = lines.enter_context(socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)))
            told = f"Host: 127.0.0.1\r\nAuthorization: Bearer {server.secrets['reader']}\r\n\r\n"
            line.sendall(f"GET /{id_}/resolve/main/model.safetensors HTTP/1.1\r\n{told}".encode())
            assert line.recv(12) == b"HTTP/1.1 200"
        yield


def open_files(server: Server) -> int:
    """How many files of models are open here, where the server runs, too."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of the listing itself, or was closed just now
            place = link.readlink()
            found += place.is_relative_to(server.home / "store") or place.suffix == ".safetensors"
    return found


def test_who_stands_still_holds_nobody_up(filled: Server) -> None:
    with standing_still(filled, "large-llama", 45):  # more than there are threads for sending
        assert ask(filled, "GET", "/api/models/bot/tree/main").status_code == 200
        assert ask(filled, "GET", f"/bot/resolve/main/{WEIGHTS}").status_code == 200
        assert ask(filled, "GET", "/bot-merged/resolve/v1/config.json").status_code == 200


@pytest.mark.parametrize("id_", ["large-llama", "large-merged"])
def test_files_are_closed_when_their_reader_goes(filled: Server, id_: str) -> None:
    ask(filled, "GET", f"/{id_}/resolve/main/model.safetensors")  # of merged models, the last ones stay open
    before = open_files(filled)
    with standing_still(filled, id_, 4):
        pass
    until(lambda: open_files(filled) <= before)
    assert ask(filled, "GET", f"/{id_}/resolve/main/model.safetensors", Range="bytes=-100").status_code == 206


def test_no_byte_of_another_model_is_sent(filled: Server, tmp_path: Path) -> None:
    base = add_large(filled.direct, tmp_path, "fleeting")
    checkpoint = filled.direct.resolve("fleeting")
    wanted = ask(filled, "GET", "/fleeting-merged/resolve/main/model.safetensors").content
    found = b""

    def read() -> None:
        nonlocal found
        headers = {"Authorization": f"Bearer {filled.secrets['reader']}"}
        url = f"{filled.url}/fleeting-merged/resolve/main/model.safetensors"
        with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
            for piece in answer.iter_raw():
                if not found:
                    (base / "model.safetensors").write_bytes(b"")
                found += piece

    with pytest.raises(httpx.RemoteProtocolError):
        read()
    assert 0 < len(found) < len(wanted)
    assert wanted.startswith(found)
    assert ask(filled, "GET", "/fleeting-merged/resolve/main/model.safetensors").is_client_error
    filled.direct.remove(checkpoint)
