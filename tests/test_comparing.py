"""What differs between two checkpoints: every number against the dense task vectors in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from registry.comparing import Difference, WeightPair
from registry.errors import Changed, Conflict
from registry.manifest import Checkpoint
from registry.merge.compare import angle_of, effective_rank
from registry.merge.sums import Factors
from registry.registering import Registration
from registry.service import Registry

LITGPT = Path(__file__).parent / "data/litgpt"
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


def test_checkpoints_that_hardly_differ_are_told_apart(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """Their norms' squares agree to all digits that their difference has."""
    one, other = (tiny.write_adapter(tmp_path / name, base=base, seed=1, targets=("q_proj",)) for name in "ab")
    tensors = load_file(other / "adapter_model.safetensors")
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name].astype(np.float64) * (1 + 1e-10)
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    pair = by_name(ckpt.diff(register(ckpt, one, base), register(ckpt, other, base)))[Q]
    assert pair.distance == pytest.approx(1e-10 * pair.norms[0], rel=1e-4)


def test_low_rank_changes_are_compared_where_the_base_is_gone(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    found = [register(ckpt, tiny.write_adapter(tmp_path / n, base=base, seed=s), base) for s, n in enumerate("ab")]
    base.rename(tmp_path / "elsewhere")
    assert all(pair.distance > 1 for pair in ckpt.diff(*found).weights)


def write_dora(folder: Path, base: Path, seed: int) -> Path:
    tiny.write_adapter(folder, base=base, seed=seed, targets=("q_proj",), config={"use_dora": True})
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer in range(tiny.LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"
        tensors[name] = np.ones(tiny.WIDTH, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_formats_are_compared_by_what_they_do_to_a_weight(ckpt: Registry) -> None:
    """litgpt's LoRA on query and value of one weight, as litgpt merged it, and its Adapter v2: `W' = diag(scale) W`."""
    base = LITGPT / "base-llama-gqa"
    one, other = (register(ckpt, LITGPT / f"{name}/final", base) for name in ("lora-llama-qv", "adapter_v2-llama"))
    found = by_name(ckpt.diff(one, other))
    weights = torch.load(base / "lit_model.pth", weights_only=True)
    adapter = torch.load(LITGPT / "adapter_v2-llama/final/lit_model.pth.adapter_v2", weights_only=True)["model"]
    merged = load_torch_file(LITGPT / "merged.safetensors")
    for layer in range(4):
        name = f"transformer.h.{layer}.attn.qkv"
        weight = weights[f"{name}.weight"].double().numpy()
        mine = merged[f"lora-llama-qv/final/{name}.weight"].double().numpy() - weight
        theirs = (adapter[f"{name}.adapter_scale"].double().numpy() - 1)[:, None] * weight
        pair = found[f"{name}.weight"]
        assert pair.norms == pytest.approx((np.linalg.norm(mine), np.linalg.norm(theirs)), rel=1e-5)
        assert pair.distance == pytest.approx(np.linalg.norm(mine - theirs), rel=1e-5)
        cosine = float((mine * theirs).sum() / np.linalg.norm(mine) / np.linalg.norm(theirs))
        assert pair.cosine == pytest.approx(cosine, abs=1e-5)


def test_a_small_delta_keeps_its_digits_beside_one_that_is_not_low_rank(
    ckpt: Registry, base: Path, tmp_path: Path
) -> None:
    """The base is of float32, to which no sum with it is rounded: this one would come out a quarter as large."""
    plain = tiny.write_adapter(tmp_path / "plain", base=base, seed=1, targets=("q_proj",))
    tensors = load_file(plain / "adapter_model.safetensors")
    tensors = {name: each * np.float32(1e-9 if "lora_B" in name else 1) for name, each in tensors.items()}
    save_file(tensors, plain / "adapter_model.safetensors", {"format": "pt"})
    one, other = register(ckpt, plain, base), register(ckpt, write_dora(tmp_path / "dora", base, 2), base)
    expected = pytest.approx(np.linalg.norm(deltas(plain)[Q]), rel=1e-6)
    assert by_name(ckpt.diff(one, other))[Q].norms[0] == expected
    assert by_name(ckpt.diff(other, one))[Q].norms[1] == expected


def test_a_base_that_changed_is_not_compared_with(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    found = [register(ckpt, write_dora(tmp_path / name, base, seed), base) for seed, name in enumerate("ab")]
    assert ckpt.diff(*found).weights
    save_file(tiny.base_tensors(seed=7), base / "model.safetensors", {"format": "pt"})
    with pytest.raises(Changed):
        ckpt.diff(*found)


def test_weights_that_are_not_finite_are_named(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    one, other = (tiny.write_adapter(tmp_path / name, base=base, seed=1) for name in "ab")
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    found = by_name(ckpt.diff(register(ckpt, one, base), register(ckpt, other, base)))
    assert {name: pair.problem for name, pair in found.items() if pair.problem} == {Q: "NaN or infinity"}


def test_an_embedding_that_was_only_saved_along_is_no_difference(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    one, other = (tiny.write_adapter(tmp_path / name, base=base, seed=1) for name in "ab")
    tensors = load_file(other / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = tiny.base_tensors()["model.embed_tokens.weight"]
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    found = ckpt.diff(register(ckpt, one, base), register(ckpt, other, base))
    assert {pair.distance for pair in found.weights} == {0.0}
    assert "model.embed_tokens.weight" not in by_name(found)


def test_fields_of_the_adapters_own_configuration(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    """The order in which names of modules were written down is no difference."""
    one = tiny.write_adapter(tmp_path / "one", base=base, config={"lora_dropout": 0.1, "exclude_modules": ["x", "y"]})
    other = tiny.write_adapter(tmp_path / "other", base=base, config={"exclude_modules": ["y", "x"]})
    found = ckpt.diff(register(ckpt, one, base), register(ckpt, other, base)).fields
    assert {field.name: (field.one, field.other) for field in found} == {
        "lora_dropout": (0.1, None),
        "adapter": ("one", "other"),
        "run": ("one", "other"),
    }


def dense(deltas: list[Factors], shape: tuple[int, int]) -> Any:
    total = np.zeros(shape)
    for each in deltas:
        rows, columns = slice(each.row, each.end), slice(each.column, each.column + each.right.shape[1])
        total[rows, columns] += each.scale * each.left @ each.right
    return total


def test_bands_of_rows_are_matrices_of_their_own() -> None:
    """Query and value of a fused weight, say: of effective ranks the mean, weighed by squared norms."""
    random = np.random.default_rng(3)
    bands = [
        Factors(random.standard_normal((rows, rank)), random.standard_normal((rank, 9)), 0.5, row=row)
        for row, rows, rank in ((0, 6, 1), (6, 4, 3), (20, 8, 2))
    ]
    parts = [dense([each], (30, 9)) for each in bands]
    squares = [float(np.square(part).sum()) for part in parts]
    expected = sum(square * entropy_rank(part) for square, part in zip(squares, parts, strict=True)) / sum(squares)
    assert effective_rank(bands) == pytest.approx(expected)
    assert effective_rank(bands[::-1]) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(8))
def test_sums_of_overlapping_deltas_are_those_of_dense_matrices(seed: int) -> None:
    """Any rows and columns, ranks above the sizes too."""
    random = np.random.default_rng(seed)

    def some() -> list[Factors]:
        found = []
        for _ in range(random.integers(0, 5)):
            rows, columns, rank = random.integers(1, 8, 3)
            row, column = random.integers(0, 20 - rows), random.integers(0, 12 - columns)
            left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
            found.append(Factors(left, right, float(random.uniform(-2, 2)), int(row), int(column)))
        return found

    one, other = some(), some()
    found, (mine, theirs) = angle_of(one, other), (dense(each, (20, 12)) for each in (one, other))
    assert found.norms == pytest.approx((np.linalg.norm(mine), np.linalg.norm(theirs)))
    assert found.distance == pytest.approx(np.linalg.norm(mine - theirs))
    assert found.product == pytest.approx((mine * theirs).sum(), abs=1e-9)
