"""Check a merged LoRA model by an independent computation: float64, whole tensors, nothing of ckpt.

python verify.py BASE ADAPTER MERGED
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(base_folder: Path, adapter_folder: Path, merged_folder: Path) -> None:
    base, merged = load_file(base_folder / "model.safetensors"), load_file(merged_folder / "model.safetensors")
    adapter = load_file(adapter_folder / "adapter_model.safetensors")
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    scale, touched, steps = config["lora_alpha"] / config["r"], 0, 0
    for name, weight in base.items():
        a = adapter.get(f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")
        if a is None:
            assert torch.equal(merged[name], weight), f"{name} should not have changed"
            continue
        b = adapter[f"base_model.model.{name.replace('.weight', '.lora_B.weight')}"]
        exact = weight.double() + scale * (b.double() @ a.double())
        rounded = exact.to(weight.dtype)
        # Ordered integers for the bit patterns: the difference counts how many bfloat16 values lie between.
        apart = (merged[name].view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
        assert int(apart.max()) <= 1, f"{name} is wrong"
        touched, steps = touched + 1, steps + int(apart.sum())
    untouched = len(base) - touched
    print(
        f"{touched} tensors are base + {scale:g} · B·A, {steps} of their elements one rounding away; {untouched} are the base's"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
