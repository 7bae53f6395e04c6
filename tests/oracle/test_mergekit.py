"""Combinations compared with the real mergekit, on whole weights in float64, where its definition is also ours.

Where it is not, `registry.merge.combine` says what differs and why; the last tests here show those differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from combined import combined, dense, recipe, task_vectors
from mergekit import sparsify
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from merging import read_weights
from safetensors.torch import load_file
from torch import Tensor

from registry.merge.lowrank import LowRankDelta
from registry.merge.sums import Factors
from registry.merge.weight import Dense
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry

pytestmark = pytest.mark.oracle
SHAPE = (37, 53)
BASE = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WEIGHTS = [0.5, 0.3, 0.7]


def by_mergekit(method: str, deltas: Sequence[LowRankDelta], **parameters: Any) -> Tensor:
    """The merged weight, float64. mergekit is given whole weights."""
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    return merge_tensors([BASE, *(BASE + dense(deltas))], method, parameters=given, base_index=0)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To what float32 coefficients can tell apart."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.fixture
def deltas() -> list[LowRankDelta]:
    return task_vectors(3, SHAPE, alike=0.5)


def test_task_arithmetic_is_the_same(deltas: list[LowRankDelta]) -> None:
    found = combined(recipe("task_arithmetic", WEIGHTS, lambda_=0.8), BASE, deltas)
    assert_same(found, by_mergekit("task_arithmetic", deltas, weight=WEIGHTS, lambda_=0.8))


def test_average_is_its_linear(deltas: list[LowRankDelta]) -> None:
    expected = merge_tensors(list(BASE + dense(deltas)), "linear", parameters={"weight": WEIGHTS})
    assert_same(combined(recipe("average", WEIGHTS), BASE, deltas), expected)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.2, 1.4)])
def test_nuslerp_is_the_same(deltas: list[LowRankDelta], weights: tuple[float, float]) -> None:
    assert_same(
        combined(recipe("nuslerp", weights), BASE, deltas[:2]), by_mergekit("nuslerp", deltas[:2], weight=list(weights))
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_same_on_task_vectors(deltas: list[LowRankDelta], t: float) -> None:
    first, second = dense(deltas[:2])
    expected = merge_tensors([first, second], "slerp", parameters={"t": t}, base_index=0)
    assert_same(combined(recipe("slerp", (1, 1), t=t), BASE, deltas[:2]), BASE + expected)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, 0.3, 0.7), (1, 0, 0)])
def test_multislerp_is_the_same(deltas: list[LowRankDelta], weights: tuple[float, ...]) -> None:
    assert_same(
        combined(recipe("multislerp", weights), BASE, deltas), by_mergekit("multislerp", deltas, weight=list(weights))
    )


def test_karcher_is_the_same_on_task_vectors(deltas: list[LowRankDelta]) -> None:
    expected = merge_tensors(list(dense(deltas)), "karcher", parameters={"max_iter": 100, "tol": 1e-12})
    assert_same(combined(recipe("karcher", (1, 1, 1)), BASE, deltas), BASE + expected)


def test_model_stock_is_the_same_where_inputs_agree(deltas: list[LowRankDelta]) -> None:
    assert_same(combined(recipe("model_stock", (1, 1, 1)), BASE, deltas), by_mergekit("model_stock", deltas))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.999, 1.0])
def test_ties_is_the_same(deltas: list[LowRankDelta], density: float) -> None:
    found = combined(recipe("ties", WEIGHTS, density=density, lambda_=1.5), BASE, deltas)
    assert_same(found, by_mergekit("ties", deltas, weight=WEIGHTS, density=density, lambda_=1.5))


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.3, 0.2), (0.9, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_are_the_same(deltas: list[LowRankDelta], method: str, density: float, gamma: float) -> None:
    found = combined(recipe(method, WEIGHTS, density=density, gamma=gamma), BASE, deltas)
    normalize = method.endswith("ties")
    assert_same(found, by_mergekit(method, deltas, weight=WEIGHTS, density=density, gamma=gamma, normalize=normalize))


@pytest.mark.parametrize("density", [0.0005, 0.2, 0.7, 1.0])
def test_sce_is_the_same_where_deltas_are_large(deltas: list[LowRankDelta], density: float) -> None:
    assert_same(
        combined(recipe("sce", (1, 1, 1), density=density), BASE, deltas),
        by_mergekit("sce", deltas, select_topk=density),
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_1_is_the_same(deltas: list[LowRankDelta], method: str) -> None:
    expected = by_mergekit(method, deltas, weight=WEIGHTS, density=1.0, normalize=method == "dare_ties")
    assert_same(combined(recipe(method, WEIGHTS, density=1.0), BASE, deltas), expected)


def keeping(deltas: Sequence[LowRankDelta], **options: Any) -> list[Tensor]:
    """Which elements dare keeps of each task vector: those of a combination of that one alone."""
    kept = []
    for index, delta in enumerate(deltas):
        zero = LowRankDelta(SHAPE, [])
        alone = [delta if other == index else zero for other in range(len(deltas))]
        kept.append(combined(recipe("dare_linear", (1, 1, 1), **options), torch.zeros(SHAPE), alone) != 0)
    return kept


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_with_our_masks_is_the_same_but_for_the_scale(
    deltas: list[LowRankDelta], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = iter(keeping(deltas, density=0.4, seed=5))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks).to(probabilities.dtype))
    is_mean = method == "dare_ties"
    expected = by_mergekit(method, deltas, weight=WEIGHTS, density=0.4, rescale=False, normalize=is_mean) - BASE
    found = combined(recipe(method, WEIGHTS, density=0.4, seed=5), BASE, deltas) - BASE
    torch.testing.assert_close(found, expected / 0.4, rtol=1e-6, atol=1e-6)


def test_della_keeps_with_the_same_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns and many equal rows: the share that is kept of a column is its probability."""
    row = torch.tensor([[0.3, -2.0, 0.1, 1.0, -0.7]], dtype=torch.float64)
    asked: list[Tensor] = []

    def noting(probabilities: Tensor) -> Tensor:
        asked.append(probabilities)
        return torch.ones_like(probabilities)

    monkeypatch.setattr(torch, "bernoulli", noting)
    sparsify.della_magprune(row, density=0.5, epsilon=0.2)
    rows = 4000
    delta = LowRankDelta((rows, 5), [Factors(np.ones((rows, 1)), row.numpy(), 1.0)])
    found = combined(recipe("della_linear", (1,), density=0.5, epsilon=0.2), torch.zeros((rows, 5)), [delta])
    torch.testing.assert_close((found != 0).double().mean(dim=0), asked[0][0].double(), rtol=0, atol=0.03)
    torch.testing.assert_close(found.mean(dim=0), row[0], rtol=0.07, atol=0)  # divided by what it is kept with


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("linear", {}, ("task_arithmetic", {})),
        ("ties", {"density": 0.3}, ("ties", {"density": 0.3})),
        ("breadcrumbs", {"density": 0.4}, ("breadcrumbs", {"density": 0.4})),
        ("nuslerp", {}, ("nuslerp", {})),
    ],
)
def test_whole_models_are_those_of_mergekit_from_merged_models(
    ckpt: Registry, base: Path, tmp_path: Path, method: str, ours: dict[str, Any], theirs: tuple[str, dict[str, Any]]
) -> None:
    """As its users go about it: merge each adapter into the base, then the models; here into float64, so that nothing is lost on the way."""
    weights = (0.6, 0.9)
    folders = [
        tiny.write_adapter(tmp_path / f"a{seed}", base=base, seed=seed, targets=["q_proj", "down_proj"])
        for seed in (1, 2)
    ]
    inputs = [
        ckpt.register(str(folder), Registration(adapter=folder.name)).registered[0].checkpoint for folder in folders
    ]
    ckpt.merge(
        ckpt.plan(*inputs, mixture=Mixture(method=method, weights=weights, options=ours)), out=str(tmp_path / "out")
    )
    whole_base = {name: tensor.double() for name, tensor in read_weights(base).items()}
    models = [
        {**whole_base, **_adapted(whole_base, load_file(folder / "adapter_model.safetensors"))} for folder in folders
    ]
    parameters = {"weight": list(weights), **theirs[1]}
    expected = merge_state_dicts([whole_base, *models], theirs[0], base=0, parameters=parameters)
    found = read_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-5, msg=name)


def _adapted(base: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in base}
    return {
        name: base[name] + 2 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
        for name, key in keys.items()
        if f"{key}.lora_A.weight" in adapter
    }


def test_mergekit_loses_energies_of_small_deltas_in_sce() -> None:
    small = [
        Dense(BASE + 1e-4 * scale * whole) for scale, whole in zip((1, 3), dense(task_vectors(2, SHAPE)), strict=True)
    ]
    ours = combined(recipe("sce", (1, 1), density=1.0), BASE, small) - BASE
    theirs = merge_tensors([BASE, *(each.rows(0, 37) for each in small)], "sce", base_index=0) - BASE
    energies = [(each.rows(0, 37) - BASE).square().sum() for each in small]
    share = energies[1] / sum(energies)
    agreeing = ((small[0].rows(0, 37) > BASE) == (small[1].rows(0, 37) > BASE)).bool()
    first, second = (each.rows(0, 37) - BASE for each in small)
    torch.testing.assert_close(ours[agreeing], ((1 - share) * first + share * second)[agreeing], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(theirs[agreeing], ((first + second) / 2)[agreeing], rtol=1e-5, atol=1e-12)


def test_mergekit_leaves_the_base_far_behind_where_model_stock_has_no_angle() -> None:
    one, other = dense(task_vectors(2, SHAPE))
    opposed = [Dense(BASE + one), Dense(BASE - 0.95 * one + 0.3 * other)]
    assert torch.equal(combined(recipe("model_stock", (1, 1)), BASE, opposed), BASE)
    theirs = merge_tensors([BASE, *(each.rows(0, 37) for each in opposed)], "model_stock", base_index=0)
    assert float((theirs - BASE).norm() / one.norm()) > 1
