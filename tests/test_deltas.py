"""The arithmetic of a merge, against float64 and against the whole product in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import assert_rounded_once
from torch import Tensor

from registry.merge.deltas import Block, BlockRecord, Factors, Scratch, factor_record, merge_block, sum_dtype

HALVES = (torch.bfloat16, torch.float16)


def merged(
    base: Tensor,
    factors: Sequence[Factors],
    *,
    dtype: torch.dtype | None = None,
    replacement: Tensor | None = None,
    rows: int = 1 << 30,
) -> tuple[Tensor, BlockRecord]:
    """A whole matrix merged in blocks of so many rows, and its record."""
    result = torch.empty(base.shape, dtype=dtype or base.dtype)
    scratch, record = Scratch(), factor_record(factors) if replacement is None else BlockRecord()
    for first in range(0, base.shape[0], rows):
        part = slice(first, first + rows)
        new = None if replacement is None else replacement[part]
        block = Block(first=first, base=base[part], replacement=new, result=result[part])
        record += merge_block(block, factors, scratch)
    return result, record


def dense(factors: Sequence[Factors], shape: Sequence[int], *, absolute: bool = False) -> Tensor:
    """The sum of all deltas, written out in float64; `absolute`: of the sizes of all that is added up."""
    total = torch.zeros(*shape, dtype=torch.float64)
    for item in factors:
        a, b, scale = item.a.double(), item.b.double(), item.scale
        if absolute:
            a, b, scale = a.abs(), b.abs(), abs(scale)
        product = scale * (b @ a)
        total[item.row : item.end] += product.T if item.transposed else product
    return total


@dataclass(frozen=True)
class Case:
    base: Tensor
    factors: list[Factors]
    rows: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A weight with none to three deltas: whole, of some rows, transposed, overlapping or apart, some with zeros in them."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    d_out, d_in = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    factors = []
    for _ in range(draw(st.integers(0, 3))):
        rank, transposed = draw(st.integers(1, 5)), draw(st.booleans())
        row = 0 if transposed else draw(st.integers(0, d_out))
        count = d_out if transposed else draw(st.integers(0, d_out - row))
        a, b = (rank, count if transposed else d_in), (d_in if transposed else count, rank)
        values = [torch.randn(shape, generator=random) for shape in (a, b)]
        if draw(st.booleans()):
            values[1][:: draw(st.integers(1, 3))] = 0
        factors.append(Factors(*values, scale=draw(st.sampled_from((1.0, 2.0, -0.3))), row=row, transposed=transposed))
    return Case(torch.randn((d_out, d_in), generator=random), factors, draw(st.integers(1, 45)))


@given(cases(), st.sampled_from((*HALVES, torch.float32, torch.float64)))
@settings(max_examples=300, deadline=None)
def test_is_the_float64_sum_rounded_once(case: Case, dtype: torch.dtype) -> None:
    base = case.base.to(dtype)
    factors = [
        Factors(*(v.to(sum_dtype(dtype)) for v in (f.a, f.b)), f.scale, f.row, f.transposed) for f in case.factors
    ]
    result, record = merged(base, factors, rows=case.rows)
    delta = dense(factors, base.shape)
    size = base.double().abs() + dense(factors, base.shape, absolute=True)
    unit = torch.finfo(sum_dtype(dtype)).eps
    if dtype is torch.float64:
        assert bool(((result - (base + delta)).abs() <= 16 * unit * size).all())
    else:
        assert_rounded_once(result, base.double() + delta, 16 * unit * size)
    assert record.elements == base.numel()
    assert record.finite
    assert record.base_square == pytest.approx(float(base.double().square().sum()), rel=1e-6)
    assert record.delta_square == pytest.approx(float(delta.square().sum()), rel=1e-6, abs=1e-12)
    assert record.changed == int((result != base).sum())
    assert record.changed <= record.reached


@pytest.mark.parametrize(("dtype", "ties"), [(torch.bfloat16, 1e-4), (torch.float16, 5e-4)], ids=str)
def test_16_bit_results_are_exact_but_for_near_ties(dtype: torch.dtype, ties: float) -> None:
    random = torch.Generator().manual_seed(1)
    base = (torch.randn((700, 900), generator=random) * 0.02).to(dtype)
    factors = [Factors(torch.randn((8, 900), generator=random), torch.randn((700, 8), generator=random) / 99, 0.7)]
    result, _ = merged(base, factors)
    exact = base.double() + dense(factors, base.shape)
    up, down = (torch.nextafter(result, torch.full_like(result, sign)).double() for sign in (torch.inf, -torch.inf))
    best = (result.double() - exact).abs() <= torch.minimum((up - exact).abs(), (down - exact).abs())
    assert float((~best).double().mean()) < ties


@pytest.mark.parametrize("shape", [(700, 900), (513, 64), (2, 3000), (1, 7), (300, 257)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 16])
def test_float32_is_what_peft_computes_to_the_bit(shape: tuple[int, int], transposed: bool, rank: int) -> None:
    random = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=random)
    d_out, d_in = reversed(shape) if transposed else shape
    a, b = torch.randn((rank, d_in), generator=random), torch.randn((d_out, rank), generator=random)
    product = (b @ a) * 0.3
    # blocks that leave one row over: a product of one row is summed in another order
    result, _ = merged(base, [Factors(a, b, 0.3, transposed=transposed)], rows=256)
    assert torch.equal(result, base + (product.T if transposed else product))


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (1, 1)])
def test_smallest_shapes(rows: int, columns: int) -> None:
    result, record = merged(torch.ones(rows, columns), [Factors(torch.ones(1, columns), torch.ones(rows, 1), 1.0)])
    assert torch.equal(result, torch.full((rows, columns), 2.0))
    assert (record.elements, record.changed, record.reached) == (rows * columns,) * 3


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_a_zero_of_either_sign_is_no_change(dtype: torch.dtype) -> None:
    base = torch.tensor([[-0.0, 0.0, 1.0, -0.0]], dtype=dtype)
    _, record = merged(base, [Factors(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.zeros(1, 1), 1.0)])
    assert (record.changed, record.reached, record.delta_square) == (0, 0, 0.0)
    _, record = merged(base, [Factors(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.ones(1, 1), 1.0)])
    assert (record.changed, record.reached, record.delta_square) == (2, 2, 2.0)


def test_what_rounding_swallowed() -> None:
    base = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.bfloat16)
    _, record = merged(base, [Factors(torch.tensor([[1e-4, 1.0, 1e-4, 0.0]]), torch.ones(1, 1), 1.0)])
    assert (record.reached, record.changed, record.largest_delta) == (3, 2, 0.0)
    _, record = merged(base[:, :1], [Factors(torch.tensor([[1e-4]]), torch.ones(1, 1), 2.0)])
    assert (record.reached, record.changed) == (1, 0)
    assert record.largest_delta == pytest.approx(2e-4)


def test_deltas_on_the_same_elements_are_reached_once() -> None:
    ones, zero = torch.ones(2, 1), torch.zeros(2, 1)
    row = torch.ones(1, 3)
    over = [Factors(row, ones, 1.0, row=0), Factors(row, ones, 1.0, row=1), Factors(row, zero, 1.0, row=2)]
    assert factor_record(over).reached == 9
    assert factor_record([Factors(row, ones, 0.0)]).reached == 0
    # opposite deltas cancel: 0 in the rows of both, 3 ones in each other row
    assert factor_record([Factors(row, ones, 1.0, 0), Factors(row, ones, -1.0, 1)]).delta_square == pytest.approx(6.0)


def test_a_replacement_is_compared_with_the_base() -> None:
    base, new = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0, 0.0]])
    result, record = merged(base.bfloat16(), [], replacement=new)
    assert torch.equal(result, new.bfloat16())
    assert (record.changed, record.reached) == (2, 2)
    assert (record.base_square, record.delta_square) == (pytest.approx(14.0), pytest.approx(13.0))


def test_without_a_base_everything_is_new() -> None:
    block = Block(first=0, base=None, replacement=torch.ones(2, 2), result=torch.empty(2, 2, dtype=torch.float16))
    assert merge_block(block, [], Scratch()) == BlockRecord(elements=4, changed=4)


def test_converting_alone_changes_nothing() -> None:
    base = torch.randn((20, 300), generator=torch.Generator().manual_seed(3))
    result, record = merged(base, [], dtype=torch.bfloat16)
    assert torch.equal(result, base.bfloat16())
    assert (record.changed, record.reached) == (0, 0)
    assert record.base_square == pytest.approx(float(base.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float16, [60000.0]),
        (torch.float16, [-60000.0]),
        (torch.bfloat16, [3.38e38]),
        (torch.float32, [float("nan")]),
        (torch.float32, [float("-inf")]),
        (torch.float64, [float("inf")]),
    ],
)
def test_sees_what_is_not_finite(dtype: torch.dtype, values: list[float]) -> None:
    base = torch.ones((3, 5), dtype=dtype)
    base[1, 3] = values[0]
    a, b = (torch.ones(shape, dtype=sum_dtype(dtype)) for shape in ((1, 5), (3, 1)))
    assert not merged(base, [Factors(a, b, values[0])])[1].finite
    assert merged(torch.full_like(base, -1.0), [Factors(a, b, 0.5)])[1].finite


def test_norms_of_values_whose_squares_overflow() -> None:
    base = torch.full((2, 300), 1e30)
    assert merged(base, [])[1].base_square == pytest.approx(6e62, rel=1e-6)


def test_scratch_gives_one_buffer_for_a_role() -> None:
    scratch = Scratch()
    first: Any = scratch.take("a", torch.float32, 4, 5)
    assert scratch.take("a", torch.bfloat16, 5, 4).data_ptr() == first.data_ptr()
    assert scratch.take("b", torch.bfloat16, 5, 4).data_ptr() != first.data_ptr()
    assert scratch.take("a", torch.float64, 40, 5).shape == (40, 5)
    assert np.shares_memory(first.numpy(), scratch.take("c", torch.bool, 1, 1).numpy()) is False
