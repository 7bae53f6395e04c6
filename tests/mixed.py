"""A base model of several dtypes in two shards, one of its weights larger than a block of the engine's grid; and adapters that fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from registry.merging import Planned
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry
from registry.tensors import DType

# One row too many for two blocks of 4 MiB, so that there are three.
ROWS, COLUMNS, RANK = 2049, 1024, 4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
Q, K, V, O = (f"model.layers.0.self_attn.{name}.weight" for name in NAMES)  # noqa: E741
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
IN_FIRST = (EMBEDDING, K, "scalar", "empty")


def base_tensors() -> dict[str, Tensor]:
    """Weights in three dtypes, with a scalar, an empty tensor and whole numbers."""
    random = torch.Generator().manual_seed(0)
    return {
        EMBEDDING: torch.randn((ROWS + 200, COLUMNS), generator=random).bfloat16(),
        Q: (torch.randn((ROWS, COLUMNS), generator=random) * 0.02).bfloat16(),
        K: torch.randn((70, COLUMNS), generator=random),
        V: torch.randn((1, COLUMNS), generator=random).half(),
        O: torch.randn((COLUMNS, 3), generator=random),
        NORM: torch.ones(COLUMNS),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty((0, 3)),
        "positions": torch.arange(5),
    }


def write_base(folder: Path) -> Path:
    """The base model, with a configuration and a tokenizer."""
    folder.mkdir()
    tensors = base_tensors()
    for file in (FIRST, SECOND):
        part = {name: tensor for name, tensor in tensors.items() if (name in IN_FIRST) == (file == FIRST)}
        save_file(part, folder / file, {"format": "pt"})
    weight_map = {name: FIRST if name in IN_FIRST else SECOND for name in tensors}
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    tiny.write_json(folder / "config.json", {"model_type": "llama", "dtype": "bfloat16"})
    tiny.write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    return folder


def factors(seed: int = 1, scale: float = 0.05) -> dict[str, Tensor]:
    """LoRA on every projection, under PEFT's names."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in base_tensors().items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn((RANK, tensor.shape[1]), generator=random)
            found[f"{module}.lora_B.weight"] = torch.randn((tensor.shape[0], RANK), generator=random) * scale
    return found


def write_lora(folder: Path, tensors: dict[str, Tensor], *, is_dora: bool = False) -> Path:
    """A LoRA with these factors; a DoRA with magnitudes that halve each row's norm, or so."""
    if is_dora:
        sizes = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_B.weight")}
        found = {
            name.replace("lora_B.weight", "lora_magnitude_vector"): torch.full((n,), 0.5) for name, n in sizes.items()
        }
        tensors = {**tensors, **found}
    return _write(folder, tensors, {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_dora": is_dora})


def write_ia3(folder: Path) -> Path:
    """Factors for the rows of every projection."""
    sizes = {name: tensor.shape[0] for name, tensor in base_tensors().items() if name.endswith("_proj.weight")}
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.ia3_l": torch.linspace(0.5, 2, size)[:, None]
        for name, size in sizes.items()
    }
    return _write(folder, tensors, {"peft_type": "IA3", "feedforward_modules": []})


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    tiny.write_json(folder / "adapter_config.json", {**config, "target_modules": list(NAMES)})
    return folder


def every_plan(registry: Registry, folder: Path) -> Iterator[tuple[str, Planned]]:
    """Plans of every kind, by what is special about them: dtypes, arithmetic, inputs, formats."""
    base = write_base(folder / "base")
    for name in ("one", "two"):
        write_lora(folder / name, factors(seed=len(name) + (name == "two")))
    write_lora(folder / "dora", factors(), is_dora=True)
    write_ia3(folder / "ia3")
    for name in ("one", "two", "dora", "ia3"):
        registry.register(str(folder / name), Registration(base=str(base), adapter=name))
    one, two, dora, ia3 = (registry.resolve(name) for name in ("one", "two", "dora", "ia3"))
    yield "lora", registry.plan(one)
    yield "lora to float16", registry.plan(one, dtype=DType.F16)
    yield "dora", registry.plan(dora)
    yield "ia3", registry.plan(ia3)
    yield "linear", registry.plan(one, two, mixture=Mixture(weights=(0.7, 0.3)))
    yield "ties", registry.plan(one, two, mixture=Mixture(method="ties"))
    litgpt = tiny.write_litgpt_base(folder / "litgpt")
    tiny.write_litgpt_run(folder / "run", base=str(litgpt))
    registry.register(str(folder / "run"), Registration(base=str(litgpt), adapter="litgpt"))
    yield "litgpt", registry.plan(registry.resolve("litgpt"))
