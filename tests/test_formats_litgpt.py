"""litgpt's outputs as its commands leave them (see data/litgpt): what is read from them, what they change, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from merging import Bench
from torch import Tensor

from registry.changes import Change, LowRank
from registry.errors import CorruptFile, InvalidInput, Refused
from registry.manifest import Checkpoint, Level
from registry.registering import Registration

DATA = Path(__file__).parent / "data/litgpt"
LLAMA, NEOX, LEGACY = (DATA / name for name in ("base-llama-gqa", "base-neox-mha", "legacy-base-llama-gqa"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a LoRA run on query and value, to be spoilt; its base is beside it."""
    shutil.copytree(LLAMA, tmp_path / LLAMA.name)
    return Path(shutil.copytree(DATA / "lora-llama-qv", tmp_path / "lora-llama-qv"))


def refused(bench: Bench, adapter: Path, base: Path) -> set[str]:
    return {code for code, finding in bench.findings(adapter, base).items() if finding.level is Level.REFUSED}


def configure(folder: Path, **fields: object) -> None:
    """Change fields of hyperparameters.yaml; None takes one away."""
    path = folder / "hyperparameters.yaml"
    known = {**yaml.safe_load(path.read_text()), **fields}
    path.write_text(yaml.safe_dump({key: value for key, value in known.items() if value is not None}))


def edit(folder: Path, change: Mapping[str, Tensor | None]) -> None:
    """Set tensors of the adapter's file; None takes one away."""
    (path,) = folder.glob("lit_model.pth.*")
    tensors = {**torch.load(path, weights_only=True)["model"], **change}
    torch.save({"model": {name: tensor for name, tensor in tensors.items() if tensor is not None}}, path)


# -- reading


def described(checkpoint: Checkpoint) -> tuple[object, ...]:
    manifest = checkpoint.manifest
    return manifest.method, checkpoint.step, manifest.rank, manifest.alpha, manifest.targets, manifest.dtype


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora-llama-qv", ("lora", 8, 4, 8.0, ("query", "value"), "float32")),
        ("lora-neox-qkv-mlp", ("lora", 5, 2, 16.0, ("query", "key", "value", "projection", "mlp"), "float32")),
        ("legacy-lora-llama-qkv", ("lora", 5, 4, 8.0, ("query", "key", "value"), "float32")),
        ("adapter-llama", ("adapter", 8, None, None, (), "float32")),
        ("adapter_v2-llama", ("adapter_v2", 8, None, None, (), "float32")),
        ("adapter_v2-neox", ("adapter_v2", 5, None, None, (), "float32")),
        ("legacy-adapter-llama", ("adapter", 5, None, None, (), "float32")),
        ("legacy-adapter_v2-llama", ("adapter_v2", 5, None, None, (), "float32")),
    ],
)
def test_the_files_know_everything(bench: Bench, name: str, expected: tuple[object, ...]) -> None:
    final = bench.registry.register(str(DATA / name)).registered[-1].checkpoint
    assert described(final) == expected
    assert {metric.name: metric.split for metric in final.metrics} == {
        "loss": "train",
        "val_loss": "val",
        "val_ppl": "val",
    }
    assert (final.run, str(final.adapter)) == (name, name)


def test_metrics_belong_to_their_step(bench: Bench) -> None:
    """The log counts iterations, two for each optimizer step; the last validation has step 0 in it."""
    first, last = (each.checkpoint for each in bench.registry.register(str(DATA / "lora-llama-qv")).registered)
    assert (first.step, last.step) == (3, 8)
    assert {m.name: round(m.value, 3) for m in first.metrics} == {"loss": 5.936, "val_loss": 5.695, "val_ppl": 297.372}
    assert {m.name: round(m.value, 3) for m in last.metrics} == {"loss": 5.381, "val_loss": 5.398, "val_ppl": 220.908}


def test_a_hand_written_loop_leaves_no_hyperparameters(bench: Bench) -> None:
    said = Registration(base=str(LLAMA))
    (found,) = bench.registry.register(str(DATA / "adapter-llama-handtrained"), said).registered
    assert described(found.checkpoint) == ("adapter", None, None, None, (), "float32")
    assert found.checkpoint.metrics == ()


# -- what cannot be merged, or only in part


@pytest.mark.parametrize(
    ("name", "base"), [("adapter-llama", LLAMA), ("adapter-llama-handtrained", LLAMA), ("legacy-adapter-llama", LEGACY)]
)
def test_an_adapter_v1_is_recorded_and_not_merged(bench: Bench, name: str, base: Path) -> None:
    """Not even in part: without its prefix nothing is left."""
    (finding,) = bench.findings(DATA / name / "final", base).values()
    assert (finding.code, finding.fits, finding.found) == ("method_not_mergeable", True, "adapter")
    assert "litgpt generate_adapter" in finding.advice
    with pytest.raises(Refused):
        bench.registry.plan(bench.register(DATA / name / "final", base), allow_lossy=True)


@pytest.mark.parametrize(
    ("name", "base", "layers"),
    [("adapter_v2-llama", LLAMA, {2, 3}), ("adapter_v2-neox", NEOX, {2}), ("legacy-adapter_v2-llama", LEGACY, {2, 3})],
)
def test_what_the_prefix_of_an_adapter_v2_adds_is_measured(
    bench: Bench, name: str, base: Path, layers: set[int]
) -> None:
    (finding,) = bench.findings(DATA / name / "final", base).values()
    assert (finding.code, finding.level, finding.fits) == ("gated_prefix", Level.REFUSED, True)
    assert {int(layer) for layer in re.findall(r"% in layer (\d)", finding.found)} == layers


def test_without_reading_its_gates_an_adapter_v2_is_only_doubted(bench: Bench) -> None:
    checkpoint = bench.register(DATA / "adapter_v2-llama/final", LLAMA)
    report = bench.registry.details(checkpoint).report
    assert report is not None
    doubts = [finding for finding in report.findings if finding.level is not Level.PASS]
    assert [(doubt.code, doubt.level) for doubt in doubts] == [("gated_prefix", Level.WARNING)]
    assert "ckpt check" in doubts[0].advice


@pytest.mark.parametrize("name", ["adapter-llama", "adapter_v2-llama", "lora-llama-qv"])
def test_an_adapter_of_another_architecture_is_refused(bench: Bench, name: str) -> None:
    assert "config_differs" in refused(bench, DATA / name / "final", NEOX)


# -- layouts


@pytest.mark.parametrize(("name", "base"), [("legacy-adapter_v2-llama", LLAMA), ("adapter_v2-llama", LEGACY)])
def test_an_adapter_v2_of_the_other_row_order_is_refused(bench: Bench, name: str, base: Path) -> None:
    findings = bench.findings(DATA / name / "final", base)
    assert findings.keys() == {"no_base_tensor", "target_missed"}
    assert all("row order" in finding.advice for finding in findings.values())


def rows(change: Change) -> list[tuple[int, int, int]]:
    """First row of the weight and one past the last, and the row of B that the first is made of, for each delta."""
    deltas = [step for step in change.steps if isinstance(step, LowRank)]
    return [(step.row, step.row + step.left.rows, step.left.offset // step.left.columns) for step in deltas]


def test_the_rows_that_each_layout_changes(bench: Bench) -> None:
    """6 query heads of 8 rows in two groups: [q k v] stacked; or three query heads, a key and a value head, twice."""
    stacked = bench.plan(DATA / "lora-llama-qv/final", LLAMA).plan.computed[0]
    assert rows(stacked) == [(0, 48, 0), (64, 80, 48)]
    by_group = bench.plan(DATA / "legacy-lora-llama-qv/final", LEGACY).plan.computed[0]
    assert rows(by_group) == [(0, 24, 0), (40, 64, 24), (32, 40, 48), (72, 80, 56)]
    as_trained = bench.plan(DATA / "legacy-lora-llama-qkv/final", LEGACY).plan.computed[0]
    assert rows(as_trained) == [(0, 48, 0), (48, 64, 48), (64, 80, 64)]


def test_rows_that_were_stacked_onto_interleaved_ones_are_found_again_in_todays_order(bench: Bench) -> None:
    """As trained, row block 3 was added to the key head of the first group, which is row block 6 today."""
    regrouped = bench.plan(DATA / "legacy-lora-llama-qkv/final", LLAMA).plan.computed[0]
    blocks = {at // 8: row // 8 for at, _, row in rows(regrouped)}
    assert blocks == {0: 0, 1: 1, 2: 2, 6: 3, 8: 4, 3: 5, 4: 6, 5: 7, 7: 8, 9: 9}


def test_parts_of_a_file_from_when_the_row_order_changed_are_refused(bench: Bench, tmp_path: Path) -> None:
    run = Path(shutil.copytree(DATA / "legacy-lora-llama-qv/final", tmp_path / "old"))
    (run / "lit_model.pth.lora").rename(run / "lit_model_lora_finetuned.pth")
    findings = bench.findings(run, LEGACY)
    assert findings.keys() == {"row_order_unknown"}
    assert "2024-02-05" in findings["row_order_unknown"].advice


def test_one_file_has_one_row_order(bench: Bench, run: Path) -> None:
    other = "transformer.h.0.attn.attn"
    edit(run / "final", {f"{other}.lora_A": torch.ones(8, 48), f"{other}.lora_B": torch.ones(64, 4)})
    assert refused(bench, run / "final", LLAMA) == {"name_collision"}


def test_a_peft_base_is_no_litgpt_base(bench: Bench, tmp_path: Path) -> None:
    import tiny

    assert refused(bench, DATA / "lora-llama-qv/final", tiny.write_base(tmp_path / "hf")) == {"layout_differs"}


def test_a_model_that_litgpt_cannot_train_adapters_for_is_refused(bench: Bench, run: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(LLAMA, tmp_path / "experts"))
    config = yaml.safe_load((base / "model_config.yaml").read_text())
    (base / "model_config.yaml").write_text(yaml.safe_dump({**config, "n_shared_expert": 2}))
    assert refused(bench, run / "final", base) == {"model_not_supported"}


# -- spoilt files

QKV = "transformer.h.0.attn.qkv"


def test_a_missing_layer_is_refused(bench: Bench, run: Path) -> None:
    edit(run / "final", {f"{QKV}.lora_A": None, f"{QKV}.lora_B": None})
    assert refused(bench, run / "final", LLAMA) == {"target_missed"}


def test_a_missing_factor_is_refused(bench: Bench, run: Path) -> None:
    edit(run / "final", {f"{QKV}.lora_B": None})
    assert refused(bench, run / "final", LLAMA) == {"missing_factor"}


@pytest.mark.parametrize("name", ["transformer.h.9.attn.qkv", "transformer.h.0.attn.other"])
def test_an_extra_module_is_refused(bench: Bench, run: Path, name: str) -> None:
    edit(run / "final", {f"{name}.lora_A": torch.ones(8, 48), f"{name}.lora_B": torch.ones(64, 4)})
    assert refused(bench, run / "final", LLAMA) == {"no_base_tensor"}


def test_factors_of_a_module_whose_flag_is_off_are_refused(bench: Bench, run: Path) -> None:
    edit(run / "final", {"lm_head.lora_A": torch.ones(4, 48), "lm_head.lora_B": torch.ones(304, 4)})
    assert refused(bench, run / "final", LLAMA) == {"unused_tensor"}


def test_another_kind_of_tensor_is_refused(bench: Bench, run: Path) -> None:
    edit(run / "final", {f"{QKV}.weight": torch.ones(80, 48)})
    assert refused(bench, run / "final", LLAMA) == {"unused_tensor"}


@pytest.mark.parametrize("shape", [(0,), (8,), (8, 48, 1), (9, 48), (8, 47)])
def test_factors_of_another_shape_are_refused(bench: Bench, run: Path, shape: tuple[int, ...]) -> None:
    edit(run / "final", {f"{QKV}.lora_A": torch.ones(shape)})
    assert refused(bench, run / "final", LLAMA) == {"shape_mismatch"}


@pytest.mark.parametrize("flags", [{"lora_key": True}, {"lora_query": False}, {"lora_projection": True}])
def test_flags_that_are_not_this_runs_are_refused(bench: Bench, run: Path, flags: dict[str, bool]) -> None:
    configure(run / "final", **flags)
    assert refused(bench, run / "final", LLAMA) & {"shape_mismatch", "target_missed"}


def test_a_rank_that_is_not_this_runs_is_refused(bench: Bench, run: Path) -> None:
    """As when a run was started from Python: litgpt then records its defaults."""
    configure(run / "final", lora_r=8, lora_alpha=16)
    assert refused(bench, run / "final", LLAMA) == {"rank_mismatch"}


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha", "lora_value"])
def test_without_its_hyperparameters_nothing_is_guessed(bench: Bench, run: Path, key: str) -> None:
    configure(run / "final", **{key: None})
    assert "hyperparameters_missing" in refused(bench, run / "final", LLAMA)


def test_values_that_are_not_finite_are_refused(bench: Bench, run: Path) -> None:
    edit(run / "final", {f"{QKV}.lora_A": torch.full((8, 48), float("nan"))})
    assert refused(bench, run / "final", LLAMA) == {"not_finite"}


def test_a_file_cut_short_is_corrupt(bench: Bench, run: Path) -> None:
    path = run / "final/lit_model.pth.lora"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFile):
        bench.registry.register(str(run / "final"), Registration(base=str(LLAMA)))


# -- adapters v1 and v2, spoilt

PREFIX = "transformer.h.{}.attn.{}"


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """A copy of an Adapter v2 whose gates are zero, so that it can be merged."""
    folder = Path(shutil.copytree(DATA / "adapter_v2-llama/final", tmp_path / "folded"))
    edit(folder, {PREFIX.format(layer, "gating_factor"): torch.zeros(1, 1, 6, 1) for layer in (2, 3)})
    return folder


def test_closed_gates_leave_nothing_out(bench: Bench, folded: Path) -> None:
    assert bench.findings(folded, LLAMA) == {}
    edit(
        folded, {PREFIX.format(layer, "gating_factor"): torch.full((1, 6, 1, 1), -0.0) for layer in (2, 3)}
    )  # as until 2023-08
    assert bench.findings(folded, LLAMA) == {}


def test_an_adapter_v1_with_closed_gates_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "adapter-llama/final", tmp_path / "closed"))
    edit(folder, {PREFIX.format(layer, "gating_factor"): torch.zeros(1, 1, 6, 1) for layer in (2, 3)})
    assert refused(bench, folder, LLAMA) == {"nothing_to_merge"}


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.adapter_scale", "lm_head.adapter_bias", f"{QKV}.adapter_scale", "transformer.h.3.mlp.proj.adapter_bias",
        "transformer.ln_f.weight", "transformer.h.1.norm_2.weight", PREFIX.format(2, "gating_factor"),
        PREFIX.format(3, "adapter_wte.weight"),
    ],
)  # fmt: skip
def test_an_incomplete_adapter_v2_is_refused(bench: Bench, folded: Path, name: str) -> None:
    edit(folded, {name: None})
    assert refused(bench, folded, LLAMA) == {"target_missed"}


@pytest.mark.parametrize(
    "name",
    ["lm_head.adapter_scale", f"{QKV}.adapter_bias", "transformer.ln_f.weight", PREFIX.format(2, "gating_factor"),
     PREFIX.format(2, "adapter_wte.weight")],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (7,), (1, 7), (1, 1, 7, 1)])
def test_tensors_of_an_adapter_v2_of_another_shape_are_refused(
    bench: Bench, folded: Path, name: str, shape: tuple[int, ...]
) -> None:
    edit(folded, {name: torch.ones(shape)})
    assert refused(bench, folded, LLAMA) == {"shape_mismatch"}


@pytest.mark.parametrize(
    "name",
    [f"{QKV}.weight", "transformer.wte.weight", "transformer.h.0.attn.norm_q.weight", "transformer.h.9.attn.proj.adapter_scale",
     PREFIX.format(7, "gating_factor")],
)  # fmt: skip
def test_tensors_that_an_adapter_v2_does_not_have_are_refused(bench: Bench, folded: Path, name: str) -> None:
    edit(folded, {name: torch.ones(48)})
    assert refused(bench, folded, LLAMA) == {"no_base_tensor"}


# -- whole models


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    """What `litgpt finetune_full` leaves: wrapped weights; at a step with the optimizer's, whose tensors are the larger part."""
    weights = torch.load(NEOX / "lit_model.pth", weights_only=True)
    for number, name in enumerate(("step-000003", "step-000010", "final")):
        folder = Path(shutil.copytree(NEOX, tmp_path / "support" / name))
        model = {key: value + number for key, value in weights.items()}
        moments = {index: {"exp_avg": value} for index, value in enumerate(model.values())}
        rest = (
            {}
            if name == "final"
            else {"optimizer": {"state": moments, "param_groups": []}, "iter_num": 6, "step_count": 3}
        )
        torch.save({"model": model, **rest}, folder / "lit_model.pth")
    return tmp_path / "support"


def test_a_run_of_full_fine_tunes_is_recorded_as_base_models(bench: Bench, full_run: Path) -> None:
    intake = bench.registry.register(str(full_run))
    assert intake.registered == ()
    names = ["support-step-000003", "support-step-000010", "support"]
    assert [(each.base.name, each.created) for each in intake.models] == [(name, True) for name in names]
    assert {each.base.parameters for each in intake.models} == {bench.registry.add_base(str(NEOX)).base.parameters}
    again = bench.registry.register(str(full_run))
    assert [(each.base.name, each.created) for each in again.models] == [(name, False) for name in names]


@pytest.mark.parametrize("place", ["final", "final/lit_model.pth"])
def test_one_of_them_can_be_named(bench: Bench, full_run: Path, place: str) -> None:
    (added,) = bench.registry.register(str(full_run / place), Registration(adapter="team/support")).models
    assert (added.base.name, added.base.url) == ("team/support", str(full_run / "final"))


def test_a_whole_model_cut_short_does_not_keep_the_others_out(bench: Bench, full_run: Path) -> None:
    path = full_run / "step-000010/lit_model.pth"
    path.write_bytes(path.read_bytes()[:-100])
    intake = bench.registry.register(str(full_run))
    assert [each.base.name for each in intake.models] == ["support-step-000003", "support"]
    assert [error.path for error in intake.unreadable] == [str(path)]


@pytest.mark.parametrize(
    "said",
    [Registration(base="tiny"), Registration(note="good"), Registration(step=3), Registration(tags={"a": "b"}), Registration(adapter="one")],
)  # fmt: skip
def test_what_a_base_model_has_no_place_for_is_refused(bench: Bench, full_run: Path, said: Registration) -> None:
    with pytest.raises(InvalidInput):
        bench.registry.register(str(full_run), said)
    assert bench.registry.bases() == []


# -- memory

MEASURED = """
import resource, sys
from pathlib import Path
import registry.merge.engine
sys.path.insert(0, "tests")
from merging import Bench
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
home, before = Path(sys.argv[1]), peak()
Bench(home).merge(home / "adapter", home / "base", home / "out")
print(peak() - before)
"""


def test_a_merge_of_a_large_file_holds_but_a_few_blocks_of_it(tmp_path: Path) -> None:
    """A model of 100 MB, every matrix of which is changed, biases are added to, and a fold has as many rows as any."""
    sizes = {"n_embd": 256, "n_layer": 1, "n_head": 4, "n_query_groups": 4, "head_size": 64, "intermediate_size": 64}
    config = {**sizes, "padded_vocab_size": 50_000, "bias": False, "lm_head_bias": False}
    block, random = "transformer.h.0", torch.Generator().manual_seed(1)
    shapes = {
        "lm_head": (50_000, 256),
        f"{block}.attn.qkv": (768, 256),
        f"{block}.attn.proj": (256, 256),
        f"{block}.mlp.fc": (64, 256),
    }
    weights = {f"{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    weights["transformer.wte.weight"] = torch.randn(50_000, 256, generator=random)
    parts = {
        f"{name}.adapter_{kind}": torch.ones(shape[0]) * 2
        for name, shape in shapes.items()
        for kind in ("scale", "bias")
    }
    for name, file, tensors in (("base", "lit_model.pth", weights), ("adapter", "lit_model.pth.adapter_v2", parts)):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / file)
        (tmp_path / name / "model_config.yaml").write_text(yaml.safe_dump(config))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], cwd=root, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "out/lit_model.pth").stat().st_size > 100e6
    assert int(done.stdout) < 64 << 10  # KiB
