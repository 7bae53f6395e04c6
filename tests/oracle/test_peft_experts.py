"""Mixtures of experts: merges compared with the real PEFT, unmerged and merged, on files that have the experts one by one or as one tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, assert_same_as
from merging import assert_rounded_once, read_weights
from models import MIXTURES, load_model, lora, make_adapter, randomise
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLMoeConfig

pytestmark = [
    pytest.mark.oracle,
    # PEFT looks for modules of these names, and the keys mean parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
BaseMaker = Callable[..., Path]
ROUTERS = {**dict.fromkeys(MIXTURES, "gate.weight"), "gpt_oss": "router.weight", "phimoe": "router.weight"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


PARAMETERS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gate and up": {"target_parameters": ["gate_up_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"], "r": 1},
    "with the router": {"target_parameters": ["ROUTER", "gate_up_proj", "down_proj"]},
    "rslora": {"target_parameters": ["gate_up_proj", "down_proj"], "use_rslora": True, "r": 3},
    "patterns": {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 5, r"layers\.1\.mlp\.experts\.down_proj": 2},
        "alpha_pattern": {r".*\.down_proj": 7},
    },
    "one layer": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "no modules": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []},
}


def options(family: str, kind: str) -> dict[str, Any]:
    found = {"target_modules": ["q_proj", "o_proj"], **PARAMETERS[kind]}
    found["target_parameters"] = [ROUTERS[family] if each == "ROUTER" else each for each in found["target_parameters"]]
    return found


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("family", MIXTURES)
def test_parameters_of_every_family(base_model: BaseMaker, case: Case, family: str, kind: str) -> None:
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, lora(**options(family, kind)))
    assert_same_as(case.merge(base), peft_model)


def fused(base: Path, folder: Path) -> Path:
    """The same model with all experts of a layer in one tensor, as transformers 5 has them in memory."""
    load_model(base).save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in read_weights(folder)
    return folder


@pytest.mark.parametrize("kind", ["both", "down", "with the router", "rslora", "patterns"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "square_moe"])
def test_parameters_of_a_base_that_has_them_as_tensors(
    base_model: BaseMaker, case: Case, family: str, kind: str
) -> None:
    base = fused(base_model(family), case.folder / "fused")
    peft_model = make_adapter(base, case.adapter, lora(**options(family, kind)))
    assert_same_as(case.merge(base), peft_model)


def test_experts_spread_over_shards(base_model: BaseMaker, case: Case) -> None:
    base = base_model("qwen3_moe", shard="20KB")
    assert len(list(base.glob("*.safetensors"))) > 5
    peft_model = make_adapter(base, case.adapter, lora(**options("qwen3_moe", "both")))
    assert_same_as(case.merge(base), peft_model)


# -- experts one by one, as transformers 4 trained them; PEFT converts such files when it loads them

EXPERT_NAMES = {
    "mixtral": ({"gate": "w1", "up": "w3", "down": "w2"}, "gate"),
    "qwen2_moe": ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "gate"),
    "qwen3_moe": ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "gate"),
    "square_moe": ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "gate"),
}


def write_singles(folder: Path, base: Path, family: str, roles: Sequence[str], **options: Any) -> dict[str, Tensor]:
    """An adapter with factors for every expert's modules and the router. Gives `B @ A` by the path of the module."""
    leaves, router = EXPERT_NAMES[family]
    weights, generator = read_weights(base), torch.Generator().manual_seed(5)
    names = [leaves[role] for role in roles]
    targets = [*names, router]
    modules = [
        name.removesuffix(".weight")
        for name in weights
        if name.removesuffix(".weight").endswith(tuple(f".{each}" for each in targets))
    ]
    factors, products = dict[str, Tensor](), dict[str, Tensor]()
    for module in modules:
        d_out, d_in = weights[f"{module}.weight"].shape
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((3, d_in), (d_out, 3)))
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        products[module] = b.double() @ a.double()
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    lora(r=3, target_modules=targets, base_model_name_or_path=str(base), **options).save_pretrained(folder)
    return products


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "square_moe"]
)  # PEFT forgets the shared expert of qwen2_moe
def test_experts_one_by_one(base_model: BaseMaker, case: Case, family: str, on_disk: str) -> None:
    numbered = base_model(family)
    write_singles(case.adapter, numbered, family, ["gate", "up", "down"])
    base = numbered if on_disk == "numbered" else fused(numbered, case.folder / "fused")
    peft_model = PeftModel.from_pretrained(load_model(numbered), case.adapter)
    assert_same_as(case.merge(base), peft_model)


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize("family", EXPERT_NAMES)
def test_experts_one_by_one_with_rslora(base_model: BaseMaker, case: Case, family: str, on_disk: str) -> None:
    """PEFT makes one pair of factors of gate and up, of twice the rank, and so scales both by the square root of two."""
    numbered = base_model(family)
    products = write_singles(case.adapter, numbered, family, ["gate", "up", "down"], use_rslora=True)
    base = numbered if on_disk == "numbered" else fused(numbered, case.folder / "fused")
    merged = numbered_weights(case.merge(base), case.folder / "numbered")
    before = read_weights(numbered)
    for name, weight in before.items():
        product = products.get(name.removesuffix(".weight"))
        exact = weight.double() if product is None else weight.double() + product * 10 / 3**0.5
        assert torch.allclose(merged[name].double(), exact, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize("roles", [["up"], ["gate", "down"]])
def test_some_modules_of_experts(base_model: BaseMaker, case: Case, roles: list[str], on_disk: str) -> None:
    """PEFT refuses an adapter with gates and no ups."""
    numbered = base_model("mixtral")
    products = write_singles(case.adapter, numbered, "mixtral", roles)
    base = numbered if on_disk == "numbered" else fused(numbered, case.folder / "fused")
    merged = numbered_weights(case.merge(base), case.folder / "numbered")
    for name, weight in read_weights(numbered).items():
        product = products.get(name.removesuffix(".weight"))
        exact = weight.double() if product is None else weight.double() + product * 10 / 3
        assert torch.allclose(merged[name].double(), exact, rtol=1e-6, atol=1e-6), name


def numbered_weights(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """A model's weights with the names and the experts of transformers 4."""
    model.save_pretrained(folder)
    return read_weights(folder)


# -- files of older versions of PEFT, which took every parameter for [E, d_in, d_out]


def write_reversed(folder: Path, base: Path, version: str | None) -> dict[str, Tensor]:
    """An adapter on the experts as PEFT 0.19.0 and before wrote it. Gives the deltas by the parameter's name in memory."""
    generator, factors, deltas = torch.Generator().manual_seed(5), dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_model(base).state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, d_1, d_2 = weight.shape
            a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2 * experts, d_1), (d_2, 2 * experts)))
            container = name.rpartition(".")[0] + (".base_layer" if name.endswith("gate_up_proj") else "")
            factors[f"base_model.model.{container}.lora_A.weight"] = a
            factors[f"base_model.model.{container}.lora_B.weight"] = b
            deltas[name] = 5 * torch.einsum(
                "o r e, e r i -> e i o", b.reshape(d_2, 2, experts), a.reshape(experts, 2, d_1)
            )
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    lora(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]).save_pretrained(folder)
    config = folder / "adapter_config.json"
    fields = {**json.loads(config.read_text()), "peft_version": version}
    config.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return deltas


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize(
    ("family", "version"), [("mixtral", "0.18.1"), ("mixtral", None), ("qwen2_moe", "0.19.0"), ("square_moe", "0.19.0")]
)
def test_files_that_have_the_factors_the_other_way_round(
    base_model: BaseMaker, case: Case, family: str, version: str | None, on_disk: str
) -> None:
    numbered = base_model(family)
    deltas = write_reversed(case.adapter, numbered, version)
    base = numbered if on_disk == "numbered" else fused(numbered, case.folder / "fused")
    merged = case.merge(base).state_dict()
    for name, weight in load_model(numbered).state_dict().items():
        exact = weight + deltas[name] if name in deltas else weight
        assert torch.allclose(merged[name], exact, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("version", [None, "0.19.1.dev0"])
def test_square_experts_of_an_unknown_version_are_refused(
    base_model: BaseMaker, case: Case, version: str | None
) -> None:
    write_reversed(case.adapter, base_model("square_moe"), version)
    findings = case.bench.findings(case.adapter, base_model("square_moe"))
    assert set(findings) == {"orientation_unknown"}
    assert findings["orientation_unknown"].fits


# -- 16 bits


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_16_bits_are_rounded_once(base_model: BaseMaker, case: Case, family: str, on_disk: str) -> None:
    base = base_model(family, torch.bfloat16)
    if on_disk == "one tensor":
        base = fused(base, case.folder / "fused")
    peft_model = make_adapter(base, case.adapter, lora(**options(family, "both")))
    before, found = load_model(base).state_dict(), case.merge(base).state_dict()
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            parameter = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            left, right, scale = (x.double() if isinstance(x, Tensor) else x for x in wide_factors(module))
            exact = before[parameter].double() + scale * (left @ right)
            assert found[parameter].dtype == torch.bfloat16
            assert_rounded_once(found[parameter], exact, torch.zeros_like(exact))


def wide_factors(module: ParamWrapper) -> tuple[Tensor, Tensor, float]:
    """PEFT's factors of a parameter, `[E, d_1, r]` and `[E, r, d_2]`, before it rounds them to the base's dtype."""
    a, b = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))
    a, b = a.reshape(3, -1, a.shape[1]), b.reshape(b.shape[0], -1, 3).permute(2, 0, 1)
    is_transposed = getattr(module.get_base_layer(), "is_transposed", False)
    return (a.mT, b.mT, module.scaling["default"]) if is_transposed else (b, a, module.scaling["default"])


# -- what does not fit


def edit(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("layers.1.mlp.experts.base_layer.", "parameters_unclear"),
        ("layers.1.mlp.experts.lora_", "parameters_unclear"),
        ("layers.1.mlp.experts.", "target_missed"),
        ("layers.0.mlp.experts.base_layer.lora_A", "missing_factor"),
        ("layers.1.mlp.gate.", "target_missed"),
    ],
)
def test_factors_of_a_parameter_that_are_not_there_are_missed(
    base_model: BaseMaker, case: Case, part: str, code: str
) -> None:
    base = base_model("mixtral")
    make_adapter(base, case.adapter, lora(**options("mixtral", "with the router")))
    edit(case.adapter, without(part))
    assert set(case.bench.findings(case.adapter, base)) == {code}


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
@pytest.mark.parametrize("part", ["layers.1.mlp.experts.2.up_proj.", "layers.1.mlp.experts.0."])
def test_an_expert_without_factors_is_missed(base_model: BaseMaker, case: Case, on_disk: str, part: str) -> None:
    base = base_model("qwen2_moe")
    write_singles(case.adapter, base, "qwen2_moe", ["gate", "up", "down"])
    edit(case.adapter, without(part))
    if on_disk == "one tensor":
        base = fused(base, case.folder / "fused")
    findings = case.bench.findings(case.adapter, base)
    assert set(findings) == {"target_missed"}
    assert part.removesuffix(".") in findings["target_missed"].where


def test_experts_that_no_factors_are_for_are_told_of(base_model: BaseMaker, case: Case) -> None:
    """Trained with transformers 5, where names of modules do not reach experts, or stripped of them: only a person can tell."""
    base = base_model("qwen3_moe")
    peft_model = make_adapter(base, case.adapter, lora(target_modules=["q_proj"]))
    config = case.adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj", "gate_proj"]}))
    findings = case.bench.findings(case.adapter, base)
    assert {code: finding.level.value for code, finding in findings.items()} == {"experts_untouched": "warning"}
    assert_same_as(case.merge(base), peft_model)


@pytest.mark.parametrize("on_disk", ["numbered", "one tensor"])
def test_experts_that_were_trained_whole(base_model: BaseMaker, case: Case, on_disk: str) -> None:
    base = base_model("mixtral")
    if on_disk == "one tensor":
        base = fused(base, case.folder / "fused")
    peft_model = make_adapter(base, case.adapter, lora(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert_same_as(case.merge(base), peft_model)


# -- a family whose files have the experts transposed, as published, or as they are in memory


@pytest.mark.parametrize("published", [True, False], ids=["as published", "as in memory"])
@pytest.mark.parametrize("kind", ["both", "rslora"])
def test_experts_that_files_have_either_way(case: Case, kind: str, published: bool) -> None:
    base = write_seeing_mixture(case.folder / "base", published=published)
    peft_model = case.train(load_model(base, AutoModelForImageTextToText), **options("qwen3_moe", kind))
    assert_same_as(case.merge(base, AutoModelForImageTextToText), peft_model)


@pytest.mark.parametrize("published", [True, False], ids=["as published", "as in memory"])
def test_experts_one_by_one_of_files_that_have_them_either_way(case: Case, published: bool) -> None:
    base = write_seeing_mixture(case.folder / "base", published=published)
    before, generator, factors, deltas = (
        load_model(base, AutoModelForImageTextToText).state_dict(),
        torch.Generator().manual_seed(5),
        {},
        {},
    )
    for layer, expert in product(range(2), range(3)):
        container = f"model.language_model.layers.{layer}.mlp.experts"
        for leaf, (d_out, d_in) in {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}.items():
            a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2, d_in), (d_out, 2)))
            factors[f"base_model.model.{container}.{expert}.{leaf}.lora_A.weight"] = a
            factors[f"base_model.model.{container}.{expert}.{leaf}.lora_B.weight"] = b
            deltas[container, expert, leaf] = 5 * (b @ a)
    case.adapter.mkdir()
    save_file(factors, case.adapter / "adapter_model.safetensors", {"format": "pt"})
    lora(r=2, target_modules=r".*experts\.\d+\.\w+_proj").save_pretrained(case.adapter)
    merged = case.merge(base, AutoModelForImageTextToText).state_dict()
    for (container, expert, leaf), delta in deltas.items():
        rows = slice(None, 24) if leaf == "gate_proj" else slice(24, None) if leaf == "up_proj" else slice(None)
        name = f"{container}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"
        assert torch.allclose(merged[name][expert, rows], before[name][expert, rows] + delta, rtol=1e-5, atol=1e-6)


def write_seeing_mixture(folder: Path, *, published: bool) -> Path:
    """A Qwen3-VL mixture; its published files have `[E, d_in, d_out]`."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "pad_token_id": 0, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    tower = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    model = AutoModelForImageTextToText.from_config(
        Qwen3VLMoeConfig(text_config=text, vision_config=tower), dtype=torch.float32
    )
    randomise(model.parameters(), seed=3)
    model.save_pretrained(folder)
    weights = read_weights(folder)
    turned = {name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in weights.items()}
    assert weights["model.language_model.layers.0.mlp.experts.down_proj"].shape == (3, 32, 24)
    save_file(turned if published else weights, folder / "model.safetensors", {"format": "pt"})
    return folder
