"""Tuners whose change is a low-rank product of factors that are put together from trained numbers and fixed or shared ones.

Tensors have PEFT's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from registry.changes import Option
from registry.errors import CorruptFile
from registry.merge.tuners.options import indices, number
from registry.merge.tuners.sums import add_entries, add_product
from registry.merge.weight import Weight

_SMALLEST_NORM = 1e-4  # DeLoRA divides by no less
# Stored projections may have been rounded to 16 bits, which changes them by 2**-9 of their size.
_ROUNDED_BITS = 2.0**-7


def delora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + B diag(λ / r / (‖A_i‖ ‖B_i‖)) A diag(n)`, n the norms that the base's columns had.

    Tensors: delora_A `[r, d_in]`, delora_B `[d_out, r]`, delora_lambda `[1]`, delora_w_norm `[d_in]`.
    Source: `peft.tuners.delora.layer.DeloraLayer`.
    """
    a, b = tensors["delora_A"], tensors["delora_B"]
    sizes = a.norm(dim=1).clamp(min=_SMALLEST_NORM) * b.norm(dim=0).clamp(min=_SMALLEST_NORM)
    return add_product(before, b * (tensors["delora_lambda"] / a.shape[0] / sizes), a * tensors["delora_w_norm"])


def randlora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scale * D`, D or its transpose the product of two shared random bases, whichever has the weight's shape.

    With `small, large` the sizes of the weight's sides and m bases of rank r: `P [r * m, small]` from `λ_ij A_i γ_j`, i running slower, and
    `Q [large, r * m]` from B with j running slower. The two orders differ; that is how such adapters are trained.
    Tensors: randlora_A `[r, 1, >= small]`, randlora_B `[>= large, >= m, r]`, randlora_lambda `[r, m]`, randlora_gamma `[m, small]`.
    Options: scale.
    Source: `peft.tuners.randlora.layer.RandLoraLayer.get_scaled_bases`.
    """
    small, large = min(before.shape), max(before.shape)
    strengths = tensors["randlora_lambda"]
    p = (strengths[:, :, None] * tensors["randlora_A"][:, :, :small] * tensors["randlora_gamma"]).flatten(end_dim=1)
    q = tensors["randlora_B"][:large, : strengths.shape[1]].flatten(start_dim=1) * number(options, "scale")
    return add_product(before, q, p) if before.shape[1] == small else add_product(before, p.T, q.T)


def vblora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + B A`, every piece of length v of A's rows and B's columns a mixture of k vectors of a shared bank.

    Tensors: vblora_vector_bank `[n, v]`; vblora_logits_A `[r, d_in / v, n]` and vblora_logits_B `[d_out / v, r, n]`, or in their place
    `…_topk_indices` `[..., k]` with `…_topk_weights` `[..., k - 1]`, whose last is what the others lack of 1. Options: topk.
    Source: `peft.tuners.vblora.layer.VBLoRALayer`.
    """
    a, b = (_mixture(tensors, f"vblora_logits_{side}", int(number(options, "topk"))) for side in "AB")
    return add_product(before, b.transpose(1, 2).flatten(end_dim=1), a.flatten(start_dim=1))


def _mixture(tensors: Mapping[str, Tensor], name: str, topk: int) -> Tensor:
    """Float64 `[..., v]`."""
    bank = tensors["vblora_vector_bank"]
    if name in tensors:
        logits, places = tensors[name].topk(topk, dim=-1)
        weights = logits.softmax(dim=-1)
    else:
        places = indices(tensors, f"{name}_topk_indices", bank.shape[0])
        most = tensors[f"{name}_topk_weights"]
        weights = torch.cat([most, 1 - most.sum(dim=-1, keepdim=True)], dim=-1)
    return torch.einsum("abk,abkv->abv", weights, bank[places])


def unilora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + B A`, every element of both one of the numbers of a shared vector, times a fixed scale.

    Tensors: unilora_theta_d `[n]`, unilora_indices_A and unilora_scales_A `[r, d_in]`, those of B `[d_out, r]`.
    Source: `peft.tuners.unilora.layer.Linear`.
    """
    numbers = tensors["unilora_theta_d"]
    a, b = (
        numbers[indices(tensors, f"unilora_indices_{side}", numbers.shape[0])] * tensors[f"unilora_scales_{side}"]
        for side in "AB"
    )
    return add_product(before, b, a)


def tinylora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + B (Σ_i v_i P_i) A`, A and B from the base's singular vectors (saved), P random, v shared by a group of layers.

    The file does not say which group a layer is in: that follows from its number in the order of training, and with that number its P was
    drawn. So the number is found by drawing again.
    Tensors: tinylora_A `[r, d_in]`, tinylora_B `[d_out, r]`, tinylora_P `[u, r, r]`, tinylora_v.0, tinylora_v.1, … `[u]`.
    Options: seed, layers (how many there are).
    Source: `peft.tuners.tinylora.layer.TinyLoraLayer`, `TinyLoraModel._create_and_replace`.

    Raises:
        CorruptFile: P was not drawn with this seed for any of the layers.
    """
    projection = tensors["tinylora_P"]
    groups = sum(name.startswith("tinylora_v.") for name in tensors)
    group = 0
    if groups > 1:
        layers = int(number(options, "layers"))
        layer = _number_of_layer(projection, int(number(options, "seed")), layers)
        group = min(layer // max(1, layers // groups), groups - 1)
    core = torch.einsum("i,ijk->jk", tensors[f"tinylora_v.{group}"], projection)
    return add_product(before, tensors["tinylora_B"] @ core, tensors["tinylora_A"])


def _number_of_layer(projection: Tensor, seed: int, layers: int) -> int:
    deviation = projection.shape[1] ** -0.5
    for layer in range(layers):
        generator = torch.Generator().manual_seed(seed + layer)
        drawn = torch.normal(0.0, deviation, projection.shape, generator=generator, dtype=torch.float32)
        if torch.allclose(drawn.double(), projection, rtol=_ROUNDED_BITS, atol=0):
            return layer
    raise CorruptFile("tinylora_P", f"not drawn with projection_seed {seed} for one of {layers} layers")


def supertuning(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W` with values added at some places of the flattened matrix; the low-rank part of Supra is a sum of its own.

    Tensors: supertuning_values `[n]`, supertuning_indices `[n]`. Source: `peft.tuners.supertuning.layer.Linear`.
    """
    places = indices(tensors, "supertuning_indices", before.shape[0] * before.shape[1])
    return add_entries(before, places, tensors["supertuning_values"])
