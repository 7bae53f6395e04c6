"""Changes that are trained as a few coefficients of a transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from registry.merge.tuners.spectral import fourierft, waveft
from registry.merge.tuners.wavelets import LOW_PASS
from registry.merge.weight import Dense, whole

SHAPES = [(6, 4), (5, 9), (7, 7), (1, 3)]


def zeros(shape: tuple[int, int]) -> Dense:
    return Dense(torch.zeros(shape))


def drawn(shape: tuple[int, int], count: int, seed: int) -> list[tuple[int, int]]:
    """The places as PEFT draws them."""
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    return [(place // shape[1], place % shape[1]) for place in order.tolist()]


@pytest.mark.parametrize("shape", SHAPES)
def test_fourierft_is_a_sum_of_waves(shape: tuple[int, int]) -> None:
    spectrum = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    found = whole(fourierft({"fourierft_spectrum": spectrum}, {"seed": 777, "scaling": 3.0}, zeros(shape)))
    rows, columns = torch.meshgrid(torch.arange(shape[0]).double(), torch.arange(shape[1]).double(), indexing="ij")
    expected = torch.zeros(shape, dtype=torch.float64)
    for value, (u, v) in zip(spectrum.tolist(), drawn(shape, 3, 777), strict=True):
        expected += value * torch.cos(2 * math.pi * (u * rows / shape[0] + v * columns / shape[1]))
    assert torch.allclose(found, expected * 3 / (shape[0] * shape[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_waveft_without_a_transform_places_its_numbers(shape: tuple[int, int]) -> None:
    spectrum = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    options = {"seed": 5, "scaling": 4.0, "wavelet": ""}
    found = whole(waveft({"waveft_spectrum": spectrum}, options, zeros(shape)))
    expected = torch.zeros(shape, dtype=torch.float64)
    for value, place in zip(spectrum.tolist(), drawn(shape, 3, 5), strict=True):
        expected[place] = 4 * value
    assert torch.equal(found, expected)


def test_haar_waves_are_blocks_of_two_by_two() -> None:
    """The upper left quarter are averages, the upper right differences between rows, the lower left between columns."""
    spectrum = torch.arange(1.0, 25.0, dtype=torch.float64)
    found = whole(waveft({"waveft_spectrum": spectrum}, {"seed": 1, "scaling": 2.0, "wavelet": "db1"}, zeros((6, 4))))
    bands = torch.zeros(6, 4, dtype=torch.float64)
    for value, place in zip(spectrum.tolist(), drawn((6, 4), 24, 1), strict=True):
        bands[place] = value
    a, h, v, d = bands[:3, :2], bands[:3, 2:], bands[3:, :2], bands[3:, 2:]
    expected = torch.zeros(6, 4, dtype=torch.float64)
    expected[0::2, 0::2], expected[0::2, 1::2] = a + h + v + d, a + h - v - d
    expected[1::2, 0::2], expected[1::2, 1::2] = a - h + v - d, a - h - v + d
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOW_PASS) - {"coif4"}))
def test_wavelets_are_orthogonal(name: str) -> None:
    """A filter is perpendicular to itself two, four, … places on, which is what makes the transform keep lengths."""
    low = torch.tensor(LOW_PASS[name], dtype=torch.float64)
    assert low.sum().item() == pytest.approx(math.sqrt(2), abs=1e-11)
    for shift in range(0, low.numel(), 2):
        assert (low[shift:] @ low[: low.numel() - shift]).item() == pytest.approx(float(shift == 0), abs=1e-10)


@pytest.mark.parametrize("wavelet", ["", "db1", "sym4", "coif2"])
def test_rows_come_out_the_same_however_they_are_asked_for(wavelet: str) -> None:
    weight: Tensor = torch.randn(9, 7, dtype=torch.float64)
    after = waveft(
        {"waveft_spectrum": torch.randn(20).double()}, {"seed": 3, "scaling": 1.5, "wavelet": wavelet}, Dense(weight)
    )
    pieces = [after.rows(first, last) for first, last in ((0, 1), (1, 4), (4, 4), (4, 9))]
    assert torch.equal(torch.cat(pieces), whole(after))
