"""Adapters of every PEFT method on tiny models, and on modules that language models seldom have; and what they are merged into."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from merging import Bench, read_weights
from models import randomise
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry.tensors import DType

BaseMaker = Callable[..., Path]
ATOL = 1e-5
# Square, wide and tall layers of each model.
TARGETS = {
    "llama": ["q_proj", "k_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen2": ["q_proj", "k_proj", "v_proj"],
    "neox": ["query_key_value", "dense"],
}


def config_of(method: str, family: str, options: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration, on square and other layers unless told otherwise."""
    config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](
        **{"target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **options}
    )
    return config


@final
class Case:
    """A folder with an adapter and what we make of it."""

    def __init__(self, folder: Path) -> None:
        self.adapter, self.out = folder / "adapter", folder / "merged"
        self.bench = Bench(folder)

    def merge(self, base: Path, dtype: DType | None = None) -> dict[str, Tensor]:
        """Merge; gives the result's tensors."""
        out = self.out if dtype is None else self.out.with_name(dtype.value)
        self.bench.merge(self.adapter, base, out, dtype)
        return read_weights(out)

    def configure(self, **changes: Any) -> None:
        """Change fields of the adapter's configuration; None takes one out."""
        path = self.adapter / "adapter_config.json"
        fields = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def assert_like_peft(found: Mapping[str, Tensor], peft_model: PeftModel) -> None:
    """Every tensor of a model directory is what PEFT merges."""
    expected = peft_model.merge_and_unload().state_dict()
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=ATOL)


def write_module(folder: Path, module: nn.Module) -> Path:
    """A base model that is just a module, with random values."""
    randomise(module.parameters(), seed=5)
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "of its own"}))
    return folder


def adapt_module(base: Path, module: nn.Module, folder: Path, config: PeftConfig) -> PeftModel:
    """Save an adapter with random values; gives the module as PEFT runs it, unmerged."""
    module.load_state_dict(load_file(base / "model.safetensors"))
    peft_model = get_peft_model(module, config)
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    peft_model.save_pretrained(folder)
    return peft_model
