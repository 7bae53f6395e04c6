"""Merges compared with the real PEFT: its merged weights, and where those are wrong (tied embeddings) its unmerged answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, assert_rounded_once, read_weights, steps
from models import FAMILIES, grow, load_model, logits, lora, make_adapter, make_bare_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
BaseMaker = Callable[..., Path]
ATOL = 1e-5


class Case:
    """A folder with an adapter and what we make of it."""

    def __init__(self, folder: Path) -> None:
        self.adapter, self.out = folder / "adapter", folder / "merged"
        self.bench = Bench(folder)

    def merge(self, base: Path) -> PreTrainedModel:
        """Merge, and load the result with transformers."""
        self.bench.merge(self.adapter, base, self.out)
        return load_model(self.out)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def assert_same_weights(merged: PreTrainedModel, peft_model: PeftModel) -> None:
    expected = peft_model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family(base_model: BaseMaker, case: Case, family: str, shard: str) -> None:
    base = base_model(family, shard=shard)
    peft_model = make_adapter(base, case.adapter, lora())
    expected = logits(peft_model)
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert_same_weights(merged, peft_model)


QV = ["q_proj", "v_proj"]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "rank 1": ("llama", {"r": 1}),
    "rank_pattern": ("llama", {"rank_pattern": {r"layers\.1\.self_attn\..*": 6, "down_proj": 2}}),
    "rank_pattern, order lost": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\..*": 6}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {r"^model\.layers\.0\..*": 3, "1.mlp.up_proj": 0.5}}),
    "both patterns": ("gpt2", {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_attn": 5}, "use_rslora": True}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias all, norms too": ("neox", {"bias": "all", "target_modules": ["query_key_value"]}),
    "bias all, Conv1D": ("gpt2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "target_modules": QV}),
    "bias and a saved module": ("neox", {"bias": "all", "modules_to_save": ["final_layer_norm"]}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved embedding and norms": ("llama", {"modules_to_save": ["embed_tokens", "norm"]}),
    "saved subtree": ("llama", {"target_modules": QV, "modules_to_save": ["mlp"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding and head": ("neox", {"target_modules": ["embed_in", "embed_out"]}),
    "position embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "pattern": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|v_proj)"}),
    "pattern that looks ahead": ("llama", {"target_modules": r"^(?!.*layers\.0).*(mlp\.\w+_proj|k_proj)$"}),
    "names that nothing has": ("llama", {"target_modules": ["q_proj", "query_key_value"]}),
    "excluded by pattern": ("llama", {"target_modules": QV, "exclude_modules": r".*layers\.0\.self_attn\.v_proj"}),
    "excluded by name": ("llama", {"target_modules": QV, "exclude_modules": ["v_proj"]}),
    "some layers": ("llama", {"target_modules": QV, "layers_to_transform": [1]}),
    "one layer of a list": ("gpt2", {"target_modules": ["c_proj"], "layers_to_transform": 0, "layers_pattern": "h"}),
    "fan_in_fan_out said of Linear": ("llama", {"fan_in_fan_out": True}),
    "fan_in_fan_out said of Conv1D": ("gpt2", {"fan_in_fan_out": True}),
    "orthogonal start": ("llama", {"init_lora_weights": "orthogonal"}),
    "mica start": ("gpt2", {"init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(base_model: BaseMaker, case: Case, option: str) -> None:
    family, options = OPTIONS[option]
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, lora(**options))
    expected = logits(peft_model)
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert_same_weights(merged, peft_model)


# -- 16 bits


def exact_sums(base: Path, adapter: Path, *, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """`W + scale * B @ A` in float64, and how far float32 sums may be from it, of every layer with factors."""
    weights, factors = read_weights(base), load_file(adapter / "adapter_model.safetensors")
    is_gpt2 = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    sums = {}
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            b = factors[key.replace("lora_A", "lora_B")]
            weight, (small, size) = weights[name].double(), products(a, b)
            delta, size = (small.T, size.T) if is_gpt2 else (small, size)
            error = (a.shape[0] + 2) * 2.0**-24 * (weight.abs() + scale * size)
            sums[name] = weight + scale * delta, error
    return sums


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b.double() @ a.double(), b.double().abs() @ a.double().abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen2", "neox"])
def test_16_bits_are_rounded_once(base_model: BaseMaker, case: Case, family: str, dtype: torch.dtype) -> None:
    base = base_model(family, dtype)
    peft_model = make_adapter(base, case.adapter, lora())
    merged = case.merge(base).state_dict()
    peft_merged = peft_model.merge_and_unload().state_dict()
    for name, (exact, error) in exact_sums(base, case.adapter, scale=2.5).items():
        assert merged[name].dtype == dtype
        assert_rounded_once(merged[name], exact, error)
        assert bool(((merged[name].double() - peft_merged[name].double()).abs() <= steps(merged[name])).all())
    untouched = merged.keys() - exact_sums(base, case.adapter, scale=2.5).keys()
    assert all(torch.equal(merged[name], peft_merged[name]) for name in untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_widened_before_they_are_multiplied(
    base_model: BaseMaker, case: Case, dtype: torch.dtype
) -> None:
    base = base_model("llama", dtype)
    make_adapter(base, case.adapter, lora(), half=True)
    merged = case.merge(base).state_dict()
    for name, (exact, error) in exact_sums(base, case.adapter, scale=2.5).items():
        assert_rounded_once(merged[name], exact, error)


# -- tied embeddings, where PEFT's own merge is wrong in most cases; its unmerged model is not

_TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "factors on the head": ({"target_modules": ["HEAD", "QKV"]}, False),
    "factors on the embedding": ({"target_modules": ["EMBEDDING", "QKV"]}, False),
    "factors on both": ({"target_modules": ["EMBEDDING", "HEAD", "QKV"]}, False),
    "saved embedding": ({"target_modules": ["QKV"], "modules_to_save": ["EMBEDDING"]}, False),
    "saved head": ({"target_modules": ["QKV"], "modules_to_save": ["HEAD"]}, False),
    "both saved": ({"target_modules": ["QKV"], "modules_to_save": ["EMBEDDING", "HEAD"]}, False),
    "saved embedding, factors on the head": ({"target_modules": ["QKV", "HEAD"], "modules_to_save": ["EMBEDDING"]}, False),
    "saved head, factors on the embedding": ({"target_modules": ["QKV", "EMBEDDING"], "modules_to_save": ["HEAD"]}, False),
}  # fmt: skip
_NAMES = {
    "gemma": {"HEAD": "lm_head", "EMBEDDING": "embed_tokens", "QKV": "q_proj"},
    "llama": {"HEAD": "lm_head", "EMBEDDING": "embed_tokens", "QKV": "q_proj"},
    "gpt2": {"HEAD": "lm_head", "EMBEDDING": "wte", "QKV": "c_attn"},
    "neox": {"HEAD": "embed_out", "EMBEDDING": "embed_in", "QKV": "query_key_value"},
}


def tied_base(base_model: BaseMaker, family: str) -> Path:
    return base_model(family, tie_word_embeddings=True)


def named(family: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [_NAMES[family][name] for name in value] if isinstance(value, list) else value
        for key, value in options.items()
    }


@pytest.mark.parametrize("kind", _TIED)
@pytest.mark.parametrize("family", _NAMES)
def test_tied(base_model: BaseMaker, case: Case, family: str, kind: str) -> None:
    options, is_tied = _TIED[kind]
    base = tied_base(base_model, family)
    expected = logits(make_adapter(base, case.adapter, lora(**named(family, options))))
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.tie_word_embeddings is is_tied


# PEFT obeys `ensure_weight_tying` only when `embed_tokens` or `lm_head` is named, and passes over `wte`, `embed_in` and `embed_out`.
_ENSURED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "both": ("gemma", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, True),
    "embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}, True),
    "head": ("gemma", {"target_modules": ["lm_head", "q_proj"]}, True),
    "pattern": ("gemma", {"target_modules": r".*(q_proj|embed_tokens|lm_head)"}, True),
    "pattern of paths": ("gemma", {"target_modules": r".*q_proj|model\.embed_tokens|lm_head"}, True),
    "pattern PEFT overlooks": ("gemma", {"target_modules": r".*q_proj|model\.embed_tokens"}, False),
    "saved": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "saved embedding": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "saved head": ("gemma", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, True),
    "gpt2, both": ("gpt2", {"target_modules": ["wte", "lm_head", "c_attn"]}, True),
    "gpt2, head": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}, True),
    "gpt2, overlooked": ("gpt2", {"target_modules": ["wte", "c_attn"]}, False),
    "neox, overlooked": ("neox", {"target_modules": ["embed_in", "embed_out"]}, False),
    "neox, embedding overlooked": ("neox", {"target_modules": ["embed_in"]}, False),
    "neox, saved, overlooked": ("neox", {"target_modules": ["query_key_value"], "modules_to_save": ["embed_in"]}, False),
    "neox, mixed, overlooked": ("neox", {"target_modules": ["embed_out"], "modules_to_save": ["embed_in"]}, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", _ENSURED)
def test_tied_with_ensure_weight_tying(base_model: BaseMaker, case: Case, kind: str) -> None:
    family, options, is_tied = _ENSURED[kind]
    base = tied_base(base_model, family)
    expected = logits(make_adapter(base, case.adapter, lora(ensure_weight_tying=True, **options)))
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.tie_word_embeddings is is_tied


@pytest.mark.parametrize("family", _NAMES)
def test_embeddings_that_are_only_saved_along_stay_tied(base_model: BaseMaker, case: Case, family: str) -> None:
    base = tied_base(base_model, family)
    qkv = _NAMES[family]["QKV"]
    peft_model = make_adapter(base, case.adapter, lora(target_modules=[qkv]), save_embedding_layers=True)
    merged = case.merge(base)
    assert merged.config.tie_word_embeddings is True
    assert read_weights(case.out).keys() == read_weights(base).keys()
    assert_same_weights(merged, peft_model)


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
)
def test_a_tied_head_that_is_in_the_files_all_the_same(
    base_model: BaseMaker, case: Case, tmp_path: Path, options: dict[str, Any], flag: bool | None
) -> None:
    tied, base = base_model("gemma"), tmp_path / "base"
    base.mkdir()
    weights = read_weights(tied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tied / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": flag}))
    expected = logits(make_adapter(tied, case.adapter, lora(**options)))
    assert torch.allclose(logits(case.merge(base)), expected, rtol=0, atol=ATOL)
    assert read_weights(case.out).keys() == weights.keys()


# -- grown vocabularies

_GROWN: dict[str, tuple[str, dict[str, Any], bool]] = {
    "untied": ("llama", {"target_modules": ["q_proj"]}, False),
    "untied, factors on both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "untied, both saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "untied, saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "tied": ("gemma", {"target_modules": ["q_proj"]}, True),
    "tied, factors on the embedding": ("gemma", {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "tied, both ensured": ("gpt2", {"target_modules": ["c_attn", "wte", "lm_head"], "ensure_weight_tying": True}, True),
    "tied, saved embedding": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "tied, both saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]}, False),
    "tied, saved and ensured": ("gemma", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
                                          "ensure_weight_tying": True}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", _GROWN)
def test_grown_vocabulary(base_model: BaseMaker, case: Case, kind: str) -> None:
    family, options, is_tied = _GROWN[kind]
    base = base_model(family)
    peft_model = make_adapter(base, case.adapter, lora(**options), prepare=grow)
    expected = logits(peft_model)
    merged = case.merge(base)
    assert merged.config.vocab_size == 72
    assert merged.get_input_embeddings().weight.shape[0] == merged.get_output_embeddings().weight.shape[0] == 72
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert merged.config.tie_word_embeddings is is_tied


@pytest.mark.parametrize(
    ("family", "options", "code"),
    [
        ("llama", {"target_modules": ["lm_head", "q_proj"]}, "vocabulary"),  # PEFT does not save the embedding's new rows
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "vocabulary"),
        ("gemma", {"target_modules": ["lm_head", "q_proj"]}, "shape_mismatch"),  # PEFT cannot run this one itself
    ],
)  # fmt: skip
def test_a_grown_vocabulary_with_rows_missing_is_refused(
    base_model: BaseMaker, case: Case, family: str, options: dict[str, Any], code: str
) -> None:
    base = base_model(family)
    make_adapter(base, case.adapter, lora(**options), prepare=grow)
    assert code in case.bench.findings(case.adapter, base)


# -- how keys and files may look


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(".weight", ".default.weight").replace("norm.default", "norm.modules_to_save.default"),
        lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn.").replace("mlp", "_orig_mod.mlp"),
    ],
    ids=["adapter's name", "FSDP", "compiled and checkpointed"],
)
def test_keys_of_trainers_that_save_without_peft(
    base_model: BaseMaker, case: Case, change: Callable[[str], str]
) -> None:
    base = base_model("llama")
    peft_model = make_adapter(base, case.adapter, lora(modules_to_save=["model.norm"]))
    rename(case.adapter, change)
    assert_same_weights(case.merge(base), peft_model)


def test_pickled_weights(base_model: BaseMaker, case: Case) -> None:
    base = base_model("qwen2")
    peft_model = make_adapter(base, case.adapter, lora(bias="all"), safe_serialization=False)
    assert not (case.adapter / "adapter_model.safetensors").exists()
    assert_same_weights(case.merge(base), peft_model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_adapter_of_the_model_without_its_head(base_model: BaseMaker, case: Case, family: str) -> None:
    base = base_model(family)
    peft_model = make_bare_adapter(base, case.adapter, lora(task_type=None))
    merged, expected = case.merge(base), peft_model.merge_and_unload().state_dict()
    found = merged.base_model.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_base_saved_without_the_prefix_that_the_model_has(base_model: BaseMaker, case: Case, tmp_path: Path) -> None:
    """As the Hub's `gpt2` is: `h.0.attn.c_attn.weight` on disk, `transformer.h.0.attn.c_attn` in the model."""
    published, base = base_model("gpt2"), tmp_path / "hub"
    base.mkdir()
    (base / "config.json").write_bytes((published / "config.json").read_bytes())
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read_weights(published).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    peft_model = make_adapter(published, case.adapter, lora(target_modules=["c_attn", "lm_head"]))
    expected = logits(peft_model)
    merged = case.merge(base)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)
    assert read_weights(case.out).keys() == {*tensors, "lm_head.weight"}


def test_patterns_whose_order_was_lost_are_refused(base_model: BaseMaker, case: Case) -> None:
    """PEFT takes the first key that matches, and sorts the keys when it saves."""
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(alpha_pattern={"up_proj": 5, r"layers\.1\..*": 9}))
    assert case.bench.findings(case.adapter, base).keys() == {"pattern_ambiguous"}


# -- the directory


def test_untouched_shards_stay_as_they_are_and_the_index_is_right(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama", shard="20KB")
    make_adapter(base, case.adapter, lora(target_modules=["q_proj"], layers_to_transform=[1]))
    case.merge(base)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    same = [name for name in shards if (base / name).read_bytes() == (case.out / name).read_bytes()]
    assert len(same) == len(shards) - 1
    index, weights = json.loads((case.out / "model.safetensors.index.json").read_text()), read_weights(case.out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert (case.out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert (case.out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(case.out.glob("adapter_*"))


def test_an_untied_head_joins_the_shard_of_the_embedding(base_model: BaseMaker, case: Case) -> None:
    base = base_model("gemma", shard="20KB")
    expected = logits(make_adapter(base, case.adapter, lora(target_modules=["lm_head"])))
    assert torch.allclose(logits(case.merge(base)), expected, rtol=0, atol=ATOL)
    index, weights = json.loads((case.out / "model.safetensors.index.json").read_text()), read_weights(case.out)
    assert index["weight_map"].keys() == weights.keys()
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())


def save_tokenizer(folder: Path, words: list[str], template: str = "") -> None:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")))
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("own", "template", "words", "says"),
    [
        ([], "", 3 + 2, "base"),
        (["a", "b", "c"], "", 3 + 3, "base"),
        (["a", "b", "c"], "adapter", 3 + 3, "adapter"),
    ],
)
def test_tokenizer_and_chat_template_are_the_adapters_if_it_has_them(
    base_model: BaseMaker, case: Case, tmp_path: Path, own: list[str], template: str, words: int, says: str
) -> None:
    base = tmp_path / "base"
    load_model(base_model("llama")).save_pretrained(base)
    save_tokenizer(base, ["x", "y"], "base")
    make_adapter(base, case.adapter, lora())
    if own:
        save_tokenizer(case.adapter, own, template)
    case.merge(base)
    tokenizer = AutoTokenizer.from_pretrained(case.out)
    assert len(tokenizer) == words
    assert tokenizer.chat_template == says
