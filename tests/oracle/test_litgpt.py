"""Merges compared with what litgpt's own merge made (see data/litgpt), and read back by litgpt itself."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import litgpt
import pytest
import torch
import yaml
from merging import Bench, assert_rounded_once, steps
from safetensors.torch import load_file
from torch import Tensor

from registry.tensors import DType

pytestmark = [
    pytest.mark.oracle,
]
DATA = Path(__file__).parents[1] / "data/litgpt"
BASES = {
    "lora-llama-qv": "base-llama-gqa",
    "lora-llama-all-bf16": "base-llama-gqa",
    "lora-neox-qkv-mlp": "base-neox-mha",
    "legacy-lora-llama-qv": "legacy-base-llama-gqa",
    "legacy-lora-llama-qkv": "legacy-base-llama-gqa",
}
FLOAT32 = [
    ("lora-llama-qv", "step-000003"), ("lora-llama-qv", "final"), ("lora-neox-qkv-mlp", "step-000003"),
    ("lora-neox-qkv-mlp", "final"), ("legacy-lora-llama-qv", "final"), ("legacy-lora-llama-qkv", "final"),
]  # fmt: skip
BFLOAT16 = ["step-000003", "final"]


def read_weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return found


def base_weights(run: str) -> dict[str, Tensor]:
    return read_weights(DATA / BASES[run] / "lit_model.pth")


def litgpt_merged(run: str, step: str) -> dict[str, Tensor]:
    """The whole model as litgpt merged it."""
    prefix, changed = f"{run}/{step}/", load_file(DATA / "merged.safetensors")
    return base_weights(run) | {k.removeprefix(prefix): v for k, v in changed.items() if k.startswith(prefix)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def merge(out: Path, run: str, step: str, dtype: DType | None = None) -> dict[str, Tensor]:
    """Merge into a folder and read the result as litgpt does."""
    Bench(out.parent).merge(DATA / run / step, DATA / BASES[run], out, dtype)
    with zipfile.ZipFile(out / "lit_model.pth") as archive:
        assert archive.testzip() is None
    return read_weights(out / "lit_model.pth")


@pytest.mark.parametrize(("run", "step"), FLOAT32)
def test_float32_equals_litgpts_merge_bit_for_bit(out: Path, run: str, step: str) -> None:
    merged, expected = merge(out, run, step), litgpt_merged(run, step)
    assert list(merged) == list(base_weights(run))
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def run_litgpt(folder: Path, ids: Tensor) -> Tensor:
    """What litgpt answers with the model in a folder."""
    fields = yaml.safe_load((folder / "model_config.yaml").read_text())
    fields.pop("sliding_window_layer_placing", None)  # litgpt 0.5.4 wrote it, later ones do not know it
    model = litgpt.GPT(litgpt.Config(**fields))
    model.load_state_dict(read_weights(folder / "lit_model.pth"), strict=True)
    with torch.no_grad():
        answer: Tensor = model.eval()(ids)
    return answer


@pytest.mark.parametrize(("run", "step"), FLOAT32)
def test_litgpt_runs_the_merged_model(out: Path, run: str, step: str) -> None:
    merge(out, run, step)
    known = load_file(DATA / "logits.safetensors")
    answer = run_litgpt(out, known["input_ids"])
    assert torch.allclose(answer, known[f"{run}/{step}/merged"], rtol=0, atol=1e-5)


def exact_sums(run: str, step: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, `W + s * B @ A` in float64, and how far float32 sums may be from it, for the current layout and all three of q, k, v."""
    hyper = yaml.safe_load((DATA / run / step / "hyperparameters.yaml").read_text())
    config = yaml.safe_load((DATA / run / step / "model_config.yaml").read_text())
    scale, rank = hyper["lora_alpha"] / hyper["lora_r"], hyper["lora_r"]
    factors = {
        name: tensor.double()
        for name, tensor in read_weights(DATA / run / step / "lit_model.pth.lora")["model"].items()
    }
    query, key = (config["head_size"] * config[count] for count in ("n_head", "n_query_groups"))
    for name, weight in base_weights(run).items():
        a, b = (factors.get(name.replace("weight", kind)) for kind in ("lora_A", "lora_B"))
        if a is None or b is None:
            continue
        parts = [query, key, key] if ".qkv." in name else [b.shape[0]]
        pairs = list(zip(b.split(parts), a.split(rank), strict=True))
        delta, size = (torch.cat([f(left) @ f(right) for left, right in pairs]) for f in (torch.clone, torch.abs))
        yield name, weight + scale * delta, (rank + 2) * 2.0**-24 * (weight.abs() + scale * size)


@pytest.mark.parametrize("step", BFLOAT16)
def test_bfloat16_is_rounded_once(out: Path, step: str) -> None:
    """litgpt rounds the weight, the product, the scaled product and the sum, and differs by no more than these."""
    run = "lora-llama-all-bf16"
    merged, litgpts, computed = merge(out, run, step, DType.BF16), litgpt_merged(run, step), set[str]()
    for name, exact, error in exact_sums(run, step):
        computed.add(name)
        assert merged[name].dtype == torch.bfloat16
        assert_rounded_once(merged[name], exact, error)
        ours, theirs = merged[name].double(), litgpts[name].double()
        weight = base_weights(run)[name].to(torch.bfloat16)
        delta = (exact - base_weights(run)[name]).to(torch.bfloat16)
        roundings = (steps(weight) + 2 * steps(delta) + steps(litgpts[name]) + steps(merged[name])) / 2
        assert bool(((ours - theirs).abs() <= roundings).all())
        assert (ours - exact).square().sum() < (theirs - exact).square().sum()
    assert computed == {name for name in merged if "norm" not in name and "wte" not in name and "ln_f" not in name}
    assert all(torch.equal(merged[name], litgpts[name]) for name in merged.keys() - computed)


def test_a_bfloat16_adapter_leaves_a_float32_base_float32(out: Path) -> None:
    run = "lora-llama-all-bf16"
    merged = merge(out, run, "final")
    for name, exact, error in exact_sums(run, "final"):
        assert merged[name].dtype == torch.float32
        assert bool(((merged[name] - exact).abs() <= steps(merged[name]) / 2 + error).all())


@pytest.fixture
def tied_base(tmp_path: Path) -> Path:
    """A base whose head lies on the bytes of its embedding, as litgpt converts tied models."""
    base = Path(shutil.copytree(DATA / "base-llama-gqa", tmp_path / "base-llama-gqa"))
    weights = torch.load(base / "lit_model.pth", weights_only=True)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, base / "lit_model.pth")
    return base


def test_a_head_on_the_bytes_of_the_embedding_is_merged_without_it(out: Path, tied_base: Path) -> None:
    """litgpt's own merge adds the head's delta to the embedding too."""
    run = DATA / "lora-llama-all-bf16/final"
    Bench(out.parent).merge(run, tied_base, out)
    merged, before = (read_weights(folder / "lit_model.pth") for folder in (out, tied_base))
    factors = read_weights(run / "lit_model.pth.lora")["model"]
    assert torch.equal(merged["transformer.wte.weight"], before["transformer.wte.weight"])
    head = before["lm_head.weight"] + 7 / 3 * (factors["lm_head.lora_B"].float() @ factors["lm_head.lora_A"].float())
    assert torch.allclose(merged["lm_head.weight"], head, rtol=1e-6, atol=1e-6)


def test_tied_bytes_stay_tied(out: Path, tied_base: Path) -> None:
    Bench(out.parent).merge(DATA / "lora-llama-qv/final", tied_base, out)
    merged = read_weights(out / "lit_model.pth")
    assert merged["lm_head.weight"].data_ptr() == merged["transformer.wte.weight"].data_ptr()
