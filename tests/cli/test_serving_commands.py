"""`ckpt serve-config`: flags to be copied, pinned names, and what cannot be served so."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import running
import tiny
from commands import Ckpt


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


@pytest.fixture
def bots(ckpt: Ckpt, tmp_path: Path, base: Path) -> Ckpt:
    """`support-bot` with two versions, of rank 4 and 12, the first in production."""
    for seed, rank in ((1, 4), (2, 12)):
        folder = tiny.write_adapter(tmp_path / f"v{seed}", base=base, seed=seed, rank=rank)
        assert ckpt("register", str(folder), "--adapter", "support-bot", "--base", str(base)).code == 0
    assert ckpt("ship", "support-bot@v1", "--to", "production").code == 0
    return ckpt


def test_vllm_gets_copies_of_pinned_versions(bots: Ckpt, tmp_path: Path, base: Path) -> None:
    found = bots("serve-config", "vllm", "support-bot@production", "support-bot", "support-bot@v1")
    copies = {f"v{number}": tmp_path / "home/serving" / digest for number, digest in enumerate(digests(bots), 1)}
    assert found.out.splitlines() == [
        f"vllm serve {base} \\",
        "  --enable-lora \\",
        "  --max-lora-rank 16 \\",
        f"  --lora-modules support-bot@v1={copies['v1']} support-bot@v2={copies['v2']}",
    ]
    for version, copy in copies.items():
        assert tiny.contents(copy) == tiny.contents(tmp_path / version)
    assert "a name is loaded once and kept" in found.err
    assert "answers as the base model" in found.err


def digests(ckpt: Ckpt) -> list[str]:
    return [
        ckpt("show", f"support-bot@v{number}", "--json").json["digest"].removeprefix("blake3:") for number in (1, 2)
    ]


def test_what_is_printed_is_one_command_of_a_shell(bots: Ckpt) -> None:
    text = bots("serve-config", "vllm", "support-bot@v1").out
    told = bots("serve-config", "vllm", "support-bot@v1", "--json").json
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == told["command"]
    assert (told["engine"], told["way"], told["environment"]) == ("vllm", "unmerged", {})
    (served,) = told["served"]
    assert (served["name"], served["checkpoint"]) == ("support-bot@v1", "support-bot@v1")
    assert told["command"][-1] == f"support-bot@v1={served['source']}"


def test_places_that_vllm_would_split_are_written_as_json(
    bots: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").rename(tmp_path / "a=b,c d")
    monkeypatch.setenv("CKPT_HOME", str(tmp_path / "a=b,c d"))
    module = bots("serve-config", "vllm", "support-bot@v1", "--json").json["command"][-1]
    assert module.startswith('{"name": "support-bot@v1", "path": "')
    assert shlex.quote(module) in bots("serve-config", "vllm", "support-bot@v1").out


def test_sglang_takes_the_rank_as_it_is(bots: Ckpt, tmp_path: Path, base: Path) -> None:
    lines = bots("serve-config", "sglang", "support-bot@v2").out.splitlines()
    assert lines[0] == f"python -m sglang.launch_server --model-path {base} \\"
    assert lines[2] == "  --max-lora-rank 12 \\"
    assert lines[3].startswith(f"  --lora-paths support-bot@v2={tmp_path / 'home/serving'}/")


def test_what_the_engine_refuses_is_refused_with_what_to_do(ckpt: Ckpt, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base, config={"alora_invocation_tokens": [1, 2]})
    assert ckpt("register", str(folder), "--adapter", "bot", "--base", str(base)).code == 0
    found = ckpt("serve-config", "vllm", "bot")
    assert found.code == 4
    assert "vLLM, unmerged, cannot serve bot@v1: an activated LoRA" in found.err
    assert "serve it with PEFT itself" in found.err
    assert found.out == ""


def test_adapters_of_two_base_models_are_not_served_together(bots: Ckpt, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", seed=7)
    folder = tiny.write_adapter(tmp_path / "math", base=other)
    assert bots("register", str(folder), "--adapter", "math", "--base", str(other)).code == 0
    found = bots("serve-config", "vllm", "support-bot", "math")
    assert found.code == 2
    assert "another base model than support-bot@v2" in found.err


def test_a_merged_model_needs_a_server(bots: Ckpt) -> None:
    found = bots("serve-config", "vllm", "support-bot", "--merged")
    assert found.code == 2
    assert "ckpt merge support-bot@v2 --out DIR" in found.err
    both = bots("serve-config", "vllm", "support-bot@v1", "support-bot@v2", "--merged", "--endpoint", "http://h")
    assert both.code == 2
    assert "one merged model" in both.err


ENDPOINT = ("--endpoint", "http://registry:8000/")


def test_through_a_server_each_version_is_a_repository(bots: Ckpt, tmp_path: Path) -> None:
    found = bots("serve-config", "vllm", "support-bot@v1", "support-bot@v2", *ENDPOINT)
    assert found.out.splitlines() == [
        'HF_ENDPOINT=http://registry:8000 HF_TOKEN="$CKPT_TOKEN" \\',
        "vllm serve base \\",
        "  --enable-lora \\",
        "  --max-lora-rank 16 \\",
        "  --lora-modules support-bot@v1=support-bot-v1 support-bot@v2=support-bot-v2",
    ]
    assert "HF_ENDPOINT stands for huggingface.co" in found.err
    assert not (tmp_path / "home/serving").exists()
    told = bots("serve-config", "sglang", "support-bot@v1", *ENDPOINT, "--json").json
    assert told["environment"] == {"HF_ENDPOINT": "http://registry:8000", "HF_TOKEN": "$CKPT_TOKEN"}
    assert told["command"][-2:] == ["--lora-paths", "support-bot@v1=support-bot-v1"]


def test_a_merged_model_is_a_repository_that_nobody_stored(bots: Ckpt, tmp_path: Path) -> None:
    found = bots("serve-config", "vllm", "support-bot@production", "--merged", *ENDPOINT)
    assert found.out.splitlines()[1:] == ["vllm serve support-bot-v1-merged \\", "  --served-model-name support-bot@v1"]
    told = bots("serve-config", "sglang", "support-bot@v1", "--merged", *ENDPOINT, "--json").json
    assert told["way"] == "merged"
    assert told["command"][3:] == ["--model-path", "support-bot-v1-merged", "--served-model-name", "support-bot@v1"]
    with tiny.open_registry(tmp_path / "home") as registry:
        assert not registry.repository(told["served"][0]["source"]).is_stored


def test_what_is_only_served_merged_is_named_as_a_repository(ckpt: Ckpt, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base, config={"layers_to_transform": [0, 1], "bias": "all"})
    assert ckpt("register", str(folder), "--adapter", "bot", "--base", str(base)).code == 0
    found = ckpt("serve-config", "vllm", "bot", *ENDPOINT)
    assert found.code == 4
    assert "`ckpt serve-config vllm bot@v1 --merged` serves it as the repository bot-v1-merged" in found.err
    assert ckpt("serve-config", "vllm", "bot", "--merged", *ENDPOINT).code == 0


def test_what_cannot_be_merged_has_no_merged_repository(ckpt: Ckpt, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base, config={"use_qalora": True})
    assert ckpt("register", str(folder), "--adapter", "bot", "--base", str(base)).code == 0
    found = ckpt("serve-config", "vllm", "bot", "--merged", *ENDPOINT)
    assert found.code == 4
    assert "vLLM, merged, cannot serve bot@v1: cannot be merged: use_qalora" in found.err


def test_a_server_that_is_set_is_the_endpoint(bots: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.serving(running.settings_of(tmp_path / "home")) as server:
        monkeypatch.setenv("CKPT_SERVER", server.url)
        monkeypatch.setenv("CKPT_HOME", str(tmp_path / "elsewhere"))
        lines = bots("serve-config", "vllm", "support-bot@v1").out.splitlines()
    assert lines[0].startswith(f"HF_ENDPOINT={server.url} ")
    assert lines[-1] == "  --lora-modules support-bot@v1=support-bot-v1"


def test_a_base_model_that_shares_its_name_is_asked_for_by_its_weights(ckpt: Ckpt, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base)
    assert ckpt("register", str(folder), "--adapter", "base", "--base", str(base)).code == 0
    (line,) = [
        line for line in ckpt("serve-config", "vllm", "base", *ENDPOINT).out.splitlines() if "vllm serve" in line
    ]
    digest = ckpt("base", "list", "--json").json[0]["fingerprint"]["weights"].removeprefix("blake3:")
    assert line == f"vllm serve base-{digest[:12]} \\"


def test_a_name_that_no_client_of_the_hub_takes_is_served_from_folders(ckpt: Ckpt, tmp_path: Path, base: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "bot", base=base)
    assert ckpt("register", str(folder), "--adapter", "lr--1", "--base", str(base)).code == 0
    found = ckpt("serve-config", "vllm", "lr--1", *ENDPOINT)
    assert found.code == 2
    assert "take no name with --" in found.err
    assert ckpt("serve-config", "vllm", "lr--1").code == 0
