"""Plans: every byte of every output file has exactly one origin, and what is announced is what is written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from factories import NOON, digest
from hypothesis import given
from hypothesis import strategies as st
from merging import Bench
from safetensors.numpy import load_file, save_file

from registry.changes import Change, LowRank, Matrix, Resolution
from registry.errors import InvalidRecipe
from registry.manifest import BaseFile, BaseFormat, BaseModel, Fingerprint, Recipe
from registry.merge.plan import Compute, Copy, Inputs, Plan, make_plan
from registry.tensors import (
    DType,
    SafetensorsHeader,
    StoredTensor,
    TensorSpec,
    layout_safetensors,
    read_safetensors_header,
)
from registry.torchzip import Literal

DATA = Path(__file__).parent / "data/litgpt"
FLOATS = (DType.F64, DType.F32, DType.F16, DType.BF16)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base", shards=3)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.write_adapter(tmp_path / "adapter")


# -- real folders


@pytest.mark.parametrize("dtype", [None, DType.BF16, DType.F64])
def test_what_is_announced_is_what_is_written(
    bench: Bench, adapter: Path, base: Path, tmp_path: Path, dtype: DType | None
) -> None:
    plan = bench.plan(adapter, base, dtype).plan
    out = tmp_path / "merged"
    bench.merge(adapter, base, out, dtype)
    announced = {file.path: file.size_bytes for file in plan.files}
    assert announced == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    expected = {*announced, *(sidecar.path for sidecar in plan.sidecars), "merge.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert (
        plan.bytes_copied + plan.bytes_computed
        == json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )


def test_only_what_the_adapter_touches_is_computed(bench: Bench, adapter: Path, base: Path) -> None:
    plan = bench.plan(adapter, base).plan
    touched = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert sorted(change.target.name for change in plan.computed) == touched
    assert plan.bytes_computed == len(touched) * tiny.WIDTH**2 * 4
    assert plan.bytes_copied == sum(array.nbytes for array in tiny.base_tensors().values()) - plan.bytes_computed


def test_a_conversion_computes_every_float_and_says_so_in_the_configuration(
    bench: Bench, adapter: Path, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", config={"dtype": "float32", "text_config": {"torch_dtype": "float32"}})
    tensors = {**load_file(base / "model.safetensors"), "steps": np.arange(3)}
    save_file(tensors, base / "model.safetensors", {"format": "pt", "by": "us"})
    plan = bench.plan(adapter, base, DType.F16).plan
    assert plan.bytes_copied == 3 * 8
    assert {change.target.dtype for change in plan.computed} == {DType.F16}
    bench.merge(adapter, base, tmp_path / "merged", DType.F16)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {array.dtype.name for name, array in merged.items() if name != "steps"} == {"float16"}
    untouched = tensors["model.embed_tokens.weight"].astype(np.float16)
    assert np.array_equal(merged["model.embed_tokens.weight"], untouched)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config["dtype"], config["text_config"]["torch_dtype"]) == ("float16", "float16")


@pytest.mark.parametrize("dtype", [DType.I8, DType.BOOL, DType.F8_E4M3])
def test_a_conversion_to_no_float_is_refused(bench: Bench, adapter: Path, base: Path, dtype: DType) -> None:
    with pytest.raises(InvalidRecipe):
        bench.plan(adapter, base, dtype)


def test_a_delta_on_weights_that_are_no_floats_is_refused(bench: Bench, adapter: Path, base: Path) -> None:
    for path in base.glob("*.safetensors"):
        save_file({name: array.astype(np.int8) for name, array in load_file(path).items()}, path, {"format": "pt"})
    assert bench.findings(adapter, base).keys() == {"base_quantised"}


def test_a_single_file_gets_the_name_that_libraries_look_for(bench: Bench, adapter: Path, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    assert [file.path for file in bench.plan(adapter, base).plan.files] == ["model.safetensors"]


def origins(plan: Plan) -> dict[str, str]:
    return {sidecar.path: sidecar.origin for sidecar in plan.sidecars}


def test_where_the_small_files_come_from(bench: Bench, adapter: Path, base: Path) -> None:
    for folder, names in {
        base: ["tokenizer.json", "vocab.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE", "modeling.py",
               "generation_config.json", "pytorch_model.bin", "optimizer.pt"],
        adapter: ["tokenizer.json", "tokenizer_config.json", "README.md", "generation_config.json", "training_args.bin"],
    }.items():  # fmt: skip
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
    from_base = {"config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE", "modeling.py"}
    from_adapter = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    expected = {**dict.fromkeys(from_base, "base"), **dict.fromkeys(from_adapter, "adapter")}
    assert origins(bench.plan(adapter, base).plan) == {**expected, "model.safetensors.index.json": "made"}
    (adapter / "chat_template.jinja").write_text("{}")
    templates = {p: o for p, o in origins(bench.plan(adapter, base).plan).items() if "template" in p}
    assert templates == {"chat_template.jinja": "adapter"}


def test_a_template_inside_the_bases_tokenizer_is_not_lost_to_the_adapters(
    bench: Bench, adapter: Path, base: Path
) -> None:
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert "chat_template.jinja" not in origins(bench.plan(adapter, base).plan)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("{}")
    made = {sidecar.path: sidecar.data for sidecar in bench.plan(adapter, base).plan.sidecars if sidecar.data}
    assert made["chat_template.jinja"] == b"{{ messages }}"
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own"}))
    assert "chat_template.jinja" not in origins(bench.plan(adapter, base).plan)


def test_a_litgpt_plan_needs_no_torch_and_keeps_litgpts_files(tmp_path: Path) -> None:
    program = (
        "import sys, tiny, pathlib; from registry.registering import Registration; home, run, base = sys.argv[1:];"
        "ckpt = tiny.open_registry(pathlib.Path(home)); ckpt.register(run, Registration(adapter='bot', base=base));"
        "plan = ckpt.plan(ckpt.resolve('bot')).plan;"
        "print('torch' in sys.modules, *(f.path for f in plan.files), *(s.path + '=' + s.origin for s in plan.sidecars))"
    )
    places = [str(tmp_path), str(DATA / "lora-llama-qv/final"), str(DATA / "base-llama-gqa")]
    done = subprocess.run(
        [sys.executable, "-c", program, *places],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, *found = done.stdout.split()
    assert loaded == "False"
    assert found[0] == "lit_model.pth"
    assert {"model_config.yaml=base", "tokenizer.json=adapter", "prompt_style.yaml=adapter"} < set(found)
    assert not [name for name in found if "hyperparameters" in name]


# -- any model, any changes

names = st.lists(st.from_regex(r"[a-z]{1,3}\.weight", fullmatch=True), min_size=1, max_size=6, unique=True)
shapes = st.one_of(st.just(()), st.tuples(st.integers(0, 5)), st.tuples(st.integers(1, 5), st.integers(1, 1500)))


@st.composite
def models(draw: st.DrawFn, format_: BaseFormat) -> tuple[BaseModel, dict[str, tuple[bytes, SafetensorsHeader]]]:
    """A base model in one to three files, from headers alone."""
    files: dict[str, list[TensorSpec]] = {}
    count = draw(st.integers(1, 3)) if format_ is BaseFormat.SAFETENSORS else 1
    for name in draw(names):
        file = f"part-{draw(st.integers(1, count))}.safetensors" if count > 1 else "lit_model.pth"
        files.setdefault(file, []).append(TensorSpec(name, draw(st.sampled_from((*FLOATS, DType.I64))), draw(shapes)))
    heads, tensors = {}, []
    for file, specs in files.items():
        head, placed = layout_safetensors(specs, draw(st.sampled_from([{}, {"format": "pt"}])), file)
        size = len(head) + sum(spec.size_bytes for spec in specs)
        heads[file] = head, read_safetensors_header(io.BytesIO(head), file, size)
        tensors += placed
    base = BaseModel(
        name="any", url="/any", in_store=False, format=format_, arch_version="", config={"model_type": "any"}, created_at=NOON, author="ada",
        fingerprint=Fingerprint(architecture=digest("a"), weights=digest("w"), tensors={}),
        files=tuple(BaseFile(path=file, size_bytes=1, identity="1") for file in files), tensors=tuple(tensors),
    )  # fmt: skip
    return base, heads


@st.composite
def changes(draw: st.DrawFn, base: BaseModel) -> list[Change]:
    """Deltas, replacements, replacements with other shapes, and tensors that the base does not have."""
    made = []
    for tensor in base.tensors:
        kind, spec = draw(st.sampled_from(["none", "delta", "replace", "grow", "add"])), tensor.spec
        stored = StoredTensor(TensorSpec("x", DType.F32, spec.shape), "adapter", 0)
        if kind == "none" or not spec.dtype.is_mergeable:
            continue
        if kind == "delta" and len(spec.shape) == 2:
            a = StoredTensor(TensorSpec("a", DType.F32, (2, spec.shape[1])), "adapter", 0)
            b = StoredTensor(TensorSpec("b", DType.F32, (spec.shape[0], 2)), "adapter", 0)
            delta = LowRank(left=Matrix.of(b), right=Matrix.of(a), scale=1.0)
            made.append(Change(target=spec, source=tensor, steps=(delta,)))
        elif kind == "grow" and spec.shape:
            shape = (spec.shape[0] + 3, *spec.shape[1:])
            made.append(Change(target=TensorSpec(spec.name, spec.dtype, shape), source=tensor, replacement=stored))
        elif kind == "add":
            target = TensorSpec(f"new.{spec.name}", spec.dtype, spec.shape)
            made.append(Change(target=target, source=tensor, replacement=stored))
        else:
            made.append(Change(target=spec, source=tensor, replacement=stored))
    return made


@st.composite
def inputs(draw: st.DrawFn, format_: BaseFormat) -> Inputs:
    base, heads = draw(models(format_))
    dtype = draw(st.sampled_from([None, *FLOATS]))
    return Inputs(
        recipe=Recipe(base=base.digest, inputs=(), dtype=dtype),
        base=base,
        resolution=Resolution(changes=tuple(draw(changes(base))), findings=()),
        adapter_files=(),
        heads=heads,
    )


def expected_specs(given_: Inputs) -> dict[str, TensorSpec]:
    """What the result must hold: the base's tensors, changed ones as their changes say, all floats in the recipe's dtype."""
    specs = {tensor.spec.name: tensor.spec for tensor in given_.base.tensors}
    specs |= {change.target.name: change.target for change in given_.resolution.changes}
    dtype = given_.recipe.dtype
    return {
        name: TensorSpec(name, dtype if dtype and spec.dtype.is_mergeable else spec.dtype, spec.shape)
        for name, spec in specs.items()
    }


def spec_of(segment: Copy | Compute) -> TensorSpec:
    return segment.target


def check_segments(given_: Inputs, plan: Plan) -> None:
    specs = [spec_of(s) for file in plan.files for s in file.segments if isinstance(s, (Copy, Compute))]
    expected = expected_specs(given_)
    assert sorted(spec.name for spec in specs) == sorted(expected)
    assert {spec.name: spec for spec in specs} == expected
    assert plan.bytes_copied + plan.bytes_computed == sum(spec.size_bytes for spec in specs)
    for file in plan.files:
        assert file.size_bytes == sum(segment.size_bytes for segment in file.segments)
        for segment in file.segments:
            if isinstance(segment, Compute):
                check_grid(segment)


def check_grid(segment: Compute) -> None:
    """The blocks are whole rows, follow each other, and together are the tensor."""
    at = 0
    for first, last in segment.blocks():
        assert first == at < last
        at = last
    assert at * segment.change.shape[1] == segment.target.elements


@given(inputs(BaseFormat.SAFETENSORS))
def test_a_safetensors_plan_has_no_gap(given_: Inputs) -> None:
    plan = make_plan(given_)
    check_segments(given_, plan)
    for file in plan.files:
        head, *rest = file.segments
        assert isinstance(head, Literal)
        header = read_safetensors_header(io.BytesIO(head.data), file.path, file.size_bytes)
        assert header.metadata["format"] == "pt"
        in_order = [spec_of(segment) for segment in rest if isinstance(segment, (Copy, Compute))]
        assert sorted(t.spec.name for t in header.tensors) == sorted(spec.name for spec in in_order)
        places = {tensor.spec.name: tensor for tensor in header.tensors}
        at = head.size_bytes
        for spec in in_order:
            assert (places[spec.name].spec, places[spec.name].offset_bytes) == (spec, at)
            at += spec.size_bytes
    check_index(plan)


def check_index(plan: Plan) -> None:
    sidecars: Mapping[str, Any] = {sidecar.path: sidecar.data for sidecar in plan.sidecars}
    assert ("model.safetensors.index.json" in sidecars) == (len(plan.files) > 1)
    if len(plan.files) > 1:
        index = json.loads(sidecars["model.safetensors.index.json"])
        assert index["metadata"]["total_size"] == plan.bytes_copied + plan.bytes_computed
        assert index["weight_map"] == {
            spec_of(s).name: file.path for file in plan.files for s in file.segments if isinstance(s, (Copy, Compute))
        }


@given(inputs(BaseFormat.LITGPT))
def test_a_litgpt_plan_has_no_gap(given_: Inputs) -> None:
    plan = make_plan(given_)
    check_segments(given_, plan)
    (file,) = plan.files
    assert file.layout is not None
    places = {tensor.spec.name: tensor for tensor in file.layout.tensors}
    at = 0
    for segment in file.segments:
        if isinstance(segment, (Copy, Compute)):
            assert (places[spec_of(segment).name].spec, places[spec_of(segment).name].offset_bytes) == (spec_of(segment), at)  # fmt: skip
        at += segment.size_bytes
