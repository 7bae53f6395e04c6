"""Tuners that add a product of small factors, of whatever kind: singular values, Hadamard, Kronecker, circulant, repeated, sparse."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from registry.changes import Option
from registry.errors import CorruptFile
from registry.merge.tuners.options import number
from registry.merge.tuners.sums import add_entries, add_product
from registry.merge.weight import RowWise, Weight

_ROUNDED_AS = {"BF16": torch.bfloat16, "F16": torch.float16}


def adalora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scale * B diag(E) A`.

    Tensors: lora_A `[r, d_in]`, lora_B `[d_out, r]`, lora_E `[r, 1]`. Options: scale.
    Source: `peft.tuners.adalora.layer.SVDLinear.get_delta_weight`.
    """
    return add_product(
        before, tensors["lora_B"] * (tensors["lora_E"][:, 0] * number(options, "scale")), tensors["lora_A"]
    )


def vera(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + diag(λ_b) B diag(λ_d) A`, A and B random, as large as the largest layer, and shared by all of them.

    PVeRA has 2r rows of A and elements of λ_d, of which the first r are the mean.
    Tensors: lambda_b `[d_out]`, lambda_d `[r]` or `[2r]`, A `[r or 2r, >= d_in]`, B `[>= d_out, r]`. Without A and B they are drawn again;
    options then: seed, inputs, outputs (of the largest layer), rank (r), dtype (of the base). Source: `peft.tuners.vera.layer.Linear`,
    `peft.tuners.vera.model.VeraModel._init_vera_A_vera_B`, and of `pvera` likewise.
    """
    (rows, columns), lambda_d = before.shape, tensors["lambda_d"]
    if "A" in tensors:
        a, b = tensors["A"], tensors["B"]
    else:
        seed, rank, inputs, outputs = (int(number(options, name)) for name in ("seed", "rank", "inputs", "outputs"))
        a, b = _projections(seed, (lambda_d.shape[0], inputs), (outputs, rank), str(options["dtype"]))
    rank = b.shape[1]
    left, right = b[:rows] * tensors["lambda_b"][:, None], a[:rank, :columns] * lambda_d[:rank, None]
    return add_product(before, left, right)


@lru_cache(maxsize=1)
def _projections(seed: int, a: tuple[int, int], b: tuple[int, int], dtype: str) -> tuple[Tensor, Tensor]:
    """Float64, drawn as PEFT does on a CPU: one stream of float32 numbers, which it then rounds to the base's dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in (a, b):
        bound = sqrt(3.0) * (sqrt(2.0) / sqrt(shape[1]))
        values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        drawn.append(values.to(_ROUNDED_AS.get(dtype, torch.float32)).double())
    return drawn[0], drawn[1]


def loha(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scale * W_1 ∘ W_2`, both low-rank.

    Tensors, for each of 1 and 2: hada_w1_a `[d_out, r]` and hada_w1_b `[r, d_in]`; of a convolution with a core hada_t1 `[r, r, k, l]` they
    are `[r, d_out]` and `[r, channels]`. Options: scale. Source: `peft.tuners.loha.layer.HadaWeight`, `HadaWeightCP`.
    """
    scale = number(options, "scale")

    def change(rows: Tensor, first: int) -> Tensor:
        one, two = (_hadamard_factor(tensors, which, first, first + rows.shape[0]) for which in "12")
        return rows.addcmul_(one, two, value=scale)

    return RowWise(before, change)


def _hadamard_factor(tensors: Mapping[str, Tensor], which: str, first: int, last: int) -> Tensor:
    a, b = tensors[f"hada_w{which}_a"], tensors[f"hada_w{which}_b"]
    if (core := tensors.get(f"hada_t{which}")) is None:
        return a[first:last] @ b
    return torch.einsum("ijkl,ip,jr->prkl", core, a[:, first:last], b).flatten(start_dim=1)


def lokr(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scale * (W_1 ⊗ W_2)`, each of them full or low-rank.

    Tensors: lokr_w1 `[a, c]`, or lokr_w1_a `[a, r]` and lokr_w1_b `[r, c]`; lokr_w2 `[b, d, k...]`, or lokr_w2_a `[b, r]` and lokr_w2_b
    `[r, d * k...]`, or with a core lokr_t2 `[r, r, k, l]` `[r, b]` and `[r, d]`; `a * b = d_out`, `c * d = d_in`. Options: scale.
    Source: `peft.tuners.lokr.layer.LoKrLayer.get_delta_weight`, `make_kron`.
    """
    scale = number(options, "scale")
    one = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    two = _second_factor(tensors)
    if two.dim() == 3:
        # Of a one-dimensional convolution. PEFT lets `kron` pad the matrix with an axis in front, where a last one was meant. Adapters are
        # trained like that, so it is what they mean.
        delta = torch.kron(one[None], two).mul_(scale).view(before.shape)
        return RowWise(before, lambda rows, first: rows.add_(delta[first : first + rows.shape[0]]))
    two = two.flatten(start_dim=1) * scale

    def change(rows: Tensor, first: int) -> Tensor:
        numbers = torch.arange(first, first + rows.shape[0])
        left, right = one[numbers // two.shape[0]], two[numbers % two.shape[0]]
        return rows.add_((left[:, :, None] * right[:, None, :]).flatten(start_dim=1))

    return RowWise(before, change)


def _second_factor(tensors: Mapping[str, Tensor]) -> Tensor:
    if "lokr_w2" in tensors:
        return tensors["lokr_w2"]
    if "lokr_t2" in tensors:
        return torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    return tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]


def c3a(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + C / d_in`, C of circulant blocks: element (t, u) of a block is its kernel's element `(u - t) mod b`.

    Tensors: c3a_kernel `[d_out / b, d_in / b, b]`. Source: `peft.tuners.c3a.utils.get_circulant_fast`.
    """
    kernel = tensors["c3a_kernel"] / before.shape[1]
    size = kernel.shape[2]
    turns = (torch.arange(size)[None, :] - torch.arange(size)[:, None]) % size

    def change(rows: Tensor, first: int) -> Tensor:
        numbers = torch.arange(first, first + rows.shape[0])
        blocks = kernel[numbers // size]
        places = turns[numbers % size][:, None, :].expand(blocks.shape)
        return rows.add_(blocks.gather(2, places).flatten(start_dim=1))

    return RowWise(before, change)


def miss(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + D`, D the transposed block over and over, along columns and (of the kind `mini`) along rows; the last copy may be cut off.

    Tensors: block `[r, d_out]` or `[r, mini_r]`. Source: `peft.tuners.miss.layer.MissLinear.get_delta_weight_miss`.
    """
    block = tensors["block"].T
    columns = torch.arange(before.shape[1]) % block.shape[1]

    def change(rows: Tensor, first: int) -> Tensor:
        numbers = torch.arange(first, first + rows.shape[0]) % block.shape[0]
        return rows.add_(block[numbers][:, columns])

    return RowWise(before, change)


def miss_bat(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """Every r × r block X of the i-th r rows becomes `X + X M_i + M_i`.

    Tensors: block (all M) `[d_out / r, r, r]`. Source: `peft.tuners.miss.layer.MissLinear.get_delta_weight`.
    """
    blocks = tensors["block"]
    size = blocks.shape[1]

    def change(rows: Tensor, first: int) -> Tensor:
        last = first + rows.shape[0]
        for index in range(first // size, -(-last // size)):
            start, stop = max(first, index * size), min(last, (index + 1) * size)
            own, block = rows[start - first : stop - first].view(stop - start, -1, size), blocks[index]
            own += own @ block + block[start - index * size : stop - index * size, None, :]
        return rows

    return RowWise(before, change)


def shira(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W` with values added at some places.

    Tensors: shira_weight `[n]`, shira_indices `[2, n]` (rows, columns). Source: `peft.tuners.shira.layer.ShiraLayer.get_delta_weight`.

    Raises:
        CorruptFile: a place outside the weight.
    """
    rows, columns = before.shape
    row, column = tensors["shira_indices"].long()
    if bool(((row < 0) | (row >= rows) | (column < 0) | (column >= columns)).any()):
        raise CorruptFile("shira_indices", f"a place outside a weight of {list(before.shape)}")
    return add_entries(before, row * columns + column, tensors["shira_weight"])
