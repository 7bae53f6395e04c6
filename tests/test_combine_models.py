"""Whole models merged from several adapters by the methods that are not sums, from files to files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from combined import change, recipe
from merging import assert_rounded_once, read_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from registry.locations import open_location
from registry.manifest import Checkpoint
from registry.merge.blocks import Sources
from registry.merge.engine import execute
from registry.merge.journal import Journal
from registry.merge.lowrank import LowRankDelta
from registry.merge.sinks import FolderSink
from registry.merge.sums import Factors
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry
from registry.united import UnitedFolder

WEIGHTS = (0.5, 0.3, 0.7)
LARGE = "model.layers.0.self_attn.q_proj.weight"


def register(ckpt: Registry, folder: Path, base: Path) -> Checkpoint:
    found = ckpt.register(str(folder), Registration(base=str(base), adapter=folder.name))
    return found.registered[0].checkpoint


@pytest.fixture
def adapters(tmp_path: Path, base: Path) -> list[Path]:
    """Three on the same base, the last of them with other targets."""
    targets = (("q_proj", "v_proj"), ("q_proj", "v_proj"), ("q_proj", "down_proj"))
    return [tiny.write_adapter(tmp_path / f"a{i}", base=base, seed=i, targets=each) for i, each in enumerate(targets)]


def task_vectors(adapters: list[Path], name: str, shape: tuple[int, int]) -> list[LowRankDelta]:
    """What each adapter adds to a weight."""
    found, key = [], f"base_model.model.{name.removesuffix('.weight')}"
    for folder in adapters:
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors.get(f"{key}.lora_{side}.weight") for side in "AB")
        terms = [] if a is None or b is None else [Factors(b.double().numpy(), a.double().numpy(), 2.0)]
        found.append(LowRankDelta(shape, terms))
    return found


@pytest.mark.parametrize(
    ("method", "weights", "options"),
    [
        ("ties", WEIGHTS, {"density": 0.3}),
        ("dare_linear", WEIGHTS, {"density": 0.3, "seed": 3}),
        ("della", WEIGHTS, {"density": 0.5, "epsilon": 0.2}),
        ("breadcrumbs_ties", WEIGHTS, {"gamma": 0.1}),
        ("sce", (), {"density": 0.4}),
        ("karcher", WEIGHTS, {}),
    ],
)
def test_every_weight_is_the_combination_rounded_once(
    ckpt: Registry,
    base: Path,
    adapters: list[Path],
    tmp_path: Path,
    method: str,
    weights: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    inputs = [register(ckpt, folder, base) for folder in adapters]
    ckpt.merge(
        ckpt.plan(*inputs, mixture=Mixture(method=method, weights=weights, options=options)), out=str(tmp_path / "out")
    )
    before, after = load_file(base / "model.safetensors"), read_weights(tmp_path / "out")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    step = recipe(method, weights or (1, 1, 1), keys=[each.digest.hex for each in inputs], **options)
    for name in changed:
        vectors = task_vectors(adapters, name, (before[name].shape[0], before[name].shape[1]))
        exact = before[name].double() + change(replace(step, name=name), vectors)
        # A sum of low-rank terms is made from their exact factors; `change` rounds them to float32's precision.
        slack = 2e-6 if method == "karcher" else 0.0
        assert_rounded_once(after[name], exact, exact.abs() * 1e-15 + slack)


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, list[Path]]:
    """One weight of several blocks, and three adapters for it."""
    random = np.random.default_rng(0)
    base = tiny.write_base(tmp_path / "base")
    shape, generator = (1100, 2100), torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {LARGE: torch.randn(shape, generator=generator).bfloat16()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapters = []
    for index in range(3):
        folder = tiny.write_adapter(tmp_path / f"a{index}", base=base, targets=["q_proj"])
        module = f"base_model.model.{LARGE.removesuffix('.weight')}"
        factors = {"A": random.standard_normal((4, shape[1])), "B": random.standard_normal((shape[0], 4)) * 0.1}
        files = {
            f"{module}.lora_{side}.weight": torch.from_numpy(values).bfloat16() for side, values in factors.items()
        }
        save_file(files, folder / "adapter_model.safetensors", {"format": "pt"})
        adapters.append(folder)
    return base, adapters


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce"])
def test_threads_do_not_show(ckpt: Registry, large: tuple[Path, list[Path]], tmp_path: Path, method: str) -> None:
    base, adapters = large
    planned = ckpt.plan(*[register(ckpt, folder, base) for folder in adapters], mixture=Mixture(method=method))
    sources = Sources(
        base=open_location(str(base)), adapter=UnitedFolder([open_location(str(each)) for each in adapters])
    )
    found = []
    for threads in (1, 5):
        out = tmp_path / f"out{threads}"
        with Journal(tmp_path / "journals", planned.plan.recipe.digest, str(out)) as journal:
            execute(
                planned.plan,
                sources,
                FolderSink(out),
                journal,
                provenance=lambda f, r: ("merge.json", b"{}"),
                threads=threads,
            )
            journal.finish()
        found.append(read_weights(out)[LARGE])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], load_file(base / "model.safetensors")[LARGE])
