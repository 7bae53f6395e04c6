"""LoRAs extracted from whole fine-tuned models: merged back, run by the real PEFT, and as near as singular values say they can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, read_weights, steps
from models import load_model, logits, lora, make_adapter, make_model
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from registry.extracting import Extract, Extraction
from registry.tensors import DType

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
RANK = 3
Tune = Callable[[str, nn.Parameter, torch.Generator], None]


def low_rank(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """A change of rank 3 to every matrix but embedding and head; norms and biases move, too."""
    if parameter.dim() == 1:
        parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    elif not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
        left, right = (
            torch.randn(size, generator=generator) for size in ((parameter.shape[0], RANK), (RANK, parameter.shape[1]))
        )
        parameter += 0.05 * left @ right


def everywhere(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """A change of full rank to everything."""
    parameter += torch.randn(parameter.shape, generator=generator) * 0.02


class Case:
    """A base model, its fine-tuned self, and what is extracted."""

    def __init__(
        self, folder: Path, family: str, tune: Tune, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> None:
        self.base, self.tuned, self.out = folder / "base", folder / "tuned", folder / "out"
        self.bench, self.folder = Bench(folder), folder
        model = make_model(family, dtype, **changes)
        model.save_pretrained(self.base)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.float().named_parameters():
                tune(name, parameter, generator)
        model.to(dtype).save_pretrained(self.tuned)

    def extract(self, rank: int = RANK, **options: Any) -> Extraction:
        wanted = Extract(rank=rank, out=self.out, **options)
        return self.bench.registry.extract(str(self.base), str(self.tuned), wanted)

    def merged(self) -> dict[str, Tensor]:
        self.bench.merge(self.out, self.base, self.folder / "merged")
        return read_weights(self.folder / "merged")

    def adapted(self) -> Tensor:
        """What the real PEFT answers with the adapter, unmerged."""
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return logits(PeftModel.from_pretrained(model, self.out))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "neox"])
def test_a_change_of_low_rank_comes_back_to_rounding(tmp_path: Path, family: str) -> None:
    """With norms and biases, on linear layers and Conv1D: the merged model and PEFT's unmerged one are the fine-tuned one."""
    case = Case(tmp_path, family, low_rank)
    found = case.extract()
    assert found.not_covered == ()
    assert found.residual < 1e-6
    expected = read_weights(case.tuned)
    merged = case.merged()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bool(((merged[name] - tensor).abs() <= 4 * steps(tensor.abs().clamp(min=0.1))).all()), name
    answer = logits(load_model(case.tuned))
    assert torch.allclose(case.adapted(), answer, rtol=0, atol=2e-5)
    assert torch.allclose(logits(load_model(tmp_path / "merged")), answer, rtol=0, atol=2e-5)


def test_bfloat16_comes_back_to_one_step(tmp_path: Path) -> None:
    """Rounding to bfloat16 makes the change one of full rank; at full rank the very bytes come back."""
    case = Case(tmp_path, "llama", low_rank, torch.bfloat16)
    case.extract(rank=32)
    merged = case.merged()
    assert [name for name, tensor in read_weights(case.tuned).items() if not torch.equal(merged[name], tensor)] == []


def test_the_residual_is_the_tail_of_the_singular_values(tmp_path: Path) -> None:
    """Eckart and Young: no factors of that rank are nearer. It is told of every tensor, and is that of the factors as they are stored."""
    case = Case(tmp_path, "llama", everywhere)
    found = case.extract(rank=5)
    before, after, factors = (
        read_weights(case.base),
        read_weights(case.tuned),
        load_file(case.out / "adapter_model.safetensors"),
    )
    with_factors = [each for each in found.tensors if each.kind == "factors"]
    assert len(with_factors) == 14
    for each in with_factors:
        delta = after[each.name].double() - before[each.name].double()
        values = torch.linalg.svdvals(delta)
        optimum = (values[5:].square().sum() / values.square().sum()).sqrt()
        a, b = (
            factors[f"base_model.model.{each.name.removesuffix('weight')}lora_{side}.weight"].double() for side in "AB"
        )
        assert each.size == pytest.approx(float(delta.norm()), rel=1e-12)
        assert each.residual == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-9)
        assert each.residual == pytest.approx(float(optimum), rel=1e-6)
    squares = sum((each.size * each.residual) ** 2 for each in with_factors)
    assert found.factors == pytest.approx((squares / sum(each.size**2 for each in with_factors)) ** 0.5, rel=1e-12)


def test_what_is_not_covered_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", everywhere)
    found = case.extract(saved=())
    left = {each.name for each in found.not_covered}
    norms = {name for name in read_weights(case.base) if "norm" in name}
    assert left == norms | {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.residual > found.factors
    total = sum(each.size**2 for each in found.tensors)
    rest = sum((each.size * each.residual) ** 2 for each in found.tensors)
    assert found.residual == pytest.approx((rest / total) ** 0.5)
    recorded = json.loads((case.out / "extraction.json").read_text())
    assert {name for name, told in recorded["tensors"].items() if told["kind"] == "not covered"} == left


@pytest.mark.parametrize(
    "options",
    [
        {"modules": ("embed_tokens", "lm_head", "q_proj")},
        {"saved": ("embed_tokens", "lm_head", "norm")},
        {"modules": ("layers.1.mlp.up_proj",)},
        {"modules": ("up_proj",), "saved": ("layers.0.self_attn.q_proj",)},
    ],
)
def test_embeddings_and_single_modules_when_they_are_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    """At full rank what is covered comes back, and what is not stays the base's, in the merged model and in PEFT's."""
    case = Case(tmp_path, "llama", everywhere)
    found = case.extract(rank=64, **options)
    kinds = {each.name: each.kind for each in found.tensors}
    before, after, merged = read_weights(case.base), read_weights(case.tuned), case.merged()
    for name, tensor in merged.items():
        expected = before[name] if kinds[name] == "not covered" else after[name]
        assert torch.allclose(tensor, expected, rtol=0, atol=1e-6), name
    assert {"factors", "not covered"} <= set(kinds.values())
    assert torch.allclose(case.adapted(), logits(load_model(tmp_path / "merged")), rtol=0, atol=2e-5)


def test_a_tied_embedding_is_not_taken_apart(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", everywhere, tie_word_embeddings=True)
    found = case.extract(modules=("embed_tokens", "q_proj"))
    (told,) = (each for each in found.not_covered if "embed_tokens" in each.name)
    assert "one matrix" in told.reason
    assert torch.allclose(case.adapted(), logits(load_model(case.merged() and tmp_path / "merged")), rtol=0, atol=2e-5)


def test_the_extraction_of_a_merged_adapter_is_that_adapter(tmp_path: Path) -> None:
    """The other way round: what PEFT merged at rank 4 is found again at rank 4."""
    make_model("llama").save_pretrained(tmp_path / "base")
    peft_model = make_adapter(tmp_path / "base", tmp_path / "adapter", lora(r=4))
    expected = logits(peft_model)
    peft_model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    bench = Bench(tmp_path)
    found = bench.registry.extract(
        str(tmp_path / "base"), str(tmp_path / "tuned"), Extract(rank=4, out=tmp_path / "out")
    )
    assert found.residual < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.allclose(logits(PeftModel.from_pretrained(model, tmp_path / "out")), expected, rtol=0, atol=2e-5)


def test_factors_of_16_bits_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", low_rank)
    found = case.extract(dtype=DType.BF16)
    assert {
        tensor.dtype for name, tensor in load_file(case.out / "adapter_model.safetensors").items() if "lora" in name
    } == {torch.bfloat16}
    assert 1e-4 < found.factors < 1e-2
