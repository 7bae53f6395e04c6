"""Tiny random models of litgpt in many shapes, and adapters on them as its own classes hold, run and save them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import litgpt
import torch
import yaml
from litgpt import adapter_v2, lora
from torch import Tensor, nn

FLAGS = ("query", "key", "value", "projection", "mlp", "head")
_SIZES: dict[str, Any] = {
    "block_size": 32, "n_layer": 4, "n_embd": 24, "n_head": 6, "n_query_groups": 2, "intermediate_size": 20, "vocab_size": 40,
    "padded_vocab_size": 40, "bias": False, "parallel_residual": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
}  # fmt: skip
# What each shape has that no other has, beside the row order of its heads.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},  # six query heads on two key-value heads
    "mha": {"n_query_groups": 6},
    "mqa": {"n_query_groups": 1},
    "wide": {"head_size": 7, "norm_qk": True},  # Qwen3: more rows of query than columns
    "biased": {"attn_bias": True},  # Qwen2.5: biases on query, key and value alone
    "neox": {"n_query_groups": 6, "bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
             "parallel_residual": True, "rotary_percentage": 0.5},
    "phi": {"n_query_groups": 6, "bias": True, "lm_head_bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
            "parallel_residual": True, "shared_attention_norm": True},
    "gemma": {"name": "Gemma-tiny", "mlp_class_name": "GemmaMLP", "scale_embeddings": True, "post_attention_norm": True,
              "post_mlp_norm": True},  # the norms' weights are one less than what they multiply with
    "moe": {"mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 2},
}  # fmt: skip


def random_values(parameters: Iterable[nn.Parameter], seed: int, spread: float = 0.2) -> None:
    """Give every parameter normal values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def make_base(folder: Path, shape: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model directory of litgpt; norms and biases are random too."""
    folder.mkdir()
    config = litgpt.Config(**{**_SIZES, "name": f"tiny-{shape}", **SHAPES[shape]})
    model = litgpt.GPT(config).to(dtype)
    random_values(model.parameters(), seed=len(shape))
    torch.save(model.state_dict(), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    return folder


def _config(kind: type[litgpt.Config], base: Path, **more: Any) -> Any:
    known = {field.name for field in fields(kind)}
    saved = yaml.safe_load((base / "model_config.yaml").read_text())
    return kind(**{key: value for key, value in saved.items() if key in known}, **more)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def load_model(folder: Path) -> litgpt.GPT:
    """Load a model directory as litgpt does: every field of its configuration known, no tensor missing or left over."""
    model = litgpt.GPT(litgpt.Config(**yaml.safe_load((folder / "model_config.yaml").read_text())))
    weights = read_weights(folder / "lit_model.pth")
    model = model.to(weights["lm_head.weight"].dtype)
    model.load_state_dict(weights, strict=True)
    return model


def _save_adapter(model: nn.Module, base: Path, folder: Path, kind: str, keep: Callable[[str, Any], bool]) -> None:
    folder.mkdir()
    names = {key: value for key, value in model.state_dict().items() if keep(key, value)}
    torch.save({"model": names}, folder / f"lit_model.pth.{kind}")
    (folder / "model_config.yaml").write_bytes((base / "model_config.yaml").read_bytes())


def make_lora(
    base: Path,
    folder: Path,
    flags: Iterable[str],
    *,
    rank: int = 3,
    alpha: float = 7,
    dtype: torch.dtype = torch.float32,
) -> lora.GPT:
    """Save a LoRA with random factors. Gives the model as litgpt runs it, unmerged."""
    options = {f"lora_{flag}": flag in tuple(flags) for flag in FLAGS}
    model = lora.GPT(_config(lora.Config, base, lora_r=rank, lora_alpha=alpha, **options)).to(dtype)
    model.load_state_dict(read_weights(base / "lit_model.pth"), strict=False)
    random_values((value for name, value in model.named_parameters() if "lora_" in name), seed=7)
    _save_adapter(model, base, folder, "lora", lora.lora_filter)
    hyper = {"checkpoint_dir": str(base), "lora_r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **options}
    (folder / "hyperparameters.yaml").write_text(yaml.dump(hyper))
    return model


def make_adapter_v2(base: Path, folder: Path, *, gates: float = 0.0, router_bias: bool = False) -> adapter_v2.GPT:
    """Save an Adapter v2 with random values, its gates spread so wide. Gives the model as litgpt runs it."""
    model = adapter_v2.GPT(_config(adapter_v2.Config, base)).to(
        read_weights(base / "lit_model.pth")["lm_head.weight"].dtype
    )
    model.load_state_dict(read_weights(base / "lit_model.pth"), strict=False)
    own = {name: value for name, value in model.named_parameters() if adapter_v2.adapter_filter(name, value)}
    random_values(own.values(), seed=11)
    with torch.no_grad():
        for name, value in own.items():
            if name.endswith("adapter_scale"):
                value += 1
            elif name.endswith("gating_factor"):
                value *= gates / 0.2
            elif name.endswith("mlp.gate.adapter_bias") and not router_bias:
                value.zero_()
    _save_adapter(model, base, folder, "adapter_v2", adapter_v2.adapter_filter)
    return model


def logits(model: nn.Module) -> Tensor:
    """What a model answers to a fixed text, `[1, 12, rows]`."""
    with torch.no_grad():
        answer: Tensor = model.eval()(torch.arange(3, 15).unsqueeze(0))
    return answer
