"""Tiny models and adapters on disk, as transformers, PEFT and litgpt write them: 2 layers of Llama's shape, a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from registry import connect
from registry.service import Registry
from registry.settings import Settings

Arrays = dict[str, NDArray[np.float32]]
LAYERS, WIDTH, INNER, VOCABULARY = 2, 16, 24, 32
MODULES = {
    **{f"self_attn.{name}": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
LITGPT_CONFIG = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_query_groups": 4,
    "head_size": 4,
    "intermediate_size": INNER,
    "padded_vocab_size": VOCABULARY,
    "bias": False,
    "lm_head_bias": False,
}


def open_registry(home: Path) -> Registry:
    """A registry with its database and store below a folder."""
    return connect(Settings.from_environment({"CKPT_HOME": str(home), "CKPT_USER": "ada"}))


def base_tensors(seed: int = 0) -> Arrays:
    """The weights of the base model; another seed, other weights."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (WIDTH,)
        for module, shape in MODULES.items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_base(folder: Path, *, seed: int = 0, shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """A base model of the Hugging Face kind, in one file or several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = base_tensors(seed)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in list(tensors)[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", {**CONFIG, **(config or {})})
    write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": VOCABULARY - 1}}})
    return folder


def adapter_tensors(seed: int = 1, *, rank: int = 4, targets: Sequence[str] = ("q_proj", "v_proj")) -> Arrays:
    """LoRA factors, under PEFT's names."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for layer in range(LAYERS):
        for module, (d_out, d_in) in MODULES.items():
            if module.rpartition(".")[2] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                found[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, d_in)).astype(np.float32)
                found[f"{prefix}.lora_B.weight"] = random.standard_normal((d_out, rank)).astype(np.float32)
    return found


def write_adapter(
    folder: Path,
    *,
    base: str | Path = "",
    seed: int = 1,
    rank: int = 4,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A LoRA adapter of PEFT. `config` changes fields of `adapter_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
    }
    save_file(adapter_tensors(seed, rank=rank, targets=targets), folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {**fields, **(config or {})})
    return folder


def write_run(folder: Path, *, base: str | Path = "", steps: Sequence[int] = (9, 50, 100)) -> Path:
    """What the Hugging Face Trainer leaves: `checkpoint-N` for each step, evaluated at every second one, and the final adapter."""
    log: list[dict[str, float]] = []
    for number, step in enumerate(steps):
        log.append({"loss": 2.0 - step / 100, "learning_rate": 1e-4, "epoch": 1.0, "step": step})
        if number % 2 == 0:
            log.append({"eval_loss": 1.5 - step / 100, "eval_runtime": 3.0, "epoch": 1.0, "step": step})
        place = write_adapter(folder / f"checkpoint-{step}", base=base, seed=step)
        write_json(place / "trainer_state.json", {"global_step": step, "log_history": log})
    write_adapter(folder, base=base, seed=steps[-1])
    return folder


def write_litgpt_base(folder: Path, *, seed: int = 0) -> Path:
    """A base model of the litgpt kind."""
    random = np.random.default_rng(seed)
    shapes = {"lm_head.weight": (VOCABULARY, WIDTH), "transformer.wte.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        shapes[f"transformer.h.{layer}.attn.qkv.weight"] = (3 * WIDTH, WIDTH)
        shapes[f"transformer.h.{layer}.attn.proj.weight"] = (WIDTH, WIDTH)
    _write_litgpt(folder, "lit_model.pth", {name: random.standard_normal(shape) for name, shape in shapes.items()})
    return folder


def write_litgpt_run(folder: Path, *, base: str, steps: Sequence[int] = (3, 6)) -> Path:
    """What litgpt leaves: `step-N` and `final` with LoRA on query and value, and the log of the training. One step is one iteration."""
    for number, step in enumerate((*steps, steps[-1] + 1)):
        random = np.random.default_rng(step)
        tensors = {}
        for layer in range(LAYERS):
            tensors[f"transformer.h.{layer}.attn.qkv.lora_A"] = random.standard_normal((8, WIDTH))
            tensors[f"transformer.h.{layer}.attn.qkv.lora_B"] = random.standard_normal((2 * WIDTH, 4))
        place = folder / (f"step-{step:06}" if number < len(steps) else "final")
        _write_litgpt(place, "lit_model.pth.lora", tensors, wrapped=True)
        write_json(
            place / "hyperparameters.yaml",
            {
                "checkpoint_dir": base,
                "devices": 1,
                "num_nodes": 1,
                "lora_r": 4,
                "lora_alpha": 8,
                **{f"lora_{flag}": flag in ("query", "value") for flag in ("query", "key", "value", "projection")},
                "lora_mlp": False,
                "lora_head": False,
                "train": {"global_batch_size": 2, "micro_batch_size": 2},
            },
        )
    rows = [f"{1 - step / 10:.1f},{step},," for step in range(1, steps[-1] + 2)]
    rows += [f",{step},{2 - step / 10:.1f},9.0" for step in steps] + [",0,0.5,1.6"]
    log = folder / "logs/csv/version_0/metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(["loss,step,val_loss,val_ppl", *rows]) + "\n")
    return folder


def _write_litgpt(folder: Path, file: str, tensors: Mapping[str, NDArray[Any]], *, wrapped: bool = False) -> None:
    import torch  # only litgpt's files need it

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}
    torch.save({"model": state} if wrapped else state, folder / file)
    write_json(folder / "model_config.yaml", LITGPT_CONFIG)  # JSON is YAML, too


def write_json(path: Path, value: object) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(value))
    return path


def stored_blobs(home: Path) -> list[Path]:
    """Every blob in the store below a registry's home."""
    return sorted((home / "store/blobs").glob("*/*"))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
