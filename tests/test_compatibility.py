"""The check: every finding, what is refused because it does not fit, and what is only not mergeable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from registry.errors import CorruptFile, Refused
from registry.manifest import Finding, Level
from registry.registering import Registration
from registry.service import Registry


def check(ckpt: Registry, adapter: Path, base: str = "", **said: Any) -> dict[str, Finding]:
    """The findings by their codes."""
    checkpoint = ckpt.register(str(adapter), Registration(**said)).registered[0].checkpoint
    return {finding.code: finding for finding in ckpt.check(checkpoint, base).findings}


def refused(findings: Mapping[str, Finding]) -> set[str]:
    return {code for code, finding in findings.items() if finding.level is Level.REFUSED}


def edit(adapter: Path, **changes: Any) -> None:
    """Change tensors of an adapter; dots in names are written as `__`."""
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name, change in changes.items():
        key = next(key for key in tensors if name.replace("__", ".") in key)
        tensors[key] = change(tensors[key])
    save_file(tensors, weights, {"format": "pt"})


def test_a_good_checkpoint_passes_everything(ckpt: Registry, adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text((adapter.parent / "base" / "tokenizer.json").read_text())
    findings = check(ckpt, adapter)
    assert {finding.level for finding in findings.values()} == {Level.PASS}
    assert {"base_weights", "architecture", "tensors", "targets", "finite", "vocabulary", "dtype"} <= findings.keys()


def test_another_base_is_refused_with_all_that_differs(ckpt: Registry, adapter: Path, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", seed=1, config={"num_attention_heads": 2})
    findings = check(ckpt, adapter, str(other))
    assert refused(findings) == {"base_weights", "architecture"}
    assert "(base)" in findings["base_weights"].expected


@pytest.mark.parametrize(
    ("own", "theirs", "verdict"), [("v1", "v2", Level.REFUSED), ("v1", "v1", Level.PASS), ("", "v1", None)]
)
def test_architecture_versions_are_compared_where_both_are_known(
    ckpt: Registry, adapter: Path, tmp_path: Path, own: str, theirs: str, verdict: Level | None
) -> None:
    ckpt.add_base(str(tiny.write_base(tmp_path / "newer", seed=1)), arch_version=theirs)
    finding = check(ckpt, adapter, "newer", arch_version=own).get("arch_version")
    assert (finding and finding.level) == verdict


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(ckpt: Registry, adapter: Path, value: float) -> None:
    def spoil(array: np.ndarray) -> np.ndarray:
        array[-1, -1] = value
        return array

    edit(adapter, layers__1__self_attn__v_proj__lora_B=spoil)
    findings = check(ckpt, adapter)
    assert refused(findings) == {"not_finite"}
    assert "layers.1.self_attn.v_proj.lora_B" in findings["not_finite"].where


def test_values_of_every_float_are_looked_at(ckpt: Registry, adapter: Path) -> None:
    edit(
        adapter,
        q_proj__lora_A=lambda array: array.astype(np.float16),
        v_proj__lora_A=lambda array: array.astype(np.float64),
    )
    assert not refused(check(ckpt, adapter))


def test_whole_numbers_cannot_be_merged(ckpt: Registry, adapter: Path) -> None:
    edit(adapter, q_proj__lora_A=lambda array: array.astype(np.int8))
    assert refused(check(ckpt, adapter)) == {"dtype"}


@pytest.mark.parametrize(
    "vocabulary",
    [{"model": {"vocab": {"a": tiny.VOCABULARY}}}, {"model": {"vocab": [["a", 0.0]] * (tiny.VOCABULARY + 1)}},
     {"model": {"vocab": {}}, "added_tokens": [{"id": tiny.VOCABULARY}]}],
)  # fmt: skip
def test_a_tokenizer_with_more_ids_than_rows_is_refused(ckpt: Registry, adapter: Path, vocabulary: object) -> None:
    tiny.write_json(adapter / "tokenizer.json", vocabulary)
    assert refused(check(ckpt, adapter)) == {"vocabulary"}


@pytest.mark.parametrize(
    "vocabulary",
    [
        {},
        {"model": 5},
        {"model": {"vocab": 5}, "added_tokens": 5},
        {"model": {"vocab": {"a": "b"}}, "added_tokens": [5, {}]},
    ],
)
def test_a_tokenizer_that_tells_nothing_is_not_held_against_it(
    ckpt: Registry, adapter: Path, vocabulary: object
) -> None:
    tiny.write_json(adapter / "tokenizer.json", vocabulary)
    assert "vocabulary" not in check(ckpt, adapter)


def test_a_tokenizer_may_be_as_large_as_llama_s(ckpt: Registry, adapter: Path) -> None:
    tiny.write_json(adapter / "tokenizer.json", {"model": {"vocab": {"a" * (20 << 20): 3}}})
    assert not refused(check(ckpt, adapter))


def test_a_tokenizer_that_is_no_json_is_corrupt(ckpt: Registry, adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{")
    checkpoint = ckpt.register(str(adapter)).registered[0].checkpoint
    with pytest.raises(CorruptFile):
        ckpt.check(checkpoint)


def test_a_quantised_base_is_not_merged_into(ckpt: Registry, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", config={"quantization_config": {"quant_method": "gptq"}})
    assert refused(check(ckpt, tiny.write_adapter(tmp_path / "bot", base=base))) == {"base_quantised"}


@pytest.mark.parametrize("inputs", [None, 5, [5, {}], [{"digest": "blake3:" + "0" * 64}]])
def test_a_base_with_a_record_of_other_merges_is_fine(
    ckpt: Registry, base: Path, adapter: Path, inputs: object
) -> None:
    tiny.write_json(base / "merge.json", {"inputs": inputs})
    assert not refused(check(ckpt, adapter))


def test_merging_the_same_checkpoint_twice_is_refused(ckpt: Registry, adapter: Path, tmp_path: Path) -> None:
    checkpoint = ckpt.register(str(adapter)).registered[0].checkpoint
    ckpt.merge(ckpt.plan(checkpoint), out=str(tmp_path / "merged"))
    findings = {each.code: each for each in ckpt.check(checkpoint, str(tmp_path / "merged")).findings}
    assert refused(findings) == {"base_weights", "merged_before"}


def test_what_fits_but_cannot_be_merged_is_recorded_and_says_so(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "bot", base=base, config={"peft_type": "PSOFT"})
    assert "method_not_mergeable" in refused(check(ckpt, adapter))
    with pytest.raises(Refused) as caught:
        ckpt.plan(ckpt.resolve("bot"))
    assert caught.value.report.verdict is Level.REFUSED


def test_an_incomplete_adapter_does_not_fit(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "bot", base=base, config={"target_modules": ["q_proj", "v_proj", "o_proj"]})
    with pytest.raises(Refused) as caught:
        ckpt.register(str(adapter))
    misfits = caught.value.report.misfits
    assert {finding.code for finding in misfits} == {"target_missed"}
    missed = {finding.where for finding in misfits}
    assert missed >= {f"model.layers.{layer}.self_attn.o_proj" for layer in range(tiny.LAYERS)}


def test_a_glance_tells_the_same_from_headers_alone(ckpt: Registry, adapter: Path) -> None:
    checkpoint = ckpt.register(str(adapter)).registered[0].checkpoint
    whole = ckpt.check(checkpoint).findings
    glance = ckpt.details(checkpoint).report
    assert glance is not None
    assert set(glance.findings) == {finding for finding in whole if finding.code not in ("finite", "vocabulary")}
