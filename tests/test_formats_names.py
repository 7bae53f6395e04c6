"""One rule from the names that training saw to those of the base's files, or none."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from registry.formats.peft_names import Names, Neighbours, match_names

LAYERS = [f"layers.{layer}.{leaf}" for layer in range(2) for leaf in ("self_attn.q_proj", "mlp.up_proj")]


def tensors(*beginnings: str) -> list[str]:
    """The names of weights of the same two layers under several beginnings."""
    return [f"{beginning}{module}.weight" for beginning in beginnings for module in LAYERS]


def found(names: Names | None, modules: list[str]) -> list[str]:
    assert names is not None
    moved = [names.to_base(module) for module in modules]
    assert [names.to_training(path) for path in moved] == modules
    return moved


@pytest.mark.parametrize(
    ("trained", "published"),
    [
        ("model.", "model."),
        ("", "model."),
        ("model.", ""),
        ("transformer.", "model."),
        ("model.", "model.language_model."),
        ("language_model.model.", "model.language_model."),
        ("0.auto_model.", ""),
    ],
)
def test_one_change_of_prefix_is_found(trained: str, published: str) -> None:
    modules = [f"{trained}{module}" for module in LAYERS]
    assert found(match_names(modules, tensors(published)), modules) == [f"{published}{module}" for module in LAYERS]


def test_modules_of_another_part_keep_their_names() -> None:
    modules = [*(f"model.{module}" for module in LAYERS), "lm_head"]
    names = match_names(modules, [*tensors("model.language_model."), "lm_head.weight"])
    assert found(names, modules)[-1] == "lm_head"


def test_a_head_that_the_files_lack_is_a_module_all_the_same() -> None:
    modules = [*(f"transformer.{module}" for module in LAYERS), "lm_head"]
    assert match_names(modules, tensors("")) is None
    assert found(match_names(modules, tensors(""), tied_head="lm_head.weight"), modules)[0] == LAYERS[0]


def test_two_towers_that_end_alike_are_not_guessed_between() -> None:
    modules = [f"model.{module}" for module in LAYERS]
    assert match_names(modules, tensors("vision.", "text.")) is None


def test_the_table_tells_towers_apart() -> None:
    """The text model of a model that also sees, trained alone."""
    modules = [f"model.{module}" for module in LAYERS]
    base = tensors("language_model.model.", "vision_tower.encoder.")
    assert match_names(modules, base) is None
    assert found(match_names(modules, base, model_type="llava"), modules) == [
        f"language_model.model.{each}" for each in LAYERS
    ]


def test_the_longest_beginning_counts() -> None:
    modules = ["model.embeddings", "model.layers.0.mixer.in_proj", "lm_head"]
    base = ["backbone.embedding.weight", "backbone.layers.0.mixer.in_proj.weight", "lm_head.weight"]
    published = [name.removesuffix(".weight") for name in base]
    assert found(match_names(modules, base, model_type="nemotron_h"), modules) == published


def test_modules_that_the_trained_model_did_not_have_have_no_name_there() -> None:
    modules = [f"model.{module}" for module in LAYERS]
    names = match_names(modules, tensors("language_model.model.", "vision_tower.encoder."), model_type="llava")
    assert names is not None
    assert names.to_training("vision_tower.encoder.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize(
    "wrong",
    [
        "model.layers.1.attention.q_proj",
        "model.layers.2.self_attn.q_proj",
        "model.block.1.mlp.up_proj",
        "other.layers.1.mlp.up_proj",
        "up_proj",
    ],
)
def test_a_rule_for_some_modules_is_no_rule(wrong: str) -> None:
    modules = [*(f"model.{module}" for module in LAYERS[:3]), wrong]
    assert match_names(modules, tensors("model.")) is None


def test_two_modules_never_mean_one_place() -> None:
    modules = [*(f"model.{module}" for module in LAYERS), *(f"old.{module}" for module in LAYERS)]
    assert match_names(modules, tensors("model.")) is None


def test_numbered_experts_are_found_by_their_container() -> None:
    numbered = [f"layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(3)]
    for base in (numbered, ["layers.0.mlp.experts.gate_up_proj"]):
        for modules in (
            ["model.layers.0.mlp.experts"],
            [f"model.layers.0.mlp.experts.{each}.up_proj" for each in (0, 2)],
        ):
            names = match_names(modules, base)
            assert found(names, modules) == [module.removeprefix("model.") for module in modules]


PARTS = st.sampled_from(["a", "b", "c", "layers", "0", "1"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=5, unique=True)


@given(PATHS, PATHS)
@example(["a", "b"], ["b", "b.a"])
def test_what_is_found_is_there_once_and_leads_back(modules: list[str], paths: list[str]) -> None:
    names = match_names(modules, [f"{path}.weight" for path in paths])
    if names is not None:
        moved = [names.to_base(module) for module in modules]
        assert set(moved) <= set(paths)
        assert len(set(moved)) == len(moved)
        assert [names.to_training(path) for path in moved] == modules


def test_names_are_told_that_end_alike() -> None:
    neighbours = Neighbours(
        [f"{each}.weight" for each in ("model.layers.0.mlp.up_proj", "vision.layers.1.mlp.up_proj")]
    )
    assert neighbours.nearest("language_model.layers.1.mlp.up_proj.weight") == "vision.layers.1.mlp.up_proj.weight"
    assert neighbours.nearest("model.layers.0.mlp.ap_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert neighbours.nearest("zzz") == ""
