"""Low-rank changes whose factors are put together from trained, fixed and shared numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from registry.errors import CorruptFile
from registry.merge.tuners.assembled import delora, randlora, supertuning, tinylora, unilora, vblora
from registry.merge.tuners.sums import add_entries, product
from registry.merge.weight import Dense, whole


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def zeros(*shape: int) -> Dense:
    return Dense(torch.zeros(*shape))


def test_delora_bounds_the_change_by_its_strength() -> None:
    """Each of r parts has length λ / r, whatever A's and B's are, before the base's norms come in."""
    a, b = random(1, 5) * 1000, random(4, 1) / 1000
    tensors = {
        "delora_A": a,
        "delora_B": b,
        "delora_lambda": torch.tensor([-6.0]).double(),
        "delora_w_norm": torch.ones(5).double(),
    }
    delta = whole(delora(tensors, {}, zeros(4, 5)))
    assert torch.linalg.matrix_norm(delta).item() == pytest.approx(6)
    assert torch.allclose(delta, -6 * b @ a / (a.norm() * b.norm()))
    tensors["delora_w_norm"] = torch.arange(5).double()
    assert torch.allclose(whole(delora(tensors, {}, zeros(4, 5))), delta * torch.arange(5))


def test_delora_of_a_vanishing_factor_is_finite() -> None:
    tensors = {
        "delora_A": torch.zeros(2, 3),
        "delora_B": random(4, 2),
        "delora_lambda": torch.ones(1),
        "delora_w_norm": torch.ones(3),
    }
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    assert torch.equal(whole(delora(tensors, {}, zeros(4, 3))), torch.zeros(4, 3).double())


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (5, 7), (5, 5)])
def test_randlora_pairs_its_two_bases_in_different_orders(rows: int, columns: int) -> None:
    small, large, rank, bases = min(rows, columns), max(rows, columns), 2, 3
    tensors = {
        "randlora_A": random(rank, 1, 9),
        "randlora_B": random(8, 4, rank),
        "randlora_lambda": random(rank, bases),
        "randlora_gamma": random(bases, small),
    }
    found = whole(randlora(tensors, {"scale": 0.5}, zeros(rows, columns)))
    expected = torch.zeros(large, small, dtype=torch.float64)
    for place in range(rank * bases):
        (i, j), (m, k) = divmod(place, bases), divmod(place, rank)
        row = tensors["randlora_lambda"][i, j] * tensors["randlora_A"][i, 0, :small] * tensors["randlora_gamma"][j]
        expected += 0.5 * torch.outer(tensors["randlora_B"][:large, m, k], row)
    assert torch.allclose(found, expected if columns == small else expected.T)


def test_vblora_mixes_the_vectors_of_the_largest_logits() -> None:
    bank = random(4, 3)
    a, b = torch.full((1, 2, 4), -50.0).double(), torch.full((1, 1, 4), -50.0).double()
    a[0, 0, 1], a[0, 1, 2], a[0, 1, 3], b[0, 0, 0] = 50, 7, 7, 50
    found = whole(
        vblora({"vblora_logits_A": a, "vblora_logits_B": b, "vblora_vector_bank": bank}, {"topk": 2}, zeros(3, 6))
    )
    expected = torch.outer(bank[0], torch.cat([bank[1], (bank[2] + bank[3]) / 2]))
    assert torch.allclose(found, expected)


def test_vblora_saved_with_weights_only_is_the_same() -> None:
    bank, logits = random(5, 2), {"vblora_logits_A": random(2, 3, 5), "vblora_logits_B": random(4, 2, 5)}
    saved: dict[str, Tensor] = {"vblora_vector_bank": bank}
    for name, values in logits.items():
        most, indices = values.topk(3)
        saved[f"{name}_topk_indices"] = indices.to(torch.uint8)
        saved[f"{name}_topk_weights"] = most.softmax(-1)[..., :-1]
    expected = whole(vblora({**logits, "vblora_vector_bank": bank}, {"topk": 3}, zeros(8, 6)))
    assert torch.allclose(whole(vblora(saved, {"topk": 3}, zeros(8, 6))), expected)


def test_unilora_looks_its_elements_up() -> None:
    tensors = {
        "unilora_theta_d": torch.tensor([2.0, 3.0, 5.0]).double(),
        "unilora_indices_A": torch.tensor([[0, 1], [2, 2]]), "unilora_scales_A": torch.tensor([[1.0, 0.5], [1.0, 2.0]]).double(),
        "unilora_indices_B": torch.tensor([[1, 0]]), "unilora_scales_B": torch.ones(1, 2).double(),
    }  # fmt: skip
    assert torch.equal(whole(unilora(tensors, {}, zeros(1, 2))), torch.tensor([[16.0, 24.5]]).double())


def tiny(layer: int, rank: int = 2, groups: int = 3) -> dict[str, Tensor]:
    drawn = torch.normal(0.0, rank**-0.5, (4, rank, rank), generator=torch.Generator().manual_seed(42 + layer))
    vectors = {f"tinylora_v.{group}": random(4) + group for group in range(groups)}
    return {"tinylora_A": random(rank, 5), "tinylora_B": random(3, rank), "tinylora_P": drawn.double(), **vectors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "group"), [(0, 0), (2, 1), (4, 2), (6, 2)])
def test_tinylora_finds_its_group_by_the_numbers_that_were_drawn(layer: int, group: int, dtype: torch.dtype) -> None:
    """Seven layers in three groups: two each, and what is left belongs to the last."""
    tensors = tiny(layer)
    tensors["tinylora_P"] = tensors["tinylora_P"].to(dtype).double()
    core = sum(v * p for v, p in zip(tensors[f"tinylora_v.{group}"], tensors["tinylora_P"], strict=True))
    found = whole(tinylora(tensors, {"seed": 42, "layers": 7}, zeros(3, 5)))
    assert torch.allclose(found, tensors["tinylora_B"] @ core @ tensors["tinylora_A"])


def test_tinylora_with_numbers_of_another_seed_is_not_guessed() -> None:
    with pytest.raises(CorruptFile, match="projection_seed 43"):
        tinylora(tiny(0), {"seed": 43, "layers": 7}, zeros(3, 5))


@pytest.mark.parametrize("blocks", [[0, 4], [0, 1, 2, 3, 4], [0, 3, 4]])
def test_entries_are_added_where_they_belong(blocks: list[int]) -> None:
    weight = random(4, 3)
    places, values = torch.tensor([11, 0, 5, 0, 6]), torch.tensor([1.0, 2, 3, 4, 5]).double()
    after = add_entries(Dense(weight), places, values)
    expected = weight.clone()
    expected[3, 2], expected[0, 0] = expected[3, 2] + 1, expected[0, 0] + 6
    expected[1, 2], expected[2, 0] = expected[1, 2] + 3, expected[2, 0] + 5
    found = torch.cat([after.rows(first, last) for first, last in pairwise(blocks)])
    assert torch.allclose(found, expected)
    sparse = {"supertuning_values": values, "supertuning_indices": places.to(torch.int32)}
    assert torch.equal(whole(supertuning(sparse, {}, Dense(weight))), found)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_a_product_with_a_weight_is_summed_in_blocks(rows: int) -> None:
    left, weight = random(2, rows), random(rows, 3)
    assert torch.allclose(product(left, Dense(weight)), left @ weight)


@pytest.mark.parametrize("outside", [-1, 12])
def test_an_index_outside_of_what_it_points_into_is_not_wrapped_around(outside: int) -> None:
    places = torch.tensor([0, outside])
    sparse = {"supertuning_values": random(2), "supertuning_indices": places}
    with pytest.raises(CorruptFile, match="supertuning_indices"):
        supertuning(sparse, {}, zeros(4, 3))
    shared = {"unilora_theta_d": random(12), "unilora_scales_A": random(1, 2), "unilora_scales_B": random(1, 1)}
    with pytest.raises(CorruptFile, match="unilora_indices_A"):
        unilora({**shared, "unilora_indices_A": places[None], "unilora_indices_B": places[:1, None]}, {}, zeros(1, 2))
