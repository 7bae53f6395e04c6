"""What the Hub's own clients, old and new, read from a registry: repositories, files, names, histories; as they are, in ranges, after a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from hub_clients import Client
from running import Server

ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(filled: Server) -> Path:
    return filled.home.parent


def test_a_repository_says_what_it_is(client: Client, filled: Server) -> None:
    told = client.does("""
info = api.model_info("bot", revision="production", files_metadata=True)
merged = api.model_info("bot-merged", revision="v2")
base = api.model_info("tiny-llama")
told = {
    "bot": [info.id, info.sha, info.library_name, info.pipeline_tag, info.tags, info.created_at],
    "files": {each.rfilename: [each.size, each.lfs and each.lfs.sha256] for each in info.siblings},
    "main": api.model_info("bot").sha,
    "expanded": api.model_info("bot", expand=["sha", "tags"]).__dict__.keys().__contains__("sha"),
    "merged": [merged.sha, merged.library_name, merged.tags, sorted(each.rfilename for each in merged.siblings)],
    "base": [base.id, base.library_name, base.safetensors and base.safetensors.total],
}
""")
    second, newest = filled.direct.resolve("bot@v2"), filled.direct.resolve("bot")
    id_, sha, library, task, tags, created = told["bot"]
    assert (id_, sha, library, task) == ("bot", second.digest.hex[:40], "peft", "text-generation")
    assert {"peft", "lora", "base_model:tiny-llama", "base_model:adapter:tiny-llama"} <= set(tags)
    assert created.startswith(f"{second.created_at:%Y-%m-%d %H:%M:%S}")
    entries = {each.path: each for each in second.manifest.files}
    assert sorted(told["files"]) == sorted(entries) == ADAPTER_FILES
    assert {path: size for path, (size, _) in told["files"].items()} == {p: e.size_bytes for p, e in entries.items()}
    assert told["main"] == newest.digest.hex[:40]
    sha, library, tags, files = told["merged"]
    assert (len(sha), library) == (40, "transformers")
    assert "virtual" in tags
    assert {"config.json", "model.safetensors.index.json"} <= set(files)
    assert told["base"] == ["tiny-llama", "transformers", filled.direct.base("tiny-llama").parameters]


def test_files_names_and_histories_are_listed(client: Client, filled: Server) -> None:
    told = client.does("""
refs = api.list_repo_refs("bot")
told = {
    "files": api.list_repo_files("bot", revision="candidate"),
    "tree": [[type(each).__name__, each.path, getattr(each, "size", 0)] for each in api.list_repo_tree("bot", recursive=True)],
    "expanded": [each.last_commit.title for each in api.list_repo_tree("bot", revision="v2", expand=True)],
    "paths": [each.path for each in api.get_paths_info("bot", ["README.md", "nothing.txt"], expand=True)],
    "branches": {each.name: each.target_commit for each in refs.branches},
    "tags": {each.name: each.target_commit for each in refs.tags},
    "commits": [[each.commit_id, each.title, each.message, each.authors] for each in api.list_repo_commits("bot")],
    "second": [each.title for each in api.list_repo_commits("bot", revision="v2")],
    "merged": [each.title for each in api.list_repo_commits("bot-merged", revision="v2")],
    "base": [each.commit_id for each in api.list_repo_commits("tiny-llama")],
    "exists": [api.repo_exists("bot"), api.repo_exists("nobody"), api.revision_exists("bot", "v3"),
               api.revision_exists("bot", "v9"), api.file_exists("bot", "README.md"), api.file_exists("bot", "no.txt")],
    "me": api.whoami()["name"],
    "models": sorted(each.id for each in api.list_models()),
    "found": sorted(each.id for each in api.list_models(search="intent", limit=10)),
    "ours": sorted(each.id for each in api.list_models(author="nlu", filter="peft")),
    "allowed": api.auth_check("bot"),
}
""")
    commits = {f"v{number}": filled.direct.resolve(f"bot@v{number}").digest.hex[:40] for number in (1, 2, 3)}
    assert sorted(told["files"]) == ADAPTER_FILES
    entries = filled.direct.resolve("bot").manifest.files
    assert sorted(told["tree"]) == sorted(["RepoFile", each.path, each.size_bytes] for each in entries)
    assert told["expanded"] == ["v2: step 20 - The best so far."] * 3
    assert told["paths"] == ["README.md"]
    assert told["branches"] == {"main": commits["v3"], "candidate": commits["v2"], "production": commits["v2"]}
    assert told["tags"] == commits
    assert [each[0] for each in told["commits"]] == [commits["v3"], commits["v2"], commits["v1"]]
    assert told["commits"][1][1:] == ["v2: step 20 - The best so far.", "The best so far.\nReally.", ["owner"]]
    assert told["second"] == told["merged"] == ["v2: step 20 - The best so far.", "v1: step 10"]
    assert len(told["base"]) == 1
    assert told["exists"] == [True, False, True, False, True, False]
    assert told["me"] == "reader"
    assert {"bot", "nlu/intent", "tiny-llama"} <= set(told["models"])
    assert "nlu/intent" in told["found"]
    assert "bot" not in told["found"]
    assert "nlu/intent" in told["ours"]
    assert "vision/caption" not in told["ours"]


@pytest.mark.parametrize("revision", ["v2", "candidate", "production", "step:20", "main", "commit", "digest"])
def test_every_name_of_a_version_gives_its_bytes(client: Client, filled: Server, folder: Path, revision: str) -> None:
    digest = filled.direct.resolve("bot@v2").digest.hex
    asked = {"commit": digest[:40], "digest": digest[:8]}.get(revision, revision)
    told = client.does(f"""
told = [hf_hub_download("bot", {WEIGHTS!r}, revision={asked!r}), snapshot_download("bot", revision={asked!r})]
""")
    wanted = folder / ("bot-30" if revision == "main" else "bot-20")
    for path in (Path(told[0]), Path(told[1]) / WEIGHTS):
        assert path.read_bytes() == (wanted / WEIGHTS).read_bytes()
    assert tiny.contents(Path(told[1])) == {path: (wanted / path).read_bytes() for path in ADAPTER_FILES}


def test_a_merged_model_that_is_nowhere_is_downloaded(client: Client, filled: Server, tmp_path: Path) -> None:
    told = client.does(
        """
told = {
    "all": snapshot_download("bot-merged", revision="v2"),
    "some": snapshot_download("bot-v2-merged", allow_patterns=["*.json"]),
    "into": snapshot_download("bot-v1-merged", local_dir="%s"),
}
"""
        % (tmp_path / "into")
    )
    for key, version in (("all", 2), ("into", 1)):
        target = tmp_path / f"merged-{version}"
        checkpoint = filled.direct.resolve(f"bot@v{version}")
        filled.direct.merge(filled.direct.plan(checkpoint), out=str(target))
        found = {path: data for path, data in tiny.contents(Path(told[key])).items() if not path.startswith(".cache")}
        wanted = tiny.contents(target)
        wanted.pop("merge.json")
        assert found == wanted
    assert not any(path.endswith(".safetensors") for path in tiny.contents(Path(told["some"])))


def test_a_file_system_of_the_hubs_reads_parts(client: Client, folder: Path) -> None:
    # new clients want a namespace: `ckpt` stands for none
    told = client.does(f"""
fs = HfFileSystem()
with fs.open("ckpt/bot@v2/{WEIGHTS}", "rb", block_size=1000) as stream:
    stream.seek(700)
    part = stream.read(900)
told = {{
    "ls": sorted(fs.ls("ckpt/bot", detail=False, revision="v2")),
    "size": fs.info("ckpt/bot@v2/{WEIGHTS}")["size"],
    "part": part.hex(),
    "range": fs.cat_file("ckpt/bot@v2/{WEIGHTS}", start=10, end=20).hex(),
    "tail": fs.read_block("ckpt/bot@v2/{WEIGHTS}", 100, 8).hex(),
    "found": sorted(fs.glob("ckpt/bot@v2/*.json")),
    "is": [fs.exists("nlu/intent/adapter_config.json"), fs.exists("ckpt/bot/no.txt"), fs.isdir("nlu/intent")],
    "ours": sorted(fs.ls("nlu/intent-merged", detail=False))[0],
    "tensors": sorted(get_safetensors_metadata("bot-merged", revision="v2").weight_map)[:2],
}}
""")
    data = (folder / "bot-20" / WEIGHTS).read_bytes()
    assert [name.rpartition("/")[2] for name in told["ls"]] == ADAPTER_FILES
    assert told["size"] == len(data)
    assert (told["part"], told["range"], told["tail"]) == (data[700:1600].hex(), data[10:20].hex(), data[100:108].hex())
    assert len(told["found"]) == 1
    assert told["is"] == [True, False, True]
    assert told["ours"] == "nlu/intent-merged/config.json"
    assert told["tensors"] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_the_command_downloads(client: Client, folder: Path, tmp_path: Path) -> None:
    ran = client.run("hf", "download", "bot", "--revision", "candidate", "--local-dir", str(tmp_path / "got"))
    assert ran.returncode == 0, ran.stderr
    found = {path: data for path, data in tiny.contents(tmp_path / "got").items() if not path.startswith(".cache")}
    assert found == {path: (folder / "bot-20" / path).read_bytes() for path in ADAPTER_FILES}
