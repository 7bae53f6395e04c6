"""Combining task vectors: what holds for every method, and each method against its definition written out on dense matrices."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import final

import numpy as np
import pytest
import torch
from combined import change, combined, dense, inputs_of, recipe, task_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from registry.changes import Combined
from registry.merge.combine import coefficients, combine
from registry.merge.lowrank import LowRankDelta
from registry.merge.methods import METHODS
from registry.merge.randomness import random_bits
from registry.merge.sums import Factors
from registry.merge.weight import Dense, whole

SIZES = (0, 1, 2, 99, 100, 101)
DENSE = [name for name, method in METHODS.items() if not method.is_exact]
ELECTING = ["ties", "dare_ties", "della", "breadcrumbs_ties"]
ADDING = ["magnitude", "dare_linear", "della_linear", "breadcrumbs"]
FROM_GRAM = ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"]
every_method = pytest.mark.parametrize("method", METHODS)


def ones(method: str) -> list[float]:
    return [1.0] * inputs_of(method)


def assert_close(found: Tensor, expected: Tensor, digits: float = 1e-6) -> None:
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=digits * size + 1e-300)


# What holds for every method


@pytest.fixture(scope="module")
def wide() -> list[LowRankDelta]:
    """Task vectors of several tiles, also for passes, one of them with few different magnitudes."""
    shape = (11, 70_000)
    steps = np.random.default_rng(5).integers(-2, 3, (2, shape[1])).astype(np.float64)
    coarse = LowRankDelta(shape, [Factors(np.ones((shape[0], 2)), steps, 1.0)])
    return [*task_vectors(2, shape), coarse]


@every_method
def test_bits_depend_neither_on_the_grid_nor_on_threads_nor_on_order(method: str, wide: list[LowRankDelta]) -> None:
    step = recipe(method, ones(method))
    base = Dense(torch.randn(wide[0].shape, generator=torch.Generator().manual_seed(2)))
    parts = [
        combine(recipe("linear", (1,)), base, [delta]) for delta in wide[-1:]
    ]  # one that is not known to be low-rank
    inputs = [*wide[: inputs_of(method) - 1], *parts]
    expected = whole(combine(step, base, inputs))
    together = combine(step, base, inputs)
    blocks = [(first, min(first + 3, 11)) for first in range(0, 11, 3)]
    random.Random(method).shuffle(blocks)
    with ThreadPoolExecutor(4) as pool:
        for (first, last), rows in zip(blocks, pool.map(lambda block: together.rows(*block), blocks), strict=True):
            assert torch.equal(rows, expected[first:last])


@every_method
def test_any_size_will_do(method: str) -> None:
    for shape in [(n, m) for n in SIZES for m in SIZES if 1 in (n, m) or n == m or 0 in (n, m)]:
        found = change(recipe(method, ones(method)), task_vectors(inputs_of(method), shape))
        assert found.shape == shape
        assert found.isfinite().all()


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if name not in ("interpolate", "ema", "slerp")]
)
def test_inputs_may_change_places(method: str) -> None:
    deltas, weights, keys = task_vectors(3, (20, 30)), [1.0, 1.0, 1.0], ["a", "b", "c"]
    if METHODS[method].is_weighted:
        weights = [0.5, 0.2, 0.8]
    count = inputs_of(method)
    found = change(recipe(method, weights[:count], keys=keys[:count]), deltas[:count])
    turned = [list(reversed(each[:count])) for each in (deltas, weights, keys)]
    assert_close(change(recipe(method, turned[1], keys=turned[2]), turned[0]), found, 1e-7)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.is_weighted])
def test_all_weight_on_one_input_is_that_input(method: str) -> None:
    deltas = task_vectors(inputs_of(method), (20, 30))
    weights = [1.0] + [0.0] * (len(deltas) - 1)
    options = {} if METHODS[method].is_exact else {"density": 1.0}
    assert_close(change(recipe(method, weights, **options), deltas), whole(deltas[0]), 1e-12)


@pytest.mark.parametrize("method", ["interpolate", "slerp"])
@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_a_way_are_its_inputs(method: str, end: int) -> None:
    deltas = task_vectors(2, (20, 30))
    assert_close(change(recipe(method, (1, 1), t=end), deltas), whole(deltas[end]), 1e-12)


@every_method
def test_weights_that_are_not_low_rank_combine_alike(method: str) -> None:
    deltas = task_vectors(inputs_of(method), (20, 30), alike=0.3)
    base = torch.randn((20, 30), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    step = recipe(method, ones(method))
    parts = [Dense(base + values) for values in dense(deltas)]
    assert_close(combined(step, base, parts), combined(step, base, deltas))
    mixed = [deltas[0], *parts[1:]]
    assert_close(combined(step, base, mixed), combined(step, base, deltas))


@every_method
def test_inputs_that_leave_a_weight_as_it_is_leave_it_so_together(method: str) -> None:
    base = Dense(torch.randn((20, 30), generator=torch.Generator().manual_seed(4)))
    parts = [base, LowRankDelta((20, 30), []), base][: inputs_of(method)]
    assert torch.equal(whole(combine(recipe(method, ones(method)), base, parts)), whole(base))


@every_method
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_result(method: str, value: float) -> None:
    deltas = task_vectors(inputs_of(method), (20, 30))
    (term,) = deltas[0].terms
    left = term.left.copy()
    left[3, 1] = value
    deltas[0] = LowRankDelta((20, 30), [replace(term, left=left)])
    assert not change(recipe(method, ones(method)), deltas)[3].isfinite().all()


@final
class Uneven:
    """A weight whose last bits depend on how many rows one asks for, as those of matrix products do."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    def rows(self, first: int, last: int) -> Tensor:
        return self._values[first:last] * (1 + 2.0**-50 * (last - first))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "karcher"])
def test_bits_do_not_depend_on_the_grid_where_those_of_an_input_do(method: str) -> None:
    deltas = task_vectors(3, (400, 900))
    base = torch.randn((400, 900), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = [Uneven(base + values) for values in dense(deltas)]
    step = recipe(method, (1, 1, 1))
    assert torch.equal(combined(step, base, parts, rows=37), combined(step, base, parts))


@final
class Watched:
    """A weight that notes how many rows at most were asked for at once."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.most = shape, 0

    def rows(self, first: int, last: int) -> Tensor:
        self.most = max(self.most, last - first)
        return torch.linspace(-first - 1, last, self.shape[1], dtype=torch.float64).repeat(last - first, 1)


@every_method
def test_never_holds_more_than_a_few_rows_of_an_input(method: str) -> None:
    inputs = [Watched((40, 50_000)) for _ in range(inputs_of(method))]
    combine(recipe(method, ones(method)), Watched((40, 50_000)), inputs).rows(0, 2)
    assert all(1 <= each.most <= 5 for each in inputs)


# Coefficients


@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.floats(-3, 3),
)
def test_linear_is_linear(one: list[float], other: list[float], factor: float) -> None:
    deltas = task_vectors(3, (6, 7))
    together = change(recipe("linear", [a + factor * b for a, b in zip(one, other, strict=True)]), deltas)
    apart = change(recipe("linear", one), deltas) + factor * change(recipe("linear", other), deltas)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.is_exact])
def test_the_coefficients_are_told(method: str) -> None:
    deltas = task_vectors(inputs_of(method), (20, 30), alike=0.5)
    step = recipe(method, ones(method))
    found = coefficients(step, Dense(torch.zeros((20, 30))), deltas)
    assert found is not None
    expected = sum(c * whole(delta) for c, delta in zip(found, deltas, strict=True))
    torch.testing.assert_close(change(step, deltas), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", DENSE)
def test_dense_methods_have_no_coefficients(method: str) -> None:
    assert coefficients(recipe(method, ones(method)), Dense(torch.zeros((2, 3))), task_vectors(3, (2, 3))) is None


@pytest.mark.parametrize("method", FROM_GRAM)
def test_coefficients_are_float32_so_that_no_order_of_summation_shows(method: str) -> None:
    deltas = task_vectors(inputs_of(method), (20, 30), alike=0.5)
    base = torch.zeros((20, 30), dtype=torch.float64)
    step = recipe(method, ones(method))
    from_factors = coefficients(step, Dense(base), deltas)
    streamed = coefficients(step, Dense(base), [Dense(values) for values in dense(deltas)])
    assert from_factors == pytest.approx(streamed, rel=1e-6)
    assert torch.tensor(from_factors).tolist() == list(from_factors or ())


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_on_the_sphere_equal_lengths_stay_the_length(method: str, scale: float) -> None:
    """Also where they are as small as deltas may be: no constant is added to a norm."""
    deltas = [LowRankDelta((20, 30), [self_scaled(delta, scale)]) for delta in task_vectors(2, (20, 30))]
    found = change(recipe(method, (1, 1)), deltas)
    assert float(found.norm()) == pytest.approx(scale, rel=1e-6)
    one, other = (float((found * whole(delta)).sum()) / scale**2 for delta in deltas)
    assert one == pytest.approx(other, rel=1e-5)  # half-way


def self_scaled(delta: LowRankDelta, length: float) -> Factors:
    (term,) = delta.terms
    return replace(term, scale=term.scale * length / float(whole(delta).norm()))


@pytest.mark.parametrize("method", FROM_GRAM)
def test_the_same_input_twice_is_that_input(method: str) -> None:
    (delta,) = task_vectors(1, (20, 30))
    assert_close(change(recipe(method, (1, 1)), [delta, delta]), whole(delta), 1e-6)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_opposite_inputs_give_something_finite(method: str) -> None:
    (delta,) = task_vectors(1, (20, 30))
    (term,) = delta.terms
    opposite = LowRankDelta((20, 30), [replace(term, scale=-term.scale)])
    found = change(recipe(method, (1, 1)), [delta, opposite])
    assert float(found.norm()) <= float(whole(delta).norm()) * (1 + 1e-6)


@pytest.mark.parametrize(("lengths", "expected"), [((1, -2), 1.5), ((1, 3, -0.5), 1.5), ((-1, -0.3, 2.6), -1.3)])
def test_karcher_is_not_moved_by_an_input_in_the_opposite_direction(
    lengths: tuple[float, ...], expected: float
) -> None:
    (delta,) = task_vectors(1, (20, 30))
    (term,) = delta.terms
    deltas = [LowRankDelta((20, 30), [replace(term, scale=length * term.scale)]) for length in lengths]
    assert_close(change(recipe("karcher", [1] * len(lengths)), deltas), expected * whole(delta))


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_a_way_to_an_input_that_leaves_the_weight_is_straight(method: str) -> None:
    (delta,) = task_vectors(1, (20, 30))
    found = change(recipe(method, (1, 1)), [delta, LowRankDelta((20, 30), [])])
    assert_close(found, whole(delta) / 2, 1e-12)


def test_karcher_is_where_the_weighted_pulls_cancel_out() -> None:
    deltas, weights = task_vectors(3, (20, 30)), (0.5, 0.2, 0.3)
    found = change(recipe("karcher", weights), deltas).flatten()
    point = found / found.norm()
    pull = torch.zeros_like(point)
    for weight, delta in zip(weights, dense(deltas), strict=True):
        unit = delta.flatten() / delta.norm()
        angle = torch.arccos(point @ unit)
        pull += weight * angle / torch.sin(angle) * (unit - (point @ unit) * point)
    assert float(pull.norm()) < 1e-6
    assert float(found.norm()) == pytest.approx(
        sum(w * float(d.norm()) for w, d in zip(weights, dense(deltas), strict=True)), rel=1e-6
    )


@pytest.mark.parametrize("cosine", [0.9, 0.3, 0.0, -0.3])
def test_model_stock_goes_as_far_as_the_inputs_agree(cosine: float) -> None:
    """For three inputs at equal angles: `t = 3 c / (1 + 2 c)`, and nowhere where they do not agree."""
    gram = np.full((3, 3), cosine) + (1 - cosine) * np.eye(3)
    directions = np.linalg.cholesky(gram) if cosine > -0.5 else np.eye(3)
    deltas = [LowRankDelta((3, 3), [Factors(np.ones((1, 1)), row[None], 1.0)]) for row in directions]
    expected = dense(deltas).mean(dim=0) * max(0.0, 3 * cosine / (1 + 2 * cosine))
    torch.testing.assert_close(change(recipe("model_stock", (1, 1, 1)), deltas), expected, rtol=0, atol=1e-6)


# Dense methods


def elected_mean(tasks: Tensor, weights: list[float]) -> Tensor:
    """The definition, element by element."""
    weighted = tasks * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = weighted * sign > 0
    sizes = torch.tensor(weights, dtype=torch.float64).abs().view(-1, 1, 1) * agrees
    divisor = sizes.sum(dim=0)
    return (weighted * agrees).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)


def weighted_sum(tasks: Tensor, weights: list[float]) -> Tensor:
    return (tasks * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)).sum(dim=0)


def fused(method: str) -> Callable[[Tensor, list[float]], Tensor]:
    return elected_mean if method in ELECTING else weighted_sum


WEIGHTS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)
SHAPES = st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES))


@settings(max_examples=40)
@given(st.sampled_from([*ADDING, *ELECTING]), SHAPES, WEIGHTS, st.floats(-2, 2))
def test_at_density_1_only_the_fusing_is_left(
    method: str, shape: tuple[int, int], weights: list[float], scale: float
) -> None:
    deltas = task_vectors(3, shape)
    expected = scale * fused(method)(dense(deltas), weights)
    assert_close(change(recipe(method, weights, density=1.0, lambda_=scale), deltas), expected, 1e-12)


def kept_by_rank(values: Tensor, least: int, most: int) -> Tensor:
    """A matrix without the elements that are smaller than the one of rank `least` or larger than that of rank `most`."""
    magnitudes = values.float().abs()
    ordered = magnitudes.flatten().sort().values
    return torch.where((magnitudes >= ordered[least]) & (magnitudes <= ordered[most]), values, 0.0)


@settings(max_examples=40)
@given(
    st.sampled_from(["magnitude", "ties", "breadcrumbs", "breadcrumbs_ties"]),
    SHAPES,
    st.sampled_from((0.001, 0.3, 0.57, 0.99)),
    WEIGHTS,
)
def test_keeps_the_elements_of_the_right_ranks(
    method: str, shape: tuple[int, int], density: float, weights: list[float]
) -> None:
    deltas = task_vectors(3, shape)
    count = shape[0] * shape[1]
    kept = max(1, int(Fraction(str(density)) * count))
    dropped = int(Fraction("0.2") * count) if method.startswith("breadcrumbs") else 0
    least = max(0, count - kept - dropped)
    tasks = dense(deltas)
    if count:
        tasks = torch.stack([kept_by_rank(task, least, least + kept - 1) for task in tasks])
    options = {"gamma": 0.2} if method.startswith("breadcrumbs") else {}
    assert_close(
        change(recipe(method, weights, density=density, **options), deltas), fused(method)(tasks, weights), 1e-12
    )


@pytest.mark.parametrize(("density", "kept"), [(0.57, 57), (0.001, 1), (0.999, 99)])
def test_keeps_as_many_as_were_asked_for_rounded_down_but_one(density: float, kept: int) -> None:
    (delta,) = task_vectors(1, (10, 10))
    assert int((change(recipe("magnitude", (1,), density=density), [delta]) != 0).sum()) == kept


def test_equal_magnitudes_are_kept_together_wherever_they_are() -> None:
    row = np.array([[3.0, -1.0, 2.0, 1.0, -2.0, 1.0]])
    delta = LowRankDelta((4, 6), [Factors(np.ones((4, 1)), row, 1.0)])
    found = change(recipe("magnitude", (1,), density=0.4), [delta])  # 9 of 24; the ninth is one of eight 2s
    assert found.tolist() == [[3, 0, 2, 0, -2, 0]] * 4


def drawn(step: Combined, index: int, shape: tuple[int, int]) -> Tensor:
    """The numbers from 0 to 1 that belong to an input's elements."""
    key = f"{step.options['seed']}\0{step.parts[index].key}\0{step.name}"
    return torch.from_numpy(random_bits(key, 0, shape[0] * shape[1]).astype(np.float64)).view(shape) / 2**32


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("shape", [(1, 7), (100, 99), (3, 70_001)])
def test_dare_keeps_elements_by_their_own_random_number(method: str, shape: tuple[int, int]) -> None:
    deltas, weights = task_vectors(2, shape), [0.5, 0.75]
    step = recipe(method, weights, density=0.3, seed=7)
    tasks = torch.stack(
        [torch.where(drawn(step, i, shape) < 0.3, whole(delta), 0.0) / 0.3 for i, delta in enumerate(deltas)]
    )
    assert_close(change(step, deltas), fused(method)(tasks, weights), 1e-12)


@pytest.mark.parametrize("method", ["della_linear", "della"])
@pytest.mark.parametrize("shape", [(5, 1), (40, 30), (3, 70_001)])
def test_della_keeps_large_elements_of_a_row_more_often(method: str, shape: tuple[int, int]) -> None:
    deltas, weights = task_vectors(2, shape), [0.5, 0.75]
    step = recipe(method, weights, density=0.4, epsilon=0.2, seed=7)
    tasks = []
    for index, delta in enumerate(deltas):
        values = whole(delta)
        ranks = np.argsort(np.argsort(values.float().abs().numpy(), axis=1, kind="stable"), axis=1, kind="stable")
        kept = (
            torch.from_numpy(0.2 + 0.4 * ranks / max(1, shape[1] - 1))
            if shape[1] > 1
            else torch.full(shape, 0.4, dtype=torch.float64)
        )
        tasks.append(torch.where(drawn(step, index, shape) < kept, values, 0.0) / kept)
    assert_close(change(step, deltas), fused(method)(torch.stack(tasks), weights), 1e-12)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_masks_keep_the_expected_value(method: str) -> None:
    delta = LowRankDelta((200, 500), [Factors(np.ones((200, 1)), np.linspace(1, 2, 500)[None], 1.0)])
    found = change(recipe(method, (1,), density=0.4), [delta])
    assert float((found != 0).double().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.5, rel=0.02)


def test_another_seed_adapter_or_tensor_has_another_mask() -> None:
    (delta,) = task_vectors(1, (20, 30))
    step = recipe("dare_linear", (1,), keys=["adapter"])
    masks = [
        change(each, [delta]) != 0
        for each in (
            step,
            recipe("dare_linear", (1,), keys=["adapter"], seed=1),
            recipe("dare_linear", (1,), keys=["other"]),
            replace(step, name="layers.1.weight"),
        )
    ]
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])
    assert torch.equal(masks[0], change(step, [delta]) != 0)


def selected(tasks: Tensor, density: float) -> Tensor:
    """SCE's definition on dense matrices."""
    if not tasks.numel():
        return tasks[0]
    variance = tasks.var(dim=0, correction=0)
    count = int(Fraction(str(density)) * int((variance > 0).sum()))
    chosen = torch.zeros(variance.numel(), dtype=torch.bool)
    chosen[variance.flatten().argsort(descending=True)[:count]] = True
    kept = tasks * chosen.view(variance.shape)
    energies = kept.square().flatten(1).sum(dim=1)
    shares = energies / energies.sum() if energies.sum() else torch.ones(len(tasks)).double()
    agrees = kept * torch.where(kept.sum(dim=0) >= 0, 1.0, -1.0) > 0
    divisor = (shares.view(-1, 1, 1) * agrees).sum(dim=0)
    return (shares.view(-1, 1, 1) * kept * agrees).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)


@settings(max_examples=40)
@given(SHAPES, st.sampled_from((0.0001, 0.3, 0.57, 1.0)), st.sampled_from((1.0, 1e-6)))
def test_sce_selects_weighs_and_erases(shape: tuple[int, int], density: float, size: float) -> None:
    small = [
        [replace(term, scale=term.scale * size * (1 + i)) for term in d.terms]
        for i, d in enumerate(task_vectors(3, shape))
    ]
    deltas = [LowRankDelta(shape, term) for term in small]
    assert_close(
        change(recipe("sce", (1, 1, 1), density=density, lambda_=2.0), deltas),
        2 * selected(dense(deltas), density),
        1e-6,
    )


def test_a_vote_that_is_a_tie_elects_the_positive() -> None:
    one, other = (
        LowRankDelta((2, 3), [Factors(np.ones((2, 1)), np.array([row]), 1.0)]) for row in ([1.0, -2, 3], [-1.0, 2, -4])
    )
    assert change(recipe("ties", (1, 1), density=1.0), [one, other]).tolist() == [[1, 2, -4]] * 2


def test_election_by_weights_gives_an_input_of_weight_0_no_say() -> None:
    deltas = task_vectors(2, (20, 30))
    (term,) = deltas[1].terms
    large = LowRankDelta((20, 30), [replace(term, scale=100.0)])
    assert_close(change(recipe("ties", (1, 0), density=1.0), [deltas[0], large]), whole(deltas[0]), 1e-12)


def test_a_negative_weight_takes_the_opposite() -> None:
    deltas = task_vectors(2, (20, 30))
    (term,) = deltas[1].terms
    opposite = LowRankDelta((20, 30), [replace(term, scale=-term.scale)])
    found = change(recipe("ties", (0.5, -0.25), density=0.5), deltas)
    assert torch.equal(found, change(recipe("ties", (0.5, 0.25), density=0.5), [deltas[0], opposite]))
