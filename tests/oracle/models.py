"""Tiny random models of real architectures, and adapters of the real PEFT on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

ROWS = 64
_SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
_GPT2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA),
    "mistral": (MistralConfig, _LLAMA),
    "qwen2": (Qwen2Config, _LLAMA),  # biases on query, key and value
    "qwen3": (Qwen3Config, {**_LLAMA, "head_dim": 12}),  # heads wider than the model
    "gemma": (GemmaConfig, {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}),  # tied
    "gpt2": (GPT2Config, _GPT2),  # tied, Conv1D, some of them square
    "neox": (GPTNeoXConfig, {**_SIZES, "tie_word_embeddings": False}),  # fused query, key and value
}
FAMILIES = sorted(_FAMILIES)
_EXPERTS = {**_LLAMA, "num_experts_per_tok": 2}
_MIXTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {**_EXPERTS, "num_local_experts": 3}),  # names and layout on disk differ from those in memory
    "qwen2_moe": (  # with a shared expert
        Qwen2MoeConfig,
        {**_EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "phimoe": (PhimoeConfig, {**_EXPERTS, "num_local_experts": 3}),  # the router is renamed, too
    "qwen3_moe": (Qwen3MoeConfig, {**_EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "head_dim": 8}),
    "square_moe": (Qwen3MoeConfig, {**_EXPERTS, "num_experts": 3, "moe_intermediate_size": 32, "head_dim": 8}),
    "gpt_oss": (  # one tensor for all experts, transposed, gates interleaved; the down projection is square
        GptOssConfig,
        {**_EXPERTS, "num_local_experts": 3, "head_dim": 8, "intermediate_size": 32, "layer_types": ["full_attention"] * 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}  # fmt: skip
MIXTURES = sorted(_MIXTURES)


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with random weights; norms and biases are random too, so that an ignored one shows."""
    config_class, sizes = (_FAMILIES | _MIXTURES)[family]
    model = AutoModelForCausalLM.from_config(config_class(**{**sizes, **changes}), dtype=dtype)
    randomise(model.parameters(), seed=len(family))
    return model


def randomise(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Give every parameter normal values, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


def load_model(folder: Path, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Load a model directory with transformers; no tensor may be missing, unexpected or of another shape."""
    model, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    return model


def lora(**options: Any) -> LoraConfig:
    """A LoRA of rank 4 and alpha 10 on every linear layer but the head, unless told otherwise."""
    defaults = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **options})


def make_adapter(
    base: Path,
    folder: Path,
    config: PeftConfig,
    *,
    prepare: Callable[[PreTrainedModel], object] = lambda model: None,
    half: bool = False,
    **save: Any,
) -> PeftModel:
    """Save an adapter with random values to a folder. Gives the model as PEFT runs it, unmerged.

    `prepare` gets the loaded model before PEFT wraps it. `half`: the adapter has the base's dtype. `save` goes to `save_pretrained`.
    """
    model = load_model(base)
    prepare(model)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=not half)
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    peft_model.save_pretrained(folder, **save)
    return peft_model


def make_bare_adapter(base: Path, folder: Path, config: LoraConfig) -> PeftModel:
    """The same, trained on the model without its head, whose modules have no `model.` before their names."""
    peft_model = get_peft_model(AutoModel.from_pretrained(base), config)
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    peft_model.save_pretrained(folder)
    return peft_model


def grow(model: PreTrainedModel) -> None:
    """Give a model eight tokens more, with random values."""
    model.resize_token_embeddings(ROWS + 8, mean_resizing=False)
    randomise({model.get_input_embeddings().weight, model.get_output_embeddings().weight}, seed=3)


def logits(model: nn.Module) -> Tensor:
    """What a model answers to a fixed text, float32 `[1, 12, rows]`."""
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        answer: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return answer.float()
