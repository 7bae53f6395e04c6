"""What differs between two checkpoints: every number against the dense task vectors in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from registry.comparing import Difference, WeightPair
from registry.errors import Conflict
from registry.manifest import Checkpoint
from registry.merge.compare import effective_rank
from registry.merge.sums import Factors
from registry.registering import Registration
from registry.service import Registry

Q = "model.layers.0.self_attn.q_proj.weight"


def register(ckpt: Registry, folder: Path, base: Path) -> Checkpoint:
    (found,) = ckpt.register(str(folder), Registration(base=str(base))).registered
    return found.checkpoint


def deltas(folder: Path, scale: float = 2.0) -> dict[str, Any]:
    """What a LoRA adds to each weight, dense."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            found[key] = scale * b.astype(np.float64) @ a
    return found


def by_name(found: Difference) -> dict[str, WeightPair]:
    return {pair.name: pair for pair in found.weights}


def entropy_rank(delta: Any) -> float:
    values = np.linalg.svd(delta, compute_uv=False)
    shares = values[values > values[0] * 1e-10] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_norms_angle_and_ranks_are_those_of_the_dense_task_vectors(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """Different ranks and different targets: a weight that one leaves alone counts as zero."""
    one = tiny.write_adapter(tmp_path / "one", base=base, seed=1, rank=4, targets=("q_proj", "v_proj"))
    other = tiny.write_adapter(tmp_path / "other", base=base, seed=2, rank=2, targets=("q_proj", "down_proj"))
    found = by_name(ckpt.diff(register(ckpt, one, base), register(ckpt, other, base)))
    first, second = deltas(one), deltas(other)
    assert found.keys() == {*first, *second}
    for name, pair in found.items():
        zero = np.zeros_like(first.get(name, second.get(name)))
        mine, theirs = first.get(name, zero), second.get(name, zero)
        assert pair.norms == pytest.approx((np.linalg.norm(mine), np.linalg.norm(theirs)))
        assert pair.distance == pytest.approx(np.linalg.norm(mine - theirs))
        if mine.any() and theirs.any():
            cosine = float((mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs))
            assert pair.cosine == pytest.approx(cosine)
        else:
            assert (pair.cosine, pair.relative) == (None, pytest.approx(1.0))
        expected = [entropy_rank(delta) if delta.any() else 0.0 for delta in (mine, theirs)]
        assert list(pair.ranks) == pytest.approx(expected)


def test_the_same_checkpoint_is_no_distance_from_itself(ckpt: Registry, base: Path, adapter: Path) -> None:
    checkpoint = register(ckpt, adapter, base)
    found = ckpt.diff(checkpoint, checkpoint)
    assert (found.fields, {pair.distance for pair in found.weights}) == ((), {0.0})
    assert all(pair.cosine == pytest.approx(1.0) for pair in found.weights)


def test_a_change_that_is_not_low_rank_is_compared_value_by_value(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """DoRA: `W' = m / ‖V‖ V`, `V = W + D`."""
    plain = tiny.write_adapter(tmp_path / "plain", base=base, seed=1, targets=("q_proj",))
    dora = tiny.write_adapter(tmp_path / "dora", base=base, seed=2, targets=("q_proj",), config={"use_dora": True})
    tensors, weights = load_file(dora / "adapter_model.safetensors"), tiny.base_tensors()
    magnitudes = np.random.default_rng(5).uniform(1, 2, tiny.WIDTH).astype(np.float32)
    for layer in range(tiny.LAYERS):
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"] = magnitudes
    added = deltas(dora)
    save_file(tensors, dora / "adapter_model.safetensors", {"format": "pt"})
    pair = by_name(ckpt.diff(register(ckpt, plain, base), register(ckpt, dora, base)))[Q]
    weight = weights[Q].astype(np.float64)
    moved = weight + added[Q]
    theirs = magnitudes[:, None] / np.linalg.norm(moved, axis=1, keepdims=True) * moved - weight
    mine = deltas(plain)[Q]
    assert pair.norms == pytest.approx((np.linalg.norm(mine), np.linalg.norm(theirs)), rel=1e-6)
    assert pair.distance == pytest.approx(np.linalg.norm(mine - theirs), rel=1e-6)
    assert pair.ranks == (pytest.approx(entropy_rank(mine)), None)


def test_configuration_and_metrics(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "bot", base=base, steps=(10, 20))
    found = [each.checkpoint for each in ckpt.register(str(run), Registration(base=str(base))).registered]
    other = register(ckpt, tiny.write_adapter(tmp_path / "wide", base=base, rank=8), base)
    difference = ckpt.diff(found[0], other)
    fields = {field.name: (field.one, field.other) for field in difference.fields}
    assert (fields["rank"], fields["alpha"], fields["step"]) == ((4, 8), (8.0, 16.0), (10, None))
    assert {"format", "method", "targets"}.isdisjoint(fields)
    metrics = {pair.name: (pair.one, pair.other) for pair in ckpt.diff(found[0], found[1]).metrics}
    assert metrics["loss"] == (pytest.approx(1.9), pytest.approx(1.8))
    assert metrics["eval_loss"] == (pytest.approx(1.4), None)


def test_names_are_cut_into_layers_and_modules(ckpt: Registry, base: Path, adapter: Path) -> None:
    checkpoint = register(ckpt, adapter, base)
    places = {(pair.layer, pair.module) for pair in ckpt.diff(checkpoint, checkpoint).weights}
    assert places == {(layer, f"self_attn.{name}") for layer in (0, 1) for name in ("q_proj", "v_proj")}


def test_different_bases_are_refused_with_both_named(ckpt: Registry, base: Path, adapter: Path, tmp_path: Path) -> None:
    strange = tiny.write_base(tmp_path / "strange", seed=9)
    other = tiny.write_adapter(tmp_path / "elsewhere", base=strange)
    with pytest.raises(Conflict) as refusal:
        ckpt.diff(register(ckpt, adapter, base), register(ckpt, other, strange))
    assert "base (" in refusal.value.reason
    assert "strange (" in refusal.value.reason


def test_what_changes_no_weight_says_why(ckpt: Registry, base: Path, adapter: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    save_file({"prompt_embeddings": np.ones((4, tiny.WIDTH), np.float32)}, prompt / "adapter_model.safetensors")
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": str(base)}
    (prompt / "adapter_config.json").write_text(json.dumps(fields))
    found = ckpt.diff(register(ckpt, adapter, base), register(ckpt, prompt, base))
    assert found.unmerged[0] == ""
    assert "prompt_tuning" in found.unmerged[1]
    assert all(pair.norms[1] == 0 for pair in found.weights)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_singular_values_are_so_many_ranks(count: int) -> None:
    directions = np.linalg.qr(np.random.default_rng(count).standard_normal((9, count))).Q
    assert effective_rank([Factors(directions, directions.T, 3.0)]) == pytest.approx(count)
    assert effective_rank([Factors(directions, 0 * directions.T, 3.0)]) == 0.0
