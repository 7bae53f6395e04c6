"""Combinations compared with PEFT's `add_weighted_adapter`, where it combines dense matrices: "cat", "svd" and the forms "…_svd".

Those that combine A's and B's apart are no combinations of what the adapters do, and have no counterpart here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from combined import change, recipe
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from registry.merge.combine import Combination
from registry.merge.lowrank import LowRankDelta, approximated, stacked, truncated
from registry.merge.sums import Factors

pytestmark = pytest.mark.oracle
D_OUT, D_IN, RANKS = 24, 40, (3, 4, 2)


class Layers(nn.Module):
    """One layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Bench:
    """A model with three adapters in PEFT, and the same as task vectors."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = None
        for index, rank in enumerate(RANKS):
            config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=["layer"], init_lora_weights=False)
            if self.model is None:
                self.model = get_peft_model(Layers(), config, adapter_name="0")
            else:
                self.model.add_adapter(str(index), config)
        self.layer = self.model.base_model.model.layer
        self.deltas = [self._task_vector(str(index)) for index in range(len(RANKS))]

    def _task_vector(self, name: str) -> LowRankDelta:
        left, right = (each[name].weight.detach().double().numpy() for each in (self.layer.lora_B, self.layer.lora_A))
        return LowRankDelta((D_OUT, D_IN), [Factors(left, right, self.layer.scaling[name])])

    def by_peft(self, kind: str, weights: Sequence[float], **options: Any) -> Tensor:
        """The delta of PEFT's combined adapter."""
        names = [str(index) for index in range(len(RANKS))]
        self.model.add_weighted_adapter(names, list(weights), "combined", combination_type=kind, **options)
        delta: Tensor = self.layer.get_delta_weight("combined").detach().double()
        return delta


@pytest.fixture
def bench() -> Bench:
    return Bench()


def product(factors: Factors) -> Tensor:
    return torch.from_numpy(factors.left @ factors.right * factors.scale)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_stacked_factors_are_its_cat(bench: Bench) -> None:
    weights = (0.5, -0.3, 1.2)
    found = stacked(bench.deltas, weights)
    assert found.left.shape == (D_OUT, sum(RANKS))
    expected = bench.by_peft("cat", weights)
    assert_close(product(found), expected)
    assert_close(change(recipe("linear", weights), bench.deltas), expected)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_truncated_factors_are_its_svd(bench: Bench, rank: int) -> None:
    weights = (0.5, -0.3, 1.2)
    found = truncated(stacked(bench.deltas, weights), rank)
    assert_close(product(found.factors), bench.by_peft("svd", weights, svd_rank=rank))


@pytest.mark.parametrize(("method", "kind"), [("ties", "ties_svd"), ("magnitude", "magnitude_prune_svd")])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_trimmed_dense_deltas_are_its_svd_forms(bench: Bench, method: str, kind: str, density: float) -> None:
    """With weights of 1, where its mean over counts is ours over weights; at full rank, where its SVD loses nothing."""
    expected = bench.by_peft(kind, (1, 1, 1), density=density, svd_rank=D_OUT)
    assert_close(change(recipe(method, (1, 1, 1), density=density), bench.deltas), expected)


@pytest.mark.parametrize(("method", "kind"), [("dare_linear", "dare_linear_svd"), ("dare_ties", "dare_ties_svd")])
def test_dare_with_our_masks_is_its_svd_form(
    bench: Bench, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = LowRankDelta((D_OUT, D_IN), [])
    kept = []
    for index, delta in enumerate(bench.deltas):
        alone = [delta if other == index else zero for other in range(3)]
        kept.append(change(recipe("dare_linear", (1, 1, 1), density=0.6, seed=3), alone) != 0)
    masks = iter(kept)
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks).to(probabilities.dtype))
    expected = bench.by_peft(kind, (1, 1, 1), density=0.6, svd_rank=D_OUT)
    assert_close(change(recipe(method, (1, 1, 1), density=0.6, seed=3), bench.deltas), expected)


def test_a_dense_combination_is_cut_to_a_rank_like_its_svd_form(bench: Bench) -> None:
    expected = bench.by_peft("ties_svd", (1, 1, 1), density=0.3, svd_rank=8)
    combination = Combination(recipe("ties", (1, 1, 1), density=0.3), bench.deltas)
    assert_close(product(approximated(combination, 8, "layer").factors), expected)
