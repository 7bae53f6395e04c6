"""Merges compared with what litgpt's own commands made (see data/litgpt), with its own classes, and read back and run by litgpt itself."""

from __future__ import annotations

import copy
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import litgpt
import pytest
import torch
import yaml
from litgpt import adapter_v2, lora
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble
from litgpt_models import FLAGS, SHAPES, load_model, logits, make_adapter_v2, make_base, make_lora, read_weights
from merging import Bench, assert_rounded_once, steps
from safetensors.torch import load_file
from torch import Tensor, nn

from registry.errors import Refused
from registry.manifest import Finding, Level
from registry.merging import MergeResult
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
    "adapter_v2-llama": "base-llama-gqa",
    "adapter_v2-neox": "base-neox-mha",
    "legacy-adapter_v2-llama": "legacy-base-llama-gqa",
}
FLOAT32 = [
    ("lora-llama-qv", "step-000003"), ("lora-llama-qv", "final"), ("lora-neox-qkv-mlp", "step-000003"),
    ("lora-neox-qkv-mlp", "final"), ("legacy-lora-llama-qv", "final"), ("legacy-lora-llama-qkv", "final"),
]  # fmt: skip
BFLOAT16 = ["step-000003", "final"]


def base_weights(run: str) -> dict[str, Tensor]:
    return read_weights(DATA / BASES[run] / "lit_model.pth")


def litgpt_merged(run: str, step: str) -> dict[str, Tensor]:
    """The whole model as litgpt merged it."""
    prefix, changed = f"{run}/{step}/", load_file(DATA / "merged.safetensors")
    return base_weights(run) | {k.removeprefix(prefix): v for k, v in changed.items() if k.startswith(prefix)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def merge_into(out: Path, adapter: Path, base: Path, dtype: DType | None = None) -> dict[str, Tensor]:
    """Merge into a folder and read the result as litgpt does."""
    Bench(out.parent).merge(adapter, base, out, dtype)
    with zipfile.ZipFile(out / "lit_model.pth") as archive:
        assert archive.testzip() is None
    return read_weights(out / "lit_model.pth")


def merge(out: Path, run: str, step: str, dtype: DType | None = None) -> dict[str, Tensor]:
    return merge_into(out, DATA / run / step, DATA / BASES[run], dtype)


# -- LoRA as litgpt's commands leave it


def run_litgpt(folder: Path, ids: Tensor) -> Tensor:
    """What litgpt answers with the model in a folder."""
    fields = yaml.safe_load((folder / "model_config.yaml").read_text())
    fields.pop("sliding_window_layer_placing", None)  # litgpt 0.5.4 wrote it, later ones do not know it
    model, weights = litgpt.GPT(litgpt.Config(**fields)), read_weights(folder / "lit_model.pth")
    model.to(weights["lm_head.weight"].dtype).load_state_dict(weights, strict=True)
    with torch.no_grad():
        answer: Tensor = model.eval()(ids)
    return answer


@pytest.mark.parametrize(("run", "step"), FLOAT32)
def test_litgpt_runs_the_merged_model(out: Path, run: str, step: str) -> None:
    merge(out, run, step)
    known = load_file(DATA / "logits.safetensors")
    answer = run_litgpt(out, known["input_ids"])
    assert torch.allclose(answer, known[f"{run}/{step}/merged"], rtol=0, atol=1e-5)


def interleaved_rows(config: dict[str, Any]) -> list[Tensor]:
    """The rows of query, key and value in the order of litgpt <= 0.5.4."""
    groups, size = config["n_query_groups"], config["head_size"]
    each = config["n_head"] // groups
    rows = torch.arange((each + 2) * groups * size).view(groups, each + 2, size)
    return [rows[:, :each].reshape(-1), rows[:, each].reshape(-1), rows[:, each + 1].reshape(-1)]


def exact_delta(
    name: str, a: Tensor, b: Tensor, hyper: dict[str, Any], config: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`s * B @ A` in float64 in the rows of a weight, and the same of the absolute values."""
    scale, rank, parts = hyper["lora_alpha"] / hyper["lora_r"], hyper["lora_r"], ("query", "key", "value")
    if ".attn.qkv" not in name and ".attn.attn" not in name:
        return scale * b @ a
    on = [part for part in parts if hyper[f"lora_{part}"]]
    sizes = dict(zip(parts, [len(rows) for rows in interleaved_rows(config)], strict=True))
    places = dict(zip(parts, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    if ".attn.attn" in name and len(on) < 3:
        places = dict(zip(parts, interleaved_rows(config), strict=True))
    delta = torch.zeros(sum(sizes.values()), a.shape[1], dtype=torch.float64)
    for part, own_b, own_a in zip(on, b.split([sizes[part] for part in on]), a.split(rank), strict=True):
        delta[places[part]] = scale * own_b @ own_a
    return delta


def exact_sums(run: str, step: str) -> Iterator[tuple[str, Tensor]]:
    """Name and `W + s * B @ A` in float64 of every weight that changes."""
    hyper = yaml.safe_load((DATA / run / step / "hyperparameters.yaml").read_text())
    config = yaml.safe_load((DATA / run / step / "model_config.yaml").read_text())
    factors = read_weights(DATA / run / step / "lit_model.pth.lora")["model"]
    for name, weight in base_weights(run).items():
        a, b = (factors.get(name.replace("weight", kind)) for kind in ("lora_A", "lora_B"))
        if a is not None and b is not None:
            yield name, weight + exact_delta(name, a.double(), b.double(), hyper, config)


def far_off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ by more than float64 sums do, or are only on one side."""
    names = found.keys() | expected.keys()
    return sorted(
        name for name in names
        if name not in found or name not in expected or not torch.allclose(found[name], expected[name], rtol=1e-14, atol=1e-15)
    )  # fmt: skip


@pytest.mark.parametrize(("run", "step"), FLOAT32)
def test_float32_equals_litgpts_merge_bit_for_bit(out: Path, run: str, step: str) -> None:
    merged, expected = merge(out, run, step), litgpt_merged(run, step)
    assert list(merged) == list(base_weights(run))
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


@pytest.mark.parametrize(("run", "step"), FLOAT32)
def test_float64_is_the_formula(out: Path, run: str, step: str) -> None:
    merged, before = merge(out, run, step, DType.F64), base_weights(run)
    expected = {name: value.double() for name, value in before.items()} | dict(exact_sums(run, step))
    assert far_off(merged, expected) == []


@pytest.mark.parametrize("step", BFLOAT16)
def test_bfloat16_is_rounded_once(out: Path, step: str) -> None:
    """litgpt rounds the weight, the product, the scaled product and the sum, and differs by no more than these."""
    run = "lora-llama-all-bf16"
    merged, litgpts, computed = merge(out, run, step, DType.BF16), litgpt_merged(run, step), set[str]()
    for name, exact in exact_sums(run, step):
        computed.add(name)
        assert merged[name].dtype == torch.bfloat16
        assert_rounded_once(merged[name], exact, torch.zeros(()))
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
    for name, exact in exact_sums(run, "final"):
        assert merged[name].dtype == torch.float32
        assert torch.allclose(merged[name].double(), exact, rtol=1e-6, atol=1e-6)


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
    merged, before = merge_into(out, run, tied_base), read_weights(tied_base / "lit_model.pth")
    factors = read_weights(run / "lit_model.pth.lora")["model"]
    assert torch.equal(merged["transformer.wte.weight"], before["transformer.wte.weight"])
    head = before["lm_head.weight"] + 7 / 3 * (factors["lm_head.lora_B"].float() @ factors["lm_head.lora_A"].float())
    assert torch.allclose(merged["lm_head.weight"], head, rtol=1e-6, atol=1e-6)


def test_tied_bytes_stay_tied(out: Path, tied_base: Path) -> None:
    merged = merge_into(out, DATA / "lora-llama-qv/final", tied_base)
    assert merged["lm_head.weight"].data_ptr() == merged["transformer.wte.weight"].data_ptr()


# -- the two row orders


def upgraded(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Weights or an adapter's vectors of litgpt <= 0.5.4 in today's names and row order, by litgpt's own function."""
    config = litgpt.Config(**yaml.safe_load((folder / "model_config.yaml").read_text()))
    return {
        name.replace(".attn.attn.", ".attn.qkv."): qkv_reassemble(value, config) if ".attn.attn." in name else value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("run", ["legacy-lora-llama-qv", "legacy-lora-llama-qkv"])
def test_a_lora_of_the_old_row_order_merges_into_a_base_of_todays(out: Path, run: str) -> None:
    """To the model that the version it was trained with made of the old base."""
    base = DATA / "base-llama-gqa"
    merged = merge_into(out, DATA / run / "final", base, DType.F64)
    expected = upgraded(dict(exact_sums(run, "final")), base)
    assert far_off({name: merged[name] for name in expected}, expected) == []
    known = load_file(DATA / "logits.safetensors")
    answer = run_litgpt(out, known["input_ids"])
    assert torch.allclose(answer.float(), known[f"{run}/final/merged"], rtol=0, atol=1e-5)


def test_a_lora_of_todays_row_order_merges_into_a_base_of_the_old(out: Path) -> None:
    merged = merge_into(out, DATA / "lora-llama-qv/final", DATA / "legacy-base-llama-gqa", DType.F64)
    again, expected = upgraded(merged, DATA / "base-llama-gqa"), dict(exact_sums("lora-llama-qv", "final"))
    assert far_off({name: again[name] for name in expected}, expected) == []


# -- LoRA of every kind, on models of every shape

Make = Callable[..., Path]


@pytest.fixture
def base(tmp_path: Path) -> Make:
    return lambda shape, dtype=torch.float32: make_base(tmp_path / f"base-{shape}", shape, dtype)


def exactly_merged(model: lora.GPT, base: Path) -> dict[str, Tensor]:
    """litgpt's own merge, done in float64 so that rounding is left to whoever wants other numbers."""
    exact = in_float64(model, base)
    lora.merge_lora_weights(exact)
    found = {name.replace("linear.", ""): value for name, value in exact.state_dict().items() if "lora_" not in name}
    assert all(value.dtype == torch.float64 for value in found.values())
    return found


def in_float64(model: nn.Module, base: Path) -> nn.Module:
    """An adapter's model as litgpt runs it, on the base's own values."""
    exact = copy.deepcopy(model).double()
    exact.load_state_dict({k: v.double() for k, v in read_weights(base / "lit_model.pth").items()}, strict=False)
    return exact


QKV = [parts for count in (1, 2, 3) for parts in combinations(("query", "key", "value"), count)]


@pytest.mark.parametrize("shape", ["llama", "mha", "mqa", "wide"])
@pytest.mark.parametrize("flags", QKV, ids="-".join)
def test_any_parts_of_query_key_and_value(out: Path, base: Make, shape: str, flags: Sequence[str]) -> None:
    folder = base(shape)
    model = make_lora(folder, out.parent / "lora", flags)
    merged = merge_into(out, out.parent / "lora", folder, DType.F64)
    assert far_off(merged, exactly_merged(model, folder)) == []
    assert torch.allclose(logits(load_model(out)), logits(in_float64(model, folder)), rtol=0, atol=1e-12)


OTHERS = [(shape, (flag,)) for shape in ("llama", "neox", "moe") for flag in ("projection", "mlp", "head")]


@pytest.mark.parametrize(("shape", "flags"), OTHERS + [(shape, FLAGS) for shape in SHAPES])
def test_any_other_layers_of_any_model(out: Path, base: Make, shape: str, flags: Sequence[str]) -> None:
    folder = base(shape)
    model = make_lora(folder, out.parent / "lora", flags)
    merged, before = merge_into(out, out.parent / "lora", folder, DType.F64), read_weights(folder / "lit_model.pth")
    assert far_off(merged, exactly_merged(model, folder)) == []
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    assert torch.allclose(logits(load_model(out)), logits(in_float64(model, folder)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16], ids=["mixed", "true"])
def test_bfloat16_models_with_adapters_of_both_kinds(out: Path, base: Make, of_adapter: torch.dtype) -> None:
    folder = base("moe", torch.bfloat16)
    model = make_lora(folder, out.parent / "lora", FLAGS, dtype=of_adapter)
    merged = merge_into(out, out.parent / "lora", folder)
    for name, exact in exactly_merged(model, folder).items():
        assert merged[name].dtype == torch.bfloat16
        assert_rounded_once(merged[name], exact, torch.zeros(()))


# -- Adapter v2


def exactly_folded(model: adapter_v2.GPT) -> dict[str, Tensor]:
    """`diag(scale) W` and `scale * (b + adapter_bias)` in float64, and the rest of a model, but for its prefixes."""
    values = {name: value.double() for name, value in model.state_dict().items()}
    found = {
        name: v
        for name, v in values.items()
        if ".linear." not in name and "adapter_" not in name and "gating" not in name
    }
    for name in (name.removesuffix(".adapter_scale") for name in values if name.endswith(".adapter_scale")):
        scale = values[f"{name}.adapter_scale"]
        found[f"{name}.weight"] = scale[:, None] * values[f"{name}.linear.weight"]
        bias = values.get(f"{name}.linear.bias", torch.zeros_like(scale))
        if not name.endswith("mlp.gate"):
            found[f"{name}.bias"] = scale * (bias + values[f"{name}.adapter_bias"])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_v2_with_its_gates_closed_folds_exactly(out: Path, base: Make, shape: str) -> None:
    """litgpt loads the result strictly, biases and all, and it answers as the adapter did."""
    folder = base(shape)
    model = make_adapter_v2(folder, out.parent / "v2")
    merged, exact = merge_into(out, out.parent / "v2", folder), exactly_folded(model)
    assert merged.keys() == exact.keys()
    assert [name for name in exact if not torch.equal(merged[name], exact[name].float())] == []
    assert torch.allclose(logits(load_model(out)), logits(model), rtol=0, atol=1e-4)


def test_only_the_fields_that_have_to_change_do(out: Path, base: Make) -> None:
    folder = base("neox")
    make_adapter_v2(folder, out.parent / "v2")
    merge_into(out, out.parent / "v2", folder)
    before, after = (yaml.safe_load((place / "model_config.yaml").read_text()) for place in (folder, out))
    assert {key: after[key] for key in after if after[key] != before[key]} == {"lm_head_bias": True}
    assert list(after) == list(before)


def test_a_fold_unties_a_head_from_its_embedding(out: Path, base: Make) -> None:
    folder = base("llama")
    weights = read_weights(folder / "lit_model.pth")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, folder / "lit_model.pth")
    model = make_adapter_v2(folder, out.parent / "v2")
    merged = merge_into(out, out.parent / "v2", folder)
    assert torch.equal(merged["transformer.wte.weight"], weights["transformer.wte.weight"])
    assert torch.allclose(logits(load_model(out)), logits(model), rtol=0, atol=1e-4)


def test_a_fold_of_a_bfloat16_model_is_rounded_once(out: Path, base: Make) -> None:
    folder = base("biased", torch.bfloat16)
    model = make_adapter_v2(folder, out.parent / "v2")
    merged = merge_into(out, out.parent / "v2", folder)
    for name, exact in exactly_folded(model).items():
        assert merged[name].dtype == torch.bfloat16
        assert_rounded_once(merged[name], exact, torch.zeros(()))


def close_gates(run: Path, out: Path) -> Path:
    """A copy of an adapter with every gate at zero."""
    shutil.copytree(run, out)
    (path,) = out.glob("lit_model.pth.adapter*")
    tensors = {name: v * 0 if "gating" in name else v for name, v in read_weights(path)["model"].items()}
    torch.save({"model": tensors}, path)
    return out


@pytest.mark.parametrize("run", ["adapter_v2-llama", "adapter_v2-neox", "legacy-adapter_v2-llama"])
def test_trained_scales_and_norms_fold(out: Path, run: str) -> None:
    """Of the old row order, too: litgpt's classes run it once names and rows are today's."""
    closed = close_gates(DATA / run / "final", out.parent / "closed")
    merge_into(out, closed, DATA / BASES[run])
    folder = DATA / BASES[run].removeprefix("legacy-")
    adapter = upgraded(read_weights(closed / "lit_model.pth.adapter_v2")["model"], folder)
    model = adapter_v2.GPT(adapter_v2.Config(**yaml.safe_load((folder / "model_config.yaml").read_text())))
    model.load_state_dict(upgraded(base_weights(run), folder) | adapter, strict=True)
    ids = load_file(DATA / "logits.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(run_litgpt(out, ids), model.eval()(ids), rtol=0, atol=1e-5)


# -- what does not fold


def merge_lossy(out: Path, adapter: Path, base: Path) -> MergeResult:
    bench = Bench(out.parent)
    planned = bench.registry.plan(bench.register(adapter, base), allow_lossy=True)
    return bench.registry.merge(planned, out=str(out))


def finding_of(result: MergeResult, code: str) -> Finding:
    (found,) = (finding for finding in result.report.findings if finding.code == code)
    return found


def test_open_gates_are_refused_unless_the_loss_is_accepted(out: Path, base: Make) -> None:
    """What is left is the model with its gates closed; what was lost stands in the result's own record."""
    folder = base("llama")
    model = make_adapter_v2(folder, out.parent / "v2", gates=0.1)
    with pytest.raises(Refused) as caught:
        Bench(out.parent).plan(out.parent / "v2", folder)
    (refused,) = (finding for finding in caught.value.report.findings if finding.level is Level.REFUSED)
    assert (refused.code, refused.fits) == ("gated_prefix", True)
    assert "--allow-lossy" in refused.advice
    result = merge_lossy(out, out.parent / "v2", folder)
    warned = finding_of(result, "gated_prefix")
    assert (warned.level, warned.found) == (Level.WARNING, refused.found)
    record = json.loads((out / "merge.json").read_text())
    assert [each["found"] for each in record["warnings"]] == [refused.found]
    merged, exact = read_weights(out / "lit_model.pth"), exactly_folded(model)
    assert [name for name in exact if not torch.equal(merged[name], exact[name].float())] == []
    assert not torch.allclose(logits(load_model(out)), logits(model), rtol=0, atol=1e-3)
    for name, value in model.named_parameters():
        if "gating_factor" in name:
            value.data.zero_()
    assert torch.allclose(logits(load_model(out)), logits(model), rtol=0, atol=1e-4)


_SHARES = re.compile(r"([\d.]+)% in layer (\d+)")


def prefix_share(model: adapter_v2.GPT, layer: int) -> tuple[float, float]:
    """The largest `|gate| * ‖what the prefix adds‖ / ‖typical own value‖` of a layer's heads, for many texts; and the largest gate."""
    attention, added, own = model.transformer.h[layer].attn, list[Tensor](), list[Tensor]()
    plain = litgpt.model.CausalSelfAttention.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        result = type(attention).scaled_dot_product_attention(attention, q, k, v, mask)
        added.append((result - plain(attention, q, k, v, mask)).norm(dim=-1))  # [1, tokens, heads]
        return result

    attention.scaled_dot_product_attention = spy
    with torch.no_grad():
        for start in range(8):
            model.eval()((torch.arange(12).unsqueeze(0) * 3 + start) % 40)
        config = model.config
        norm = model.transformer.h[layer].norm_1
        random = torch.randn(20000, config.n_embd, generator=torch.Generator().manual_seed(1))
        weight = norm.weight + getattr(norm, "add_unit_offset", False)
        inputs = random * weight + (0 if getattr(norm, "bias", None) is None else norm.bias)
        values = attention.qkv(inputs)[:, -config.n_query_groups * config.head_size :]
        own = values.view(-1, config.n_query_groups, config.head_size).square().sum(-1).mean(0).sqrt()
    share = torch.cat(added).amax((0, 1)) / own.repeat_interleave(config.n_head // config.n_query_groups)
    return float(share.max()), float(attention.gating_factor.detach().abs().max())


@pytest.mark.parametrize("shape", ["llama", "mqa", "neox", "biased", "gemma"])
def test_the_loss_of_a_prefix_is_bounded_tightly(out: Path, base: Make, shape: str) -> None:
    """No text makes litgpt's prefix add more than what was said, and texts make it add a fair part of that."""
    folder = base(shape)
    model = make_adapter_v2(folder, out.parent / "v2", gates=0.1)
    said = Bench(out.parent).findings(out.parent / "v2", folder)["gated_prefix"].found
    bounds = {int(layer): float(number) / 100 for number, layer in _SHARES.findall(said)}
    assert bounds.keys() == {2, 3}
    for layer, bound in bounds.items():
        share, gate = prefix_share(model, layer)
        assert bound / 4 < share < bound * 1.02
        assert gate <= float(said.partition("gates of up to ")[2].partition(";")[0]) * 1.01


def test_biases_of_routers_are_refused_unless_the_loss_is_accepted(out: Path, base: Make) -> None:
    folder = base("moe")
    model = make_adapter_v2(folder, out.parent / "v2", router_bias=True)
    refused = Bench(out.parent).findings(out.parent / "v2", folder)["router_bias"]
    assert refused.level is Level.REFUSED
    shifts = {}
    for number, block in enumerate(model.transformer.h):
        bias = block.mlp.gate.adapter_scale * block.mlp.gate.adapter_bias
        shifts[number] = f"{float(bias.max() - bias.min()):.3g}"
        block.mlp.gate.adapter_bias.data.zero_()
    assert all(f"{shift} in layer {number}" in refused.found for number, shift in shifts.items())
    result = merge_lossy(out, out.parent / "v2", folder)
    assert finding_of(result, "router_bias").level is Level.WARNING
    assert torch.allclose(logits(load_model(out)), logits(model), rtol=0, atol=1e-4)


# -- full fine-tunes


def test_an_adapter_trained_on_a_full_fine_tune_merges_into_it(out: Path, base: Make) -> None:
    """`litgpt finetune_full` wraps its weights and, at a step, adds the optimizer's, over which litgpt's own merge stumbles."""
    folder = base("llama")
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    logits_before = model(torch.arange(8).unsqueeze(0)).sum()
    logits_before.backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 4, "step_count": 2}
    step = out.parent / "full/step-000002"
    shutil.copytree(folder, step)
    torch.save(state, step / "lit_model.pth")
    torch.save(model.state_dict(), folder / "lit_model.pth")
    unmerged = make_lora(folder, out.parent / "lora", FLAGS)
    merge_into(out, out.parent / "lora", step)
    assert torch.allclose(logits(load_model(out)), logits(unmerged), rtol=0, atol=1e-4)
