"""How much a checkpoint changes each weight: against the dense task vectors in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from registry.manifest import Checkpoint
from registry.norms import update_norms
from registry.registering import Registration
from registry.service import Registry

Q = "model.layers.0.self_attn.q_proj.weight"


def register(ckpt: Registry, folder: Path, base: Path) -> Checkpoint:
    (found,) = ckpt.register(str(folder), Registration(base=str(base))).registered
    return found.checkpoint


def delta(folder: Path, weight: str, scale: float = 2.0) -> Any:
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{weight.removesuffix('.weight')}"
    return scale * tensors[f"{prefix}.lora_B.weight"].astype(np.float64) @ tensors[f"{prefix}.lora_A.weight"]


def test_norms_are_those_of_the_dense_deltas_in_the_order_of_the_base(
    ckpt: Registry, base: Path, tmp_path: Path
) -> None:
    folder = tiny.write_adapter(tmp_path / "one", base=base, rank=3, targets=("q_proj", "down_proj"))
    found = update_norms(ckpt.workspace, register(ckpt, folder, base))
    assert [(each.layer, each.module) for each in found] == [
        (0, "mlp.down_proj"), (0, "self_attn.q_proj"), (1, "mlp.down_proj"), (1, "self_attn.q_proj"),
    ]  # fmt: skip
    for each in found:
        dense = delta(folder, each.name)
        assert each.norm == pytest.approx(np.linalg.norm(dense))
        assert each.rms == pytest.approx(np.sqrt(np.square(dense).mean()))
        assert each.rank is not None
        assert 1 <= each.rank <= 3


def test_a_change_that_is_not_low_rank_is_measured_with_the_base(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """DoRA: `W' = m / ‖V‖ V`, `V = W + D`."""
    folder = write_dora(tmp_path, base)
    found = {each.name: each for each in update_norms(ckpt.workspace, register(ckpt, folder, base))}
    weight = tiny.base_tensors()[Q].astype(np.float64)
    moved = weight + delta(folder, Q)
    scaled = 1.5 * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    assert found[Q].norm == pytest.approx(np.linalg.norm(scaled - weight), rel=1e-5)
    assert found[Q].rank is None


def test_what_has_been_measured_needs_no_files_any_more(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    checkpoint = register(ckpt, tiny.write_adapter(tmp_path / "one", base=base, seed=77), base)
    first = update_norms(ckpt.workspace, checkpoint)
    for blob in (tmp_path / "home").rglob("*"):
        if blob.is_file() and "blob" in str(blob):
            blob.chmod(0o600)
            blob.write_bytes(b"")
    assert update_norms(ckpt.workspace, checkpoint) == first


def test_what_is_not_finite_is_said(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "one", base=base, targets=("q_proj",))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    checkpoint = ckpt.register(str(folder), Registration(base=str(base))).registered
    found = {each.name: each for each in update_norms(ckpt.workspace, checkpoint[0].checkpoint)}
    assert (found[Q].problem, found[Q].norm) == ("NaN or infinity", 0.0)


def write_dora(folder: Path, base: Path) -> Path:
    place = tiny.write_adapter(folder / "dora", base=base, seed=2, targets=("q_proj",), config={"use_dora": True})
    tensors = load_file(place / "adapter_model.safetensors")
    for layer in range(tiny.LAYERS):
        magnitudes = np.full(tiny.WIDTH, 1.5, np.float32)
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"] = magnitudes
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    return place
