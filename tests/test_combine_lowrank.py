"""Sums of low-rank matrices, against dense ones in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from combined import task_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from registry.merge.lowrank import LowRankDelta, approximated, gram, stacked, truncated
from registry.merge.rounding import Array
from registry.merge.sums import Factors
from registry.merge.weight import Dense, whole


@dataclass(frozen=True)
class Case:
    """Terms in a matrix, some of them in a part of it only, and the matrix written out."""

    shape: tuple[int, int]
    terms: list[Factors]

    def written_out(self) -> Array:
        total = np.zeros(self.shape)
        for term in self.terms:
            columns = slice(term.column, term.column + term.right.shape[1])
            total[term.row : term.end, columns] += term.scale * (term.left @ term.right)
        return total


@st.composite
def terms(draw: st.DrawFn, shape: tuple[int, int]) -> list[Factors]:
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    found = []
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, shape[0])), draw(st.integers(0, shape[1]))
        n, m = draw(st.integers(0, shape[0] - row)), draw(st.integers(0, shape[1] - column))
        rank = draw(st.integers(0, 5))
        size = 10.0 ** draw(st.integers(-6, 6))
        left, right = random.standard_normal((n, rank)) * size, random.standard_normal((m, rank)).T
        found.append(Factors(left, right, draw(st.sampled_from((1.0, -0.25, 3.0))), row, column))
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    return Case(shape, draw(terms(shape)))


def assert_near(found: Tensor | Array, expected: Tensor | Array, digits: float = 1e-6) -> None:
    expected = torch.as_tensor(expected)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=digits * size + 1e-300)


@settings(max_examples=60)
@given(cases())
def test_rows_are_those_of_the_sum_to_float32(case: Case) -> None:
    assert_near(whole(LowRankDelta(case.shape, case.terms)), case.written_out())


@given(cases(), st.integers(1, 31))
def test_rows_are_the_same_in_every_grid(case: Case, every: int) -> None:
    delta = LowRankDelta(case.shape, case.terms)
    blocks = [delta.rows(first, min(first + every, case.shape[0])) for first in range(0, case.shape[0], every)]
    assert torch.equal(torch.cat(blocks) if blocks else delta.rows(0, 0), whole(delta))


@pytest.mark.parametrize("rank", [1, 7, 16, 64, 300])
def test_no_order_of_summation_gives_other_bits(rank: int) -> None:
    """Of numbers of one sign and one size, whose sums have the most digits."""
    random = np.random.default_rng(rank)
    left, right = random.uniform(0.9, 1, (50, rank)), random.uniform(0.9, 1, (rank, 60))
    order = random.permutation(rank)
    shuffled = LowRankDelta((50, 60), [Factors(left[:, order], right[order], 0.3)])
    assert torch.equal(whole(shuffled), whole(LowRankDelta((50, 60), [Factors(left, right, 0.3)])))


def test_factors_of_16_bits_with_a_power_of_two_for_scale_are_multiplied_exactly() -> None:
    random = torch.Generator().manual_seed(3)
    left, right = (torch.randn(shape, generator=random).bfloat16().double().numpy() for shape in ((9, 8), (8, 11)))
    found = whole(LowRankDelta((9, 11), [Factors(left, right, 2.0)]))
    exact = [[2 * math.fsum(left[i] * right[:, j]) for j in range(11)] for i in range(9)]
    assert found.tolist() == exact


@settings(max_examples=50)
@given(st.data())
def test_inner_products_are_those_of_the_dense_matrices(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    every = [Case(shape, data.draw(terms(shape))) for _ in range(3)]
    matrices = np.stack([case.written_out().ravel() for case in every])
    found = gram([LowRankDelta(shape, case.terms) for case in every])
    norms = np.linalg.norm(matrices, axis=1)
    tolerance = 1e-10 * (np.outer(norms, norms) + norms.max() ** 2) + 1e-300
    assert (np.abs(found.numpy() - matrices @ matrices.T) <= tolerance).all()


@settings(max_examples=50)
@given(st.data())
def test_stacked_factors_lose_nothing(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    every = [Case(shape, data.draw(terms(shape))) for _ in range(3)]
    coefficients = (0.5, -2.0, 0.0)
    found = stacked([LowRankDelta(shape, case.terms) for case in every], coefficients)
    assert found.scale == 1
    expected = sum(c * case.written_out() for c, case in zip(coefficients, every, strict=True))
    assert_near(found.left @ found.right, expected, 1e-9)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
def test_truncated_factors_are_the_best_of_their_rank(rank: int, n: int, m: int, inner: int) -> None:
    random = np.random.default_rng(inner * 1000 + n)
    term = Factors(random.standard_normal((n, inner)), random.standard_normal((inner, m)), -0.7)
    product = torch.from_numpy(term.left @ term.right * term.scale)
    u, sizes, v = torch.linalg.svd(product, full_matrices=False)
    found = truncated(term, rank)
    assert found.factors.left.shape[1] == found.factors.right.shape[0] == min(rank, inner, n, m)
    assert_near(found.factors.left @ found.factors.right, (u[:, :rank] * sizes[:rank]) @ v[:rank], 1e-9)
    assert found.energy == pytest.approx(float(product.square().sum()))
    assert found.discarded == pytest.approx(
        float(sizes[rank:].square().sum()), rel=1e-6, abs=1e-18 * found.energy + 1e-20
    )


def test_truncated_factors_have_equal_halves_and_a_fixed_sign() -> None:
    (delta,) = task_vectors(1, (20, 30), rank=4)
    (term,) = delta.terms
    found = truncated(term, 3).factors
    opposite = truncated(Factors(-term.left, -term.right, term.scale), 3).factors
    np.testing.assert_allclose(opposite.left, found.left, atol=1e-12)
    np.testing.assert_allclose(opposite.right, found.right, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found.left, axis=0), np.linalg.norm(found.right, axis=1))
    largest = np.abs(found.left).argmax(axis=0)
    assert (found.left[largest, range(3)] > 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, 5)])
def test_nothing_is_truncated_to_nothing(shape: tuple[int, int]) -> None:
    found = truncated(stacked([LowRankDelta(shape, [])], [1.0]), 2)
    assert (found.factors.left @ found.factors.right).tolist() == np.zeros(shape).tolist()
    assert found.energy == found.discarded == 0


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(0, 60), st.integers(0, 60))
def test_a_matrix_of_low_rank_is_found_again_by_reading_it(rank: int, n: int, m: int) -> None:
    (delta,) = task_vectors(1, (n, m), rank=rank)
    found = approximated(delta, rank, "layer")
    assert_near(found.factors.left @ found.factors.right, whole(delta), 1e-9)
    assert found.discarded <= 1e-12 * found.energy


def test_a_matrix_of_full_rank_is_approximated_nearly_as_well_as_can_be_and_the_difference_is_the_one_reported() -> (
    None
):
    random = torch.Generator().manual_seed(0)
    values = torch.randn((300, 200), generator=random, dtype=torch.float64) * torch.logspace(
        0, -2, 200, dtype=torch.float64
    )
    found = approximated(Dense(values), 20, "layer")
    difference = float((values - torch.from_numpy(found.factors.left @ found.factors.right)).square().sum())
    best = float(torch.linalg.svdvals(values)[20:].square().sum())
    assert found.discarded == pytest.approx(difference, rel=1e-9)
    assert best <= difference <= 1.01 * best
    again = approximated(Dense(values), 20, "layer")
    assert np.array_equal(again.factors.left, found.factors.left)


def test_an_infinite_factor_shows_in_the_rows() -> None:
    left, right = np.ones((3, 2)), np.ones((2, 4))
    left[1, 0] = math.inf
    rows = whole(LowRankDelta((3, 4), [Factors(left, right, 1.0)]))
    assert not rows[1].isfinite().any()
    assert rows[[0, 2]].isfinite().all()
