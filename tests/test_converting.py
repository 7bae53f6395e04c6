"""Conversions between layouts: what is moved where, refused and recorded, and that nothing half-done or unlike its source is left."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from merging import Bench, read_weights, same
from safetensors.torch import load_file, save_file

from registry.base_models import open_base
from registry.converting import Counterpart, Side, verify
from registry.errors import BaseChanged, Conflict, InvalidInput, NotConvertible, Refused, UnknownCheckpoint
from registry.formats.base_model import read_base
from registry.formats.litgpt_names import correspondence, rearrange
from registry.locations import open_location
from registry.lora_files import alpha_for, brief_names
from registry.manifest import BaseFormat, Checkpoint
from registry.rearranged import RearrangedModel
from registry.rearranging import Conversion, Wanted, convert_model, find_model
from registry.registering import Registration
from registry.tensors import DType, StoredTensor, TensorSpec

DATA = Path(__file__).parent / "data/litgpt"
BASE, RUN = DATA / "base-llama-gqa", DATA / "lora-llama-qv/final"
HF, LITGPT = BaseFormat.SAFETENSORS, BaseFormat.LITGPT


def convert(bench: Bench, subject: str | Path, layout: BaseFormat, out: Path | None = None, **more: Any) -> Conversion:
    return bench.registry.convert(str(subject), Wanted(layout=layout, out=out, **more))


def left_in(bench: Bench, folder: Path) -> set[str]:
    """What lies in a folder, besides the registry, and in the registry's own place for what it makes."""
    making = bench.registry.settings.home / "making"
    return {path.name for path in folder.iterdir() if path.name != "registry"} | {
        path.name for path in (making.iterdir() if making.exists() else ())
    }


# -- names


FAMILIES = [
    "Llama-x",
    "Gemma-2-x",
    "phi-x",
    "Phi-3-x",
    "Qwen2.5-x",
    "Qwen3-x",
    "falcon-7b-x",
    "falcon-40b-x",
    "pythia-x",
    "Mixtral-x",
]


@given(
    name=st.sampled_from(FAMILIES), groups=st.integers(1, 4), per_group=st.integers(1, 4), size=st.integers(1, 5),
    experts=st.integers(0, 3), legacy=st.booleans(),
)  # fmt: skip
def test_every_row_has_one_place_in_either_layout(
    name: str, groups: int, per_group: int, size: int, experts: int, legacy: bool
) -> None:
    kinds = {
        "pythia-x": "GptNeoxMLP",
        "falcon-7b-x": "GptNeoxMLP",
        "falcon-40b-x": "GptNeoxMLP",
        "Mixtral-x": "LLaMAMoE",
    }
    config = {
        "name": name, "mlp_class_name": kinds.get(name, "LLaMAMLP"), "n_layer": 2, "n_head": groups * per_group, "n_query_groups": groups,
        "head_size": size, "n_embd": 6, "intermediate_size": 7, "padded_vocab_size": 9, "n_expert": experts,
    }  # fmt: skip
    table = correspondence(config, legacy=legacy)
    for module, start in (("source", "source_row"), ("target", "target_row")):
        rows = Counter(
            (getattr(each, module), row)
            for each in table
            for row in range(getattr(each, start), getattr(each, start) + each.count)
        )
        assert set(rows.values()) == {1}
        heights = Counter(name for name, _ in rows)
        assert all((name, row) in rows for name, height in heights.items() for row in range(height))


def test_a_family_without_such_a_layout_has_no_table() -> None:
    config = {"name": "OLMo-2-x", "n_head": 2, "n_embd": 4, "n_layer": 1}
    assert correspondence(config) == ()


def test_what_has_no_place_is_told() -> None:
    with closing(open_location(str(BASE))) as location:
        head = read_base(location)
    table = correspondence(head.config)
    first, *rest = head.tensors
    stranger = replace(first, spec=replace(first.spec, name="transformer.extra.weight"))
    small = replace(first, spec=replace(first.spec, name="transformer.ln_f.weight"))
    found = rearrange([stranger, small, *(tensor for tensor in rest if "h.0.norm_1" not in tensor.spec.name)], table)
    assert found.strangers == ("transformer.extra.weight",)
    assert found.problems == ("transformer.ln_f.weight: 48 rows expected, shape [304, 48] found",)


def test_a_part_that_is_missing_is_told() -> None:
    tensors = tiny.base_tensors()
    config = {"name": "Llama", "mlp_class_name": "LLaMAMLP", **tiny.LITGPT_CONFIG}
    back = [rows.flipped for rows in correspondence(config)]
    specs = {name: array.shape for name, array in tensors.items() if "layers.1.self_attn.k_proj" not in name}
    stored = [StoredTensor(TensorSpec(name, DType.F32, shape), "x", 0) for name, shape in specs.items()]
    assert rearrange(stored, back).problems == ("transformer.h.1.attn.qkv.weight: a part of it is missing",)


# -- models


def test_a_model_in_shards_reads_as_in_one_file(tmp_path: Path, bench: Bench) -> None:
    convert(bench, BASE, HF, tmp_path / "one")
    (tmp_path / "many").mkdir()
    with closing(open_location(str(BASE))) as location:
        head = read_base(location)
        model = RearrangedModel(location, rearrange(head.tensors, correspondence(head.config)).tensors)
        told: list[int] = []
        model.write_safetensors(tmp_path / "many", told.append, shard_bytes=50_000)
    shutil.copy(tmp_path / "one/config.json", tmp_path / "many")
    assert sum(told) == sum(tensor.spec.size_bytes for tensor in head.tensors)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    with closing(open_location(str(tmp_path / "many"))) as location:
        assert {tensor.spec.name for tensor in read_base(location).tensors} == set(read_weights(tmp_path / "one"))
    assert same(read_weights(tmp_path / "many"), read_weights(tmp_path / "one")) == []


def test_a_model_is_recorded_under_its_name_and_known_weights_keep_theirs(tmp_path: Path, bench: Bench) -> None:
    base = bench.registry.add_base(str(BASE), name="litgpt").base
    there = convert(bench, "litgpt", HF, tmp_path / "hf", name="team/hf")
    assert there.base is not None
    assert (there.base.name, there.base.url) == ("team/hf", str(tmp_path / "hf"))
    back = convert(bench, "team/hf", LITGPT, tmp_path / "back", name="again")
    assert back.base == base
    assert bench.registry.base("litgpt").url == str(BASE)


def test_a_result_unlike_its_source_is_not_published(tmp_path: Path, bench: Bench) -> None:
    """The digests are those of what was registered; bytes that changed since come back as other ones."""
    workspace = bench.registry._workspace
    model = find_model(workspace, str(BASE))
    name = "transformer.h.1.attn.qkv.weight"
    digests = {**model.digests, name: model.digests["lm_head.weight"]}
    with pytest.raises(NotConvertible) as refusal:
        convert_model(workspace, replace(model, digests=digests), Wanted(layout=HF, out=tmp_path / "out"))
    assert refusal.value.reasons == (f"{name} did not come back the same",)
    assert left_in(bench, tmp_path) == set()


def test_a_base_that_changed_is_not_converted(tmp_path: Path, bench: Bench) -> None:
    base = shutil.copytree(BASE, tmp_path / "base")
    bench.registry.add_base(str(base), name="moved")
    weights = torch.load(base / "lit_model.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, base / "lit_model.pth")
    with pytest.raises(BaseChanged):
        convert(bench, "moved", HF, tmp_path / "out")
    assert left_in(bench, tmp_path) == {"base"}


def litgpt_copy(folder: Path, *, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """The base model with more tensors, or another configuration."""
    copy = Path(shutil.copytree(BASE, folder))
    weights = torch.load(copy / "lit_model.pth", weights_only=True)
    torch.save(
        {**weights, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}, copy / "lit_model.pth"
    )
    fields = yaml.safe_load((copy / "model_config.yaml").read_text())
    (copy / "model_config.yaml").write_text(yaml.safe_dump({**fields, **(config or {})}))
    return copy


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor that nobody knows": ({"transformer__extra__weight": torch.ones(3)}, "transformer.extra.weight: no such tensor"),
    "a bias on the head": ({"lm_head__bias": torch.ones(304)}, "biases on head, where llama has them on nothing"),
    "biases on the queries alone": (
        {f"transformer__h__{layer}__attn__qkv__bias": torch.ones(80) for layer in range(4)}, "biases on qkv, where llama has them on nothing",
    ),
    "a family that is not known": ({"config": {"name": "Gemma-2-x"}}, "no config.json can be made for 'Gemma-2-x'"),
    "an option that is not known": ({"config": {"scale_embeddings": True}}, "scale_embeddings=True is not known here"),
    "other sizes than it says": ({"config": {"n_head": 4}}, "transformer.h.0.attn.qkv.weight: 64 rows expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_have_no_other_layout(tmp_path: Path, bench: Bench, case: str) -> None:
    changes, reason = REFUSED[case]
    source = litgpt_copy(tmp_path / "source", **changes)
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, source, HF, tmp_path / "out")
    assert refusal.value.reasons[0].startswith(reason)
    assert left_in(bench, tmp_path) == {"source"}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"model_type": "bert"}, "no model_config.yaml can be made for model_type 'bert'"),
        ({}, "config.json has no max_position_embeddings"),
        ({"max_position_embeddings": 32, "hidden_act": "relu"}, "hidden_act='relu'"),
        ({"max_position_embeddings": 32, "attention_bias": True}, "litgpt has biases on attention and MLP both"),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"max_position_embeddings": 32, "attention_bias": True, "mlp_bias": True}, "biases on nothing, where"),
    ],
)
def test_models_that_litgpt_cannot_run(tmp_path: Path, bench: Bench, facts: dict[str, Any], reason: str) -> None:
    source = tiny.write_base(tmp_path / "source", config=facts)
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, source, LITGPT, tmp_path / "out")
    assert reason in refusal.value.reasons[0]
    assert left_in(bench, tmp_path) == {"source"}


def test_a_configuration_beside_the_weights_must_be_theirs(tmp_path: Path, bench: Bench) -> None:
    convert(bench, BASE, HF, tmp_path / "hf")
    source = litgpt_copy(tmp_path / "source")
    good = json.loads((tmp_path / "hf/config.json").read_text())
    tiny.write_json(source / "config.json", {**good, "rms_norm_eps": 1e-6})
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, source, HF, tmp_path / "out")
    assert refusal.value.reasons == ("config.json says norm_eps=1e-06, 1e-05 is right: give another one with --config",)
    convert(bench, source, HF, tmp_path / "out", config=tmp_path / "hf/config.json")
    assert json.loads((tmp_path / "out/config.json").read_text()) == good


def test_where_it_goes_must_be_said_and_free(tmp_path: Path, bench: Bench) -> None:
    with pytest.raises(InvalidInput, match="say where to"):
        convert(bench, BASE, HF)
    with pytest.raises(InvalidInput, match="written to a folder"):
        convert(bench, BASE, HF, name="hf")
    with pytest.raises(NotConvertible, match="it is one already"):
        convert(bench, BASE, LITGPT, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(Conflict):
        convert(bench, BASE, HF, tmp_path / "full")
    bench.register(RUN, BASE)
    with pytest.raises(UnknownCheckpoint):
        convert(bench, "tried@v9", HF, tmp_path / "out")
    assert left_in(bench, tmp_path) == {"full"}


# -- adapters


@pytest.fixture
def litgpt_run(bench: Bench) -> Checkpoint:
    return bench.register(RUN, BASE)


def test_a_converted_adapter_is_registered_with_its_lineage(
    tmp_path: Path, bench: Bench, litgpt_run: Checkpoint
) -> None:
    convert(bench, BASE, HF, tmp_path / "hf", name="hf")
    found = convert(bench, litgpt_run.ref, HF, name="team/peft")
    assert found.registered is not None
    made = found.registered.checkpoint
    assert (made.ref, made.base_name, made.step) == ("team/peft@v1", "hf", litgpt_run.step)
    assert made.origin is not None
    assert (made.origin.action, made.origin.parents) == ("convert", (litgpt_run.ref,))
    assert made.origin.detail == {"to": "peft", "exact": True}
    assert made.metrics == litgpt_run.metrics
    assert left_in(bench, tmp_path) == {"hf"}


def test_without_its_base_model_there_it_can_be_written_but_not_registered(
    tmp_path: Path, bench: Bench, litgpt_run: Checkpoint
) -> None:
    with pytest.raises(NotConvertible, match="is not registered in that layout"):
        convert(bench, litgpt_run.ref, HF, tmp_path / "out", name="peft")
    assert left_in(bench, tmp_path) == set()
    found = convert(bench, litgpt_run.ref, HF, tmp_path / "out")
    assert (found.exact, found.registered) == (True, None)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (RUN / "tokenizer.json").read_bytes()


def test_a_base_model_that_is_named_must_be_the_same(tmp_path: Path, bench: Bench, litgpt_run: Checkpoint) -> None:
    convert(bench, BASE, HF, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"
    save_file({**weights, name: weights[name] * 2}, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, litgpt_run.ref, HF, tmp_path / "out", base=str(tmp_path / "hf"))
    assert refusal.value.reasons == (f"hf is another model: {name}",)
    assert left_in(bench, tmp_path) == {"hf"}


def test_an_adapter_that_gives_other_weights_is_refused(tmp_path: Path, bench: Bench, litgpt_run: Checkpoint) -> None:
    """Two rows of a B in each other's place: names, shapes and norms are right, the merged weights are not."""
    workspace = bench.registry._workspace
    convert(bench, litgpt_run.ref, HF, tmp_path / "out")
    examined = bench.registry._examine(litgpt_run)
    side = Side(
        base=examined.base, model=open_base(workspace, examined.base), adapter=workspace.folder_of(litgpt_run),
        resolution=examined.resolution,
    )  # fmt: skip
    other = Counterpart.find(workspace, side, Wanted(layout=HF, out=tmp_path), lambda what, done, total: None)
    compared, difference = verify(side, other, tmp_path / "out", "a PEFT adapter", exact=True, label="bot")
    assert compared == 15360
    assert difference < 1e-12
    file = tmp_path / "out/adapter_model.safetensors"
    factors = load_file(file)
    name = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
    factors[name] = factors[name][[1, 0, *range(2, len(factors[name]))]].clone()
    save_file(factors, file, {"format": "pt"})
    with pytest.raises(NotConvertible) as refusal:
        verify(side, other, tmp_path / "out", "a PEFT adapter", exact=True, label="bot")
    assert refusal.value.reasons == ("model.layers.3.self_attn.v_proj: merging gives other weights",)


def test_what_litgpt_cannot_say_is_refused(tmp_path: Path, bench: Bench) -> None:
    base = tiny.write_base(tmp_path / "base", config={"max_position_embeddings": 32, "num_key_value_heads": 4})
    adapter = tiny.write_adapter(tmp_path / "saved", base=base, config={"modules_to_save": ["norm"]})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.ones(tiny.WIDTH)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (found,) = bench.registry.register(str(adapter), Registration(base=str(base), adapter="bot")).registered
    with pytest.raises(NotConvertible) as refusal:
        convert(bench, found.checkpoint.ref, LITGPT, tmp_path / "out")
    assert refusal.value.reasons == ("model.norm.weight: values that replace the base's are no LoRA",)
    assert left_in(bench, tmp_path) == {"base", "saved"}


def test_what_cannot_be_merged_is_not_converted(tmp_path: Path, bench: Bench) -> None:
    checkpoint = bench.register(DATA / "adapter-llama/final", BASE)
    with pytest.raises(Refused):
        convert(bench, checkpoint.ref, HF, tmp_path / "out")
    assert left_in(bench, tmp_path) == set()


# -- the files


@given(scale=st.floats(1e-6, 1e6), rank=st.integers(1, 512))
def test_alpha_gives_the_scale_again(scale: float, rank: int) -> None:
    assert alpha_for(scale, rank) / rank == pytest.approx(scale, rel=2.0**-52)


@given(alpha=st.integers(1, 4096), rank=st.integers(1, 512), times=st.integers(1, 4))
def test_a_whole_alpha_stays_whole(alpha: int, rank: int, times: int) -> None:
    found = alpha_for(alpha / rank, times * rank)
    assert (found, type(found)) == (times * alpha, int)


def test_names_are_brief_where_that_is_clear() -> None:
    everywhere = [f"model.layers.{layer}.{module}" for layer in range(2) for module in ("attn.q", "attn.k", "mlp.k")]
    wanted = ["model.layers.0.attn.q", "model.layers.1.attn.q", "model.layers.0.attn.k"]
    assert brief_names(wanted, everywhere) == ["q", "model.layers.0.attn.k"]
