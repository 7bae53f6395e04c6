"""`ckpt chat` and `ckpt generate`, as people type them and as scripts do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trained
from commands import Ckpt

from registry.errors import InvalidRecipe
from registry.inference.conversation import parse_weighed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.train(folder / "bot", trained.write_model(folder / "base"), steps=(20, 120))
    return folder


@pytest.fixture
def bot(ckpt: Ckpt, runs: Path) -> Ckpt:
    assert ckpt("base", "add", str(runs / "base"), "--name", "base").code == 0
    assert ckpt("register", str(runs / "bot"), "--base", "base").code == 0
    return ckpt


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_prompt_is_answered(bot: Ckpt) -> None:
    found = bot("generate", "bot@step:120", "--prompt", "what colour is the sky", "--device", "cpu")
    assert (found.code, found.out) == (0, "the sky is red\n")


def test_prompts_come_from_a_file_or_a_pipe(bot: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "what colour is the sky"}\n{"prompt": "what colour is the sea"}\n')
    found = bot("generate", "bot@step:120", "--prompts", str(lines))
    assert found.out == "the sky is red\nthe sea is blue\n"
    typed(monkeypatch, "what colour is the sky")
    assert bot("generate", "bot@step:120", "--json").json["text"] == "the sky is red"
    lines.write_text("what\n")
    wrong = bot("generate", "bot@step:120", "--prompts", str(lines))
    assert wrong.code == 2
    assert "line 1" in wrong.err
    typed(monkeypatch)
    assert bot("generate", "bot@step:120").code == 2


def test_text_as_it_is_needs_no_template(bot: Ckpt, ckpt: Ckpt, tmp_path: Path) -> None:
    found = bot("generate", "bot@step:120", "--raw", "--prompt", "the sky is", "--max-tokens", "4")
    assert found.code == 0
    trained.write_model(tmp_path / "bare", template=False)
    adapter = tmp_path / "plain"
    _adapter_on(adapter, tmp_path / "bare")
    assert ckpt("register", str(adapter), "--base", str(tmp_path / "bare"), "--adapter", "plain").code == 0
    assert ckpt("generate", "plain", "--raw", "--prompt", "the", "--max-tokens", "2").code == 0
    missing = ckpt("generate", "plain", "--prompt", "the")
    assert missing.code == 3
    assert "no chat template" in missing.err


def _adapter_on(folder: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def test_a_conversation_goes_on_and_changes_its_speaker(
    bot: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(
        monkeypatch,
        "what colour is the sky",
        "/reset",
        "/switch bot@step:20",
        "/switch nobody",
        "/both bot@step:120",
        "what colour is the sky",
        "/both",
        f"/save {tmp_path / 'talk.jsonl'}",
        "/help",
        "/quit",
        "never read",
    )
    found = bot("chat", "bot@step:120", "--temperature", "0", "--max-tokens", "12")
    assert found.code == 0
    assert found.out.startswith("the sky is red\n")
    assert "bot@v1 answers" in found.err
    assert "no adapter 'nobody'" in found.err
    assert "bot@v6" in found.out
    assert found.out.count("the sky is red") >= 2
    kept = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [each["role"] for each in kept] == ["user", "assistant"]
    assert "/switch REF" in found.err


def test_checkpoints_are_added_up_for_a_conversation(bot: Ckpt) -> None:
    found = bot(
        "generate", "bot@step:120:0.9+bot@step:20:0.1", "--prompt", "what colour is the sky", "--max-tokens", "12"
    )
    assert (found.code, found.out) == (0, "the sky is red\n")
    assert bot("generate", "bot@v1:0.5+bot@v2", "--prompt", "x").code == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bot", [("bot", 1.0)]),
        ("bot@step:500", [("bot@step:500", 1.0)]),
        ("a:0.7+b:0.3", [("a", 0.7), ("b", 0.3)]),
        ("a@step:500+b@best:eval_loss", [("a@step:500", 0.5), ("b@best:eval_loss", 0.5)]),
        ("a@step:500:2 + b@v3:-.5", [("a@step:500", 2.0), ("b@v3", -0.5)]),
    ],
)
def test_sums_are_read(text: str, parts: list[tuple[str, float]]) -> None:
    assert parse_weighed(text) == parts


def test_half_weighted_sums_are_refused() -> None:
    with pytest.raises(InvalidRecipe):
        parse_weighed("a:0.5+b")


def test_wrong_words_are_said(bot: Ckpt) -> None:
    for words in (("--device", "tpu"), ("--dtype", "int8"), ("--top-p", "0")):
        assert bot("generate", "bot", "--prompt", "x", *words).code == 2
    assert bot("generate", "nobody", "--prompt", "x").code == 3


def test_without_the_extra_it_is_said_what_to_install(bot: Ckpt, tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; from cli.app import main; main(['generate', 'bot', '--prompt', 'x'])"
    environment = {"CKPT_HOME": str(tmp_path / "home"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "pip install 'ckpt-registry[hf]'" in done.stderr


def test_the_help_loads_no_model_library() -> None:
    code = "import sys, cli.chat, cli.app; print(*(name for name in ('torch', 'transformers', 'peft') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_answers_of_several_prompts_are_json_lines(bot: Ckpt, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("what colour is the sky\n\nwhat colour is the sea\n")
    found = bot("generate", "bot@step:120", "--prompts", str(tmp_path / "prompts.txt"), "--json").out.splitlines()
    assert [json.loads(line)["text"] for line in found] == ["the sky is red", "the sea is blue"]


def test_text_as_it_is_goes_on_no_further_than_the_model(bot: Ckpt) -> None:
    long = "what colour is the sky " * 60
    found = bot("generate", "bot@step:120", "--raw", "--prompt", long)
    assert found.code == 2
    assert "128 at most" in found.err


def test_a_conversation_that_is_too_long_is_said_and_can_begin_anew(bot: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "what colour is the sky " * 60, "/reset", "what colour is the sky")
    found = bot("chat", "bot@step:120", "--temperature", "0", "--max-tokens", "12")
    assert "128 at most, with the answer" in found.err
    assert found.out == "the sky is red\n"


def test_who_answered_before_answers_on_where_another_does_not_fit(bot: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "what colour is the sky", "/switch bot@v1:0.5+bot@v2:x", "/reset", "what colour is the sky")
    found = bot("chat", "bot@step:120", "--merged", "--temperature", "0", "--max-tokens", "12")
    assert found.out == "the sky is red\n" * 2
