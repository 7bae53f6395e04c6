"""litgpt's outputs as its commands leave them (see data/litgpt): what is read from them, and what is refused for merging."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from merging import Bench
from torch import Tensor

from registry.changes import Change
from registry.errors import CorruptFile, NotACheckpoint
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


def edit(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Set tensors of the LoRA file; None takes one away."""
    path = folder / "lit_model.pth.lora"
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


def test_full_weights_are_a_base_and_no_adapter(bench: Bench) -> None:
    with pytest.raises(NotACheckpoint):
        bench.registry.register(str(LLAMA))


# -- what is recorded but not merged


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("adapter-llama", LLAMA),
        ("adapter-llama-handtrained", LLAMA),
        ("adapter_v2-llama", LLAMA),
        ("adapter_v2-neox", NEOX),
        ("legacy-adapter-llama", LEGACY),
        ("legacy-adapter_v2-llama", LEGACY),
    ],
)
def test_other_adapters_are_recorded_and_not_merged(bench: Bench, name: str, base: Path) -> None:
    (finding,) = bench.findings(DATA / name / "final", base).values()
    assert (finding.code, finding.fits) == ("method_not_mergeable", True)
    assert finding.found == ("adapter_v2" if "v2" in name else "adapter")
    assert "litgpt generate_adapter" in finding.advice


@pytest.mark.parametrize("name", ["adapter-llama", "adapter_v2-llama", "lora-llama-qv"])
def test_an_adapter_of_another_architecture_is_refused(bench: Bench, name: str) -> None:
    assert "config_differs" in refused(bench, DATA / name / "final", NEOX)


# -- layouts


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("legacy-lora-llama-qv", LLAMA),
        ("legacy-lora-llama-qkv", LLAMA),
        ("lora-llama-qv", LEGACY),
        ("lora-llama-all-bf16", LEGACY),
        ("legacy-adapter_v2-llama", LLAMA),
        ("adapter_v2-llama", LEGACY),
    ],
)
def test_the_two_row_orders_are_not_mixed(bench: Bench, name: str, base: Path) -> None:
    assert "no_base_tensor" in refused(bench, DATA / name / "final", base)


def rows(change: Change) -> list[tuple[int, int]]:
    return [(delta.row, delta.row + delta.b.count) for delta in change.deltas]


def test_the_rows_that_each_layout_changes(bench: Bench) -> None:
    """6 query heads of 8 rows in two groups: [q k v] stacked; or three query heads, a key and a value head, twice."""
    stacked = bench.plan(DATA / "lora-llama-qv/final", LLAMA).plan.computed[0]
    assert rows(stacked) == [(0, 48), (64, 80)]
    by_group = bench.plan(DATA / "legacy-lora-llama-qv/final", LEGACY).plan.computed[0]
    assert rows(by_group) == [(0, 24), (40, 64), (32, 40), (72, 80)]
    as_trained = bench.plan(DATA / "legacy-lora-llama-qkv/final", LEGACY).plan.computed[0]
    assert rows(as_trained) == [(0, 48), (48, 64), (64, 80)]


def test_a_peft_base_is_no_litgpt_base(bench: Bench, tmp_path: Path) -> None:
    import tiny

    assert refused(bench, DATA / "lora-llama-qv/final", tiny.write_base(tmp_path / "hf")) == {"layout_differs"}


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
