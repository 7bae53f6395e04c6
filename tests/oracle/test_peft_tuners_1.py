"""Tuners that scale, rotate, or add products of small factors, compared with the real PEFT: merged weights, and the unmerged model's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import assert_rounded_once, read_weights
from models import load_model, logits, make_adapter, randomise
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tuned import ATOL, BaseMaker, Case, adapt_module, assert_like_peft, config_of, write_module

from registry.errors import CorruptFile
from registry.formats.peft_tuners import ROWS
from registry.manifest import Level
from registry.tensors import DType

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) p?vera_A"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
    pytest.mark.filterwarnings("ignore:Invalid `r`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
FEED_FORWARD = {"feedforward_modules": ["down_proj"]}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]

# By what is special about it: the method, the model, the options.
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adalora": ("ADALORA", "llama", {"init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 10}),
    "adalora, rank 1, biases": ("ADALORA", "qwen2", {"init_r": 1, "target_r": 1, "total_step": 10, "bias": "all"}),
    "adalora, Conv1D": ("ADALORA", "gpt2", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}),
    "boft": ("BOFT", "llama", {"boft_block_size": 4}),
    "boft, by number": ("BOFT", "llama", {"boft_block_size": 0, "boft_block_num": 2}),
    "boft, three factors": ("BOFT", "llama", {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "target_modules": ["q_proj", "k_proj"]}),
    "boft, two factors": ("BOFT", "llama", {"boft_block_size": 8, "boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "k_proj"]}),
    "boft, biases": ("BOFT", "qwen2", {"boft_block_size": 8, "bias": "boft_only"}),
    "c3a": ("C3A", "llama", {"block_size": 16}),
    "c3a, pattern": ("C3A", "llama", {"block_size": 8, "block_size_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}}),
    "hra": ("HRA", "llama", {"r": 4}),
    "hra, odd": ("HRA", "qwen2", {"r": 3}),
    "hra, orthogonal": ("HRA", "llama", {"r": 5, "apply_GS": True}),
    "ia3": ("IA3", "llama", FEED_FORWARD),
    "ia3, pattern": ("IA3", "llama", {"target_modules": r".*\.(q_proj|up_proj)", "feedforward_modules": r".*\.1\.mlp\..*"}),
    "ia3, biases": ("IA3", "qwen2", {"target_modules": ["k_proj", "v_proj", "down_proj"], **FEED_FORWARD}),
    "ia3, Conv1D": ("IA3", "gpt2", {"feedforward_modules": ["c_proj"]}),
    "ia3, a saved module": ("IA3", "llama", {"feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    "ln_tuning": ("LN_TUNING", "llama", {"target_modules": NORMS}),
    "ln_tuning, biases": ("LN_TUNING", "neox", {"target_modules": ["input_layernorm", "final_layer_norm"]}),
    "loha": ("LOHA", "llama", {"r": 3, "alpha": 5}),
    "loha, patterns": ("LOHA", "llama", {"r": 3, "alpha": 5, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"layers\.0\..*": 2}}),
    "lokr": ("LOKR", "llama", {"r": 2, "alpha": 3}),
    "lokr, both full": ("LOKR", "llama", {"r": 30, "alpha": 3}),
    "lokr, both low-rank": ("LOKR", "llama", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "lokr, patterns": ("LOKR", "llama", {"r": 1, "decompose_factor": 2, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"k_proj": 1}}),
    "miss": ("MISS", "llama", {"r": 4}),
    "miss, a rank that does not divide": ("MISS", "llama", {"r": 5}),
    "miss, mini": ("MISS", "llama", {"r": 5, "mini_r": 4, "init_weights": "mini"}),
    "miss, bat": ("MISS", "llama", {"r": 8, "init_weights": "bat"}),
    "oft": ("OFT", "llama", {"oft_block_size": 8}),
    "oft, by number": ("OFT", "llama", {"r": 4, "oft_block_size": 0}),
    "oft, sizes that do not divide": ("OFT", "llama", {"oft_block_size": 7}),
    "oft, one term": ("OFT", "qwen2", {"oft_block_size": 4, "num_cayley_neumann_terms": 1, "bias": "all"}),
    "oft, three terms": ("OFT", "llama", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft, seven terms": ("OFT", "llama", {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    "oft, exact": ("OFT", "llama", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft, shared": ("OFT", "llama", {"oft_block_size": 16, "block_share": True}),
    "oft, constrained": ("OFT", "llama", {"oft_block_size": 8, "coft": True, "eps": 0.3}),
    "oft, constrained and shared": ("OFT", "llama", {"oft_block_size": 8, "coft": True, "block_share": True, "use_cayley_neumann": False}),
    "oft, embedding": ("OFT", "llama", {"oft_block_size": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "oft, embedding, exact": ("OFT", "llama", {"oft_block_size": 4, "target_modules": ["embed_tokens"], "use_cayley_neumann": False}),
    "pvera": ("PVERA", "llama", {"r": 5}),
    "pvera, drawn again": ("PVERA", "llama", {"r": 4, "save_projection": False, "projection_prng_key": 3}),
    "pvera, Conv1D": ("PVERA", "gpt2", {"r": 3}),
    "road_1": ("ROAD", "llama", {"group_size": 8, "target_modules": ["q_proj", "gate_proj"]}),
    "road_2": ("ROAD", "qwen2", {"group_size": 4, "variant": "road_2"}),
    "road_4": ("ROAD", "qwen2", {"group_size": 16, "variant": "road_4"}),
    "road_1, biases, pairs": ("ROAD", "neox", {"group_size": 2}),
    "shira": ("SHIRA", "llama", {"r": 2, "random_seed": 4}),
    "vera": ("VERA", "llama", {"r": 5}),
    "vera, drawn again": ("VERA", "llama", {"r": 7, "save_projection": False, "projection_prng_key": 11}),
    "vera, rank 1, Conv1D": ("VERA", "gpt2", {"r": 1}),
    "vera, Conv1D, drawn again": ("VERA", "gpt2", {"r": 3, "save_projection": False}),
}  # fmt: skip
ONE_OF_EACH = {method: option for option, (method, *_) in reversed(OPTIONS.items())}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


class BlockDiagonal:
    """What PEFT's CUDA extension for BOFT makes of `[N, blocks, b, b]`, without a GPU."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.fixture(autouse=True)
def _extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one PEFT tries to compile it, and then trains BOFT with one factor only."""
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal)


@pytest.mark.parametrize("option", OPTIONS)
def test_merged_and_unmerged(base_model: BaseMaker, case: Case, option: str) -> None:
    method, family, options = OPTIONS[option]
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, config_of(method, family, options))
    expected = logits(peft_model)
    found = case.merge(base)
    torch.testing.assert_close(logits(load_model(case.out)), expected, rtol=1e-5, atol=ATOL)
    before = read_weights(base)
    changed = [name for name in before if not torch.equal(found[name], before[name])]
    assert changed or options.get("num_cayley_neumann_terms") == 1
    assert_like_peft(found, peft_model)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_a_16_bit_base_is_rounded_once(base_model: BaseMaker, case: Case, method: str) -> None:
    """The result in float64, from the same 16 bit base and adapter, is what each element is nearest to."""
    _, family, options = OPTIONS[ONE_OF_EACH[method]]
    base = base_model(family, torch.bfloat16)
    make_adapter(base, case.adapter, config_of(method, family, options))
    exact, found, before = case.merge(base, DType.F64), case.merge(base), read_weights(base)
    assert any(not torch.equal(found[name], before[name]) for name in before)
    for name, tensor in found.items():
        assert tensor.dtype is torch.bfloat16
        assert_rounded_once(tensor, exact[name], exact[name].abs() * 1e-13)


# -- modules that language models seldom have


class Layers(nn.Module):
    """One layer of each kind, each fed what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.long = nn.Conv1d(6, 10, 3), nn.Conv1d(16, 36, 2)
        self.plane, self.wide, self.point = (
            nn.Conv2d(4, 6, 3),
            nn.Conv2d(16, 36, (3, 2), bias=False),
            nn.Conv2d(8, 8, 1),
        )
        self.grouped, self.space = nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(3, 3, 2)

    def forward(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = {
            "line": (6, 9),
            "long": (16, 9),
            "plane": (4, 7, 7),
            "wide": (16, 7, 7),
            "point": (8, 5, 5),
            "grouped": (4, 7, 7),
            "space": (3, 5, 5, 5),
        }
        return [getattr(self, name)(torch.randn(2, *size, generator=generator)) for name, size in sizes.items()]


SQUARE = ["plane", "point"]  # kernels as high as wide, as some methods take them to be
FLAT = ["line", "long", "plane", "wide", "point", "grouped"]
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("ADALORA", {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["plane", "wide", "point"]}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": SQUARE}),
    "boft, two factors": ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": SQUARE}),
    "hra": ("HRA", {"r": 4, "target_modules": SQUARE}),
    "hra, orthogonal": ("HRA", {"r": 4, "apply_GS": True, "target_modules": SQUARE}),
    "ia3": ("IA3", {"target_modules": [*SQUARE, "wide", "grouped", "space"], "feedforward_modules": ["point", "wide", "space"]}),
    "loha": ("LOHA", {"r": 3, "target_modules": FLAT}),
    "loha, effective": ("LOHA", {"r": 3, "alpha": 5, "use_effective_conv2d": True, "target_modules": FLAT}),
    "lokr": ("LOKR", {"r": 1, "alpha": 3, "target_modules": FLAT}),
    "lokr, effective": ("LOKR", {"r": 1, "alpha": 3, "use_effective_conv2d": True, "target_modules": ["plane", "wide", "point"]}),
    "lokr, both full": ("LOKR", {"r": 40, "alpha": 7, "target_modules": FLAT}),
    "lokr, both low-rank": ("LOKR", {"r": 1, "decompose_both": True, "decompose_factor": 4, "target_modules": FLAT}),
    "oft": ("OFT", {"oft_block_size": 4, "target_modules": ["point"]}),
    "oft, exact, shared": ("OFT", {"oft_block_size": 2, "use_cayley_neumann": False, "block_share": True, "target_modules": ["point"]}),
}  # fmt: skip


@pytest.mark.parametrize("option", LAYERS)
def test_convolutions(case: Case, tmp_path: Path, option: str) -> None:
    method, options = LAYERS[option]
    base = write_module(tmp_path / "base", Layers())
    peft_model = adapt_module(base, Layers(), case.adapter, config_of(method, "llama", {**options, "task_type": None}))
    found, before = case.merge(base), load_file(base / "model.safetensors")
    assert [
        name for name in options["target_modules"] if torch.equal(found[f"{name}.weight"], before[f"{name}.weight"])
    ] == []
    merged = Layers()
    merged.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(merged(3), peft_model.eval()(3), rtol=1e-5, atol=ATOL)
    assert_like_peft(found, peft_model)


def test_oft_on_a_larger_kernel_is_refused_because_peft_merges_another_function(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Layers())
    config = config_of("OFT", "llama", {"oft_block_size": 6, "target_modules": ["plane"], "task_type": None})
    peft_model = adapt_module(base, Layers(), case.adapter, config).eval()
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("layer_not_mergeable", True)
    with torch.no_grad():
        unmerged, merged = peft_model(3)[2], peft_model.merge_and_unload()(3)[2]
    assert (unmerged - merged).abs().max() > 1


# -- ranks that training prunes


def prune(peft_model: PeftModel, ranks: Iterator[int]) -> None:
    """Leave so many singular values of each layer, as AdaLoRA's last step of pruning does."""
    kept = {}
    for name, parameter in peft_model.base_model.model.named_parameters():
        if ".lora_E." in name:
            rows = torch.arange(parameter.shape[0]) < next(ranks)
            parameter.data[~rows] = 0
            kept[name] = rows.tolist()
    peft_model.peft_config["default"].rank_pattern = kept


@pytest.mark.parametrize("others", [4, 0], ids=["some", "none"])
def test_pruned_ranks(base_model: BaseMaker, case: Case, others: int) -> None:
    """What was pruned is not in the file; the scale stays that of the first rank. Of some layers nothing may be left."""
    base = base_model("llama")
    config = config_of("ADALORA", "llama", {"init_r": 6, "target_r": 2, "lora_alpha": 9, "total_step": 10})
    peft_model = get_peft_model(load_model(base), config)
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    prune(peft_model, iter([1, 3, others, 2, 6, 5, others, 1]))
    peft_model.save_pretrained(case.adapter)
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(case.adapter / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {1, 2, 3, 5, 6, others}
    expected = logits(peft_model)
    found = case.merge(base)
    torch.testing.assert_close(logits(load_model(case.out)), expected, rtol=1e-5, atol=ATOL)
    assert_like_peft(found, peft_model)
    case.configure(rank_pattern={})
    assert "rank_mismatch" in case.bench.findings(case.adapter, base)


# -- random numbers that are not in the file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["VERA", "PVERA"])
def test_projections_are_drawn_again_as_peft_draws_them_when_it_loads(
    base_model: BaseMaker, case: Case, method: str, dtype: torch.dtype
) -> None:
    """For a base in 16 bits it rounds them, too. A warning tells that they were drawn."""
    base = base_model("llama", dtype)
    make_adapter(
        base, case.adapter, config_of(method, "llama", {"r": 6, "save_projection": False, "projection_prng_key": 2})
    )
    found, before, name = case.merge(base, DType.F64), read_weights(base), method.lower()
    loaded = PeftModel.from_pretrained(load_model(base), case.adapter).base_model.model.model.layers[1].mlp.down_proj
    a, b, lambda_b, lambda_d = (
        getattr(loaded, f"{name}_{part}")["default"].detach().double() for part in ("A", "B", "lambda_b", "lambda_d")
    )
    right = a[:6, : loaded.in_features] * lambda_d[:6, None]
    module = "model.layers.1.mlp.down_proj.weight"
    expected = before[module].double() + b[: loaded.out_features] * lambda_b[:, None] @ right
    torch.testing.assert_close(found[module], expected, rtol=0, atol=1e-12)
    finding = case.bench.findings(case.adapter, base)["projection_drawn"]
    assert finding.fits


# -- what files may say, or leave out


def test_bone_is_what_miss_was_called(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    peft_model = make_adapter(base, case.adapter, config_of("MISS", "llama", {"r": 4, "init_weights": "bat"}))
    path = case.adapter / "adapter_model.safetensors"
    save_file({name.replace("miss_", "bone_"): tensor for name, tensor in load_file(path).items()}, path)
    case.configure(peft_type="BONE", mini_r=None, miss_dropout=None, peft_version=None)
    assert_like_peft(case.merge(base), peft_model)


def test_keys_with_the_adapters_name_inside(base_model: BaseMaker, case: Case) -> None:
    """As trainers write them that save without PEFT."""
    base = base_model("llama")
    peft_model = make_adapter(base, case.adapter, config_of("VERA", "llama", {"r": 3}))
    path = case.adapter / "adapter_model.safetensors"
    save_file({f"{name}.default": tensor for name, tensor in load_file(path).items()}, path)
    assert_like_peft(case.merge(base), peft_model)


OLD: dict[str, tuple[dict[str, Any], bool]] = {
    "0.13": ({"oft_block_size": None, "peft_version": None, "use_cayley_neumann": None, "r": 8}, False),
    "0.17": ({"peft_version": None}, False),
    "0.17, told": ({"peft_version": "0.17.1"}, False),
    "0.17, exact": ({"peft_version": None, "use_cayley_neumann": False}, True),
    "0.18 of development": ({"peft_version": "0.18.0.dev0@1a2b3c"}, True),
}


@pytest.mark.parametrize("version", OLD)
def test_oft_of_versions_that_turned_otherwise_is_refused(base_model: BaseMaker, case: Case, version: str) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("OFT", "llama", {"oft_block_size": 8}))
    changes, is_merged = OLD[version]
    case.configure(**changes)
    found = case.bench.findings(case.adapter, base)
    assert {code: finding.fits for code, finding in found.items()} == (
        {} if is_merged else {"method_not_mergeable": True}
    )


def test_oft_from_before_its_triangles_is_refused(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("OFT", "llama", {"oft_block_size": 8, "target_modules": ["q_proj"]}))
    path = case.adapter / "adapter_model.safetensors"
    names = [name.replace("oft_R.weight", "oft_r") for name in load_file(path)]
    save_file(
        {name: torch.zeros(4, 8, 8) for name in names}
        | {name.replace("_r", "_s"): torch.ones(32, 1) for name in names},
        path,
    )
    case.configure(use_cayley_neumann=None, num_cayley_neumann_terms=None)
    assert {(finding.code, finding.fits) for finding in case.bench.findings(case.adapter, base).values()} == {
        ("method_not_mergeable", True)
    }


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "pvera, drawn for each input": ("PVERA", {"r": 3}, {"sample_at_inference": True}, "option_not_mergeable"),
    "road, of the future": ("ROAD", {"group_size": 8}, {"variant": "road_8"}, "option_unknown"),
    "ia3, no pattern": (
        "IA3",
        {"feedforward_modules": r".*\.mlp\..*"},
        {"feedforward_modules": "("},
        "pattern_invalid",
    ),
    "an option of the future": ("LOHA", {"r": 3}, {"use_more": True}, "option_unknown"),
    "adalora, an option of lora": ("ADALORA", {"total_step": 10}, {"use_dora": True}, "option_unknown"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_recorded(base_model: BaseMaker, case: Case, what: str) -> None:
    method, options, change, code = REFUSED[what]
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of(method, "llama", options))
    case.configure(**change)
    assert {(finding.code, finding.fits) for finding in case.bench.findings(case.adapter, base).values()} == {
        (code, True)
    }
    assert case.bench.register(case.adapter, base).manifest.method == method.lower()


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "adalora, rank": ("ADALORA", {"init_r": 4, "total_step": 10}, {"init_r": 5}, "rank_mismatch"),
    "boft, size": ("BOFT", {"boft_block_size": 4}, {"boft_block_size": 8}, "shape_mismatch"),
    "boft, number": ("BOFT", {"boft_block_size": 0, "boft_block_num": 4}, {"boft_block_num": 2}, "shape_mismatch"),
    "c3a, size": ("C3A", {"block_size": 8}, {"block_size": 4}, "shape_mismatch"),
    "hra, rank": ("HRA", {"r": 4}, {"r": 2}, "rank_mismatch"),
    "ia3, the other side": ("IA3", FEED_FORWARD, {"feedforward_modules": ["gate_proj"]}, "shape_mismatch"),
    "loha, rank": ("LOHA", {"r": 3}, {"rank_pattern": {"k_proj": 4}}, "rank_mismatch"),
    "lokr, rank": ("LOKR", {"r": 2}, {"r": 1}, "rank_mismatch"),
    "miss, rank": ("MISS", {"r": 4}, {"r": 8}, "rank_mismatch"),
    "miss, kind": ("MISS", {"r": 4}, {"init_weights": "bat"}, "shape_mismatch"),
    "miss, mini": ("MISS", {"r": 4, "mini_r": 2, "init_weights": "mini"}, {"mini_r": 4}, "rank_mismatch"),
    "oft, shared": ("OFT", {"oft_block_size": 8}, {"block_share": True}, "shape_mismatch"),
    "pvera, rank": ("PVERA", {"r": 4}, {"r": 8}, "rank_mismatch"),
    "road, variant": ("ROAD", {"group_size": 8}, {"variant": "road_2"}, "shape_mismatch"),
    "road, groups": ("ROAD", {"group_size": 8}, {"group_size": 64}, "shape_mismatch"),
    "shira, rank": ("SHIRA", {"r": 2}, {"r": 3}, "rank_mismatch"),
    "vera, rank": ("VERA", {"r": 4}, {"r": 3}, "rank_mismatch"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_configuration_of_another_save_is_refused(base_model: BaseMaker, case: Case, what: str) -> None:
    method, options, change, code = CONTRADICTIONS[what]
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of(method, "llama", options))
    case.configure(**change)
    assert code in case.bench.findings(case.adapter, base)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_every_tensor_has_to_be_there(base_model: BaseMaker, case: Case, method: str) -> None:
    """One tensor fewer, or one more, and it is refused, whichever it is."""
    _, family, options = OPTIONS[ONE_OF_EACH[method]]
    base = base_model(family)
    make_adapter(base, case.adapter, config_of(method, family, options))
    path = case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    last = next(name for name in reversed(tensors) if name.startswith("base_model.model."))
    module = re.sub(r"\.(hada|ln_tuning|[a-z0-9]+)_\w+(\.weight|\.bias)?$", "", last)
    own = [name for name in tensors if name.startswith(f"{module}.") or not name.startswith("base_model.model.")]
    assert own
    for name in own:
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
        found = case.bench.findings(case.adapter, base).values()
        assert Level.REFUSED in {finding.level for finding in found}, name
    prefix = last.removeprefix(f"{module}.").partition("_")[0]
    save_file({**tensors, f"{module}.{prefix}_more": torch.ones(2)}, path)
    assert "unused_tensor" in case.bench.findings(case.adapter, base)


FACTS: dict[str, tuple[str, dict[str, Any], tuple[int | None, float | None, str]]] = {
    "the rank that training began with": (
        "ADALORA",
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10},
        (4, 6, "alpha/r"),
    ),
    "a number of blocks": ("OFT", {"r": 4, "oft_block_size": 0}, (4, None, "")),
    "no rank": ("OFT", {"oft_block_size": 8}, (None, None, "")),
    "a scale": ("LOKR", {"r": 2, "alpha": 3}, (2, 3, "alpha/r")),
}


@pytest.mark.parametrize("what", FACTS)
def test_facts_of_a_checkpoint(base_model: BaseMaker, case: Case, what: str) -> None:
    method, options, facts = FACTS[what]
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of(method, "llama", options))
    manifest = case.bench.register(case.adapter, base).manifest
    assert (manifest.method, (manifest.rank, manifest.alpha, manifest.scaling)) == (method.lower(), facts)


# AdaLoRA's configuration has all fields of LoRA's, but its arithmetic only some.
FIELDS_OF_LORA = {
    "use_rslora", "alpha_pattern", "megatron_config", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "use_dora", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "lora_bias",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying",
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(set(ROWS) - {"bone"}))
def test_every_field_of_pefts_configuration_is_known(method: str) -> None:
    """One that a newer PEFT brings is not, until somebody has looked at it."""
    names = {each.name for each in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())])}
    assert names - ROWS[method].known_fields == (FIELDS_OF_LORA if method == "adalora" else set())


def test_a_projection_too_small_for_a_layer_is_refused(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("VERA", "llama", {"r": 3}))
    path = case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.vera_A": tensors["base_model.vera_A"][:, :40].contiguous()}, path)
    assert "shape_mismatch" in case.bench.findings(case.adapter, base)


def test_shira_places_outside_the_weight_stop_the_merge(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, config_of("SHIRA", "llama", {"r": 2, "random_seed": 1}))
    path = case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.shira_indices"))
    tensors[name][1, 3] = 32
    save_file(tensors, path)
    with pytest.raises(CorruptFile, match="shira_indices"):
        case.merge(base)
    assert not case.out.exists()


def test_shira_places_saved_as_floats_as_on_windows(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    peft_model = make_adapter(base, case.adapter, config_of("SHIRA", "llama", {"r": 2, "random_seed": 1}))
    path = case.adapter / "adapter_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    assert_like_peft(case.merge(base), peft_model)


TIED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a turned embedding": ("OFT", "gemma", {"oft_block_size": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "a turned head": ("HRA", "gemma", {"r": 4, "target_modules": ["lm_head", "k_proj"]}),
    "projections for a head": (
        "VERA",
        "gemma",
        {"r": 4, "target_modules": ["lm_head", "k_proj"], "save_projection": False},
    ),
}


@pytest.mark.parametrize("what", TIED)
def test_a_tied_embedding_with_an_adapter_on_one_side_is_untied(base_model: BaseMaker, case: Case, what: str) -> None:
    """PEFT's merge changes both sides; the unmerged model has them apart."""
    method, family, options = TIED[what]
    base = base_model(family)
    expected = logits(make_adapter(base, case.adapter, config_of(method, "llama", options)))
    found = case.merge(base)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    torch.testing.assert_close(logits(load_model(case.out)), expected, rtol=1e-5, atol=ATOL)
