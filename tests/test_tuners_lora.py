"""The arithmetic of LoRA's relatives against numpy, in float64, and however the rows are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from registry.changes import Option
from registry.merge.tuners import TUNERS
from registry.merge.weight import Dense, whole

Array = NDArray[np.float64]
ROWS, COLUMNS, RANK, SCALE = 600, 5, 3, 1.75  # more rows than are summed at a time


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def apply(method: str, tensors: Mapping[str, Array], weight: Array, **options: Option) -> Array:
    """The tuner's result, checked to be the same to the bit in pieces of any size."""
    given = {name: torch.from_numpy(array) for name, array in tensors.items()}
    after = TUNERS[method](given, options, Dense(torch.from_numpy(weight)))
    found = whole(after)
    assert after.shape == tuple(weight.shape)
    for step in (1, 7, 599):
        pieces = [after.rows(first, min(first + step, len(weight))) for first in range(0, len(weight), step)]
        torch.testing.assert_close(torch.cat(pieces), found, rtol=1e-14, atol=1e-14)
    answer: Array = found.numpy()
    return answer


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_dora_gives_every_row_its_magnitude() -> None:
    weight, a, b, m = noise(ROWS, COLUMNS), noise(RANK, COLUMNS, seed=1), noise(ROWS, RANK, seed=2), noise(ROWS, seed=3)
    found = apply("dora", {"a": a, "b": b, "m": m}, weight, scale=SCALE)
    close(np.linalg.norm(found, axis=1), abs(m))
    direction = weight + SCALE * b @ a
    close(found, m[:, None] * direction / np.linalg.norm(direction, axis=1)[:, None])


def test_dora_of_a_convolution_takes_the_norm_over_all_of_an_output_channel() -> None:
    weight, a, b, m = (
        noise(4, 6, 3, 2),
        noise(RANK, 6, 3, 2, seed=1),
        noise(4, RANK, 1, 1, seed=2),
        noise(1, 4, 1, 1, seed=3),
    )
    found = apply("dora", {"a": a, "b": b, "m": m}, weight.reshape(4, -1), scale=SCALE).reshape(weight.shape)
    direction = weight + SCALE * np.einsum("orxy,rikl->oikl", b, a)
    close(found, m.reshape(4, 1, 1, 1) * direction / np.sqrt((direction**2).sum(axis=(1, 2, 3), keepdims=True)))


def test_dora_of_an_embedding_gives_every_column_its_magnitude() -> None:
    weight, a, b, m = (
        noise(ROWS, COLUMNS),
        noise(RANK, ROWS, seed=1),
        noise(COLUMNS, RANK, seed=2),
        noise(COLUMNS, seed=3),
    )
    found = apply("dora_embedding", {"a": a, "b": b, "m": m}, weight, scale=SCALE)
    close(np.linalg.norm(found, axis=0), abs(m))
    direction = weight + SCALE * (b @ a).T
    close(found, m * direction / np.linalg.norm(direction, axis=0))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_kasa_takes_the_smallest_singular_values_away(shape: tuple[int, int]) -> None:
    weight, a, b, diag = (
        noise(*shape),
        noise(RANK, shape[1], seed=1),
        noise(shape[0], RANK, seed=2),
        noise(RANK, seed=3),
    )
    rest = apply("kasa", {"a": a, "b": b, "diag": np.zeros(RANK)}, weight, scale=SCALE)
    before, after = (np.linalg.svd(matrix, compute_uv=False) for matrix in (weight, rest))
    close(after, np.where(np.arange(len(before)) < len(before) - RANK, before, 0.0))
    found = apply("kasa", {"a": a, "b": b, "diag": diag}, weight, scale=SCALE)
    close(found - rest, SCALE * b @ np.diag(diag) @ a)


def test_add_takes_a_vector_for_a_column() -> None:
    bias, value = noise(ROWS, 1), noise(ROWS, seed=1)
    close(apply("add", {"value": value}, bias, scale=SCALE), bias + SCALE * value[:, None])


@pytest.mark.parametrize("rows", [(), (0,), (599,), (0, 599), (256, 255, 3), tuple(range(600))], ids=len)
def test_rows_are_replaced_and_no_other(rows: tuple[int, ...]) -> None:
    weight, values = noise(ROWS, COLUMNS), noise(len(rows), COLUMNS, seed=1)
    expected = weight.copy()
    expected[list(rows)] = values
    assert np.array_equal(apply("rows", {"values": values}, weight, rows=rows), expected)


class Counted:
    """A weight that remembers the most rows that were asked for at once."""

    def __init__(self, values: Array) -> None:
        self._dense, self.most = Dense(torch.from_numpy(values)), 0

    @property
    def shape(self) -> tuple[int, int]:
        return self._dense.shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        self.most = max(self.most, last - first)
        return self._dense.rows(first, last)


@pytest.mark.parametrize(
    ("method", "a", "b", "m"),
    [("dora", (RANK, COLUMNS), (ROWS, RANK), ROWS), ("dora_embedding", (RANK, ROWS), (COLUMNS, RANK), COLUMNS)],
)
def test_dora_never_holds_the_whole_weight(method: str, a: tuple[int, ...], b: tuple[int, ...], m: int) -> None:
    before = Counted(noise(ROWS, COLUMNS))
    tensors = {"a": torch.from_numpy(noise(*a)), "b": torch.from_numpy(noise(*b)), "m": torch.from_numpy(noise(m))}
    TUNERS[method](tensors, {"scale": SCALE}, before).rows(10, 20)
    assert before.most <= 256


@pytest.mark.parametrize("method", ["dora", "dora_embedding", "add", "rows", "kasa"])
def test_the_weight_before_is_not_touched(method: str) -> None:
    weight = noise(6, 6)
    kept = weight.copy()
    tensors: dict[str, Any] = {
        "a": noise(2, 6), "b": noise(6, 2), "m": noise(6), "diag": noise(2), "value": noise(6, 6), "values": noise(1, 6),
    }  # fmt: skip
    apply(method, tensors, weight, scale=SCALE, rows=(2,))
    assert np.array_equal(weight, kept)
