"""The LoRA family compared with the real PEFT: DoRA, biases, convolutions, attention modules, token rows, variants, initialisers.

Merged weights and the answers of the unmerged model; where PEFT's own merge is wrong, the latter alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, assert_rounded_once, read_weights, same, steps
from models import ROWS, grow, load_model, logits, lora, make_adapter, randomise
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry.manifest import Level

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"
    ),  # said of every lora_B.bias
]
BaseMaker = Callable[..., Path]
ATOL = 1e-5
QV = ["q_proj", "v_proj"]
QKV = ["q_proj", "k_proj", "v_proj"]  # those with a bias in Qwen2
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "dora, square and wide": ("qwen3", {"use_dora": True, "r": 1}),
    "dora, Conv1D": ("gpt2", {"use_dora": True}),
    "dora, patterns and rslora": ("llama", {"use_dora": True, "use_rslora": True, "r": 3, "rank_pattern": {"q_proj": 5},
                                            "alpha_pattern": {"down_proj": 2}}),
    "dora, embedding and head": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora, position embedding": ("gpt2", {"use_dora": True, "target_modules": ["wpe", "c_attn"]}),
    "dora, biases and a saved module": ("qwen2", {"use_dora": True, "bias": "all", "modules_to_save": ["norm"]}),
    "lora_bias": ("qwen2", {"lora_bias": True, "target_modules": QKV}),
    "lora_bias, Conv1D": ("gpt2", {"lora_bias": True, "alpha_pattern": {"c_attn": 3}}),
    "lora_bias, rslora, base biases too": ("neox", {"lora_bias": True, "use_rslora": True, "bias": "all",
                                                    "target_modules": ["query_key_value"]}),
    "block-diagonal": ("llama", {"use_bdlora": BLOCKS, "target_modules": [*QV, "o_proj", "down_proj"]}),
    "velora": ("llama", {"velora_config": VeloraConfig(num_groups=4)}),
    "monteclora": ("llama", {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2), "target_modules": QV}),
}  # fmt: skip


class Case:
    """A folder with an adapter and what we make of it."""

    def __init__(self, folder: Path) -> None:
        self.adapter, self.out = folder / "adapter", folder / "merged"
        self.bench = Bench(folder)

    def merge(self, base: Path) -> dict[str, Tensor]:
        """Merge; gives the result's tensors."""
        self.bench.merge(self.adapter, base, self.out)
        return read_weights(self.out)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def assert_like_peft(found: Mapping[str, Tensor], peft_model: PeftModel) -> None:
    """Every tensor of a model directory is what PEFT merges."""
    expected = peft_model.merge_and_unload().state_dict()
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(base_model: BaseMaker, case: Case, option: str) -> None:
    family, options = OPTIONS[option]
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, lora(**options))
    expected = logits(peft_model)
    found = case.merge(base)
    assert torch.allclose(logits(load_model(case.out)), expected, rtol=0, atol=ATOL)
    assert_like_peft(found, peft_model)


def test_a_bias_of_b_counts_without_its_flag(base_model: BaseMaker, case: Case, tmp_path: Path) -> None:
    """Tools that extract adapters write it, and leave the flag alone."""
    base = base_model("qwen2")
    make_adapter(base, case.adapter, lora(lora_bias=True, target_modules=QKV))
    expected = case.merge(base)
    again = Case(tmp_path / "again")
    shutil.copytree(case.adapter, again.adapter)
    edit_config(again.adapter, lora_bias=False)
    assert same(again.merge(base), expected) == []


# -- KaSA, whose base is made smaller first


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 7}, "use_rslora": True}, {"bias": "all"}], ids=str)
def test_kasa(base_model: BaseMaker, case: Case, options: dict[str, Any]) -> None:
    base = base_model("qwen2")
    peft_model = make_adapter(base, case.adapter, lora(kasa_config=KasaConfig(), **options))
    expected = logits(peft_model)
    found = case.merge(base)
    assert torch.allclose(logits(load_model(case.out)), expected, rtol=0, atol=ATOL)
    assert_like_peft(found, peft_model)


# -- DoRA and rounding


def dora_of(weight: Tensor, factors: Mapping[str, Tensor], module: str, *, transposed: bool) -> Tensor:
    """`diag(m / |V|) V` in float64, with scale 2.5."""
    a, b, m = (
        factors[f"base_model.model.{module}.{end}"].double()
        for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    rows = (weight.double().T if transposed else weight.double()) + 2.5 * b @ a
    rows *= (m / rows.norm(dim=1)).unsqueeze(1)
    return rows.T if transposed else rows


@pytest.mark.parametrize("half", [True, False], ids=["16 bit adapter", "32 bit adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_is_rounded_once(base_model: BaseMaker, case: Case, family: str, dtype: torch.dtype, half: bool) -> None:
    base = base_model(family, dtype)
    make_adapter(base, case.adapter, lora(use_dora=True), half=half)
    before, found, factors = read_weights(base), case.merge(base), load_file(case.adapter / "adapter_model.safetensors")
    modules = [
        name.removesuffix(".lora_A.weight").removeprefix("base_model.model.") for name in factors if "lora_A" in name
    ]
    assert len(modules) == {"llama": 14, "gpt2": 8}[family]
    for module in modules:
        name = f"{module}.weight"
        exact = dora_of(before[name], factors, module, transposed=family == "gpt2")
        assert_rounded_once(found[name], exact, exact.abs() * 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_of_an_embedding_is_rounded_once(base_model: BaseMaker, case: Case, dtype: torch.dtype) -> None:
    base = base_model("llama", dtype)
    make_adapter(base, case.adapter, lora(use_dora=True, target_modules=["embed_tokens"]))
    before, found, factors = read_weights(base), case.merge(base), load_file(case.adapter / "adapter_model.safetensors")
    name = "model.embed_tokens.weight"
    ends = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    a, b, m = (factors[f"base_model.model.model.embed_tokens.{end}"].double() for end in ends)
    exact = before[name].double() + 2.5 * (b @ a).T
    exact *= m / exact.norm(dim=0)
    assert_rounded_once(found[name], exact, exact.abs() * 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("target", "axis"), [("q_proj", 1), ("embed_tokens", 0)])
def test_a_dora_that_has_not_been_trained_is_the_base_within_one_rounding(
    base_model: BaseMaker, case: Case, dtype: torch.dtype, target: str, axis: int
) -> None:
    base = base_model("llama", dtype)
    config = lora(
        use_dora=True, target_modules=[target, "up_proj"], layers_to_transform=[1] if target == "q_proj" else None
    )
    make_adapter(base, case.adapter, config)
    before = read_weights(base)
    (name,) = (name for name in before if name.endswith(f"{target}.weight") and ".0." not in name)
    factors = load_file(case.adapter / "adapter_model.safetensors")
    for key in factors:
        if target in key and key.endswith(("lora_B.weight", "lora_embedding_B")):
            factors[key] = torch.zeros_like(factors[key])
        elif target in key and "magnitude" in key:
            factors[key] = before[name].double().norm(dim=axis).float()
    save_file(factors, case.adapter / "adapter_model.safetensors")
    found = case.merge(base)[name].double()
    assert bool(((found - before[name].double()).abs() <= steps(before[name])).all())


# -- modules of torch that language models seldom have


class Convolutions(nn.Module):
    """One of each kind of convolution, on inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(6, 10, 3, padding=1, stride=2), nn.Conv2d(5, 7, (3, 2), bias=False)
        self.point, self.space = nn.Conv2d(4, 4, 1), nn.Conv3d(3, 5, (1, 2, 3))
        self.point_line = nn.Conv1d(4, 6, 1)

    def forward(self, seed: int) -> list[Tensor]:
        channels = {self.line: 6, self.plane: 5, self.point: 4, self.space: 3, self.point_line: 4}
        return [layer(noise((2, count, *[6] * (layer.weight.dim() - 2)), seed)) for layer, count in channels.items()]


class Attention(nn.Module):
    """An nn.MultiheadAttention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn, self.last = (
            nn.Linear(8, 12),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(12, 5),
        )

    def forward(self, seed: int) -> list[Tensor]:
        inner = self.first(noise((2, 4, 8), seed))
        return [self.last(self.attn(inner, inner, inner, need_weights=False)[0])]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, groups=2)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_module(folder: Path, kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Path:
    """A base model that is just a module."""
    module = kind()
    randomise(module.parameters(), seed=5)
    folder.mkdir()
    save_file(module.to(dtype).state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "of its own"}))
    return folder


def load_module(folder: Path, kind: type[nn.Module]) -> nn.Module:
    module = kind()
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.eval()


def adapt_module(base: Path, kind: type[nn.Module], folder: Path, config: LoraConfig) -> PeftModel:
    """Save an adapter with random values; gives the model as PEFT runs it, unmerged."""
    peft_model = get_peft_model(load_module(base, kind), config).eval()
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    peft_model.save_pretrained(folder)
    return peft_model


def answers(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [part for seed in range(3) for part in model(seed)]


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rank 1": {"r": 1},
    "rslora and patterns": {"use_rslora": True, "r": 3, "rank_pattern": {"point": 2}, "alpha_pattern": {"line": 5}},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "r": 3},
    "lora_bias": {"lora_bias": True, "exclude_modules": ["plane"]},
}


@pytest.mark.parametrize("option", CONVOLUTIONS)
def test_convolutions(case: Case, tmp_path: Path, option: str) -> None:
    base = write_module(tmp_path / "base", Convolutions)
    targets = ["line", "plane", "point", "space", "point_line"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets, **CONVOLUTIONS[option]})
    peft_model = adapt_module(base, Convolutions, case.adapter, config)
    expected, found = answers(peft_model), case.merge(base)
    torch.testing.assert_close(answers(load_module(case.out, Convolutions)), expected, rtol=0, atol=ATOL)
    assert_like_peft(found, peft_model)


def test_a_convolution_is_rounded_once(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Convolutions, torch.bfloat16)
    adapt_module(base, Convolutions, case.adapter, LoraConfig(r=4, lora_alpha=10, target_modules=["plane", "space"]))
    before, found, factors = read_weights(base), case.merge(base), load_file(case.adapter / "adapter_model.safetensors")
    for name in ("plane", "space"):
        a, b = (factors[f"base_model.model.{name}.lora_{end}.weight"].double().flatten(1) for end in "AB")
        exact = before[f"{name}.weight"].double() + 2.5 * (b @ a).view_as(before[f"{name}.weight"])
        assert_rounded_once(found[f"{name}.weight"], exact, exact.abs() * 1e-14)


def test_a_kernel_is_warned_of_since_no_file_tells_dilation(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Convolutions)
    adapt_module(base, Convolutions, case.adapter, LoraConfig(target_modules=["line", "plane"]))
    assert case.bench.findings(case.adapter, base).keys() == {"convolution"}


def test_no_warning_where_the_kernel_is_a_point(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Convolutions)
    adapt_module(base, Convolutions, case.adapter, LoraConfig(target_modules=["point", "point_line"]))
    assert case.bench.findings(case.adapter, base) == {}


@pytest.mark.parametrize(
    ("kind", "target", "missing"), [(Convolutions, "point", "point"), (Attention, "attn", "attn.base_layer.out_proj")]
)
def test_missing_factors_of_such_a_module_are_noticed(
    case: Case, tmp_path: Path, kind: type[nn.Module], target: str, missing: str
) -> None:
    base = write_module(tmp_path / "base", kind)
    others = ["line"] if kind is Convolutions else ["first"]
    adapt_module(base, kind, case.adapter, LoraConfig(target_modules=[target, *others]))
    path = case.adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if f".{missing}.lora" not in name}, path)
    finding = case.bench.findings(case.adapter, base)["target_missed"]
    assert finding.where == missing


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_a_grouped_convolution_is_refused(case: Case, tmp_path: Path) -> None:
    base = write_module(tmp_path / "base", Grouped)
    adapt_module(base, Grouped, case.adapter, LoraConfig(r=4, target_modules=["conv"]))
    finding = case.bench.findings(case.adapter, base)["layer_not_mergeable"]
    assert finding.fits
    assert "grouped" in finding.found


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "r": 3, "alpha_pattern": {"attn": 5}}, {"bias": "all"}], ids=str
)
def test_attention_modules(case: Case, tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT adds the delta of the output projection twice, whenever it runs; its merge is checked, too."""
    base = write_module(tmp_path / "base", Attention)
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ["attn", "first"], **options})
    peft_model = adapt_module(base, Attention, case.adapter, config)
    expected = answers(peft_model)
    assert case.bench.findings(case.adapter, base).keys() == {"attention_output"}
    found = case.merge(base)
    torch.testing.assert_close(answers(load_module(case.out, Attention)), expected, rtol=0, atol=ATOL)
    assert_like_peft(found, peft_model)


# -- single rows of embeddings

IDS = [3, 40, 7]
_ROWS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "untied": ("llama", {"trainable_token_indices": IDS}, False),
    "untied, by name": ("llama", {"trainable_token_indices": {"embed_tokens": IDS}}, False),
    "untied, both": ("llama", {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [9]}}, False),
    "untied, positions too": ("gpt2", {"trainable_token_indices": {"wte": IDS, "wpe": [5, 0]}, "target_modules": ["c_attn"]}, True),
    "tied": ("gemma", {"trainable_token_indices": IDS}, True),
    "tied, both alike": ("gemma", {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}}, True),
    "tied, both alike, ensured": ("gemma", {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS},
                                            "ensure_weight_tying": True}, True),
    "tied, both different": ("gemma", {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [9, 3]}}, False),
    "tied, head alone": ("gemma", {"trainable_token_indices": {"lm_head": IDS}}, False),
    "tied, with DoRA elsewhere": ("gemma", {"trainable_token_indices": IDS, "use_dora": True}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", _ROWS)
def test_rows(base_model: BaseMaker, case: Case, kind: str) -> None:
    family, options, is_tied = _ROWS[kind]
    base = base_model(family)
    expected = logits(make_adapter(base, case.adapter, lora(**{"target_modules": ["q_proj"], **options})))
    case.merge(base)
    merged = load_model(case.out)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.tie_word_embeddings is is_tied


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_rows_of_a_grown_vocabulary(base_model: BaseMaker, case: Case, family: str) -> None:
    base = base_model(family)
    options = {"trainable_token_indices": [3, 70], "target_modules": ["c_attn" if family == "gpt2" else "q_proj"]}
    expected = logits(make_adapter(base, case.adapter, lora(**options), prepare=grow))
    case.merge(base)
    merged = load_model(case.out)
    assert merged.config.vocab_size == ROWS + 8
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", None),
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", r".*embed_tokens"),
        ("gemma", None),
        ("gemma", ["embed_tokens"]),
        ("gpt2", ["wte"]),
    ],
    ids=str,
)
def test_trainable_tokens(base_model: BaseMaker, case: Case, family: str, targets: Any) -> None:
    base = base_model(family)
    config = TrainableTokensConfig(token_indices=IDS, target_modules=targets, task_type="CAUSAL_LM")
    peft_model = make_adapter(base, case.adapter, config)
    expected = logits(peft_model)
    found = case.merge(base)
    merged = load_model(case.out)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.tie_word_embeddings is (family != "llama")
    assert_like_peft(found, peft_model)


# -- tied embeddings with DoRA


@pytest.mark.parametrize("ensured", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_tied_with_dora(base_model: BaseMaker, case: Case, targets: list[str], ensured: bool) -> None:
    base = base_model("gemma")
    options = {"use_dora": True, "target_modules": [*targets, "q_proj"], "ensure_weight_tying": ensured}
    expected = logits(make_adapter(base, case.adapter, lora(**options)))
    case.merge(base)
    assert torch.allclose(logits(load_model(case.out)), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_dora_of_a_grown_vocabulary(base_model: BaseMaker, case: Case, family: str) -> None:
    base = base_model(family)
    targets = ["embed_tokens", "lm_head", "q_proj"] if family == "llama" else ["embed_tokens", "q_proj"]
    expected = logits(make_adapter(base, case.adapter, lora(use_dora=True, target_modules=targets), prepare=grow))
    case.merge(base)
    merged = load_model(case.out)
    assert merged.config.vocab_size == ROWS + 8
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)


# -- initialisers that change the base


@pytest.mark.filterwarnings(
    "ignore:PiSSA changes the base weights of the model", "ignore:OLoRA changes the base weights of the model"
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("uses_rslora", [False, True])
def test_an_adapter_converted_to_a_plain_lora(
    base_model: BaseMaker, case: Case, tmp_path: Path, start: str, uses_rslora: bool
) -> None:
    base, first = base_model("llama"), tmp_path / "first"
    peft_model = get_peft_model(load_model(base), lora(init_lora_weights=start, use_rslora=uses_rslora))
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(first)
    peft_model.peft_config["default"].init_lora_weights = start
    randomise((p for p in peft_model.parameters() if p.requires_grad), seed=7)
    expected = logits(peft_model)
    peft_model.save_pretrained(case.adapter, path_initial_model_for_weight_conversion=str(first))
    case.merge(base)
    assert torch.allclose(logits(load_model(case.out)), expected, rtol=0, atol=10 * ATOL)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_the_base_is_refused(base_model: BaseMaker, case: Case, start: str) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(init_lora_weights=start))
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("initialiser_changes_base", True)
    assert "path_initial_model_for_weight_conversion" in finding.advice


def test_an_adapter_merges_into_the_base_that_its_initialiser_left(
    base_model: BaseMaker, case: Case, tmp_path: Path
) -> None:
    """What the advice says: save that base, and say that the adapter starts plainly."""
    rest = tmp_path / "rest"
    peft_model = make_adapter(base_model("llama"), case.adapter, lora(init_lora_weights="pissa"))
    expected = logits(peft_model)
    peft_model.unload().save_pretrained(rest)
    edit_config(case.adapter, init_lora_weights=True)
    case.merge(rest)
    assert torch.allclose(logits(load_model(case.out)), expected, rtol=0, atol=ATOL)


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# -- what has no merged form


@pytest.mark.parametrize(
    "options",
    [{"alora_invocation_tokens": [5, 6]}, {"use_qalora": True, "target_modules": ["q_proj"]}],
    ids=["alora", "qalora"],
)
def test_what_has_no_merged_form_is_recorded_and_not_merged(
    base_model: BaseMaker, case: Case, options: dict[str, Any]
) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(**options))
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.fits) == ("method_not_mergeable", True)
    assert "serve it unmerged" in finding.advice
    assert case.bench.register(case.adapter, base).manifest.parameters > 0


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_bias_for_layers_that_have_none_is_refused(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(lora_bias=True, target_modules=QV))
    findings = case.bench.findings(case.adapter, base)
    assert findings.keys() == {"bias_not_mergeable"}
    assert findings["bias_not_mergeable"].fits


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [(None, False), ("0.16.0", False), ("0.21.9.dev0", False), ("0.22.0", True), ("1.0", True)],
)
def test_an_attention_module_of_a_peft_that_nobody_knows_is_refused(
    case: Case, tmp_path: Path, version: str | None, is_refused: bool
) -> None:
    base = write_module(tmp_path / "base", Attention)
    adapt_module(base, Attention, case.adapter, LoraConfig(target_modules=["attn"]))
    edit_config(case.adapter, peft_version=version)
    (finding,) = case.bench.findings(case.adapter, base).values()
    assert (finding.code, finding.level) == ("attention_output", Level.REFUSED if is_refused else Level.WARNING)
