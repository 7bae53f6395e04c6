"""What the Hub's own clients send: folders, files and models become checkpoints, each push one version; and what is refused, in words."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import tracemalloc
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import tiny
import trained
from blake3 import blake3
from hub_clients import CLIENTS, Client
from running import Server, serving, settings_of
from safetensors.numpy import save_file

from registry.manifest import Checkpoint, FileEntry
from registry.refs import Digest
from registry.registering import Registration
from registry.server.hub.commits import Intake, read_commit
from registry.teamwork import Role

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a base model, `tiny-llama`, and a token for each role; `nlu` may write in that namespace only."""
    folder = tmp_path_factory.mktemp("uploads")
    with serving(settings_of(folder / "home")) as server:
        server.direct.add_base(str(tiny.write_base(folder / "tiny-llama")), name="tiny-llama", copy=True)
        for role in Role:
            server.add_token(role.value, role)
        server.add_token("nlu", Role.WRITER, ["nlu"])
        yield server


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Client:
    """Each of the clients, as a writer."""
    return Client(request.param, server.url, server.secrets["writer"], tmp_path / "hf")


@pytest.fixture
def name(client: Client, request: pytest.FixtureRequest) -> str:
    """An adapter that no other test knows."""
    return f"{request.node.originalname.removeprefix('test_').replace('_', '-')[:60]}-{client.name.replace('.', '')}"


def adapter(place: Path, seed: int = 1) -> Path:
    return tiny.write_adapter(place, base="tiny-llama", seed=seed)


def versions(server: Server, name: str) -> list[str]:
    return sorted(each.ref for each in server.direct.checkpoints(name))


def test_a_folder_becomes_a_version(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    (place / "README.md").write_text("---\nlibrary_name: peft\n---\n# Bot\n")
    ran = client.run("hf", "upload", name, str(place), "--commit-message", "the first")
    assert ran.returncode == 0, ran.stderr
    checkpoint = server.direct.resolve(name)
    assert versions(server, name) == [f"{name}@v1"]
    assert [each.path for each in checkpoint.manifest.files] == ["README.md", *ADAPTER_FILES]
    assert [note.text for note in checkpoint.notes] == ["the first"]
    assert (checkpoint.author, checkpoint.base_name) == ("writer", "tiny-llama")


def test_the_same_again_is_no_new_version(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", seed=2)
    told = client.does(f"""
told = []
for place in ({str(first)!r}, {str(first)!r}, {str(second)!r}):
    repo = api.create_repo({name!r}, exist_ok=True).repo_id
    info = api.upload_folder(repo_id=repo, folder_path=place, commit_description="with care")
    told.append([info.oid, api.model_info(repo, revision=info.oid).sha, api.model_info({name!r}).sha])
told.append(failed(api.create_repo, {name!r}))
""")
    commits = [server.direct.resolve(f"{name}@{each}").digest.hex[:40] for each in ("v1", "v2")]
    assert told[:3] == [[commits[0]] * 3, [commits[0]] * 3, [commits[1]] * 3]
    assert told[3][0] == "HfHubHTTPError"
    assert "already" in told[3][1]
    assert versions(server, name) == [f"{name}@v1", f"{name}@v2"]
    notes = [note.text for note in server.direct.resolve(f"{name}@v1").notes]
    assert notes == ["Upload folder using huggingface_hub\n\nwith care"]


def test_a_branch_is_an_alias(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    for seed, extra in ((1, ()), (2, ("--revision", "candidate")), (3, ("--revision", "candidate"))):
        place = adapter(tmp_path / str(seed), seed=seed)
        ran = client.run("hf", "upload", name, str(place), *extra)
        assert ran.returncode == 0, ran.stderr
    assert server.direct.resolve(f"{name}@candidate").version == 3
    told = client.does(f"""
api.create_branch({name!r}, branch="stable", revision="v2")
api.create_branch({name!r}, branch="stable", exist_ok=True)
api.create_tag({name!r}, tag="paper", revision="v1")
api.delete_branch({name!r}, branch="candidate")
told = {{
    "refs": {{each.name: each.target_commit for each in api.list_repo_refs({name!r}).branches}},
    "again": failed(api.create_tag, {name!r}, tag="paper"),
    "version": failed(api.create_branch, {name!r}, branch="v2"),
    "delete": failed(api.delete_tag, {name!r}, tag="nothing"),
}}
""")
    commits = {f"v{n}": server.direct.resolve(f"{name}@v{n}").digest.hex[:40] for n in (1, 2, 3)}
    assert told["refs"] == {"main": commits["v3"], "stable": commits["v2"], "paper": commits["v1"]}
    assert "paper already" in told["again"][1]
    assert told["version"][0] == "BadRequestError"
    assert told["delete"][0] == "RevisionNotFoundError"


def test_a_first_version_may_have_a_branch(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    ran = client.run("hf", "upload", name, str(adapter(tmp_path / "out")), "--revision", "candidate")
    assert ran.returncode == 0, ran.stderr
    assert server.direct.resolve(f"{name}@candidate").version == 1


def test_files_one_by_one_make_one_version(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    (place / "README.md").write_text("# Bot\n")
    client.does(f"""
repo = api.create_repo({name!r}).repo_id
for path in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
    api.upload_file(repo_id=repo, path_or_fileobj={str(place)!r} + "/" + path, path_in_repo=path)
told = api.list_repo_files(repo)
""")
    assert versions(server, name) == [f"{name}@v1"]
    assert [each.path for each in server.direct.resolve(name).manifest.files] == ["README.md", *ADAPTER_FILES]


def test_half_a_checkpoint_waits_and_is_nobody_elses(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    send = f"api.upload_file(repo_id={name!r}, path_or_fileobj={str(place)!r} + '/' + path, path_in_repo=path)"
    told = client.does(f"path = 'adapter_config.json'; {send}; told = api.model_info({name!r}).siblings")
    assert told == []
    other = Client(client.name, server.url, server.secrets["shipper"], tmp_path / "other")
    told = other.does(f"path = 'adapter_model.safetensors'; told = failed(api.model_info, {name!r}); {send}")
    assert told[0] == "RepositoryNotFoundError"
    assert all(str(each.adapter) != name for each in server.direct.checkpoints())
    client.does(f"path = 'adapter_model.safetensors'; told = {send}.oid")
    assert versions(server, name) == [f"{name}@v1"]


def test_a_tokenizer_after_its_model_is_the_next_version(
    client: Client, server: Server, name: str, tmp_path: Path
) -> None:
    place = adapter(tmp_path / "out")
    (place / "trainer_state.json").write_text('{"global_step": 7, "log_history": [{"eval_loss": 0.5, "step": 7}]}')
    told = client.does(f"""
repo = api.create_repo({name!r}).repo_id
api.upload_folder(repo_id=repo, folder_path={str(place)!r})
send = lambda: api.upload_file(repo_id=repo, path_or_fileobj=b"{{}}", path_in_repo="tokenizer.json").oid
told = [send(), send(), api.list_repo_files(repo)]
""")
    first, second = (server.direct.resolve(f"{name}@{each}") for each in ("v1", "v2"))
    assert versions(server, name) == [first.ref, second.ref]
    assert told[:2] == [second.digest.hex[:40]] * 2
    assert told[2] == [*ADAPTER_FILES, "tokenizer.json", "trainer_state.json"]
    assert [(each.step, each.metric("eval_loss")) for each in (first, second)] == [(7, 0.5)] * 2
    assert second.manifest.tokenizer


def test_a_run_becomes_a_version_for_each_step(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", base="tiny-llama", steps=(9, 50))
    (run / "runs").mkdir()
    (run / "runs/events.out").write_bytes(b"log")
    (run / ".gitattributes").write_bytes(b"*.bin filter=lfs\n")
    ran = client.run("hf", "upload", name, str(run))
    assert ran.returncode == 0, ran.stderr
    found = sorted(server.direct.checkpoints(name), key=lambda each: each.version)
    assert [each.step for each in found] == [9, 50, None]
    assert found[0].metric("eval_loss") is not None
    assert [each.path for each in found[2].manifest.files] == [*ADAPTER_FILES]


ALL_LARGE = """
import huggingface_hub._commit_api as one, huggingface_hub.hf_api as two
ask = one._fetch_upload_modes
def all_large(*args, additions, **others):
    ask(*args, additions=additions, **others)
    for each in additions:
        each._upload_mode = "lfs"
one._fetch_upload_modes = two._fetch_upload_modes = all_large
"""


def test_large_files_stream(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    place, before = adapter(tmp_path / "out"), files_taken(server)
    client.token = server.add_token(f"sender-{client.name}", Role.WRITER)
    told = client.does(
        f"""{ALL_LARGE}
repo = api.create_repo({name!r}).repo_id
told = [api.upload_folder(repo_id=repo, folder_path={str(place)!r}).oid for _ in range(2)]
""",
        HF_HUB_DISABLE_XET="1",
    )
    checkpoint = server.direct.resolve(name)
    assert told == [checkpoint.digest.hex[:40]] * 2
    assert versions(server, name) == [f"{name}@v1"]
    assert files_taken(server) == before + 2, "a file that is here was sent again"


def files_taken(server: Server) -> float:
    """How many large files a server has taken."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("ckpt_requests_total") and "objects/{oid}" in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'status="200"' in line)


def test_an_address_for_a_large_file_is_good_for_nothing_else(server: Server) -> None:
    data, other = b"x" * 1000, hashlib.sha256(b"y").hexdigest()
    oid = hashlib.sha256(data).hexdigest()
    files = "/large.git/info/lfs/objects"
    with httpx.Client(base_url=server.url, timeout=60) as anyone:
        ours = {"Authorization": f"Bearer {server.secrets['writer']}"}
        asked = {"operation": "upload", "objects": [{"oid": oid, "size": 1000}]}
        (told,) = anyone.post(f"{files}/batch", json=asked, headers=ours).json()["objects"]
        href = told["actions"]["upload"]["href"]
        assert anyone.put(href.replace(oid, other), content=b"y").status_code == 401
        assert anyone.get(href).status_code in (401, 404)
        assert anyone.put(href.partition("?")[0], content=data).status_code == 401
        assert anyone.put(href[:-8] + "shipper", content=data).status_code == 401
        answer = anyone.put(href, content=b"z" * 1000)
        assert answer.status_code == 409
        assert (
            anyone.post(told["actions"]["verify"]["href"], json={"oid": oid, "size": 1000}, headers=ours).status_code
            == 409
        )
        assert anyone.put(href, content=data).status_code == 200
        assert (
            anyone.post(told["actions"]["verify"]["href"], json={"oid": oid, "size": 1000}, headers=ours).status_code
            == 200
        )
        assert "actions" not in anyone.post(f"{files}/batch", json=asked, headers=ours).json()["objects"][0]
        token = server.direct.create_token("leaver", Role.WRITER, ()).secret
        theirs = {"Authorization": f"Bearer {token}"}
        (told,) = anyone.post(f"{files}/batch", json=asked, headers=theirs).json()["objects"]
        server.direct.revoke_token("leaver")
        assert anyone.put(told["actions"]["upload"]["href"], content=data).status_code == 401


# -- refusals


def test_refusals_say_what_to_do(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    good, lost = adapter(tmp_path / "good"), tiny.write_adapter(tmp_path / "lost", base="no/such-model")
    nameless, misfit = tiny.write_adapter(tmp_path / "nameless"), tmp_path / "misfit"
    tiny.write_adapter(misfit, base="tiny-llama")
    save_file({k: v[:, :8] for k, v in tiny.adapter_tensors().items()}, misfit / "adapter_model.safetensors")
    whole = tiny.write_base(tmp_path / "whole")
    server.direct.ship(registered(server, name, good), "live")
    told = client.does(f"""
def upload(place, **others):
    return failed(api.upload_folder, folder_path=place, **{{"repo_id": {name!r}, **others}})
told = {{
    "lost": upload({str(lost)!r}),
    "nameless": upload({str(nameless)!r}),
    "misfit": upload({str(misfit)!r}),
    "whole": upload({str(whole)!r}),
    "base": upload({str(good)!r}, repo_id="tiny-llama"),
    "merged": upload({str(good)!r}, repo_id={name + "-merged"!r}),
    "version": upload({str(good)!r}, repo_id={name + "-v1"!r}),
    "environment": upload({str(good)!r}, revision="live"),
    "selector": upload({str(good)!r}, revision="step:5"),
    "commit": upload({str(good)!r}, revision="0" * 40),
    "pull request": upload({str(good)!r}, create_pr=True),
    "stale": upload({str(lost)!r}, parent_commit="0" * 40),
    "deletion": failed(api.delete_file, "README.md", repo_id={name!r}),
    "dataset": failed(api.create_repo, "things", repo_type="dataset"),
}}
""")
    expected = {
        "lost": ("BadRequestError", "`ckpt base add PATH --name no/such-model`"),
        "nameless": ("BadRequestError", "has to name the base model"),
        "misfit": ("HfHubHTTPError", "is this the base model it was trained on?"),
        "whole": ("HfHubHTTPError", "`ckpt base add PATH --name NAME`"),
        "base": ("HfHubHTTPError", "`ckpt base add` records them"),
        "merged": ("HfHubHTTPError", "takes no files"),
        "version": ("HfHubHTTPError", "versions never change"),
        "environment": ("HfHubHTTPError", "`ckpt ship REF --to live`"),
        "selector": ("BadRequestError", "step:5"),
        "commit": ("HfHubHTTPError", "never changes"),
        "pull request": ("BadRequestError", "no pull requests"),
        "stale": ("HfHubHTTPError", "look again"),
        "deletion": ("HfHubHTTPError", "versions never change"),
        "dataset": ("BadRequestError", "only models"),
    }
    assert {key: error for key, (error, _) in told.items()} == {key: error for key, (error, _) in expected.items()}
    assert [told[key][1] for key, (_, text) in expected.items() if text not in told[key][1]] == []
    assert versions(server, name) == [f"{name}@v1"]


def registered(server: Server, name: str, place: Path) -> Checkpoint:
    return server.direct.register(str(place), Registration(adapter=name)).registered[0].checkpoint


def test_who_may_not(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    script = f"""
told = [failed(api.create_repo, {name!r}), failed(api.upload_folder, repo_id={name!r}, folder_path={str(place)!r})]
told += [failed(api.upload_folder, repo_id="nlu/" + {name!r}, folder_path={str(place)!r})]
"""
    reader = Client(client.name, server.url, server.secrets["reader"], tmp_path / "reader").does(script)
    assert all("role writer" in text and "403" in text for _, text in reader)
    nlu = Client(client.name, server.url, server.secrets["nlu"], tmp_path / "nlu").does(script)
    assert all("may record only in nlu" in text for _, text in nlu[:2])
    assert nlu[2] == ["", ""]
    assert [each.ref for each in server.direct.checkpoints() if each.adapter.name == name] == [f"nlu/{name}@v1"]
    stranger = Client(client.name, server.url, "", tmp_path / "stranger").does(script)
    assert {error for error, _ in stranger} <= {"RepositoryNotFoundError", "HfHubHTTPError"}


def test_a_commit_that_follows_the_right_one(client: Client, server: Server, name: str, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", seed=2)
    told = client.does(f"""
first = api.upload_folder(repo_id={name!r}, folder_path={str(first)!r}).oid
told = [
    failed(api.upload_folder, repo_id={name!r}, folder_path={str(second)!r}, parent_commit=first, delete_patterns="*"),
    failed(api.upload_folder, repo_id={name!r}, folder_path={str(first)!r}, parent_commit=first),
]
""")
    assert told[0] == ["", ""]
    assert "412" in told[1][1]
    assert versions(server, name) == [f"{name}@v1", f"{name}@v2"]


# -- at the same time, and cut off


def test_two_at_once_are_two_versions_unless_they_are_the_same(server: Server, tmp_path: Path) -> None:
    bodies = [body_of(adapter(tmp_path / str(seed), seed=seed)) for seed in (1, 2, 1, 2)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda body: send(server, "crowd", body), bodies))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert versions(server, "crowd") == ["crowd@v1", "crowd@v2"]
    oids = [answer.json()["commitOid"] for answer in answers]
    assert oids[:2] == oids[2:]


def test_what_is_cut_off_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    body = body_of(place)
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port)) as line:
        head = f"POST /api/models/cut/commit/main HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(body)}\r\n"
        line.sendall(
            f"{head}Authorization: Bearer {server.secrets['writer']}\r\n\r\n".encode() + body[: len(body) // 2]
        )
    assert send(server, "cut", body).status_code == 200
    assert versions(server, "cut") == ["cut@v1"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"nonsense", 400),
        (b'{"key": "file", "value": {"path": "a", "content": "@@@@"}}', 400),
        (b'{"key": "file", "value": {"path": "a", "content": "YWJj', 400),
        (b'{"key": "file", "value": {"path": "a"}}', 400),
        (b'{"key": "file", "value": {"content": "YWJj", "path": "../a"}}', 422),
        (b'{"key": "file", "value": {"content": "YWJj", "path": "a", "encoding": "utf-8"}}', 400),
        (b'{"key": "lfsFile", "value": {"path": "a", "oid": "' + b"0" * 64 + b'", "size": 3}}', 409),
        (b'{"key": "lfsFile", "value": {"path": "a", "oid": "x"}}', 400),
        (b'{"key": "what", "value": {}}', 400),
        (b'{"key": "header", "value": {"summary": "' + b"x" * (3 << 20) + b'"}}', 413),
        (b"[1, 2]", 400),
    ],
)
def test_what_is_no_commit(server: Server, body: bytes, status: int) -> None:
    answer = send(server, "odd", body)
    assert (answer.status_code, bool(answer.json()["error"])) == (status, True)


def body_of(place: Path, **header: str) -> bytes:
    """A commit of a folder's files, as clients write it."""
    lines: list[object] = [{"key": "header", "value": {"summary": "a push", **header}}]
    for path in sorted(each for each in place.iterdir() if each.is_file()):
        value = {"content": base64.b64encode(path.read_bytes()).decode(), "path": path.name, "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    return b"\n".join(json.dumps(line).encode() for line in lines)


def send(server: Server, name: str, body: bytes) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.secrets['writer']}", "Content-Type": "application/x-ndjson"}
    return httpx.post(f"{server.url}/api/models/{name}/commit/main", content=body, headers=headers, timeout=60)


# -- as it streams in


def test_however_a_commit_is_cut_into_pieces_it_is_the_same(tmp_path: Path) -> None:
    place = adapter(tmp_path / "out")
    (place / "odd.txt").write_text('{"content": "x", "content":"')
    body = body_of(place, description='a "content": "quoted", {"content": "twice"}')
    whole = read_commit([body], in_memory())
    assert [entry.path for entry in whole.files] == [*ADAPTER_FILES, "odd.txt"]
    assert whole.message.startswith('a push\n\na "content"')
    for size in (1, 2, 3, 5, 7, 64, 1000):
        pieces = (body[at : at + size] for at in range(0, len(body), size))
        assert read_commit(pieces, in_memory()) == whole


def in_memory() -> Intake:
    def take(data: Iterable[bytes]) -> FileEntry:
        text = b"".join(data)
        return FileEntry(path="x", size_bytes=len(text), digest=Digest(blake3(text).hexdigest()))

    return Intake(take=take, sent=lambda sha256: None)


def test_a_commit_takes_little_memory_whatever_its_size() -> None:
    megabyte = base64.b64encode(bytes(3 << 18))

    def body() -> Iterator[bytes]:
        yield b'{"key": "file", "value": {"content": "'
        for _ in range(200):
            yield megabyte
        yield b'", "path": "large", "encoding": "base64"}}'

    def take(data: Iterable[bytes]) -> FileEntry:
        return FileEntry(path="x", size_bytes=sum(map(len, data)), digest=Digest("0" * 64))

    tracemalloc.start()
    try:
        commit = read_commit(body(), Intake(take=take, sent=lambda sha256: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert commit.files[0].size_bytes == 200 * (3 << 18)
    assert peak < 8 << 20


# -- what trains


@pytest.mark.oracle
def test_models_push_themselves(server: Server, tmp_path: Path) -> None:
    """PEFT, a tokenizer and the Trainer, as they are."""
    home = trained.write_model(tmp_path / "lab")
    server.direct.add_base(str(home), name="lab/talker", copy=True)
    client = Client("", server.url, server.secrets["writer"], tmp_path / "hf")
    told = client.does(f"""
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
base = AutoModelForCausalLM.from_pretrained("lab/talker")
tokenizer = AutoTokenizer.from_pretrained("lab/talker")
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
model.push_to_hub("talks")
told = {{"model": api.list_repo_files("talks")}}
model.push_to_hub("talks", revision="candidate")
tokenizer.push_to_hub("talks")
told["tokenizer"] = api.list_repo_files("talks")
tokenizer.push_to_hub("nlu/early")
model.push_to_hub("nlu/early")
told["early"] = api.list_repo_files("nlu/early")
told["whole"] = failed(base.push_to_hub, "whole-model")

rows = [{{"input_ids": torch.arange(8), "labels": torch.arange(8)}}] * 8
arguments = TrainingArguments({str(tmp_path / "run")!r}, max_steps=4, save_steps=2, per_device_train_batch_size=1,
    report_to=[], push_to_hub=True, hub_model_id="nlu/trains", hub_strategy="every_save", use_cpu=True, disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
""")
    assert told["model"] == ["README.md", *ADAPTER_FILES]
    assert versions(server, "talks") == ["talks@v1", "talks@v2"]
    assert server.direct.resolve("talks@candidate").version == 1
    assert {"tokenizer.json", "tokenizer_config.json", *ADAPTER_FILES} <= set(told["tokenizer"])
    assert versions(server, "nlu/early") == ["nlu/early@v1"]
    assert told["early"] == told["tokenizer"]
    assert "`ckpt base add PATH --name NAME`" in told["whole"][1]
    found = sorted(server.direct.checkpoints("nlu/trains"), key=lambda each: each.version)
    said = [(each.step, each.notes[0].text) for each in found]
    # the Trainer leaves out a push while the one before is under way
    assert said[0] == (2, "Training in progress, step 2")
    assert said[1:-1] in ([], [(4, "Training in progress, step 4")])
    assert said[-1] == (None, "End of training")
