"""Rotations, reflections and scalings, by what they must keep, and against definitions written down another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from registry.changes import Option
from registry.merge.tuners.rotations import boft, hra, oft, road
from registry.merge.tuners.scalings import ia3
from registry.merge.weight import Dense, Weight, whole

EXACT: dict[str, Option] = {"terms": 0, "reach": 0.0, "is_embedding": False}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def skew(above: Tensor, size: int) -> Tensor:
    """The skew matrix with these elements above the diagonal, row by row."""
    found = torch.zeros(size, size, dtype=torch.float64)
    places = [(row, column) for row in range(size) for column in range(row + 1, size)]
    for (row, column), value in zip(places, above, strict=True):
        found[row, column], found[column, row] = value, -value
    return found


def test_oft_keeps_lengths_and_turns_every_block_by_its_own_matrix() -> None:
    before, above = random(5, 6), random(2, 3) * 0.3
    found = whole(oft({"oft_R": above}, EXACT, Dense(before)))
    assert torch.allclose(found.norm(dim=1), before.norm(dim=1))
    identity = torch.eye(3, dtype=torch.float64)
    turns = [(identity - skew(each, 3)) @ torch.linalg.inv(identity + skew(each, 3)) for each in above]
    assert torch.allclose(found, before @ torch.block_diag(*turns).T)
    inverse = whole(oft({"oft_R": above}, {**EXACT, "is_embedding": True}, Dense(found)))
    assert torch.allclose(inverse, before)


@pytest.mark.parametrize(("terms", "powers"), [
    (1, [1]), (2, [1, 2]), (3, [1, 2, 2, 1]), (4, [1, 2, 2, 1]), (5, [1, 2, 2, 2, 1]), (6, [1, 2, 2, 2, 2, 1]),
])  # fmt: skip
def test_oft_with_so_many_terms_of_its_series(terms: int, powers: list[int]) -> None:
    before, above = random(2, 3), random(1, 3)
    q = skew(above[0], 3)
    turn = sum((factor * torch.linalg.matrix_power(q, power) for power, factor in enumerate(powers)), torch.zeros(3, 3))
    found = whole(oft({"oft_R": above}, {**EXACT, "terms": terms}, Dense(before)))
    assert torch.allclose(found, before @ turn.T)


def test_oft_with_a_series_turns_the_other_way() -> None:
    before, above = random(4, 4), random(1, 6) * 0.01
    exact = whole(oft({"oft_R": -above}, EXACT, Dense(before)))
    series = whole(oft({"oft_R": above}, {**EXACT, "terms": 9}, Dense(before)))
    assert torch.allclose(exact, series, rtol=0, atol=1e-12)


def test_oft_within_a_reach_is_cut_back_to_it_and_otherwise_left_alone() -> None:
    before, above = random(3, 8), torch.cat([random(1, 6), random(1, 6) * 1e-3])
    found = whole(oft({"oft_R": above}, {**EXACT, "reach": 0.5}, Dense(before)))
    length = (2 * above[0].square().sum()).sqrt()
    cut = torch.stack([above[0] * (0.5 / 2**0.5) / length, above[1]])
    assert torch.allclose(found, whole(oft({"oft_R": cut}, EXACT, Dense(before))))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_keeps_lengths_before_it_scales(factors: int) -> None:
    before, scale = random(5, 16), random(5)
    turned = whole(boft({"boft_R": random(factors, 4, 4, 4), "boft_s": scale[:, None]}, {}, Dense(before)))
    assert torch.allclose(turned.norm(dim=1), before.norm(dim=1) * scale.abs())


def test_boft_of_several_factors_mixes_inputs_of_different_blocks() -> None:
    one = torch.zeros(1, 16, dtype=torch.float64)
    one[0, 0] = 1
    reached = {}
    for factors in (1, 2, 3):
        tensors = {"boft_R": random(factors, 4, 4, 4), "boft_s": torch.ones(1).double()}
        reached[factors] = int((whole(boft(tensors, {}, Dense(one))).abs() > 1e-12).sum())
    assert reached == {1: 4, 2: 8, 3: 16}


def test_hra_reflects_at_each_vector_in_turn() -> None:
    before, u = random(3, 6), random(6, 2)
    found = whole(hra({"hra_u": u}, {"is_orthogonal": False}, Dense(before)))
    mirrors = [torch.eye(6) - 2 * torch.outer(v, v) / (v @ v) for v in u.T]
    assert torch.allclose(found, before @ mirrors[0] @ mirrors[1])
    again = whole(hra({"hra_u": u.flip(1)}, {"is_orthogonal": False}, Dense(found)))
    assert torch.allclose(again, before)


def test_hra_of_orthogonal_vectors_reflects_at_the_space_between_them() -> None:
    before, u = random(3, 6), random(6, 2)
    found = whole(hra({"hra_u": u}, {"is_orthogonal": True}, Dense(before)))
    projection = u @ torch.linalg.inv(u.T @ u) @ u.T
    assert torch.allclose(found, before - 2 * before @ projection)


def test_road_turns_pairs_of_one_group() -> None:
    theta, alpha = torch.tensor([0.5, 1.0]).double(), torch.tensor([2.0, 1.0]).double()
    before = random(4, 3)
    found = whole(road({"road_theta": theta, "road_alpha": alpha}, {"group": 4}, Dense(before)))
    for pair in range(2):
        x, y, turn = before[pair], before[pair + 2], theta[pair]
        assert torch.allclose(found[pair], alpha[pair] * (x * turn.cos() - y * turn.sin()))
        assert torch.allclose(found[pair + 2], alpha[pair] * (x * turn.sin() + y * turn.cos()))


def test_road_with_more_angles_is_the_same_where_they_are() -> None:
    theta, alpha, before = random(6), random(6), Dense(random(12, 2))
    double = {
        "road_theta": theta.view(-1, 1, 2).repeat(1, 2, 1).flatten(),
        "road_alpha": alpha.view(-1, 1, 2).repeat(1, 2, 1).flatten(),
    }
    four = {name: values.view(-1, 1, 4).repeat(1, 2, 1).flatten() for name, values in double.items()}
    expected = whole(road({"road_theta": theta, "road_alpha": alpha}, {"group": 4}, before))
    for tensors in (double, four):
        assert torch.allclose(whole(road(tensors, {"group": 4}, before)), expected)


def test_ia3_scales_every_column_of_an_input_channel() -> None:
    before, scale = random(2, 6), torch.tensor([[[[2.0]], [[3.0]]]]).double()
    found = whole(ia3({"ia3_l": scale}, {"side": "inputs"}, Dense(before)))
    assert torch.equal(found, before * torch.tensor([2, 2, 2, 3, 3, 3]))


EVERY: dict[str, tuple[Callable[..., Weight], Mapping[str, Tensor], Mapping[str, Option]]] = {
    "oft": (oft, {"oft_R": random(3, 6) * 0.2}, {**EXACT, "terms": 5}),
    "oft, shared": (oft, {"oft_R": random(1, 6) * 0.2}, EXACT),
    "boft": (boft, {"boft_R": random(1, 4, 3, 3), "boft_s": random(12, 1)}, {}),
    "boft, two factors": (boft, {"boft_R": random(2, 6, 2, 2), "boft_s": random(12, 1)}, {}),
    "hra": (hra, {"hra_u": random(12, 3)}, {"is_orthogonal": False}),
    "hra, orthogonal": (hra, {"hra_u": random(12, 3)}, {"is_orthogonal": True}),
    "road": (road, {"road_theta": random(12), "road_alpha": random(12)}, {"group": 6}),
    "ia3, outputs": (ia3, {"ia3_l": random(12, 1)}, {"side": "outputs"}),
    "ia3, inputs": (ia3, {"ia3_l": random(1, 12)}, {"side": "inputs"}),
}


@pytest.mark.parametrize("what", EVERY)
def test_rows_are_the_same_however_they_are_asked_for(what: str) -> None:
    tune, tensors, options = EVERY[what]
    before = random(12, 12)
    weight = tune(tensors, options, Dense(before))
    parts = torch.cat([weight.rows(first, last) for first, last in pairwise((0, 1, 5, 7, 12))])
    torch.testing.assert_close(parts, whole(weight), rtol=0, atol=1e-13)
    assert not torch.equal(parts, before)
