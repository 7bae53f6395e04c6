"""Conversions compared with litgpt's own converters, transformers and PEFT: names, bytes, and what the models answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import litgpt
import pytest
import torch
import yaml
from litgpt.lora import GPT as LoraGPT
from litgpt.lora import Config as LoraConfigOfLitgpt
from litgpt.lora import lora_filter
from litgpt.scripts.convert_hf_checkpoint import (
    copy_weights_gpt_neox,
    copy_weights_hf_llama,
    copy_weights_qwen_2_5,
    copy_weights_qwen_3,
)
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from merging import Bench, read_weights, same
from models import load_model, lora, make_adapter, make_model, randomise
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from registry.errors import NotConvertible
from registry.manifest import BaseFormat
from registry.rearranging import Conversion, Wanted

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
DATA = Path(__file__).parents[1] / "data/litgpt"
HF, LITGPT = BaseFormat.SAFETENSORS, BaseFormat.LITGPT
IDS = torch.arange(3, 15).unsqueeze(0)
SIZES: dict[str, Any] = {
    "block_size": 64, "vocab_size": 60, "padded_vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "intermediate_size": 48,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    **SIZES, "n_query_groups": 2, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-tiny": LLAMA,
    "Llama-adjusted": {
        **LLAMA, "rope_base": 500000,
        "rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16},
    },
    "Llama-condensed": {**LLAMA, "rope_condense_ratio": 4},
    "Llama-biased": {**LLAMA, "bias": True},
    "Mistral-tiny": {**LLAMA, "sliding_window_size": 8},
    "Qwen2.5-tiny": {**LLAMA, "attn_bias": True},
    "Qwen3-tiny": {**LLAMA, "norm_qk": True, "head_size": 12, "n_query_groups": 1},
    "Mixtral-tiny": {**LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "Qwen3-moe-tiny": {
        **LLAMA, "norm_qk": True, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "pythia-tiny": {**SIZES, "intermediate_size": 80, "rotary_percentage": 0.25, "n_query_groups": 4},
    "pythia-serial": {**SIZES, "parallel_residual": False, "gelu_approximate": "tanh", "rope_base": 5000},
}  # fmt: skip


def write_litgpt(folder: Path, name: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> litgpt.GPT:
    """A random model, as litgpt saves it."""
    folder.mkdir(parents=True)
    model = litgpt.GPT(litgpt.Config(name=name, **config)).to(dtype)
    randomise(model.parameters(), seed=len(name))
    torch.save(model.state_dict(), folder / "lit_model.pth")
    fields = {key: value for key, value in vars(model.config).items() if key != "rope_n_elem"}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(fields))
    return model


def run_litgpt(folder: Path, ids: Tensor = IDS) -> Tensor:
    """What litgpt answers with the model in a folder, loaded strictly."""
    model = litgpt.GPT(litgpt.Config.from_file(folder / "model_config.yaml"))
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True), strict=True)
    with torch.no_grad():
        answer: Tensor = model.eval()(ids)
    return answer


def run_transformers(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return answer.float()


def convert(bench: Bench, subject: str | Path, layout: BaseFormat, out: Path | None = None, **more: Any) -> Conversion:
    return bench.registry.convert(str(subject), Wanted(layout=layout, out=out, **more))


# -- whole models


@pytest.mark.parametrize("name", MODELS)
def test_transformers_answers_as_litgpt_and_litgpt_again_as_before(tmp_path: Path, bench: Bench, name: str) -> None:
    """There and back with configurations that are made from one another: all bytes are the same, and so are the answers."""
    ours, theirs, back = tmp_path / name, tmp_path / "hf", tmp_path / f"{name}-again"
    write_litgpt(ours, name, MODELS[name])
    convert(bench, ours, HF, theirs)
    expected = run_litgpt(ours)
    assert torch.allclose(run_transformers(load_model(theirs)), expected, rtol=0, atol=2e-5)
    convert(bench, theirs, LITGPT, back)
    weights = [torch.load(folder / "lit_model.pth", weights_only=True) for folder in (ours, back)]
    assert same(*weights) == []
    assert torch.allclose(run_litgpt(back), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Llama-biased"])
def test_export_has_the_names_and_values_of_litgpts_own(tmp_path: Path, bench: Bench, name: str) -> None:
    ours = tmp_path / name
    write_litgpt(ours, name, MODELS[name], torch.bfloat16)
    convert(bench, ours, HF, tmp_path / "hf")
    convert_lit_checkpoint(checkpoint_dir=ours, output_dir=tmp_path / "theirs")
    assert same(read_weights(tmp_path / "hf"), torch.load(tmp_path / "theirs/model.pth", weights_only=True)) == []


# Families whose config.json has to come from the original: litgpt's converters are the oracle for names and rows.
GIVEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Gemma-2-tiny": (
        {**LLAMA, "mlp_class_name": "GemmaMLP", "post_attention_norm": True, "post_mlp_norm": True, "gelu_approximate": "tanh",
         "scale_embeddings": True},
        {"model_type": "gemma2", "tie_word_embeddings": True},
    ),
    "Gemma-tiny": (
        {**LLAMA, "mlp_class_name": "GemmaMLP", "scale_embeddings": True}, {"model_type": "gemma", "tie_word_embeddings": True},
    ),
    "Gemma-3-tiny": (
        {**LLAMA, "mlp_class_name": "GemmaMLP", "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True,
         "scale_embeddings": True},
        {"model_type": "gemma3_text", "tie_word_embeddings": True},
    ),
    "phi-tiny": (
        {**SIZES, "shared_attention_norm": True, "norm_class_name": "LayerNorm", "lm_head_bias": True, "bias": True,
         "rotary_percentage": 0.5},
        {"model_type": "phi"},
    ),
    "Phi-3-tiny": (LLAMA, {"model_type": "phi3"}),
    "falcon-7b-tiny": (
        {**SIZES, "n_query_groups": 1, "shared_attention_norm": True, "bias": False, "norm_class_name": "LayerNorm"},
        {"model_type": "falcon"},
    ),
    "falcon-40b-tiny": ({**SIZES, "n_query_groups": 2, "bias": False, "norm_class_name": "LayerNorm"}, {"model_type": "falcon"}),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_other_families_take_the_configuration_that_lies_beside(tmp_path: Path, bench: Bench, name: str) -> None:
    config, facts = GIVEN[name]
    ours, theirs = tmp_path / name, tmp_path / "hf"
    model = write_litgpt(ours, name, config)
    if facts.get("tie_word_embeddings"):
        state = model.state_dict()
        torch.save({**state, "lm_head.weight": state["transformer.wte.weight"]}, ours / "lit_model.pth")
    (ours / "config.json").write_text(json.dumps({**facts, "vocab_size": 64}))
    convert(bench, ours, HF, theirs)
    convert_lit_checkpoint(checkpoint_dir=ours, output_dir=tmp_path / "theirs")
    assert same(read_weights(theirs), torch.load(tmp_path / "theirs/model.pth", weights_only=True)) == []
    convert(bench, theirs, LITGPT, tmp_path / "back", config=ours / "model_config.yaml")
    weights = [torch.load(folder / "lit_model.pth", weights_only=True) for folder in (ours, tmp_path / "back")]
    assert same(*weights) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "neox"])
def test_import_has_the_names_and_values_of_litgpts_own(tmp_path: Path, bench: Bench, family: str) -> None:
    """From models as transformers 5 saves them, in shards."""
    source, out = tmp_path / "source", tmp_path / "litgpt"
    model = make_model(family, torch.bfloat16)
    model.save_pretrained(source, max_shard_size="20KB")
    convert(bench, source, LITGPT, out)
    config = litgpt.Config.from_file(out / "model_config.yaml")
    weights, expected = read_weights(source), dict[str, Tensor]()
    if family == "neox":
        copy_weights_gpt_neox(config, expected, weights)
    elif family in ("qwen2", "qwen3"):
        (copy_weights_qwen_2_5 if family == "qwen2" else copy_weights_qwen_3)(config, {}, expected, weights)
    else:
        copy_weights_hf_llama(config, {}, expected, weights)
    assert same(torch.load(out / "lit_model.pth", weights_only=True), expected) == []
    loaded = load_model(source).float()
    answer = litgpt.GPT(config)
    answer.load_state_dict({name: tensor.float() for name, tensor in expected.items()}, strict=True)
    with torch.no_grad():
        assert torch.allclose(answer.eval()(IDS), run_transformers(loaded), rtol=0, atol=2e-5)


def test_a_tied_model_stays_tied_on_one_storage(tmp_path: Path, bench: Bench) -> None:
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    convert(bench, tmp_path / "tied", LITGPT, tmp_path / "litgpt")
    weights = torch.load(tmp_path / "litgpt/lit_model.pth", weights_only=True)
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    convert(bench, tmp_path / "litgpt", HF, tmp_path / "again", config=tmp_path / "tied/config.json")
    assert same(read_weights(tmp_path / "again"), read_weights(tmp_path / "tied")) == []
    assert torch.equal(
        run_transformers(load_model(tmp_path / "again")), run_transformers(load_model(tmp_path / "tied"))
    )


def test_a_trained_head_unties_the_model(tmp_path: Path, bench: Bench) -> None:
    """litgpt keeps the head beside a config.json that says tied, and transformers then ignores it."""
    write_litgpt(tmp_path / "Llama-tiny", "Llama-tiny", LLAMA)
    made = make_model("llama", tie_word_embeddings=True).config.to_dict()
    (tmp_path / "Llama-tiny/config.json").write_text(
        json.dumps({**made, "head_dim": 8, "rms_norm_eps": 1e-5}, default=str)
    )
    convert(bench, tmp_path / "Llama-tiny", HF, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is False
    answer = run_transformers(load_model(tmp_path / "hf"))
    assert torch.allclose(answer, run_litgpt(tmp_path / "Llama-tiny"), rtol=0, atol=2e-5)


def test_a_merged_litgpt_model_goes_to_transformers(tmp_path: Path, bench: Bench) -> None:
    run, base = DATA / "lora-llama-qv/final", DATA / "base-llama-gqa"
    merged = bench.merge(run, base, tmp_path / "merged").merged
    convert(bench, merged.digest.hex, HF, tmp_path / "hf")
    known = load_file(DATA / "logits.safetensors")
    answer = run_transformers(load_model(tmp_path / "hf"), known["input_ids"])
    assert torch.allclose(answer, known["lora-llama-qv/final/merged"], rtol=0, atol=1e-5)
    record = json.loads((tmp_path / "hf/conversion.json").read_text())
    assert record["from"]["merged"] == str(merged.digest)
    assert record["merge"]["recipe_digest"] == str(merged.recipe.digest)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_old_row_order_is_put_right(tmp_path: Path, bench: Bench) -> None:
    convert(bench, DATA / "legacy-base-llama-gqa", HF, tmp_path / "old")
    convert(bench, DATA / "base-llama-gqa", HF, tmp_path / "new")
    assert same(read_weights(tmp_path / "old"), read_weights(tmp_path / "new")) == []


# -- adapters


RUNS = {
    "lora-llama-qv": "base-llama-gqa", "lora-llama-all-bf16": "base-llama-gqa", "lora-neox-qkv-mlp": "base-neox-mha",
    "legacy-lora-llama-qv": "legacy-base-llama-gqa", "legacy-lora-llama-qkv": "legacy-base-llama-gqa",
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_peft_runs_what_litgpt_trained(tmp_path: Path, bench: Bench, run: str) -> None:
    """The real PEFT, on the converted base, answers what litgpt's merged model answered."""
    base = DATA / RUNS[run]
    convert(bench, base, HF, tmp_path / "hf", name="hf")
    checkpoint = bench.register(DATA / run / "final", base)
    found = convert(bench, checkpoint.ref, HF, tmp_path / "peft", name="converted")
    assert found.exact
    assert found.difference < 1e-12
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, tmp_path / "peft")
    known = load_file(DATA / "logits.safetensors")
    answer = run_transformers(adapted, known["input_ids"])
    if f"{run}/final/merged" in known and "bf16" not in run:
        assert torch.allclose(answer, known[f"{run}/final/merged"], rtol=0, atol=1e-5)
    ours = bench.merge(DATA / run / "final", base, tmp_path / "merged")
    convert(bench, ours.merged.digest.hex, HF, tmp_path / "merged-hf")
    merged = run_transformers(load_model(tmp_path / "merged-hf"), known["input_ids"])
    assert torch.allclose(answer, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", [run for run in RUNS if not run.startswith("legacy")])
def test_there_and_back_gives_litgpts_tensors(tmp_path: Path, bench: Bench, run: str) -> None:
    base, final = DATA / RUNS[run], DATA / run / "final"
    convert(bench, base, HF, tmp_path / "hf", name="hf")
    there = convert(bench, bench.register(final, base).ref, HF, name="there")
    assert there.registered is not None
    back = convert(bench, there.registered.checkpoint.ref, LITGPT, tmp_path / "back", name="back")
    assert back.exact
    assert back.registered is not None
    assert back.registered.checkpoint.base_name == RUNS[run]
    before, after = (
        torch.load(place / "lit_model.pth.lora", weights_only=True) for place in (final, tmp_path / "back")
    )
    assert same(after, before["model"]) == []
    fields = [yaml.safe_load((place / "hyperparameters.yaml").read_text()) for place in (final, tmp_path / "back")]
    wanted = [key for key in fields[0] if key.startswith("lora_") or key == "precision"]
    assert {key: fields[0][key] for key in wanted} == {key: fields[1][key] for key in wanted}


def test_litgpts_own_merge_accepts_a_converted_adapter(tmp_path: Path, bench: Bench) -> None:
    from litgpt.scripts.merge_lora import merge_lora

    make_model("llama").save_pretrained(tmp_path / "base")
    expected = make_adapter(
        tmp_path / "base", tmp_path / "peft", lora(target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "base-llama-gqa" / name, tmp_path / "base" / name)
    convert(bench, tmp_path / "base", LITGPT, tmp_path / "litgpt", name="litgpt")
    checkpoint = bench.register(tmp_path / "peft", tmp_path / "base")
    convert(bench, checkpoint.ref, LITGPT, tmp_path / "lora", name="lora")
    merge_lora(tmp_path / "lora")
    assert torch.allclose(run_litgpt(tmp_path / "lora"), run_transformers(expected), rtol=0, atol=2e-5)


CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "every linear layer": ("llama", {}, True),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}, True),
    "one of three": ("qwen2", {"target_modules": ["k_proj"]}, True),
    "one layer": ("qwen3", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, True),
    "ranks that differ by two": ("llama", {"rank_pattern": {"q_proj": 2, "up_proj": 8}}, True),
    "ranks that differ": ("llama", {"rank_pattern": {"q_proj": 3}}, False),
    "alphas that differ": ("mistral", {"alpha_pattern": {"v_proj": 7}}, False),
    "rslora": ("llama", {"use_rslora": True, "r": 4}, True),
    "fused": ("neox", {}, True),
    "fused alone": ("neox", {"target_modules": ["query_key_value"]}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_litgpt_runs_what_peft_trained(tmp_path: Path, bench: Bench, case: str) -> None:
    """litgpt's LoRA model, unmerged and loaded strictly, answers what PEFT's does."""
    family, options, is_exact = CASES[case]
    make_model(family).save_pretrained(tmp_path / "base")
    expected = run_transformers(make_adapter(tmp_path / "base", tmp_path / "peft", lora(**options)))
    checkpoint = bench.register(tmp_path / "peft", tmp_path / "base")
    found = convert(bench, checkpoint.ref, LITGPT, tmp_path / "lora")
    assert found.exact is is_exact
    convert(bench, tmp_path / "base", LITGPT, tmp_path / "litgpt")
    hyper = yaml.safe_load((tmp_path / "lora/hyperparameters.yaml").read_text())
    fields = yaml.safe_load((tmp_path / "lora/model_config.yaml").read_text())
    flags = {key: value for key, value in hyper.items() if key.startswith("lora_")}
    model = LoraGPT(LoraConfigOfLitgpt(**{**fields, **flags}))
    factors = torch.load(tmp_path / "lora/lit_model.pth.lora", weights_only=True)
    weights = torch.load(tmp_path / "litgpt/lit_model.pth", weights_only=True)
    assert {name for name in model.state_dict() if lora_filter(name, None)} == set(factors)
    model.load_state_dict({**weights, **factors}, strict=True)
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS), expected, rtol=0, atol=2e-5)


def write_litgpt_lora(folder: Path, base: Path, **flags: bool) -> None:
    """An adapter with random factors, as `litgpt finetune_lora` saves it."""
    fields = yaml.safe_load((base / "model_config.yaml").read_text())
    every = {f"lora_{flag}": False for flag in ("query", "key", "value", "projection", "mlp", "head")}
    chosen = {"lora_r": 2, "lora_alpha": 6, **every, **{f"lora_{flag}": on for flag, on in flags.items()}}
    model = LoraGPT(LoraConfigOfLitgpt(**fields, **chosen))
    randomise(model.parameters(), seed=1)
    folder.mkdir()
    torch.save(
        {"model": {k: v for k, v in model.state_dict().items() if lora_filter(k, v)}}, folder / "lit_model.pth.lora"
    )
    (folder / "hyperparameters.yaml").write_text(
        yaml.safe_dump({"checkpoint_dir": str(base), **chosen, "lora_dropout": 0.0})
    )
    shutil.copy(base / "model_config.yaml", folder)


def test_experts_cannot_go_to_peft_and_the_rest_can(tmp_path: Path, bench: Bench) -> None:
    """transformers 5 keeps experts in one parameter, and the router is no linear layer."""
    base = tmp_path / "Mixtral-tiny"
    write_litgpt(base, "Mixtral-tiny", MODELS["Mixtral-tiny"])
    write_litgpt_lora(tmp_path / "experts", base, mlp=True, value=True)
    write_litgpt_lora(tmp_path / "attention", base, projection=True, value=True)
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, bench.register(tmp_path / "experts", base).ref, HF, tmp_path / "out")
    assert refusal.value.reasons[0].startswith("model.layers.0.block_sparse_moe.gate: transformers has no module")
    convert(bench, base, HF, tmp_path / "hf")
    checkpoint = bench.register(tmp_path / "attention", base)
    convert(bench, checkpoint.ref, HF, tmp_path / "out")
    adapted = PeftModel.from_pretrained(load_model(tmp_path / "hf"), tmp_path / "out")
    bench.merge(tmp_path / "attention", base, tmp_path / "merged")
    assert torch.allclose(run_transformers(adapted), run_litgpt(tmp_path / "merged"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("name", ["Qwen3-tiny", "pythia-tiny"])
def test_single_parts_of_the_fused_matrix(tmp_path: Path, bench: Bench, name: str, part: str) -> None:
    base = tmp_path / name
    write_litgpt(base, name, MODELS[name])
    write_litgpt_lora(tmp_path / "lora", base, **{part: True, "head": True})
    convert(bench, base, HF, tmp_path / "hf", name="hf")
    there = convert(bench, bench.register(tmp_path / "lora", base).ref, HF, tmp_path / "peft", name="there")
    adapted = PeftModel.from_pretrained(load_model(tmp_path / "hf"), tmp_path / "peft")
    bench.merge(tmp_path / "lora", base, tmp_path / "merged")
    assert torch.allclose(run_transformers(adapted), run_litgpt(tmp_path / "merged"), rtol=0, atol=2e-5)
    assert there.registered is not None
    convert(bench, there.registered.checkpoint.ref, LITGPT, tmp_path / "back")
    before, after = (
        torch.load(tmp_path / place / "lit_model.pth.lora", weights_only=True) for place in ("lora", "back")
    )
    assert same(after, before["model"]) == []


def test_a_head_of_a_tied_model_gets_its_own_factors(tmp_path: Path, bench: Bench) -> None:
    """PEFT unties the head; litgpt has one of its own anyway."""
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = make_adapter(tmp_path / "base", tmp_path / "peft", lora(target_modules=["lm_head", "q_proj"]))
    expected = run_transformers(model)
    checkpoint = bench.register(tmp_path / "peft", tmp_path / "base")
    convert(bench, checkpoint.ref, LITGPT, tmp_path / "lora")
    convert(bench, tmp_path / "base", LITGPT, tmp_path / "litgpt")
    bench.merge(tmp_path / "lora", tmp_path / "litgpt", tmp_path / "merged")
    assert torch.allclose(run_litgpt(tmp_path / "merged"), expected, rtol=0, atol=2e-5)
