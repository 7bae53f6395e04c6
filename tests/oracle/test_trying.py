"""Trying against transformers and peft by hand: the same answers, and the difference of the logits of both models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import trained

from registry.errors import BelowPolicy, InvalidInput, PathNotFound
from registry.inference import Message, open_runner
from registry.registering import Registration
from registry.service import Registry
from registry.trying import PROMPTS, Trying, over_tolerance, read_prompts, try_checkpoint

pytestmark = pytest.mark.oracle
LITGPT = Path(__file__).parents[1] / "data" / "litgpt"
QUESTIONS = ("what colour is the sky", "what colour is the moon")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.train(folder / "bot", trained.write_model(folder / "base"), steps=(20, 60))
    return folder


def logits(folder: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def test_what_is_found_is_what_both_models_give_by_hand(registered: Registry, runs: Path, tmp_path: Path) -> None:
    checkpoint = registered.resolve("bot@step:60")
    before = tiny.stored_blobs(registered.settings.home)
    tried = try_checkpoint(registered, checkpoint, Trying(prompts=QUESTIONS, max_tokens=12, device="cpu"))
    assert tiny.stored_blobs(registered.settings.home) == before
    registered.merge(registered.plan(checkpoint), out=str(tmp_path / "merged"))
    runner = open_runner(registered, checkpoint, device="cpu")
    for question, trial in zip(QUESTIONS, tried.trials, strict=True):
        ids = runner.prompt([Message("user", question)])
        whole = [*ids, *runner.encode(trial.adapter)]
        unmerged = logits(runs / "base", runs / "bot/checkpoint-60", whole)[len(ids) - 1 :]
        merged = logits(tmp_path / "merged", None, whole)[len(ids) - 1 :]
        assert trial.largest == pytest.approx(np.abs(unmerged - merged).max(), abs=1e-5)
        assert trial.mean == pytest.approx(np.abs(unmerged - merged).mean(), abs=1e-6)
        assert (trial.agreed, trial.places) == (len(unmerged), len(unmerged))
        assert trial.merged == trial.adapter
        assert trial.base != trial.adapter
    assert tried.largest is not None
    assert 0 < tried.largest < 1e-3
    assert set(tried.tokens_per_second) == {"base", "adapter", "merged"}


def test_a_policy_can_ask_for_it(registered: Registry) -> None:
    registered.set_policy("bot", "eval_loss min, try/logit_difference <= 0.05, gate production")
    checkpoint = registered.resolve("bot@step:60")
    with pytest.raises(BelowPolicy) as refused:
        registered.ship(checkpoint, "production")
    assert list(refused.value.failures) == [
        "try/logit_difference <= 0.05 is wanted, try/logit_difference was not measured: `ckpt try` measures it"
    ]
    tried = try_checkpoint(registered, checkpoint, Trying(prompts=QUESTIONS, max_tokens=8))
    checkpoint = registered.resolve("bot@step:60")
    assert checkpoint.metric("try/logit_difference") == tried.largest
    assert checkpoint.metric("try/agreement") == 1.0
    assert {metric.data for metric in checkpoint.metrics if metric.name.startswith("try/")} == {tried.data}
    assert QUESTIONS[0] in checkpoint.notes[-1].text
    registered.ship(checkpoint, "production")
    assert list(over_tolerance(tried, 0.05)) == []
    assert list(over_tolerance(tried, 0.0)) != []


def test_what_cannot_be_merged_is_tried_unmerged(registered: Registry, runs: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs / "base")
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "soft"
    )
    soft = (
        registered.register(str(tmp_path / "soft"), Registration(adapter="soft", base="base")).registered[0].checkpoint
    )
    tried = try_checkpoint(registered, soft, Trying(prompts=QUESTIONS[:1], max_tokens=4))
    assert tried.unmerged_because
    assert tried.largest is tried.agreement is tried.trials[0].merged is None
    assert [metric.name for metric in tried.metrics] == ["try/tokens_per_second"]
    assert "not merged" in tried.note
    assert list(over_tolerance(tried, 1.0)) == [f"it could not be merged: {tried.unmerged_because}"]


@pytest.mark.parametrize(("name", "is_merged"), [("lora-llama-qv", True), ("adapter-llama", False)])
def test_adapters_of_litgpt_are_tried(ckpt: Registry, name: str, is_merged: bool) -> None:
    said = Registration(adapter="bot", base=str(LITGPT / "base-llama-gqa"))
    checkpoint = ckpt.register(str(LITGPT / name / "final"), said).registered[0].checkpoint
    tried = try_checkpoint(ckpt, checkpoint, Trying(prompts=("hello",), max_tokens=4, device="cpu"))
    assert (tried.trials[0].merged is not None, bool(tried.unmerged_because)) == (is_merged, not is_merged)
    assert (tried.largest is not None and tried.largest < 1e-4) == is_merged


def test_nothing_is_recorded_where_that_is_not_wanted(registered: Registry) -> None:
    checkpoint = registered.resolve("bot@step:20")
    try_checkpoint(registered, checkpoint, Trying(prompts=QUESTIONS[:1], max_tokens=2), records=False)
    assert registered.resolve("bot@step:20") == checkpoint


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\n two\n")
    lines.write_text(json.dumps({"prompt": "one\ntwo"}) + "\n")
    assert read_prompts(plain) == ("one", "two")
    assert read_prompts(lines) == ("one\ntwo",)
    for wrong in ("[]", "{}", "{", '{"prompt": 3}', '{"prompt": " "}'):
        lines.write_text(wrong)
        with pytest.raises(InvalidInput, match="line 1"):
            read_prompts(lines)
    with pytest.raises(PathNotFound):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(InvalidInput):
        Trying(prompts=())
    with pytest.raises(InvalidInput):
        Trying(prompts=PROMPTS * 5)


def test_a_prompt_that_is_too_long_is_said(registered: Registry) -> None:
    with pytest.raises(InvalidInput, match="--max-tokens"):
        try_checkpoint(registered, registered.resolve("bot"), Trying(prompts=("sky",), max_tokens=400))
