"""Low-rank sums with float32 results: what PEFT computes, to the bit, in blocks of any number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from registry.merge.single import SingleSum
from registry.merge.sums import Factors
from registry.merge.weight import Dense


@pytest.mark.parametrize("shape", [(700, 900), (513, 64), (2, 3000), (1, 7), (300, 257)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 16])
def test_float32_is_what_peft_computes_to_the_bit(shape: tuple[int, int], transposed: bool, rank: int) -> None:
    random = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=random)
    d_out, d_in = reversed(shape) if transposed else shape
    a, b = torch.randn((rank, d_in), generator=random), torch.randn((d_out, rank), generator=random)
    product = (b @ a) * 0.3
    left, right = (a.T, b.T) if transposed else (b, a)
    found = SingleSum(Dense(base), [Factors(left.double().numpy(), right.double().numpy(), 0.3)])
    # blocks that leave one row over: a product of one row is summed in another order
    rows = [found.rows(first, min(first + 256, shape[0])) for first in range(0, shape[0], 256)]
    assert torch.equal(torch.cat(rows).float(), base + (product.T if transposed else product))


def test_deltas_of_some_rows_and_columns() -> None:
    ones = np.ones((2, 1))
    found = SingleSum(Dense(torch.zeros(4, 5)), [Factors(ones, np.ones((1, 3)), 2.0, row=1, column=2)]).rows(0, 4)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[1:3, 2:5] = 2.0
    assert torch.equal(found, expected)
