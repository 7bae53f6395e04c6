"""What merges of models, tried with the real PEFT, have in common: an adapter's folder, the merged model, and the comparison of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from merging import Bench
from models import load_model, logits, lora, randomise
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

ATOL = 1e-5


@final
class Case:
    """A folder with an adapter and what we make of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.adapter, self.out = folder, folder / "adapter", folder / "merged"
        self.bench = Bench(folder)

    def train(self, model: PreTrainedModel, **options: Any) -> PeftModel:
        """Save a LoRA with random values on a loaded model. Gives the model as PEFT runs it, unmerged."""
        peft_model = get_peft_model(model, lora(**options))
        randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
        peft_model.save_pretrained(self.adapter)
        return peft_model

    def merge(self, base: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
        """Merge, and load the result with transformers."""
        self.bench.merge(self.adapter, base, self.out)
        return load_model(self.out, kind)


def assert_same_as(merged: PreTrainedModel, peft_model: PeftModel) -> None:
    """The same answers as the unmerged model, and the weights of PEFT's own merge."""
    assert torch.allclose(logits(merged), logits(peft_model), rtol=0, atol=ATOL)
    expected, found = peft_model.merge_and_unload().state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    odd = [name for name in expected if not torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)]
    assert odd == []
