"""Changes that are products of small factors, against definitions written down another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from registry.changes import Option
from registry.errors import CorruptFile
from registry.merge.tuners.products import adalora, c3a, loha, lokr, miss, miss_bat, shira, vera
from registry.merge.weight import Dense, Weight, whole


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def zeros(*shape: int) -> Dense:
    return Dense(torch.zeros(*shape))


def test_adalora_weighs_each_rank() -> None:
    a, b, e = random(2, 5), random(4, 2), torch.tensor([[3.0], [0.0]]).double()
    found = whole(adalora({"lora_A": a, "lora_B": b, "lora_E": e}, {"scale": 0.5}, zeros(4, 5)))
    assert torch.allclose(found, 1.5 * torch.outer(b[:, 0], a[0]))


def test_adalora_with_nothing_left_changes_nothing() -> None:
    before = random(4, 5)
    tensors = {"lora_A": random(0, 5), "lora_B": random(4, 0), "lora_E": random(0, 1)}
    assert torch.equal(whole(adalora(tensors, {"scale": 2.0}, Dense(before))), before)


def test_vera_takes_the_beginning_of_projections_made_for_the_largest_layer() -> None:
    tensors = {"A": random(2, 9), "B": random(8, 2), "lambda_b": random(4), "lambda_d": random(2)}
    found = whole(vera(tensors, {}, zeros(4, 5)))
    expected = (
        torch.diag(tensors["lambda_b"]) @ tensors["B"][:4] @ torch.diag(tensors["lambda_d"]) @ tensors["A"][:, :5]
    )
    assert torch.allclose(found, expected)


def test_vera_draws_the_same_projections_for_every_layer_and_rounds_them_to_the_base() -> None:
    tensors = {"lambda_b": torch.ones(2).double(), "lambda_d": torch.ones(3).double()}
    options = {"seed": 5, "rank": 3, "inputs": 7, "outputs": 6, "dtype": "F32"}
    wide, narrow = (whole(vera(tensors, options, zeros(2, columns))) for columns in (7, 4))
    assert torch.equal(wide[:, :4], narrow)
    rounded = whole(vera(tensors, {**options, "dtype": "BF16"}, zeros(2, 7)))
    assert 0 < (rounded - wide).abs().max() < 2.0**-7
    assert not torch.allclose(whole(vera(tensors, {**options, "seed": 6}, zeros(2, 7))), wide)


@pytest.mark.parametrize("kernel", [(2, 3), (3, 1)])
def test_loha_with_a_core_is_the_product_of_two_tucker_forms(kernel: tuple[int, int]) -> None:
    tensors = {f"hada_w{number}_a": random(2, 4) + number for number in (1, 2)}
    tensors |= {f"hada_w{number}_b": random(2, 5) - number for number in (1, 2)}
    tensors |= {f"hada_t{number}": random(2, 2, *kernel) * number for number in (1, 2)}
    found = whole(loha(tensors, {"scale": 0.5}, zeros(4, 5 * kernel[0] * kernel[1]))).view(4, 5, *kernel)
    for output, channel, *place in ((0, 0, 0, 0), (3, 4, 1, 0), (2, 1, 0, kernel[1] - 1)):
        one, two = (
            tensors[f"hada_w{number}_a"][:, output]
            @ tensors[f"hada_t{number}"][:, :, *place]
            @ tensors[f"hada_w{number}_b"][:, channel]
            for number in (1, 2)
        )
        assert found[output, channel, *place].item() == pytest.approx((0.5 * one * two).item())


def test_lokr_is_a_kronecker_product_whatever_its_factors_are_made_of() -> None:
    one, two = (
        {"lokr_w1_a": random(2, 1), "lokr_w1_b": random(1, 3)},
        {"lokr_w2_a": random(5, 2), "lokr_w2_b": random(2, 4)},
    )
    full = {"lokr_w1": one["lokr_w1_a"] @ one["lokr_w1_b"], "lokr_w2": two["lokr_w2_a"] @ two["lokr_w2_b"]}
    expected = 0.5 * torch.kron(full["lokr_w1"], full["lokr_w2"])
    for tensors in ({**one, **two}, full, {**one, "lokr_w2": full["lokr_w2"]}):
        assert torch.allclose(whole(lokr(tensors, {"scale": 0.5}, zeros(10, 12))), expected)


def test_lokr_on_a_one_dimensional_convolution_pads_in_front_as_peft_does() -> None:
    one, two = random(2, 3), random(5, 4, 2)
    found = whole(lokr({"lokr_w1": one, "lokr_w2": two}, {"scale": 1.0}, zeros(10, 24)))
    meant = torch.kron(one, two.flatten(start_dim=1))
    expected = torch.einsum("ac,bdk->badck", one, two).reshape(10, 24)
    assert torch.allclose(found, expected)
    assert not torch.allclose(found, meant)


def test_c3a_adds_a_circular_convolution_of_each_block() -> None:
    kernel, x = random(1, 1, 6), random(6)
    delta = whole(c3a({"c3a_kernel": kernel}, {}, zeros(6, 6)))
    # The matrix is that of the kernel's circular correlation.
    expected = torch.fft.ifft(torch.fft.fft(kernel[0, 0]).conj() * torch.fft.fft(x)).real / 6
    assert torch.allclose(delta @ x, expected)


def test_miss_repeats_its_block_and_cuts_off_the_last() -> None:
    block = random(2, 4)
    found = whole(miss({"block": block}, {}, zeros(4, 5)))
    assert torch.equal(found, torch.cat([block.T, block.T, block.T[:, :1]], dim=1))
    twice = whole(miss({"block": block}, {}, zeros(8, 2)))
    assert torch.equal(twice, torch.cat([block.T, block.T]))


def test_miss_bat_changes_block_by_block() -> None:
    before, blocks = random(4, 6), random(2, 2, 2)
    found = whole(miss_bat({"block": blocks}, {}, Dense(before)))
    for i in range(2):
        for j in range(3):
            x, m = before[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], blocks[i]
            assert torch.allclose(found[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], x + x @ m + m)


def test_shira_adds_up_what_falls_on_one_place() -> None:
    places = torch.tensor([[0, 2, 0], [1, 3, 1]], dtype=torch.int32)
    found = whole(
        shira({"shira_weight": torch.tensor([1.0, 2.0, 4.0]).double(), "shira_indices": places}, {}, zeros(3, 4))
    )
    assert (found[0, 1], found[2, 3], found.abs().sum()) == (5, 2, 7)


@pytest.mark.parametrize("place", [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_shira_outside_the_weight_is_refused(place: tuple[int, int]) -> None:
    tensors = {"shira_weight": torch.ones(1).double(), "shira_indices": torch.tensor(place)[:, None]}
    with pytest.raises(CorruptFile):
        shira(tensors, {}, zeros(3, 4))


LOW_RANK = {"lora_A": random(3, 12), "lora_B": random(12, 3), "lora_E": random(3, 1)}
HADAMARD = {
    f"hada_w{number}_{side}": random(*shape) for number in "12" for side, shape in (("a", (12, 2)), ("b", (2, 12)))
}
EVERY: dict[str, tuple[Callable[..., Weight], Mapping[str, Tensor], Mapping[str, Option]]] = {
    "adalora": (adalora, LOW_RANK, {"scale": 0.5}),
    "vera": (vera, {"A": random(2, 13), "B": random(14, 2), "lambda_b": random(12), "lambda_d": random(2)}, {}),
    "loha": (loha, HADAMARD, {"scale": 2.0}),
    "lokr": (lokr, {"lokr_w1": random(3, 4), "lokr_w2": random(4, 3)}, {"scale": 2.0}),
    "lokr, padded in front": (lokr, {"lokr_w1": random(3, 2), "lokr_w2": random(4, 3, 2)}, {"scale": 2.0}),
    "c3a": (c3a, {"c3a_kernel": random(3, 3, 4)}, {}),
    "miss": (miss, {"block": random(5, 4)}, {}),
    "miss, bat": (miss_bat, {"block": random(4, 3, 3)}, {}),
    "shira": (shira, {"shira_weight": random(3), "shira_indices": torch.tensor([[0, 11, 5], [2, 11, 0]])}, {}),
}  # fmt: skip


@pytest.mark.parametrize("what", EVERY)
def test_rows_are_the_same_however_they_are_asked_for(what: str) -> None:
    tune, tensors, options = EVERY[what]
    before = random(12, 12)
    weight = tune(tensors, options, Dense(before))
    parts = torch.cat([weight.rows(first, last) for first, last in pairwise((0, 1, 5, 7, 12))])
    torch.testing.assert_close(parts, whole(weight), rtol=0, atol=1e-13)
    assert not torch.equal(parts, before)
