"""Models in memory against transformers and peft by hand: logits, text, swapped and summed adapters, merged weights."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import tiny
import trained

from registry.errors import InvalidRecipe, NoChatTemplate, NoTokenizer, Refused
from registry.inference import Message, Runner, Sampling, open_runner
from registry.manifest import Checkpoint
from registry.registering import Registration
from registry.service import Registry

pytestmark = pytest.mark.oracle
QUESTION = [Message("user", "what colour is the sky")]


@pytest.fixture
def last(registered: Registry) -> Checkpoint:
    return registered.resolve("bot@step:120")


@pytest.fixture
def runner(registered: Registry, last: Checkpoint) -> Runner:
    return open_runner(registered, last, device="cpu")


def by_hand(runs: Path, step: int, ids: list[int]) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs / "base")
    if step:
        model = PeftModel.from_pretrained(model, runs / f"bot/checkpoint-{step}")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def test_the_trained_adapter_answers_what_it_learned(runner: Runner) -> None:
    said = "".join(runner.generate(runner.prompt(QUESTION), Sampling(max_tokens=12)))
    assert said == "the sky is red"


def test_logits_are_those_of_peft_whoever_answered_before(registered: Registry, runner: Runner, runs: Path) -> None:
    ids = runner.prompt(QUESTION)
    for step in (120, 0, 20, 120, 80, 0):
        runner.use(registered.resolve(f"bot@step:{step}") if step else None)
        np.testing.assert_allclose(runner.logits(ids), by_hand(runs, step, ids), atol=1e-5)


def test_more_adapters_than_are_kept_take_turns(registered: Registry, runner: Runner, runs: Path) -> None:
    ids = runner.prompt(QUESTION)
    for step in (20, 40, 60, 80, 100, 120, 20):
        runner.use(registered.resolve(f"bot@step:{step}"))
        np.testing.assert_allclose(runner.logits(ids), by_hand(runs, step, ids), atol=1e-5)


def test_a_weighted_sum_is_the_sum_of_the_deltas(
    registered: Registry, runner: Runner, runs: Path, tmp_path: Path
) -> None:
    from registry.mixing import Mixture

    first, second = registered.resolve("bot@step:20"), registered.resolve("bot@step:120")
    runner.use([(first, 0.7), (second, 0.3)])
    ids = runner.prompt(QUESTION)
    mixture = Mixture(method="linear", weights=(0.7, 0.3))
    registered.merge(registered.plan(first, second, mixture=mixture), out=str(tmp_path / "merged"))
    np.testing.assert_allclose(runner.logits(ids), _of_folder(tmp_path / "merged", ids), atol=2e-4)


def _of_folder(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def test_more_are_added_up_than_are_kept(registered: Registry, runner: Runner, runs: Path) -> None:
    found = [registered.resolve(f"bot@step:{step}") for step in (20, 40, 60, 80, 100, 120)]
    runner.use([(each, float(each.step == 100)) for each in found])
    ids = runner.prompt(QUESTION)
    np.testing.assert_allclose(runner.logits(ids), by_hand(runs, 100, ids), atol=2e-4)
    runner.use(found[0])
    np.testing.assert_allclose(runner.logits(ids), by_hand(runs, 20, ids), atol=1e-5)


def test_the_merged_model_is_the_materialised_one_and_nothing_is_written(
    registered: Registry, runner: Runner, last: Checkpoint, tmp_path: Path
) -> None:
    ids = runner.prompt(QUESTION)
    before = tiny.stored_blobs(registered.settings.home)
    runner.use_merged(last)
    found = runner.logits(ids)
    assert tiny.stored_blobs(registered.settings.home) == before
    registered.merge(registered.plan(last), out=str(tmp_path / "merged"))
    np.testing.assert_array_equal(found, _of_folder(tmp_path / "merged", ids))
    assert "".join(runner.generate(ids, Sampling(max_tokens=12))) == "the sky is red"
    runner.use(None)
    assert not np.allclose(runner.logits(ids), found)


def test_greedy_text_is_that_of_generate(runner: Runner, runs: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = runner.prompt([Message("user", "what colour is the moon")])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), runs / "bot/checkpoint-120")
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    text = AutoTokenizer.from_pretrained(runs / "base").decode(out, skip_special_tokens=True)
    assert "".join(runner.generate(ids, Sampling(max_tokens=12))) == text


def test_a_seed_gives_the_same_text_again(runner: Runner) -> None:
    ids = runner.prompt(QUESTION)
    warm = Sampling(max_tokens=20, temperature=3.0, seed=7)
    first = "".join(runner.generate(ids, warm))
    assert "".join(runner.generate(ids, warm)) == first
    assert first != "".join(runner.generate(ids, Sampling(max_tokens=20, temperature=3.0, seed=8)))
    assert "".join(runner.generate(ids, Sampling(max_tokens=12, temperature=3.0, top_p=1e-9))) == "the sky is red"


def test_text_comes_in_pieces_that_are_whole(runner: Runner) -> None:
    pieces = list(runner.generate(runner.prompt(QUESTION), Sampling(max_tokens=12)))
    assert len(pieces) > 1
    assert "".join(pieces) == "the sky is red"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_an_adapter_of_another_base_is_refused(registered: Registry, runner: Runner, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other")
    stranger = tiny.write_adapter(tmp_path / "stranger", base=other)
    found = registered.register(str(stranger), Registration(adapter="stranger")).registered[0].checkpoint
    with pytest.raises(Refused):
        runner.use(found)


def test_only_lora_is_added_up(registered: Registry, runner: Runner) -> None:
    with pytest.raises(InvalidRecipe):
        runner.use([])


@pytest.mark.parametrize(
    ("made", "error"), [({"tokenizer": False}, NoTokenizer), ({"template": False}, NoChatTemplate)]
)
def test_what_a_model_lacks_is_said(
    ckpt: Registry, tmp_path: Path, made: dict[str, bool], error: type[Exception]
) -> None:
    base = ckpt.add_base(str(trained.write_model(tmp_path / "bare", **made)), name="bare").base
    runner = open_runner(ckpt, base, device="cpu")
    with pytest.raises(error, match="bare"):
        runner.prompt(QUESTION)


def models_in_memory() -> int:
    from transformers import LlamaForCausalLM

    gc.collect()
    return sum(type(each) is LlamaForCausalLM for each in gc.get_objects())


def test_one_model_is_in_memory_at_a_time(registered: Registry, runs: Path) -> None:
    before, last = models_in_memory(), registered.resolve("bot@step:120")
    runner = open_runner(registered, registered.base("base"), device="cpu")
    assert models_in_memory() == before
    ids = runner.prompt(QUESTION)
    runner.use(last)
    unmerged = runner.logits(ids)
    assert models_in_memory() == before + 1
    runner.use_merged(last)
    merged = runner.logits(ids)
    assert models_in_memory() == before + 1
    runner.use(None)
    np.testing.assert_allclose(runner.logits(ids), by_hand(runs, 0, ids), atol=1e-5)
    assert models_in_memory() == before + 1
    runner.use(last)
    np.testing.assert_array_equal(runner.logits(ids), unmerged)
    np.testing.assert_allclose(merged, unmerged, atol=1e-3)


def test_what_cannot_be_merged_leaves_who_answered(registered: Registry, runner: Runner, last: Checkpoint) -> None:
    ids = runner.prompt(QUESTION)
    before = runner.logits(ids)
    folder = registered.settings.home / "odd"
    _prompt_tuning(folder, registered)
    odd = registered.register(str(folder), Registration(adapter="odd", base="base")).registered[0].checkpoint
    with pytest.raises(Refused):
        runner.use_merged(odd)
    np.testing.assert_array_equal(runner.logits(ids), before)


def _prompt_tuning(folder: Path, registered: Registry) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(registered.base("base").url)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(folder)


def test_tokenizers_are_told_apart_by_what_is_in_them(registered: Registry, runner: Runner) -> None:
    runner.use(registered.resolve("bot@step:20"))
    first = runner.speaker
    runner.use(registered.resolve("bot@step:40"))
    assert runner.speaker == first  # the trainer puts the same tokenizer beside each
    runner.use(None)
    assert runner.speaker != first


def test_adapters_that_replace_the_same_weights_are_not_added_up(registered: Registry, runner: Runner) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    folder = registered.settings.home / "whole"
    for seed in (1, 2):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(registered.base("base").url), config)
        model.base_model.model.lm_head.weight.data += seed
        model.save_pretrained(folder / f"checkpoint-{seed}")
    found = [each.checkpoint for each in registered.register(str(folder), Registration(base="base")).registered]
    with pytest.raises(InvalidRecipe, match="add them up"):
        runner.use([(each, 0.5) for each in found])
