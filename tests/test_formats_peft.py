"""PEFT adapters matched with a base model from headers alone: what fits, and what is refused and why."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from merging import Bench
from safetensors.numpy import load_file, save_file

from registry.errors import CorruptFile
from registry.formats.patterns import Pattern
from registry.manifest import Finding, Level
from registry.registering import Registration

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of rank 4 on query and value of both layers; it fits."""
    return tiny.write_adapter(tmp_path / "adapter")


def edit(adapter: Path, change: dict[str, Any]) -> None:
    """Set tensors of the weights file; None takes one away."""
    path = adapter / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: array for name, array in tensors.items() if array is not None}, path, {"format": "pt"})


def configure(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensor(adapter: Path, name: str) -> Any:
    return load_file(adapter / "adapter_model.safetensors")[name]


def refused(findings: dict[str, Finding]) -> set[str]:
    return {code for code, finding in findings.items() if finding.level is Level.REFUSED}


def test_what_fits_has_no_finding(bench: Bench, adapter: Path, base: Path) -> None:
    assert bench.findings(adapter, base) == {}


# -- tensors


def test_a_renamed_key_is_refused_and_so_is_the_module_it_leaves_bare(bench: Bench, adapter: Path, base: Path) -> None:
    a = tensor(adapter, f"{Q0}.lora_A.weight")
    edit(adapter, {f"{Q0}.lora_A.weight": None, f"{Q0}s.lora_A.weight": a})
    assert refused(bench.findings(adapter, base)) == {"missing_factor", "unused_tensor"}
    b = tensor(adapter, f"{Q0}.lora_B.weight")
    edit(adapter, {f"{Q0}.lora_B.weight": None, f"{Q0}s.lora_B.weight": b})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"no_base_tensor", "target_missed", "unused_tensor"}
    assert findings["no_base_tensor"].found == "nearest is model.layers.0.self_attn.q_proj.weight"
    assert findings["target_missed"].where == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"{Q0}.lora_C.weight", f"{Q0}.weight", f"{Q0}.bias", "something", "x.lora_E", "base_model.vera_A", f"{Q0}.lora_diag",
        f"{Q0}.lora_magnitude_vector", "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", f"{Q0}.m",
    ],
)  # fmt: skip
def test_an_extra_key_is_refused(bench: Bench, adapter: Path, base: Path, name: str) -> None:
    edit(adapter, {name: np.ones((16, 16), np.float32)})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"unused_tensor"}
    assert findings["unused_tensor"].where == name


def test_factors_that_the_configuration_does_not_call_for_are_refused(bench: Bench, tmp_path: Path, base: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "wide", targets=["q_proj", "k_proj"], config={"target_modules": ["q_proj"]})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"unused_tensor"}
    assert "k_proj" in findings["unused_tensor"].where


def test_a_missing_layer_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {name: None for name in tiny.adapter_tensors() if ".layers.1." in name})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"target_missed"}
    assert findings["target_missed"].where.startswith("model.layers.1.")


def test_a_missing_factor_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {f"{Q0}.lora_B.weight": None})
    assert refused(bench.findings(adapter, base)) == {"missing_factor"}


def test_a_file_without_factors_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    save_file({"x": np.ones(1, np.float32)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert {"nothing_matched", "target_missed", "unused_tensor"} <= refused(bench.findings(adapter, base))


def test_an_empty_tensor_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {f"{Q0}.lora_A.weight": np.zeros((0,), np.float32)})
    assert "empty_tensor" in refused(bench.findings(adapter, base))


@pytest.mark.parametrize("twin", [f"{Q0}.lora_A.default.weight", f"_orig_mod.{Q0}.lora_A.weight"])
def test_two_keys_for_one_factor_are_refused(bench: Bench, adapter: Path, base: Path, twin: str) -> None:
    edit(adapter, {twin: tensor(adapter, f"{Q0}.lora_A.weight")})
    assert refused(bench.findings(adapter, base)) == {"duplicate_tensor"}


def test_a_rank_that_the_configuration_does_not_say_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {f"{Q0}.lora_A.weight": np.ones((3, 16), np.float32), f"{Q0}.lora_B.weight": np.ones((16, 3), np.float32)})  # fmt: skip
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"rank_mismatch"}
    assert (findings["rank_mismatch"].expected, findings["rank_mismatch"].found) == (
        "rank 4, says adapter_config.json",
        "rank 3",
    )


def test_factors_of_different_ranks_are_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {f"{Q0}.lora_B.weight": np.ones((16, 3), np.float32)})
    assert refused(bench.findings(adapter, base)) == {"rank_mismatch"}


def test_factors_of_different_kinds_of_layers_are_refused(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {f"{Q0}.lora_A.weight": np.ones((4, 16, 1, 1), np.float32)})
    assert refused(bench.findings(adapter, base)) == {"shape_mismatch"}


def test_factors_of_a_convolution_do_not_fit_a_linear_layer(bench: Bench, adapter: Path, base: Path) -> None:
    edit(
        adapter,
        {
            f"{Q0}.lora_A.weight": np.ones((4, 16, 3), np.float32),
            f"{Q0}.lora_B.weight": np.ones((16, 4, 1), np.float32),
        },
    )
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"shape_mismatch"}
    assert findings["shape_mismatch"].found == "A and B make [16, 16, 3]"


# -- what variants add to the factors


def add_to_all(adapter: Path, end: str, *shape: int) -> None:
    """Give every module with factors one more tensor."""
    modules = {
        name.removesuffix(".lora_A.weight") for name in tiny.adapter_tensors() if name.endswith(".lora_A.weight")
    }
    edit(adapter, {f"{module}.{end}": np.ones(shape, np.float32) for module in modules})


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_magnitudes_may_have_any_of_their_names(bench: Bench, adapter: Path, base: Path, end: str) -> None:
    configure(adapter, use_dora=True)
    add_to_all(adapter, f"lora_magnitude_vector{end}", 16)
    assert bench.findings(adapter, base) == {}


@pytest.mark.parametrize(
    ("fields", "end", "shape", "code"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", (15,), "shape_mismatch"),
        ({"use_dora": True}, "lora_diag", (4,), "missing_factor"),
        ({"kasa_config": {"beta": 0.1}}, "lora_diag", (3,), "shape_mismatch"),
        ({"kasa_config": {"beta": 0.1}}, "lora_magnitude_vector", (16,), "missing_factor"),
        ({}, "lora_magnitude_vector", (16,), "unused_tensor"),
        ({}, "lora_diag", (4,), "unused_tensor"),
        ({}, "lora_B.bias", (16,), "bias_not_mergeable"),  # the base has no biases
        ({"use_dora": True}, "lora_B.bias", (16,), "missing_factor"),
        ({"lora_bias": True}, "lora_B.bias", (16,), "bias_not_mergeable"),
        (
            {"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 3}},
            "lora_velora_embed",
            (4,),
            "shape_mismatch",
        ),
        ({"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}}, "lora_velora_embed", (4,), "rank_mismatch"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
            "lora_velora_embed",
            (4,),
            "shape_mismatch",
        ),
    ],
    ids=str,
)
def test_what_a_variant_adds_must_fit_the_configuration(
    bench: Bench, adapter: Path, base: Path, fields: dict[str, Any], end: str, shape: tuple[int, ...], code: str
) -> None:
    configure(adapter, **fields)
    add_to_all(adapter, end, *shape)
    assert refused(bench.findings(adapter, base)) == {code}


@pytest.mark.parametrize(
    "end", ["lora_velora_embed", "lora_monteclora_sampler.std_prior", "lora_monteclora_sampler.default.expert_weights"]
)
def test_what_only_training_needs_is_passed_over(bench: Bench, adapter: Path, base: Path, end: str) -> None:
    add_to_all(adapter, end, 4)
    assert bench.findings(adapter, base) == {}


# -- single rows of embeddings

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("indices", "count", "code"),
    [
        ([1, 3], 1, "shape_mismatch"),
        ([1, 1], 2, "shape_mismatch"),
        ([1, tiny.VOCABULARY], 2, "shape_mismatch"),
        ({"lm_head": [1, 3]}, 2, "unused_tensor"),
        ({"embed_tokens": [1, 3], "tokens": [3, 1]}, 2, "unused_tensor"),
        ({"embed_tokens": [1, 3], "wpe": [0]}, 2, "target_missed"),
    ],
)  # fmt: skip
def test_rows_must_be_those_of_the_configuration(
    bench: Bench, adapter: Path, base: Path, indices: Any, count: int, code: str
) -> None:
    configure(adapter, trainable_token_indices=indices)
    edit(adapter, {ROWS: np.ones((count, tiny.WIDTH), np.float32)})
    assert code in refused(bench.findings(adapter, base))


def test_rows_that_are_not_in_the_file_are_missed(bench: Bench, adapter: Path, base: Path) -> None:
    configure(adapter, trainable_token_indices=[1])
    assert refused(bench.findings(adapter, base)) == {"target_missed"}


@pytest.mark.parametrize(
    "indices", [3, "ab", [True], [-1], [0.5], {"embed_tokens": 3}, {"embed_tokens": ["1"]}], ids=str
)
def test_row_numbers_that_are_none_are_corrupt(bench: Bench, adapter: Path, base: Path, indices: Any) -> None:
    configure(adapter, trainable_token_indices=indices)
    with pytest.raises(CorruptFile):
        bench.registry.register(str(adapter), Registration(base=str(base)))


def test_rows_of_an_embedding_that_has_factors_too_are_refused(bench: Bench, adapter: Path, base: Path) -> None:
    configure(adapter, trainable_token_indices=[1], target_modules=["q_proj", "v_proj", "embed_tokens"])
    edit(
        adapter,
        {ROWS: np.ones((1, tiny.WIDTH), np.float32), **factors(EMBEDDING, tiny.WIDTH, tiny.VOCABULARY, embedding=True)},
    )
    assert refused(bench.findings(adapter, base)) == {"tokens_unclear"}


def test_rows_of_a_tied_embedding_whose_head_has_factors_are_refused(bench: Bench, adapter: Path, tied: Path) -> None:
    configure(adapter, trainable_token_indices=[1], target_modules=["q_proj", "v_proj", "lm_head"])
    edit(adapter, {ROWS: np.ones((1, tiny.WIDTH), np.float32), **factors(HEAD, tiny.VOCABULARY, tiny.WIDTH)})
    assert refused(bench.findings(adapter, tied)) == {"tokens_unclear"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bench: Bench, adapter: Path, base: Path, value: float) -> None:
    a = tensor(adapter, f"{Q0}.lora_A.weight")
    a[2, 3] = value
    edit(adapter, {f"{Q0}.lora_A.weight": a})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"not_finite"}
    assert findings["not_finite"].where == f"{Q0}.lora_A.weight"


# -- the base


def test_a_base_of_other_shapes_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] = np.ones((8, 16), np.float32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    findings = bench.findings(adapter, base)
    assert refused(findings) == {"shape_mismatch"}
    assert findings["shape_mismatch"].found == "A and B make [16, 16]"


def test_a_base_of_the_same_shapes_with_other_weights_is_refused(
    bench: Bench, adapter: Path, base: Path, tmp_path: Path
) -> None:
    checkpoint = bench.register(adapter, base)
    other = bench.registry.check(checkpoint, base=str(tiny.write_base(tmp_path / "other", seed=9)))
    assert [finding.code for finding in other.findings if finding.level is Level.REFUSED] == ["base_weights"]


def test_a_quantised_base_is_refused(bench: Bench, adapter: Path, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "quantised", config={"quantization_config": {"bits": 4}})
    assert refused(bench.findings(adapter, base)) == {"base_quantised"}


def test_a_base_that_has_this_checkpoint_in_it_is_refused(
    bench: Bench, adapter: Path, base: Path, tmp_path: Path
) -> None:
    bench.merge(adapter, base, tmp_path / "merged")
    checkpoint = bench.register(adapter, base)
    report = bench.registry.check(checkpoint, base=str(tmp_path / "merged"))
    assert {f.code for f in report.findings if f.level is Level.REFUSED} == {"merged_before", "base_weights"}


def test_a_tokenizer_with_more_ids_than_rows_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    tiny.write_json(adapter / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": tiny.VOCABULARY}}})
    assert refused(bench.findings(adapter, base)) == {"vocabulary"}


# -- the configuration


@pytest.mark.parametrize(
    ("fields", "code", "found"),
    [
        ({"alora_invocation_tokens": [1]}, "method_not_mergeable", "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 2}}, "method_not_mergeable", "arrow_config"),
        ({"use_qalora": True}, "method_not_mergeable", "use_qalora"),
        ({"megatron_config": {"a": 1}}, "method_not_mergeable", "megatron_config"),
        ({"use_warp": 2}, "option_unknown", "use_warp=2"),
        ({"init_lora_weights": "warp"}, "option_unknown", "init_lora_weights='warp'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialiser_changes_base", "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "initialiser_changes_base", "init_lora_weights='loftq'"),
        ({"init_lora_weights": "corda"}, "initialiser_changes_base", "init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "initialiser_changes_base", "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "OLoRA"}, "initialiser_changes_base", "init_lora_weights='OLoRA'"),
        ({"rank_pattern": {"a(": 4}}, "pattern_invalid", "rank_pattern: 'a('"),
    ],
)
def test_what_cannot_be_merged_is_recorded_all_the_same(
    bench: Bench, adapter: Path, base: Path, fields: dict[str, Any], code: str, found: str
) -> None:
    configure(adapter, **fields)
    findings = bench.findings(adapter, base)
    assert refused(findings) == {code}
    assert findings[code].found == found
    assert findings[code].fits
    assert bench.register(adapter, base).version == 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"rank_pattern": {"k_proj": 2}}, "pattern_unused"),
        ({"alpha_pattern": {"layers.7.*": 2}}, "pattern_unused"),
        ({"target_modules": ["q_proj", "v_proj", "query_key_value"]}, "target_unused"),
        ({"target_modules": "(["}, "pattern_invalid"),
    ],
)
def test_warnings_do_not_stop_a_merge(
    bench: Bench, adapter: Path, base: Path, fields: dict[str, Any], code: str
) -> None:
    configure(adapter, **fields)
    assert {each.code: each.level for each in bench.findings(adapter, base).values()} == {code: Level.WARNING}
    assert bench.plan(adapter, base).plan.bytes_computed


@pytest.mark.parametrize(
    "fields",
    [
        {"r": None}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": "16"}, {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": None}}, {"target_modules": 3}, {"target_modules": [1]}, {"modules_to_save": {}, "exclude_modules": 1},
        {"layers_to_transform": ["0"]}, {"use_bdlora": True}, {"use_bdlora": {"nblocks": 0}}, {"use_bdlora": {"target_modules_bd_a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_corrupt(
    bench: Bench, adapter: Path, base: Path, fields: dict[str, Any]
) -> None:
    configure(adapter, **fields)
    with pytest.raises(CorruptFile) as caught:
        bench.registry.register(str(adapter), Registration(base=str(base)))
    assert caught.value.path.endswith("adapter_config.json")


def test_a_saved_module_that_is_not_in_the_file_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    configure(adapter, modules_to_save=["lm_head"])
    assert refused(bench.findings(adapter, base)) == {"target_missed"}


def test_a_saved_module_of_another_shape_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    configure(adapter, modules_to_save=["norm"])
    edit(adapter, {"base_model.model.model.norm.weight": np.ones(8, np.float32)})
    assert refused(bench.findings(adapter, base)) == {"shape_mismatch"}


def test_fewer_rows_than_the_base_has_are_not_cut_off(bench: Bench, adapter: Path, base: Path) -> None:
    edit(adapter, {"base_model.model.lm_head.weight": np.ones((tiny.VOCABULARY - 1, tiny.WIDTH), np.float32)})
    assert refused(bench.findings(adapter, base)) == {"shape_mismatch"}


# -- tied embeddings (what becomes of those that are right, the oracle tests show)

HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "tied", config={"tie_word_embeddings": True})


def factors(module: str, d_out: int, d_in: int, *, embedding: bool = False) -> dict[str, Any]:
    a, b = (f"{module}.lora_embedding_{x}" if embedding else f"{module}.lora_{x}.weight" for x in "AB")
    return {a: np.ones((4, d_in), np.float32), b: np.ones((d_out, 4), np.float32)}


def test_a_tie_that_is_both_ensured_and_broken_is_refused(bench: Bench, adapter: Path, tied: Path) -> None:
    saved = {f"{EMBEDDING}.weight": np.ones((tiny.VOCABULARY, tiny.WIDTH), np.float32)}
    edit(adapter, {**saved, **factors(HEAD, tiny.VOCABULARY, tiny.WIDTH)})
    configure(adapter, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    findings = bench.findings(adapter, tied)
    assert refused(findings) == {"tying_unclear"}
    assert findings["tying_unclear"].fits


def test_factors_for_fewer_rows_than_the_saved_matrix_has_are_refused(bench: Bench, adapter: Path, tied: Path) -> None:
    saved = {f"{HEAD}.weight": np.ones((tiny.VOCABULARY + 8, tiny.WIDTH), np.float32)}
    edit(adapter, {**saved, **factors(EMBEDDING, tiny.WIDTH, tiny.VOCABULARY, embedding=True)})
    configure(adapter, target_modules=["q_proj", "v_proj", "embed_tokens"])
    assert refused(bench.findings(adapter, tied)) == {"shape_mismatch"}


# -- prefixes


def rename(adapter: Path, old: str, new: str) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace(old, new): array for name, array in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "base.inner."])
def test_one_change_of_prefix_for_all_modules_is_understood(
    bench: Bench, adapter: Path, base: Path, prefix: str
) -> None:
    rename(adapter, "base_model.model.model.", f"base_model.model.{prefix}")
    assert bench.findings(adapter, base) == {}


def test_a_prefix_that_fits_only_some_modules_is_not_guessed(bench: Bench, adapter: Path, base: Path) -> None:
    rename(adapter, "base_model.model.model.layers.0.", "base_model.model.other.layers.0.")
    rename(adapter, "base_model.model.model.layers.1.", "base_model.model.layers.7.")
    assert "no_base_tensor" in refused(bench.findings(adapter, base))


def test_a_prefix_that_could_mean_two_towers_is_not_guessed(bench: Bench, adapter: Path, base: Path) -> None:
    rename(adapter, "base_model.model.model.", "base_model.model.")
    tensors = load_file(base / "model.safetensors")
    towers = {name.replace("model.layers.", "vision.layers."): array for name, array in tensors.items()}
    save_file({**tensors, **towers}, base / "model.safetensors", {"format": "pt"})
    assert "no_base_tensor" in refused(bench.findings(adapter, base))


# -- files


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(bench: Bench, adapter: Path, base: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = -(-(length - 0x80) // 0x100) * 0x100 + 0x80
    path.write_bytes(padded.to_bytes(8, "little") + data[8 : 8 + length].ljust(padded) + data[8 + length :])
    assert path.read_bytes()[0] == 0x80
    assert bench.findings(adapter, base) == {}


# -- patterns

PIECES = ["a", "b", ".", "*", "+", "?", "(", ")", "|", "[ab]", "[^a]", "{1,2}", "{2}", "{,1}", "^", "$", "(?:", "(?=", "(?!", r"\b"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text("ab.", max_size=5))
def test_patterns_match_what_re_matches(source: str, text: str) -> None:
    pattern = Pattern.compile(source)
    try:
        expected = re.compile(source).fullmatch(text)
    except re.error:
        assert pattern is None
    else:
        assert pattern is not None
        assert pattern.matches(text) == bool(expected)


@pytest.mark.parametrize("source", ["(", "[a", "a" * 30_000])
def test_patterns_that_are_none(source: str) -> None:
    assert Pattern.compile(source) is None


@pytest.mark.parametrize(
    "source", ["(a|a)*x", "((a)+)+x", "(a*)*x", ".*.*.*.*.*.*.*.*x", "(a{1,50}){1,50}x", "((((a?)*)*)*)*x"]
)
def test_patterns_that_would_keep_re_busy_are_quick(source: str) -> None:
    pattern, start = Pattern.compile(source), time.process_time()
    assert pattern is not None
    assert pattern.matches("a" * 100 + "x")
    with contextlib.suppress(CorruptFile):
        assert not pattern.matches("a" * 300)
    assert time.process_time() - start < 1


def test_a_pattern_that_takes_too_long_is_refused() -> None:
    pattern = Pattern.compile("(a{1,50}){1,50}x")
    assert pattern is not None
    with pytest.raises(CorruptFile):
        pattern.matches("a" * 60)
