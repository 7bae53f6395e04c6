"""`layer_replication` matched with a base model from headers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from merging import Bench
from safetensors.numpy import load_file, save_file

from registry.errors import CorruptFile
from registry.formats.peft_replication import Stack
from registry.merge.plan import Compute, Copy
from registry.registering import Registration
from registry.service import Registry


def replicated(folder: Path, layers: list[list[int]], **config: Any) -> Path:
    """LoRA on the query of each layer of a replicated stack."""
    adapter = tiny.write_adapter(folder, targets=["q_proj"], config={"layer_replication": layers, **config})
    one = {
        name: array for name, array in load_file(adapter / "adapter_model.safetensors").items() if ".layers.0." in name
    }
    count = sum(last - first for first, last in layers)
    tensors = {
        name.replace(".layers.0.", f".layers.{layer}."): array + layer for name, array in one.items() for layer in range(count)
    }  # fmt: skip
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


def test_a_stack_takes_the_place_of_the_bases_layers(bench: Bench, base: Path, tmp_path: Path) -> None:
    plan = bench.plan(replicated(tmp_path / "adapter", [[1, 2], [0, 1], [1, 2]]), base).plan
    (file,) = plan.files
    made = {change.target.name: change.source for change in plan.computed}
    copies = {segment.target.name: segment.tensor.spec.name for segment in file.segments if isinstance(segment, Copy)}
    for layer, source in enumerate([1, 0, 1]):
        query = made.pop(f"model.layers.{layer}.self_attn.q_proj.weight")
        assert query is not None
        assert query.spec.name == f"model.layers.{source}.self_attn.q_proj.weight"
        assert copies.pop(f"model.layers.{layer}.mlp.up_proj.weight") == f"model.layers.{source}.mlp.up_proj.weight"
    assert made == {}
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert {name: source for name, source in copies.items() if ".layers." not in name} == dict(
        zip(outside, outside, strict=True)
    )
    config = next(sidecar.data for sidecar in plan.sidecars if sidecar.path == "config.json")
    assert json.loads(config or b"")["num_hidden_layers"] == 3


def test_layers_that_the_stack_leaves_out_are_not_in_the_result(bench: Bench, base: Path, tmp_path: Path) -> None:
    (file,) = bench.plan(replicated(tmp_path / "adapter", [[1, 2]]), base).plan.files
    names = [segment.target.name for segment in file.segments if isinstance(segment, (Copy, Compute))]
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0"}
    assert len(set(names)) == len(names) == 12


@pytest.mark.parametrize(
    "value",
    ["0-2", [0, 2], [[0]], [[0, 1, 2]], [[2, 1]], [[-1, 2]], [[0, 0]], [[0.0, 2]], [[True, 2]], [["0", "2"]], [[0, 10**9]], {"0": 2}],
    ids=str,
)  # fmt: skip
def test_what_is_no_list_of_ranges_is_corrupt(bench: Bench, base: Path, tmp_path: Path, value: object) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", config={"layer_replication": value})
    with pytest.raises(CorruptFile, match="layer_replication"):
        bench.registry.register(str(adapter), Registration(base=str(base)))


def test_layers_that_the_base_does_not_have_are_refused(bench: Bench, base: Path, tmp_path: Path) -> None:
    findings = bench.findings(replicated(tmp_path / "adapter", [[0, 3]]), base)
    assert findings["layers_differ"].expected == "one list of at least 3 layers, as layer_replication says"
    assert not findings["layers_differ"].fits


def test_a_base_with_two_lists_of_layers_is_refused(bench: Bench, base: Path, tmp_path: Path) -> None:
    path = base / "model.safetensors"
    save_file({**load_file(path), "vision.layers.0.weight": np.ones((2, 2), np.float32)}, path, {"format": "pt"})
    assert "layers_differ" in bench.findings(replicated(tmp_path / "adapter", [[0, 2], [0, 2]]), base)


def test_a_base_with_a_layer_missing_is_refused(bench: Bench, base: Path, tmp_path: Path) -> None:
    path = base / "model.safetensors"
    renamed = {name.replace(".layers.1.", ".layers.2."): array for name, array in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})
    assert "layers_differ" in bench.findings(replicated(tmp_path / "adapter", [[0, 1], [0, 1]]), base)


def stack(ckpt: Registry, base: Path, layers: list[list[int]], **config: Any) -> Stack:
    model = ckpt.add_base(str(base)).base
    return Stack.of(replace(model, config={**model.config, **config}), {"layer_replication": layers})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"layer_types": ["full", "sliding"]}, {"layer_types": ["full", "sliding", "sliding"]}),
        ({"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 0, 0]}),
        ({"mlp_only_layers": [1]}, {"mlp_only_layers": [1, 2]}),
        ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
        ({"n_layer": 2}, {"n_layer": 3}),
    ],
)
def test_what_the_configuration_says_of_each_layer_goes_with_it(
    ckpt: Registry, base: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    found = stack(ckpt, base, [[0, 2], [1, 2]], **before)
    assert found.config == {"num_hidden_layers": 3, **after}
    assert found.findings == ()


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        ({"first_k_dense_replace": 1}, True),
        ({"first_k_dense_replace": 0}, False),
        ({"decoder_sparse_step": 2}, True),
        ({"decoder_sparse_step": 1}, False),
        ({"use_sliding_window": True}, True),
        ({"use_sliding_window": True, "layer_types": ["sliding", "full"]}, False),
        ({"sliding_window_pattern": 6}, True),
        ({"model_type": "gemma2"}, True),
        ({"model_type": "gemma2", "layer_types": ["sliding", "full"]}, False),
        ({"sliding_window": 4096, "model_type": "mistral"}, False),
    ],
)
def test_kinds_that_follow_from_a_layers_number_are_refused(
    ckpt: Registry, base: Path, config: dict[str, Any], is_refused: bool
) -> None:
    codes = [finding.code for finding in stack(ckpt, base, [[0, 2], [0, 2]], **config).findings]
    assert codes == (["replication_unclear"] if is_refused else [])


def test_without_replication_nothing_changes(ckpt: Registry, base: Path) -> None:
    found = stack(ckpt, base, [])
    assert (found.config, found.removed, found.findings) == ({}, frozenset(), ())
    assert all(name == tensor.spec.name for name, tensor in found.tensors.items())
