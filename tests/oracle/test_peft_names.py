"""Adapters whose training saw other names than the base's files have, compared with the real PEFT and transformers' own tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import ATOL, Case, assert_same_as
from merging import read_weights, same
from models import load_model, logits, lora, make_adapter, randomise
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    Gemma3Config,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from registry.formats.peft_names import match_names

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]
BaseMaker = Callable[..., Path]
_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# Text towers and vision towers have the same number of layers and names that end alike.
TOWERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava": lambda: LlavaConfig(
        text_config={"model_type": "llama", **_TEXT}, image_token_index=63,
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **_TOWER},
    ),
    "gemma3": lambda: Gemma3Config(  # tied
        text_config={"head_dim": 8, **_TEXT}, vision_config=_TOWER, mm_tokens_per_image=4, image_token_index=63
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={"rope_parameters": _ROPE, **_TEXT}, image_token_id=60, vision_start_token_id=61, vision_end_token_id=62, video_token_id=63,
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={"rope_parameters": {**_ROPE, "mrope_interleaved": True}, "head_dim": 8, **_TEXT},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
                       "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a model that sees and reads, as `save_pretrained` writes it: with the names it is published with."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model = AutoModelForImageTextToText.from_config(TOWERS[family](), dtype=torch.float32)
            randomise(model.parameters(), seed=3)
            made[family] = tmp_path_factory.mktemp("towers") / family
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def rename(adapter: Path, *pairs: tuple[str, str]) -> None:
    """Change the beginnings of the adapter's keys: the first pair that fits."""
    path = adapter / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        inner = name.removeprefix("base_model.model.")
        old, new = next((pair for pair in pairs if inner.startswith(pair[0])), ("", ""))
        renamed[f"base_model.model.{new}{inner.removeprefix(old)}"] = tensor
    save_file(renamed, path, {"format": "pt"})


TARGETS: dict[str, dict[str, Any]] = {
    "both towers": {"target_modules": "all-linear"},
    "text only": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "text and head": {"target_modules": r".*language_model.*\.(q_proj|down_proj)|lm_head"},
    "a saved head": {"target_modules": r".*language_model.*\.k_proj", "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_towers_that_transformers_nests_anew(towers: Callable[[str], Path], case: Case, family: str, kind: str) -> None:
    base = towers(family)
    peft_model = case.train(load_model(base, AutoModelForImageTextToText), **TARGETS[kind])
    assert_same_as(case.merge(base, AutoModelForImageTextToText), peft_model)


@pytest.mark.parametrize("kind", TARGETS)
def test_towers_with_tied_embeddings(towers: Callable[[str], Path], case: Case, kind: str) -> None:
    """PEFT's own merge is wrong where the head has factors, its unmerged model is not."""
    base = towers("gemma3")
    peft_model = case.train(load_model(base, AutoModelForImageTextToText), **TARGETS[kind])
    expected = logits(peft_model)
    merged = case.merge(base, AutoModelForImageTextToText)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=ATOL)


# What the parts of each family were called in training before transformers 4.52, in today's model.
BEFORE_4_52 = {
    "llava": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", "")],
    "gemma3": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", "")],
    "qwen2_vl": [("model.language_model.", "model."), ("lm_head.", "lm_head."), ("model.", "")],
}  # fmt: skip


@pytest.mark.parametrize("published", [True, False], ids=["files as published", "files as in memory"])
@pytest.mark.parametrize("family", BEFORE_4_52)
def test_adapters_from_before_the_towers_were_nested_anew(
    towers: Callable[[str], Path], case: Case, family: str, published: bool
) -> None:
    base = towers(family)
    if not published:
        base = case.folder / "in-memory"
        load_model(towers(family), AutoModelForImageTextToText).save_pretrained(base, save_original_format=False)
    peft_model = case.train(load_model(base, AutoModelForImageTextToText), target_modules="all-linear")
    rename(case.adapter, *BEFORE_4_52[family])
    assert_same_as(case.merge(base, AutoModelForImageTextToText), peft_model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_adapters_of_the_text_model_alone(
    towers: Callable[[str], Path], case: Case, family: str, targets: str | list[str]
) -> None:
    """The names alone would allow the vision tower, whose layers end alike and are as many."""
    base = towers(family)
    whole = load_model(base, AutoModelForImageTextToText)
    text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=torch.float32)
    state = {**{f"model.{name}": tensor for name, tensor in whole.model.language_model.state_dict().items()},
             "lm_head.weight": whole.lm_head.weight}  # fmt: skip
    text.load_state_dict(state)
    peft_model = case.train(text, target_modules=targets)
    merged = case.merge(base, AutoModelForImageTextToText)
    assert torch.allclose(logits(merged), logits(peft_model), rtol=0, atol=ATOL)
    before = load_model(base, AutoModelForImageTextToText).model
    tower = before.vision_tower.state_dict()
    assert same(merged.model.vision_tower.state_dict(), tower) == []


@pytest.mark.parametrize("family", [*TOWERS, "mixtral", "phimoe"])
def test_the_tables_say_what_transformers_says(
    towers: Callable[[str], Path], base_model: BaseMaker, family: str
) -> None:
    """Every module of the model in memory is found in the files where transformers finds it, and back."""
    base = towers(family) if family in TOWERS else base_model(family)
    model = load_model(base, AutoModelForImageTextToText if family in TOWERS else AutoModelForCausalLM)
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    found = {}
    for name in read_weights(base):
        renamed = name
        for each in renamings:
            renamed, _ = each.rename_source_key(renamed)
        if ".experts." not in name:
            found[renamed.rpartition(".")[0]] = name.rpartition(".")[0]
    modules = [
        name for name, module in model.named_modules() if list(module.parameters(recurse=False)) and name in found
    ]
    assert len(modules) > 16
    names = match_names(modules, read_weights(base), model_type=model.config.model_type)
    assert names is not None
    assert {module: names.to_base(module) for module in modules} == {module: found[module] for module in modules}
    assert [names.to_training(found[module]) for module in modules] == modules


RENAMED = (
    "aria", "aya_vision", "fuyu", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3",
    "mllama", "paligemma", "video_llava", "vipllava", "qwen2_vl", "qwen2_5_vl", "emu3", "paddleocr_vl", "mixtral", "minimax", "minimax_m2",
)  # fmt: skip


def renamings_of(model_type: str) -> dict[str, str]:
    """What transformers renames when it loads a family's files: from pattern to replacement."""
    of_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ""), None)
    found = dict(getattr(of_class, "_checkpoint_conversion_mapping", {}))
    for each in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(each, WeightRenaming):
            found[each.source_patterns[0]] = each.target_patterns[0]
    return found


@pytest.mark.parametrize("model_type", RENAMED)
def test_every_family_that_transformers_renames_is_in_the_tables(model_type: str) -> None:
    renamings = renamings_of(model_type)
    assert renamings
    found = {}
    for pattern in renamings:
        plain = re.sub(r"^\^|\(\?.+\)", "", pattern).removesuffix(".weight").strip(".")
        if "image_newline" in plain or "e_score" in plain:
            continue  # parameters without a module, which adapters leave alone
        published = f"model.layers.0.{plain}" if pattern.startswith(".") else plain
        published = published if published.endswith(("embedding", "lm_head", "gate")) else f"{published}.layers.1.x"
        renamed = f"{published}.weight"
        for each, replacement in renamings.items():
            renamed = re.sub(each, replacement, renamed, count=1)
        found[renamed.removesuffix(".weight")] = published
    names = match_names(found, [f"{published}.weight" for published in found.values()], model_type=model_type)
    assert names is not None
    assert {module: names.to_base(module) for module in found} == found


# -- task heads


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_a_head_for_a_task_is_added(base_model: BaseMaker, case: Case, family: str) -> None:
    """Trained with a head that the base does not have: the merged model is a classifier."""
    base = base_model(family)
    model, _ = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, output_loading_info=True)
    peft_model = case.train(model, task_type="SEQ_CLS", target_modules="all-linear")
    merged = case.merge(base, AutoModelForSequenceClassification)
    assert merged.config.num_labels == 3
    assert_same_as(merged, peft_model)


def test_a_head_for_tokens_is_added(base_model: BaseMaker, case: Case) -> None:
    base = base_model("qwen3")
    model, _ = AutoModelForTokenClassification.from_pretrained(base, num_labels=5, output_loading_info=True)
    peft_model = case.train(model, task_type="TOKEN_CLS", target_modules=["q_proj"])
    assert_same_as(case.merge(base, AutoModelForTokenClassification), peft_model)


def test_a_head_on_a_model_that_was_published_without_its_prefix(case: Case) -> None:
    """The encoder's modules are below `bert.` in training and in no module in the files."""
    sizes = {**_TEXT, "max_position_embeddings": 32, "num_key_value_heads": None}
    encoder = AutoModel.from_config(BertConfig(**sizes), dtype=torch.float32)
    randomise(encoder.parameters(), seed=3)
    encoder.save_pretrained(case.folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(case.folder / "base", num_labels=4)
    peft_model = case.train(model, task_type="SEQ_CLS", target_modules=["query", "dense"])
    merged = case.merge(case.folder / "base", AutoModelForSequenceClassification)
    assert merged.config.architectures == ["BertForSequenceClassification"]
    assert_same_as(merged, peft_model)


def test_labels_that_the_configuration_has_stay(base_model: BaseMaker, case: Case) -> None:
    """A classifier's own head is replaced, and nothing else about it changes."""
    labels = {0: "no", 1: "yes"}
    model, _ = AutoModelForSequenceClassification.from_pretrained(
        base_model("llama"), id2label=labels, output_loading_info=True
    )
    model.save_pretrained(case.folder / "classifier")
    loaded = load_model(case.folder / "classifier", AutoModelForSequenceClassification)
    peft_model = case.train(loaded, task_type="SEQ_CLS", target_modules=["v_proj"])
    merged = case.merge(case.folder / "classifier", AutoModelForSequenceClassification)
    assert_same_as(merged, peft_model)
    assert merged.config.id2label == labels


# -- names that nothing explains


def test_one_renamed_module_is_refused_with_both_names(base_model: BaseMaker, case: Case) -> None:
    base = base_model("llama")
    make_adapter(base, case.adapter, lora(target_modules=["q_proj"]))
    rename(case.adapter, ("model.layers.1.self_attn.q_proj.", "model.layers.1.attention.q_proj."))
    finding = case.bench.findings(case.adapter, base)["no_base_tensor"]
    assert not finding.fits
    assert finding.where.startswith("base_model.model.model.layers.1.attention.q_proj.")
    assert finding.found == "nearest is model.layers.1.self_attn.q_proj.weight"


def test_an_adapter_of_another_model_is_refused(base_model: BaseMaker, case: Case) -> None:
    make_adapter(base_model("gpt2"), case.adapter, lora())
    assert "no_base_tensor" in case.bench.findings(case.adapter, base_model("llama"))


def test_an_adapter_of_a_model_with_more_layers_is_refused(base_model: BaseMaker, case: Case) -> None:
    make_adapter(base_model("llama", num_hidden_layers=3), case.adapter, lora())
    assert "no_base_tensor" in case.bench.findings(case.adapter, base_model("llama"))


def test_an_adapter_of_a_model_with_fewer_layers_is_refused(base_model: BaseMaker, case: Case) -> None:
    make_adapter(base_model("llama"), case.adapter, lora(target_modules=["q_proj"]))
    findings = case.bench.findings(case.adapter, base_model("llama", num_hidden_layers=3))
    assert set(findings) == {"target_missed"}
