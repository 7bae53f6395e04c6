"""What vLLM and SGLang take unmerged and merged: the rules are those of their sources, as of vLLM 0.33 and SGLang 0.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from factories import digest, manifest

from registry.manifest import FileEntry, Finding, Format, Level, Report
from registry.servability import Servability, rank_flag, rank_of, servable

LORA: Mapping[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def by_way(found: tuple[Servability, ...]) -> dict[str, Servability]:
    return {f"{each.engine} {each.way}": each for each in found}


def of(config: Mapping[str, Any] = LORA, *, report: Report | None = None, **said: Any) -> dict[str, Servability]:
    return by_way(servable(manifest(**said), {**LORA, **config}, ref="bot@v3", report=report))


def test_a_plain_lora_is_served_every_way() -> None:
    found = of()
    assert list(found) == ["vllm unmerged", "vllm merged", "sglang unmerged", "sglang merged"]
    assert all(each.is_possible and not each.reason for each in found.values())
    assert found["vllm unmerged"].advice == "start it with --enable-lora --max-lora-rank 8"
    assert found["sglang unmerged"].advice == "start it with --max-lora-rank 8"
    assert found["vllm merged"].advice == "ckpt merge bot@v3 --out DIR"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "lora_bias"),
        ("bias", "all", "trained biases"),
        ("init_lora_weights", "pissa_niter_16", "PiSSA"),
        ("init_lora_weights", "olora", "PiSSA"),
        ("init_lora_weights", "corda", "PiSSA"),
        ("init_lora_weights", "loftq", "PiSSA"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("layer_replication", [[0, 4], [2, 6]], "replicated layers"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("use_qalora", True, "QALoRA"),
        ("modules_to_save", ["score", "lm_head"], "modules trained whole (lm_head, score)"),
        ("modules_to_save", "lm_head", "modules trained whole (lm_head)"),
        ("trainable_token_indices", [1], "trained tokens"),
    ],
)
def test_what_neither_engine_applies_is_refused_unmerged(field: str, value: object, reason: str) -> None:
    found = of({field: value})
    for engine in ("vllm", "sglang"):
        each = found[f"{engine} unmerged"]
        assert not each.is_possible
        assert reason in each.reason
        assert each.advice


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "use_bdlora", "modules_to_save"])
def test_it_says_who_refuses_and_who_only_may_not_apply_it(field: str) -> None:
    found = of({field: {"modules_to_save": ["lm_head"], "use_bdlora": {"nblocks": 2}}.get(field, True)})
    assert "not known" not in found["vllm unmerged"].reason
    assert ("SGLang is not known to apply" in found["sglang unmerged"].reason) is (field != "use_dora")
    assert found["vllm unmerged"].advice == "merge it: ckpt merge bot@v3"


def test_vllm_takes_heads_of_classifiers() -> None:
    found = of({"modules_to_save": ["classifier", "score"]})
    assert found["vllm unmerged"].is_possible
    assert not found["sglang unmerged"].is_possible


def test_plain_starts_and_unset_fields_are_fine() -> None:
    unset = {"use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": None, "rank_pattern": {}}
    assert of({"init_lora_weights": "gaussian", **unset})["vllm unmerged"].is_possible


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (4, 8), (8, 8), (9, 16), (300, 320), (512, 512), (513, None)])
def test_vllm_knows_only_some_ranks(rank: int, flag: int | None) -> None:
    assert rank_flag("vllm", rank) == flag
    assert rank_flag("sglang", rank) == rank
    assert of(rank=rank)["vllm unmerged"].is_possible is (flag is not None)


def test_the_highest_rank_of_a_module_counts() -> None:
    assert rank_of(manifest(rank=8), {"rank_pattern": {"q_proj": 24, "v_proj": 4}}) == 24
    assert "--max-lora-rank 32" in of({"rank_pattern": {"q_proj": 24}})["vllm unmerged"].advice
    assert of({"rank_pattern": {"q_proj": 600}})["vllm unmerged"].reason == "rank 600, and 512 is the highest"


def test_sglang_refuses_tokens_that_the_base_lacks() -> None:
    files = tuple(FileEntry(path=path, size_bytes=2, digest=digest(path)) for path in ("a", "added_tokens.json"))
    found = of(files=files)
    assert "added_tokens.json" in found["sglang unmerged"].advice
    assert "added_tokens.json" not in found["vllm unmerged"].advice


def test_other_methods_are_served_merged() -> None:
    found = of({"peft_type": "IA3"}, method="ia3", rank=None)
    assert found["vllm unmerged"].reason == "ia3, and only LoRA is served unmerged"
    assert found["vllm unmerged"].advice == "merge it: ckpt merge bot@v3"
    assert found["sglang merged"].is_possible


@pytest.mark.parametrize(
    ("method", "config"), [("prompt_tuning", {}), ("lora", {"alora_invocation_tokens": [1]}), ("xlora", {})]
)
def test_what_cannot_be_merged_either_is_left_to_peft(method: str, config: Mapping[str, Any]) -> None:
    for each in of(config, method=method).values():
        assert not each.is_possible
        assert "PEFT itself" in each.advice


def test_what_began_with_the_base_says_how_to_save_it() -> None:
    found = of({"init_lora_weights": "pissa"})
    assert "path_initial_model_for_weight_conversion" in found["vllm unmerged"].advice
    assert not found["vllm merged"].is_possible


def test_a_report_counts_for_more_than_the_configuration() -> None:
    finding = Finding(code="shape", level=Level.REFUSED, where="q_proj", found="4 rows", advice="train it again")
    refused = of(report=Report(checkpoint="bot@v3", base="b", findings=(finding,)))
    assert refused["vllm unmerged"].is_possible
    assert (refused["vllm merged"].reason, refused["vllm merged"].advice) == (
        "cannot be merged: 4 rows",
        "train it again",
    )
    passed = of({"init_lora_weights": "pissa"}, report=Report(checkpoint="bot@v3", base="b", findings=()))
    assert passed["vllm merged"].is_possible


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_litgpts_layout_has_to_be_converted(method: str) -> None:
    found = by_way(servable(manifest(format=Format.LITGPT, method=method), {}, ref="bot@v3"))
    assert found["vllm unmerged"].reason == "litgpt's layout"
    assert not found["vllm merged"].is_possible
    assert "ckpt convert" in found["vllm unmerged"].advice
