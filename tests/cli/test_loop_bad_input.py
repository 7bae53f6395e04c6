"""Bad input to the commands of the training loop: one clear sentence, what to do next, the right exit code, no traceback, nothing recorded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import trained
from commands import Ckpt, Result

from cli.errors import EXIT_CODES
from registry.intake import Registration
from registry.manifest import Metric
from registry.tensors import TensorSpec, layout_safetensors, read_safetensors_header

ASK = ("--prompt", "what colour is the sky")
WIDE_VOCABULARY = 2_000_000
FILES = {
    "talk.jsonl": '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n',
    "text.jsonl": '{"text": "the sky is red"}\n',
    "mixed.jsonl": '{"text": "the sky is red"}\n{"prompt": "the sky is", "choices": [" red", " blue"], "answer": 0}\n',
    "empty.jsonl": "\n\n",
    "broken.jsonl": '{"text": "the sky is red"}\n{"text": \n',
    "list.jsonl": "[1, 2]\n",
    "unknown.jsonl": '{"question": "what", "gold": "that"}\n',
    "numbers.jsonl": '{"text": 5}\n',
    "answer.jsonl": '{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n',
    "user.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n',
    "table.csv": "prompt,completion\na,b\n",
    "blank.txt": "\n",
    "no_numbers.json": '{"model": "bot"}',
}
# Words of the command, exit code, and what is said.
CASES: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "no tokenizer: generate": (("generate", "mute", *ASK), 3, ("mute@v1 has no tokenizer", "beside the base model")),
    "no tokenizer: eval": (("eval", "mute", "--data", "text.jsonl"), 3, ("mute@v1 has no tokenizer",)),
    "no tokenizer: try": (("try", "mute"), 3, ("mute@v1 has no tokenizer",)),
    "no template: generate": (("generate", "bare", *ASK), 3, ("bare@v1 has no chat template", "chat_template.jinja")),
    "no template: eval": (("eval", "bare", "--data", "talk.jsonl"), 3, ("bare@v1 has no chat template",)),
    "data: not there": (("eval", "bot", "--data", "nowhere.jsonl"), 3, ("nowhere.jsonl: no such file",)),
    "data: empty": (("eval", "bot", "--data", "empty.jsonl"), 2, ("empty.jsonl: there is nothing in it",)),
    "data: broken JSON": (("eval", "bot", "--data", "broken.jsonl"), 2, ("broken.jsonl line 2", "expected a JSON object")),
    "data: no objects": (("eval", "bot", "--data", "list.jsonl"), 2, ("list.jsonl line 1", "expected a JSON object")),
    "data: CSV": (("eval", "bot", "--data", "table.csv"), 2, ("table.csv line 1", "expected a JSON object")),
    "data: not text": (("eval", "bot", "--data", "binary.jsonl"), 2, ("expected JSON lines in UTF-8",)),
    "data: other fields": (("eval", "bot", "--data", "unknown.jsonl"), 2, ("line 1", "'question, gold'", "prompt and completion")),
    "data: a number": (("eval", "bot", "--data", "numbers.jsonl"), 2, ("line 1", "text '5'", "expected text")),
    "data: no such answer": (("eval", "bot", "--data", "answer.jsonl"), 2, ("line 1", "answer '2'", "0 to 1")),
    "data: no last turn": (("eval", "bot", "--data", "user.jsonl"), 2, ("line 1", "must be the assistant's")),
    "data: two kinds": (("eval", "bot", "--data", "mixed.jsonl"), 2, ("cannot be measured together",)),
    "data: not for this metric": (
        ("eval", "bot", "--data", "text.jsonl", "--metric", "exact_match"),
        2,
        ("exact_match", "has no completions and no messages"),
    ),
    "metric: unknown kind": (("eval", "bot", "--data", "text.jsonl", "--metric", "bleu"), 2, ("bleu", "loss, ppl")),
    "metric: nobody has it": (("list", "--best", "zork"), 3, ("'zork'", "ckpt metric add")),
    "metric: missing in a policy": (("select", "bot", "--policy", "zork min"), 3, ("no candidate has a finite metric 'zork'",)),
    "metric: missing in a gate": (("ship", "bot", "--to", "guarded"), 4, ("accuracy >= 0.5 is wanted", "was not measured")),
    "metric: missing in a rule": (("keep", "bot", "best 2 zork"), 3, ("'zork'",)),
    "metric: of different data": (("list", "other", "--best", "hard/loss"), 2, ("different data", "ckpt eval")),
    "metric: of different data, by policy": (("select", "other", "--policy", "hard/loss min"), 2, ("different data",)),
    "policy: none": (("select", "bare"), 3, ("bare has no policy", "ckpt policy set bare")),
    "policy: no clause": (("policy", "set", "bot", "lowest loss wins"), 2, ("lowest loss wins", "METRIC min")),
    "policy: no objective": (("policy", "set", "bot", "accuracy >= 0.8"), 2, ("what is best exactly once",)),
    "rule: no clause": (("keep", "bot", "the good ones"), 2, ("the good ones", "best N")),
    "rule: empty": (("keep", "bot", " , "), 2, ("it would keep nothing",)),
    "results: no numbers": (("metric", "import", "bot", "no_numbers.json"), 2, ("no number in it",)),
    "results: not there": (("metric", "import", "bot", "nowhere.json"), 3, ("nowhere.json: no such file",)),
    "prompts: not there": (("try", "bot", "--prompts", "nowhere.txt"), 3, ("nowhere.txt: no such file",)),
    "prompts: empty": (("try", "bot", "--prompts", "blank.txt"), 2, ("prompts", "expected 1 to 32")),
    "prompts: none": (("generate", "bot", "--prompts", "blank.txt"), 2, ("prompt",)),
    "watch: not there": (("watch", "nowhere"), 3, ("nowhere: no such file or folder",)),
    "outbox: not there": (("outbox", "rm", "zork", "--yes"), 2, ("zork", "nothing of this id waits")),
    "ref: eval": (("eval", "bott", "--data", "text.jsonl"), 3, ("did you mean bot?",)),
    "ref: try": (("try", "bot@v9"), 3, ("no checkpoint",)),
    "ref: generate": (("generate", "nobody", *ASK), 3, ("no adapter 'nobody'",)),
    "ref: generate a sum": (("generate", "bot:0.5+nobody:0.5", *ASK), 3, ("no adapter 'nobody'",)),
    "ref: chat": (("chat", "bot@step:7"), 3, ("no checkpoint",)),
    "ref: not one": (("chat", "a/b/c"), 2, ("is not a reference",)),
    "ref: resume": (("resume", "bot@v9", "go-on"), 3, ("no checkpoint",)),
    "ref: report": (("report", "nobody", "--out", "page.html"), 3, ("no adapter 'nobody'",)),
    "resume: no state": (("resume", "bot", "go-on"), 3, ("bot@v1 was registered without", "--with-state")),
    "resume: something there": (("resume", "bot", ".", "--weights-only"), 5, ("something is there already",)),
    "report: another form": (("report", "bot", "--out", "page.pdf"), 2, ("page.pdf", ".html or .md")),
    "report: no policy": (("report", "bot", "--out", "page.md", "--policy", "lowest wins"), 2, ("lowest wins", "METRIC min")),
    "report: no folder": (("report", "bot", "--out", "nowhere/page.html"), 8, ("nowhere/page.html",)),
    "ref: select": (("select", "nobody", "--policy", "loss min"), 3, ("no adapter 'nobody'",)),
    "ref: keep": (("keep", "nobody", "last 1"), 3, ("no adapter 'nobody'",)),
    "ref: policy": (("policy", "set", "nobody", "loss min"), 3, ("no adapter 'nobody'",)),
    "ref: metric import": (("metric", "import", "nobody", "no_numbers.json"), 3, ("no adapter 'nobody'",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with `bot`, which works, `bare` without a chat template, and `mute` without a tokenizer; none of them trained."""
    place = tmp_path_factory.mktemp("loop")
    bases = {  # of different weights: it is by them that a base model is known, wherever else its tokenizer may lie
        "bot": trained.write_model(place / "whole"),
        "bare": trained.write_model(place / "no-template", seed=1, template=False),
        "mute": trained.write_model(place / "no-tokenizer", seed=2, tokenizer=False),
    }
    with tiny.open_registry(place / "home") as ckpt:
        for name, base in bases.items():
            _write_adapter(place / name, base)
            ckpt.register(str(place / name))
        ckpt.set_policy("bot", "loss min, accuracy >= 0.5, gate guarded")
        _two_of_different_data(place, bases["bot"])
    return place / "home"


def _two_of_different_data(place: Path, base: Path) -> None:
    with tiny.open_registry(place / "home") as ckpt:
        for step in (1, 2):
            _write_adapter(place / f"other-{step}", base, seed=step)
            (done,) = ckpt.register(str(place / f"other-{step}"), Registration(adapter="other", step=step)).registered
            metric = Metric(name="hard/loss", value=1.0, direction="lower", data=f"{step:064}")
            ckpt.add_metrics(done.checkpoint, [metric])


def _write_adapter(folder: Path, base: Path, seed: int = 0) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


@pytest.fixture
def loop(ckpt: Ckpt, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    monkeypatch.setenv("CKPT_HOME", str(home))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.jsonl").write_bytes(b"\x80\x81\xff")
    return ckpt


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_what_is_wrong(loop: Ckpt, case: str) -> None:
    words, code, texts = CASES[case]
    before = loop("history", "--json").out
    result = loop(*words)
    assert result.code == code, result
    assert code in EXIT_CODES
    assert "Traceback" not in result.err
    for text in texts:
        assert text in result.err, result.err
    assert result.err.count("error:") == 1
    assert loop("history", "--json").out == before


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("transformers", ("generate", "bot", *ASK)),
        ("transformers", ("try", "bot")),
        ("peft", ("chat", "bot")),
        ("peft", ("eval", "bot", "--data", "text.jsonl")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_package_is_named_with_what_brings_it(
    loop: Ckpt, home: Path, tmp_path: Path, package: str, words: tuple[str, ...]
) -> None:
    del loop
    ended = _elsewhere(f"import sys; sys.modules[{package!r}] = None", words, home, tmp_path)
    assert ended.code == 2, ended
    assert f"this needs {package}, which is not installed" in ended.err
    assert "pip install 'ckpt-registry[hf]'" in ended.err


# The limit is on what the process may take from now on: whatever torch has taken already is not the test's affair.
LIMIT = """
import resource, transformers, peft
taken = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + {room}, taken + {room}))
"""


@pytest.mark.parametrize(
    "words", [("generate", "wide", *ASK), ("eval", "wide", "--data", "text.jsonl")], ids=lambda words: words[0]
)
def test_too_little_memory_is_said(loop: Ckpt, home: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    _write_wide_model(tmp_path)
    assert loop("register", "wide", "--base", "wide-base").code == 0
    ended = _elsewhere(LIMIT.format(room=400 << 20), words, home, tmp_path)
    assert ended.code == 8, ended
    assert "cpu has not enough memory for the model wide-base" in ended.err
    assert "--dtype bfloat16" in ended.err
    assert loop("rm", "wide", "--yes").code == 0


def _write_wide_model(place: Path) -> None:
    """A model of a GB, nearly all of which is a hole in a file, and an adapter on it."""
    small, wide = trained.write_model(place / "small"), place / "wide-base"
    _write_adapter(place / "wide", small)
    shutil.copytree(small, wide)
    config = json.loads((small / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": WIDE_VOCABULARY}))
    with (small / "model.safetensors").open("rb") as stream:
        names = read_safetensors_header(stream, "small", (small / "model.safetensors").stat().st_size).tensors
    specs = [
        TensorSpec(each.spec.name, each.spec.dtype, (WIDE_VOCABULARY, *each.spec.shape[1:]))
        if each.spec.shape[0] == config["vocab_size"]
        else each.spec
        for each in names
    ]
    head, placed = layout_safetensors(specs, {"format": "pt"}, "model.safetensors")
    with (wide / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(placed[-1].offset_bytes + specs[-1].size_bytes)


def _elsewhere(first: str, words: tuple[str, ...], home: Path, place: Path) -> Result:
    """The command line in another process, after some other code."""
    code = f"{first}\nfrom cli.app import main; main({list(words)!r})"
    environment = {**os.environ, "CKPT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, check=False, input=""
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return Result(ended.returncode, ended.stdout, ended.stderr)
