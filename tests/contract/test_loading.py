"""The best checkpoint and a model in memory, in all three ways to run a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import trained
from sites import Maker, Site

from registry.errors import DirectionUnknown, MixedData, Refused, UnknownAdapter, UnknownMetric
from registry.manifest import Checkpoint, Metric
from registry.registering import Registration
from registry.service import Registry

LITGPT = Path(__file__).parents[1] / "data/litgpt"


def test_the_best_is_what_ranking_puts_first(ckpt: Registry, make: Maker) -> None:
    for loss in (0.5, 0.3, 0.4):
        ckpt.add_metrics(make("bot"), [Metric(name="eval_loss", value=loss), Metric(name="taste", value=loss)])
    assert ckpt.best("bot").ref == "bot@v2"
    assert ckpt.best("bot", "eval_loss", direction="higher").ref == "bot@v1"
    assert ckpt.best("bot", "taste", direction="lower") == ckpt.rank("bot", metric="eval_loss").groups[0].checkpoints[0]
    with pytest.raises(DirectionUnknown):
        ckpt.best("bot", "taste")
    with pytest.raises(UnknownMetric):
        ckpt.best("bot", "accuracy")
    with pytest.raises(UnknownAdapter):
        ckpt.best("nobody")


def test_values_of_different_data_have_no_best(ckpt: Registry, make: Maker) -> None:
    for number in range(2):
        ckpt.add_metrics(make("bot"), [Metric(name="loss", value=1.0 + number, data=f"{number}" * 64)])
    with pytest.raises(MixedData):
        ckpt.best("bot", "loss")


@pytest.fixture
def bot(ckpt: Registry, tmp_path: Path) -> Checkpoint:
    """A LoRA on a small Llama."""
    base = trained.write_model(tmp_path / "llama")
    ckpt.add_base(str(base), name="llama", copy=True)
    folder = write_lora(tmp_path / "bot", base)
    return ckpt.register(str(folder), Registration(adapter="bot", base="llama")).registered[0].checkpoint


def write_lora(folder: Path, base: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


def answer(model: Any) -> Any:
    import torch

    with torch.no_grad():
        found = model(torch.arange(5, 15).unsqueeze(0))
    return getattr(found, "logits", found)


def written(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.suffix != ".db"}


def test_a_model_of_transformers_comes_with_its_adapter_or_merged(
    ckpt: Registry, bot: Checkpoint, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    unmerged = ckpt.load("bot", device="cpu")
    assert isinstance(unmerged, PeftModel)
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), tmp_path / "bot")
    assert torch.equal(answer(unmerged), answer(by_hand))
    before = written(ckpt.settings.home)
    merged = ckpt.load(bot, merged=True, device="cpu")
    assert written(ckpt.settings.home) == before
    assert isinstance(merged, LlamaForCausalLM)
    assert torch.allclose(answer(merged), answer(by_hand), atol=1e-4)
    assert ckpt.merged() == []
    assert ckpt.load(bot, merged=True, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_of_litgpt_comes_with_its_adapter_or_merged(ckpt: Registry) -> None:
    import torch

    for name in ("base-llama-gqa", "adapter-llama/final", "lora-llama-qv/final"):
        if name.startswith("base"):
            ckpt.add_base(str(LITGPT / name), name="base", copy=True)
        else:
            ckpt.register(str(LITGPT / name), Registration(adapter=name.partition("/")[0], base="base"))
    unmerged, merged = (ckpt.load("lora-llama-qv", merged=way, device="cpu") for way in (False, True))
    assert type(unmerged).__module__ == type(merged).__module__ == "litgpt.model"
    assert torch.allclose(answer(unmerged), answer(merged), atol=1e-5)
    assert not torch.allclose(answer(unmerged), answer(ckpt.load("adapter-llama", device="cpu")), atol=1e-2)
    with pytest.raises(Refused):
        ckpt.load("adapter-llama", merged=True, device="cpu")


def test_what_is_not_there_is_not_loaded(site: Site, make: Maker) -> None:
    make("bot")
    with pytest.raises(UnknownAdapter):
        site.connect("ada").load("nobody")
    assert not tiny.stored_blobs(site.home) or site.name == "embedded"
