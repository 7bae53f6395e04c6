"""LoRA's relatives that are more than a low-rank sum. Names as in PEFT: `A [r, d_in]`, `B [d_out, r]`, `s` the scale, `W [d_out, d_in]`.

A convolution's `A [r, d_in, k...]` and `B [d_out, r, 1...]` count as `[r, d_in * k...]` and `[d_out, r]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from registry.changes import Option
from registry.merge.tuners.options import number
from registry.merge.tuners.sums import add_product
from registry.merge.weight import Dense, RowWise, Weight, whole

# Rows whose squares are summed at a time; fixed, so that the norms come out the same however the rows are asked for.
_BLOCK_ROWS = 256


def dora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W' = diag(m / |V|) V` with `V = W + s B A` and the norm of each row, no epsilon (PEFT: DoraLinearLayer, _DoraConvNdLayer).

    Args:
        tensors: `a`, `b`, and `m` with `d_out` elements.
        options: `scale`.
        before: `W`. For a convolution a row is all of an output channel.
    """
    magnitudes = tensors["m"].flatten()

    def normalise(rows: Tensor, first: int) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1)
        return rows.mul_((magnitudes[first : first + rows.shape[0]] / norms).unsqueeze(1))

    return RowWise(add_product(before, _b(tensors, options), _a(tensors)), normalise)


def dora_embedding(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W' = V diag(m / |V|)` with `V = W + s (B A)ᵀ` and the norm of each column over all rows (PEFT: DoraEmbeddingLayer). Reads `W` twice.

    Args:
        tensors: `a [r, rows]`, `b [columns, r]`, `m` with as many elements as columns.
        options: `scale`.
        before: `W [rows, columns]`.
    """
    summed = add_product(before, _a(tensors).T, _b(tensors, options).T)
    rows, columns = before.shape
    squares = torch.zeros(columns, dtype=torch.float64)
    for first in range(0, rows, _BLOCK_ROWS):
        squares += summed.rows(first, min(first + _BLOCK_ROWS, rows)).square_().sum(dim=0)
    factors = tensors["m"].flatten() / squares.sqrt_()
    return RowWise(summed, lambda block, _: block.mul_(factors))


def kasa(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W' = W - W_r + s B diag(σ) A`, `W_r` the part of `W` that belongs to its r smallest singular values (PEFT: KasaLinearVariant).

    Args:
        tensors: `a`, `b`, and `diag [r]`.
        options: `scale`.
        before: `W`, of a linear layer, with more than r singular values.
    """
    diagonal = tensors["diag"]
    values = whole(before)
    left, singular, right = torch.linalg.svd(values, full_matrices=False)
    kept = singular.shape[0] - diagonal.shape[0]
    values -= (left[:, kept:] * singular[kept:]) @ right[kept:]
    return add_product(Dense(values), _b(tensors, options) * diagonal, _a(tensors))


def add(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + s X`, `X` of the same number of elements: a bias, `b + s lora_B.bias` (PEFT: LoraLayer.merge with lora_bias).

    Args:
        tensors: `value`.
        options: `scale`.
        before: `W`.
    """
    value = tensors["value"].reshape(before.shape) * number(options, "scale")
    return RowWise(before, lambda rows, first: rows.add_(value[first : first + rows.shape[0]]))


def put_rows(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """Some rows of `W` replaced (PEFT: TrainableTokensLayer.merge).

    Args:
        tensors: `values [n, columns]`.
        options: `rows`, n different row numbers.
        before: `W`.
    """
    places, values = torch.tensor(options["rows"], dtype=torch.int64), tensors["values"]

    def put(rows: Tensor, first: int) -> Tensor:
        here = (places >= first) & (places < first + rows.shape[0])
        rows[places[here] - first] = values[here]
        return rows

    return RowWise(before, put)


def _a(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["a"].flatten(1)


def _b(tensors: Mapping[str, Tensor], options: Mapping[str, Option]) -> Tensor:
    """`s B`."""
    return tensors["b"].flatten(1) * number(options, "scale")
