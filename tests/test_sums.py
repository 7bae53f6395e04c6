"""Low-rank sums with 16-bit results, against exact fractions; the compiled kernel and numpy must give the same bytes and the same record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.merge import kernel
from registry.merge.exact import round_sums
from registry.merge.reading import Scratch
from registry.merge.records import BlockRecord
from registry.merge.rounding import WORDS, Array, round_once, values_of
from registry.merge.sums import Factors, RoundedSum
from registry.tensors import DType

HALVES = (DType.BF16, DType.F16)
WAYS = ("compiled", "numpy")


@pytest.fixture(autouse=True)
def built() -> None:
    """A kernel that nobody built would make half of these tests compare numpy with itself."""
    assert kernel.is_there(), (
        "registry/merge/kernel.c was not compiled: is there a C compiler? Then `pip install -e .` again"
    )


def merged(
    base: Array, dtypes: tuple[DType, DType], factors: Sequence[Factors], *, rows: int = 1 << 30, way: str = "compiled"
) -> tuple[Array, BlockRecord]:
    """A whole matrix of bits merged in blocks of so many rows, and its record."""
    total, scratch = RoundedSum(factors, base.shape), Scratch()
    result = np.empty(base.shape, WORDS[dtypes[1]])
    record = total.record()
    with pytest.MonkeyPatch.context() as patch:
        if way == "numpy":
            patch.setattr(kernel, "is_there", lambda: False)
        for first in range(0, len(base), rows):
            part = slice(first, first + rows)
            old, out = (memoryview(each[part].reshape(-1).view(np.uint8)) for each in (base, result))
            record += total.add(first, old, dtypes, out, scratch)
    return result, record


def bits(values: Any, dtype: DType) -> Array:
    return round_once(np.asarray(values, np.float64), dtype)


def numbers(found: Array, dtype: DType) -> Array:
    return values_of(found.tobytes(), dtype).reshape(found.shape)


def exactly(base: Array, dtypes: tuple[DType, DType], factors: Sequence[Factors]) -> Array:
    """Every element summed as a fraction and rounded to the nearest number, ties to even; float64 values."""
    start = numbers(base, dtypes[0])
    result = np.empty(base.shape)
    for i, j in np.ndindex(*base.shape):
        value = Fraction(float(start[i, j]))
        for item in factors:
            row, column = i - item.row, j - item.column
            if 0 <= row < len(item.left) and 0 <= column < item.right.shape[1]:
                pairs = zip(item.left[row], item.right[:, column], strict=True)
                value += Fraction(item.scale) * sum(
                    (Fraction(float(a)) * Fraction(float(b)) for a, b in pairs), Fraction(0)
                )
        result[i, j] = number_nearest(value, dtypes[1])
    return result


def number_nearest(value: Fraction, dtype: DType) -> float:
    guess = int(bits([float(value)], dtype)[0])
    near = [number for step in (-1, 0, 1) if (number := guess + step) >= 0]
    read = {number: float(values_of(WORDS[dtype](number & 0xFFFF).tobytes(), dtype)[0]) for number in near}
    finite = [number for number in near if np.isfinite(read[number])]
    return read[min(finite, key=lambda number: (abs(Fraction(read[number]) - value), number % 2))]


@dataclass(frozen=True)
class Case:
    base: Array
    dtypes: tuple[DType, DType]
    factors: list[Factors]
    rows: int


def matrix(random: np.random.Generator, shape: tuple[int, int], dtype: DType, size: float) -> Array:
    """Values of a dtype, float64."""
    return numbers(bits(random.standard_normal(shape) * size, dtype), dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A weight with none to three deltas: whole, of some rows and columns, transposed, overlapping or apart, with zeros, large or tiny."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtypes = draw(st.sampled_from([*((one, other) for one in HALVES for other in HALVES), (DType.F32, DType.BF16)]))
    size = draw(st.sampled_from([1.0, 1.0, 0.01, 1e-5]))
    factors = []
    for _ in range(draw(st.integers(0, 3))):
        row, column, rank = draw(st.integers(0, rows)), draw(st.integers(0, columns)), draw(st.integers(0, 6))
        count, width = draw(st.integers(0, rows - row)), draw(st.integers(0, columns - column))
        dtype = draw(st.sampled_from([DType.F32, DType.BF16]))
        left, right = matrix(random, (count, rank), dtype, size), matrix(random, (rank, width), dtype, 1.0)
        if draw(st.booleans()):
            left[:: draw(st.integers(1, 3))] = 0
        if draw(st.booleans()):
            left = np.ascontiguousarray(left.T).T
        factors.append(Factors(left, right, draw(st.sampled_from([1.0, 2.0, -0.3])), row, column))
    base = bits(random.standard_normal((rows, columns)), dtypes[0])
    return Case(base, dtypes, factors, draw(st.integers(1, 25)))


@given(cases())
@settings(max_examples=150)
def test_every_element_is_the_exact_sum_rounded_once(case: Case) -> None:
    expected, start = exactly(case.base, case.dtypes, case.factors), numbers(case.base, case.dtypes[0])
    results = [merged(case.base, case.dtypes, case.factors, rows=case.rows, way=way) for way in WAYS]
    for result, record in results:
        assert np.array_equal(numbers(result, case.dtypes[1]), expected)
        assert (record.elements, record.finite) == (case.base.size, True)
        assert record.changed == int((expected != numbers(bits(start, case.dtypes[1]), case.dtypes[1])).sum())
        assert record.changed <= record.reached
        assert record.base_square == pytest.approx(float(np.square(start).sum()), rel=1e-9)
    assert np.array_equal(results[0][0], results[1][0])


@given(cases())
def test_the_norm_of_the_delta_follows_from_its_factors(case: Case) -> None:
    delta = np.zeros(case.base.shape)
    for item in case.factors:
        columns = slice(item.column, item.column + item.right.shape[1])
        delta[item.row : item.end, columns] += item.scale * (item.left @ item.right)
    record = RoundedSum(case.factors, case.base.shape).record()
    assert record.delta_square == pytest.approx(float(np.square(delta).sum()), rel=1e-6, abs=1e-12)
    assert int(np.count_nonzero(delta)) <= record.reached


def test_a_wide_matrix_of_real_sizes_equals_the_error_free_sum_everywhere() -> None:
    """Tiles, ranks and rows that do not divide: 0.7 million elements, each settled without error as well."""
    random = np.random.default_rng(1)
    shape, rank = (301, 2333), 19
    left, right = (matrix(random, size, DType.F32, 0.05) for size in ((shape[0], rank), (rank, shape[1])))
    for dtype in HALVES:
        base = bits(random.standard_normal(shape) * 0.02, dtype)
        found, _ = merged(base, (dtype, dtype), [Factors(left, right, 2 / 3)], rows=128)
        i, j = (index.reshape(-1) for index in np.indices(shape))
        exact = round_sums(numbers(base, dtype).reshape(-1), left[i], np.full(rank, 2 / 3), right[:, j].T, dtype)
        assert np.array_equal(found.reshape(-1), exact)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_do_not_show(way: str) -> None:
    random = np.random.default_rng(2)
    base = bits(random.standard_normal((97, 600)), DType.BF16)
    factors = [Factors(matrix(random, (97, 8), DType.F32, 0.1), matrix(random, (8, 600), DType.F32, 0.1), 0.7)]
    results = [merged(base, (DType.BF16, DType.BF16), factors, rows=rows, way=way)[0] for rows in (1, 2, 8, 9, 97)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("way", WAYS)
def test_more_ties_than_the_kernel_lists(way: str) -> None:
    """Every element lies in the middle between two numbers: the even one wins, and no float decides that."""
    base = np.full((300, 300), 0x3F80, np.uint16)
    for scale, expected in ((1.0, 0x3F80), (3.0, 0x3F82), (1 + 2.0**-40, 0x3F81)):
        factors = [Factors(np.full((300, 1), 2.0**-4), np.full((1, 300), 2.0**-4), scale)]
        assert np.all(merged(base, (DType.BF16, DType.BF16), factors, way=way)[0] == expected)


@pytest.mark.parametrize("way", WAYS)
def test_factors_that_float32_cannot_multiply(way: str) -> None:
    base = bits([[1.0, -2.0, 3.0]], DType.BF16)
    factors = [Factors(np.array([[1e30]]), np.array([[1e30, 1.0, 1e-30]]), 1e-30)]
    assert numbers(merged(base, (DType.BF16,) * 2, factors, way=way)[0], DType.BF16)[0, 1:].tolist() == [-1.0, 3.0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_subnormal_results(dtype: DType, way: str) -> None:
    least = numbers(np.array([1], np.uint16), dtype)[0]
    base = np.array([[0, 1, 2, 0x8001]], np.uint16)
    factors = [Factors(np.array([[least]]), np.array([[0.5, 0.5, 0.75, 1.0]]), 1.0)]
    assert merged(base, (dtype, dtype), factors, way=way)[0][0, :3].tolist() == [0, 2, 3]
    assert numbers(merged(base, (dtype, dtype), factors, way=way)[0], dtype)[0, 3] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_zero_of_either_sign_is_no_change(dtype: DType, way: str) -> None:
    base = bits([[-0.0, 0.0, 1.0, -0.0]], dtype)
    _, record = merged(
        base, (dtype, dtype), [Factors(np.zeros((1, 1)), np.array([[1.0, 1.0, 1.0, 0.0]]), 1.0)], way=way
    )
    assert (record.changed, record.reached, record.delta_square) == (0, 0, 0.0)
    _, record = merged(base, (dtype, dtype), [Factors(np.ones((1, 1)), np.array([[0.0, 1.0, 0.0, 1.0]]), 1.0)], way=way)
    assert (record.changed, record.reached, record.delta_square) == (2, 2, 2.0)


@pytest.mark.parametrize("way", WAYS)
def test_what_rounding_swallowed(way: str) -> None:
    base = bits([[1.0, 1.0, 0.0, 1.0]], DType.BF16)
    pair = (DType.BF16, DType.BF16)
    _, record = merged(base, pair, [Factors(np.ones((1, 1)), np.array([[1e-4, 1.0, 1e-4, 0.0]]), 1.0)], way=way)
    assert (record.reached, record.changed, record.largest_delta) == (3, 2, 0.0)
    _, record = merged(base[:, :1], pair, [Factors(np.ones((1, 1)), np.array([[1e-4]]), 2.0)], way=way)
    assert (record.reached, record.changed) == (1, 0)
    assert record.largest_delta == pytest.approx(2e-4)


def test_deltas_on_the_same_elements_are_reached_once() -> None:
    ones, zero, row = np.ones((2, 1)), np.zeros((2, 1)), np.ones((1, 3))
    over = [Factors(ones, row, 1.0, row=0), Factors(ones, row, 1.0, row=1), Factors(zero, row, 1.0, row=2)]
    assert RoundedSum(over, (4, 3)).record().reached == 9
    assert RoundedSum([Factors(ones, row, 0.0)], (2, 3)).record().reached == 0
    # opposite deltas cancel: 0 in the rows of both, 3 ones in each other row
    opposite = [Factors(ones, row, 1.0, row=0), Factors(ones, row, -1.0, row=1)]
    assert RoundedSum(opposite, (3, 3)).record().delta_square == pytest.approx(6.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtypes", [(DType.F32, DType.BF16), (DType.F32, DType.F16), (DType.BF16, DType.F16)])
def test_converting_alone_changes_nothing(dtypes: tuple[DType, DType], way: str) -> None:
    base = bits(np.random.default_rng(3).standard_normal((20, 600)), dtypes[0])
    result, record = merged(base, dtypes, [], way=way)
    assert np.array_equal(result, round_once(numbers(base, dtypes[0]), dtypes[1]))
    assert (record.changed, record.reached) == (0, 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "value"), [(DType.F16, 60000.0), (DType.F16, -60000.0), (DType.BF16, 3.38e38), (DType.BF16, float("nan")),
                         (DType.F16, float("-inf"))],
)  # fmt: skip
def test_sees_what_is_not_finite(dtype: DType, value: float, way: str) -> None:
    values = np.ones((3, 5))
    values[1, 3] = value
    base = bits(values, dtype)
    with np.errstate(invalid="ignore"):
        over = [Factors(np.ones((3, 1)), np.full((1, 5), np.nan_to_num(value, nan=1.0, neginf=-1.0)), 1.0)]
    assert not merged(base, (dtype, dtype), over, way=way)[1].finite
    half = [Factors(np.ones((3, 1)), np.ones((1, 5)), 0.5)]
    assert merged(bits(-np.ones((3, 5)), dtype), (dtype, dtype), half, way=way)[1].finite


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_values_whose_squares_overflow(way: str) -> None:
    base = bits(np.full((2, 300), 1e30), DType.BF16)
    assert merged(base, (DType.BF16,) * 2, [], way=way)[1].base_square == pytest.approx(6e62, rel=1e-2)


def test_without_a_kernel_the_library_is_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "LIBRARY", tmp_path / "none.so")
    kernel._library.cache_clear()
    try:
        assert not kernel.is_there()
    finally:
        kernel._library.cache_clear()


def test_scratch_gives_one_buffer_for_a_role() -> None:
    scratch = Scratch()
    first = np.frombuffer(scratch.take("a", 80), np.uint8)
    assert np.shares_memory(np.frombuffer(scratch.take("a", 40), np.uint8), first)
    assert not np.shares_memory(np.frombuffer(scratch.take("b", 40), np.uint8), first)
    assert len(scratch.take("a", 4000)) == 4000
