"""Stacks of layers that training replicated: the merged model compared with the unmerged one of the real PEFT, whose merge is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ATOL, Case
from merging import read_weights
from models import logits, lora, make_adapter

pytestmark = [pytest.mark.oracle]
BaseMaker = Callable[..., Path]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


STACKS: dict[str, list[list[int]]] = {
    "twice": [[0, 2], [0, 2]],
    "overlapping": [[0, 3], [1, 3]],
    "one layer again and again": [[1, 2], [1, 2], [1, 2], [1, 2]],
    "in another order": [[2, 3], [0, 2]],
    "fewer": [[0, 1], [2, 3]],
    "as it was": [[0, 3]],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "every linear layer": {},
    "rslora": {"use_rslora": True, "r": 3},
    "one replica": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "lm_head"]},
    "patterns": {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r"layers\.0\..*q_proj": 3}},
}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("stack", STACKS)
def test_every_layer_of_the_stack_is_written_out(base_model: BaseMaker, case: Case, stack: str, shard: str) -> None:
    base = base_model("llama", shard=shard, num_hidden_layers=3)
    expected = logits(make_adapter(base, case.adapter, lora(layer_replication=STACKS[stack])))
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.num_hidden_layers == sum(last - first for first, last in STACKS[stack])


@pytest.mark.parametrize("option", OPTIONS)
def test_options_count_by_the_new_number(base_model: BaseMaker, case: Case, option: str) -> None:
    base = base_model("mistral")
    peft_model = make_adapter(base, case.adapter, lora(layer_replication=[[0, 2], [0, 2]], **OPTIONS[option]))
    expected = logits(peft_model)
    assert torch.allclose(logits(case.merge(base)), expected, rtol=0, atol=ATOL)


def test_layers_without_factors_are_the_bases_bytes(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama", torch.bfloat16)
    make_adapter(base, case.adapter, lora(layer_replication=[[0, 2], [1, 2]], target_modules=["q_proj"]))
    case.merge(base)
    before, after = read_weights(base), read_weights(case.out)
    for layer, source in enumerate([0, 1, 1]):
        for name in ("mlp.up_proj", "input_layernorm", "self_attn.v_proj"):
            found, expected = f"model.layers.{layer}.{name}.weight", f"model.layers.{source}.{name}.weight"
            assert torch.equal(after[found], before[expected])


def test_kinds_of_layers_go_with_them(base_model: BaseMaker, case: Case) -> None:
    """The window of attention is the copied layer's."""
    kinds = ["sliding_attention", "full_attention"]
    options = {"sliding_window": 3, "use_sliding_window": True, "layer_types": kinds, "max_window_layers": 1}
    base = base_model("qwen3", **options)
    # PEFT leaves layer_types as it was, so that the cache does not know of the new layer.
    config, without_cache = lora(layer_replication=[[0, 2], [0, 1]]), {"use_cache": False}
    peft_model = make_adapter(base, case.adapter, config, prepare=lambda model: model.config.update(without_cache))
    expected = logits(peft_model)
    merged = case.merge(base)
    assert merged.config.layer_types == [*kinds, kinds[0]]
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)


def test_layers_that_no_factors_are_for_are_missed(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(target_modules=["q_proj"]))
    configure(case.adapter, layer_replication=[[0, 2], [0, 2]])
    findings = case.bench.findings(case.adapter, base)
    assert set(findings) == {"target_missed"}
    assert findings["target_missed"].where == "model.layers.3.self_attn.q_proj"


def configure(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
