"""Widening and rounding, against exact fractions and against torch."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.merge.exact import round_sums, two_product, two_sum
from registry.merge.rounding import WORDS, round_once, values_of
from registry.tensors import DType

HALVES = (DType.BF16, DType.F16)
TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def number(bits: int, dtype: DType) -> float:
    return float(values_of(WORDS[dtype](bits).tobytes(), dtype)[0])


def nearest(value: Fraction, dtype: DType) -> int:
    """The bits of the nearest finite number, ties to even, found by looking at a guess and its neighbours."""
    guess = int(round_once(np.array([float(value)]), dtype)[0])
    near = [guess + step for step in (-1, 0, 1) if 0 <= guess + step < 1 << 8 * dtype.itemsize_bytes]
    finite = [bits for bits in near if np.isfinite(number(bits, dtype))]
    return min(finite, key=lambda bits: (abs(Fraction(number(bits, dtype)) - value), bits % 2))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_survives(dtype: DType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = values_of(bits.tobytes(), dtype)
    known = torch.from_numpy(bits.view(np.int16)).view(TORCH[dtype]).double().numpy()
    assert np.array_equal(values, known, equal_nan=True)
    finite = np.isfinite(values)
    assert np.array_equal(round_once(values, dtype)[finite], bits[finite])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_middle_between_two_16_bit_numbers_and_its_neighbours(dtype: DType) -> None:
    """The places where rounding twice, by way of float32, goes wrong."""
    infinity = {DType.BF16: 0x7F80, DType.F16: 0x7C00}[dtype]
    low = np.arange(infinity - 1, dtype=np.uint16)
    below, above = (values_of(bits.tobytes(), dtype) for bits in (low, low + np.uint16(1)))
    middle = (below + above) / 2
    even = np.where(low % 2 == 0, low, low + 1)
    for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
        assert np.array_equal(round_once(sign * middle, dtype), even | bit)
        assert np.array_equal(round_once(sign * np.nextafter(middle, 0.0), dtype), low | bit)
        assert np.array_equal(round_once(sign * np.nextafter(middle, np.inf), dtype), (low + 1) | bit)


@pytest.mark.parametrize("dtype", [*HALVES, DType.F32])
def test_the_rest_decides_in_the_middle(dtype: DType) -> None:
    one = int(round_once(np.array([1.0]), dtype)[0])
    middle = np.array([(number(one, dtype) + number(one + 1, dtype)) / 2])
    for value, sign in ((middle, 1), (-middle, -1)):
        found = [int(round_once(value, dtype, np.array([rest]))[0]) for rest in (-1e-300, 0.0, 1e-300)]
        top = 1 << 8 * dtype.itemsize_bytes - 1
        expected = [one, one, one + 1] if sign > 0 else [one + 1 + top, one + top, one + top]
        assert found == expected


@given(st.floats(allow_nan=False, allow_infinity=False, width=64), st.sampled_from(HALVES))
def test_any_float64_is_rounded_once(value: float, dtype: DType) -> None:
    found = number(int(round_once(np.array([value]), dtype)[0]), dtype)
    largest = {DType.BF16: 3.3895313892515355e38, DType.F16: 65504.0}[dtype]
    if abs(value) < largest:
        assert found == number(nearest(Fraction(value), dtype), dtype)
    elif not np.isfinite(found):
        assert np.sign(found) == np.sign(value)


@given(st.floats(width=32), st.sampled_from([*HALVES, DType.F32]))
def test_float32_values_round_as_torch_rounds_them(value: float, dtype: DType) -> None:
    found = values_of(round_once(np.array([value]), dtype).tobytes(), dtype)
    known = torch.tensor([value], dtype=torch.float32).to(TORCH[dtype]).double().numpy()
    assert np.array_equal(found, known, equal_nan=True)
    assert bool(np.signbit(found[0])) == bool(np.signbit(known[0])) or np.isnan(value)


moderate = st.floats(-1e30, 1e30, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-30)


@given(moderate, moderate)
def test_sums_and_products_lose_nothing(a: float, b: float) -> None:
    one, other = np.array([a]), np.array([b])
    total, error = two_sum(one, other)
    assert Fraction(float(total[0])) + Fraction(float(error[0])) == Fraction(a) + Fraction(b)
    product, error = two_product(one, other)
    assert Fraction(float(product[0])) + Fraction(float(error[0])) == Fraction(a) * Fraction(b)


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


singles = st.floats(-1e4, 1e4, width=32).map(lambda value: float32(value) if abs(value) > 1e-6 else 0.0)


@given(singles, st.lists(st.tuples(singles, singles), min_size=1, max_size=6), moderate, st.sampled_from(HALVES))
def test_a_sum_of_products_is_rounded_as_the_exact_one(
    start: float, pairs: list[tuple[float, float]], scale: float, dtype: DType
) -> None:
    scale = float(np.clip(scale, -1e3, 1e3))
    left, right = (np.array([[pair[side] for pair in pairs]]) for side in (0, 1))
    scales = np.full(len(pairs), scale)
    exact = Fraction(start) + sum((Fraction(scale) * Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
    found = int(round_sums(np.array([start]), left, scales, right, dtype)[0])
    if abs(exact) < 60000:
        assert number(found, dtype) == number(nearest(exact, dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tiny", [2.0**-140, 2.0**-400, 0.0, -(2.0**-400)])
def test_what_lies_far_below_a_middle_decides(dtype: DType, tiny: float) -> None:
    """1 plus half a step, made of products, and a last one that no float64 sum would see."""
    half = 2.0 ** -{DType.BF16: 8, DType.F16: 11}[dtype]
    left, right = np.array([[half, half * 2.0**-60, -half, 1.0]]), np.array([[1.0, 2.0**60, 1.0, 1.0]])
    found = round_sums(np.array([1.0]), left, np.array([1.0, 1.0, 1.0, tiny]), right, dtype)
    one = int(round_once(np.array([1.0]), dtype)[0])
    assert int(found[0]) == one + (tiny > 0)


def test_eight_bit_floats_are_not_computed_with() -> None:
    with pytest.raises(ValueError, match="float8"):
        values_of(b"\0", DType.F8_E4M3)
