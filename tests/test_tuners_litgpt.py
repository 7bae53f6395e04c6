"""The arithmetic of litgpt's Adapter v2."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.merge.tuners import TUNERS
from registry.merge.weight import Dense, whole


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rows=st.integers(1, 9), columns=st.integers(1, 5), cut=st.integers(0, 9))
def test_rows_are_scaled_whatever_the_blocks(rows: int, columns: int, cut: int) -> None:
    weight, scale = random(rows, columns, seed=1), random(rows, seed=2)
    folded = TUNERS["adapter_v2"]({"scale": scale}, {}, Dense(weight))
    assert torch.equal(whole(folded), torch.diag(scale) @ weight)
    cut = min(cut, rows)
    assert torch.equal(torch.cat([folded.rows(0, cut), folded.rows(cut, rows)]), whole(folded))


def test_a_bias_is_shifted_before_it_is_scaled() -> None:
    bias, scale, shift = (random(6, seed=seed) for seed in (1, 2, 3))
    inputs, weight = random(4, seed=4), random(6, 4, seed=5)
    tuner = TUNERS["adapter_v2"]
    new_weight = whole(tuner({"scale": scale}, {}, Dense(weight)))
    new_bias = whole(tuner({"scale": scale, "shift": shift}, {}, Dense(bias[:, None])))[:, 0]
    assert torch.allclose(new_weight @ inputs + new_bias, scale * (weight @ inputs + bias + shift), rtol=1e-14)
