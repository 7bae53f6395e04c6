"""Tuners whose change depends on the weight that they change: products with it, what lies in its range, its singular values.

Tensors have PEFT's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from registry.changes import Option
from registry.merge.tuners.options import indices, number
from registry.merge.tuners.sums import add_product, blocks, product
from registry.merge.weight import Dense, RowWise, Weight, whole

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
_SMALLEST_NORM = 1e-12  # below it FRoD takes a column for zero


def hira(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W ∘ (1 + B A)`, or `W ∘ (1 + (B A)ᵀ)` of an embedding `[num, dim]`, whose factors are A `[r, num]`, B `[dim, r]`.

    Tensors: hira_A `[r, d_in, k...]`, hira_B `[d_out, r, 1...]`, or hira_embedding_A, hira_embedding_B. Source: `peft.tuners.hira.layer`.
    """
    if "hira_A" in tensors:
        left, right = tensors["hira_B"].flatten(start_dim=1), tensors["hira_A"].flatten(start_dim=1)
    else:
        left, right = tensors["hira_embedding_A"].T, tensors["hira_embedding_B"].T
    return RowWise(before, lambda rows, first: rows.addcmul_(rows, left[first : first + rows.shape[0]] @ right))


def glora(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + W ∘ A + B`.

    Tensors: for each of glora_A and glora_B either `.Xd` `[d_out, r]` and `.Xu` `[r, d_in]`, whose product it is, or `.X`, `[d_out, 1]` or
    `[1]`, or `.zeros` `[d_out, d_in]`. Source: `peft.tuners.glora.layer.GloraLayer.merge`.
    """

    def change(rows: Tensor, first: int) -> Tensor:
        a, b = (_path(tensors, side, first, first + rows.shape[0]) for side in "AB")
        return rows.addcmul_(rows, a).add_(b)

    return RowWise(before, change)


def glora_bias(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`b + b ∘ D + E + W C`, b `[d_out, 1]`.

    Tensors: W `[d_out, d_in]` of the base; for glora_C `.Xd` `[d_in, r]` and `.Xu` `[r, 1]`, or `.X` or `.zeros` `[d_in, 1]`; for glora_D
    and glora_E `.X` `[d_out]` or `[1]`, or `.zeros`. Source: `peft.tuners.glora.layer.GloraLayer.merge`.
    """
    rows = before.shape[0]
    bias, (d, e) = whole(before), (_path(tensors, side, 0, rows).reshape(-1, 1) for side in "DE")
    c = _path(tensors, "C", 0, tensors["W"].shape[1]).expand(tensors["W"].shape[1], 1)
    return Dense(bias + bias * d + e + tensors["W"] @ c)


def _path(tensors: Mapping[str, Tensor], side: str, first: int, last: int) -> Tensor:
    """Rows of one of GLoRA's factors; a single number stands for all of them."""
    name = f"glora_{side}"
    if f"{name}.Xd" in tensors:
        return tensors[f"{name}.Xd"][first:last] @ tensors[f"{name}.Xu"]
    found = tensors[f"{name}.X" if f"{name}.X" in tensors else f"{name}.zeros"]
    return found[first:last] if found.shape[0] > 1 else found


def deft(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + Q (c R - Tᵀ W)`: part of the weight's range is taken out and replaced. Reads the weight twice.

    `Q = P, T = relu(P)` by method `relu`, `Q = T` the orthonormal columns of P by method `qr`.
    Tensors: deft_P `[d_out, r]`, deft_R `[r, d_in]` (none to take out only). Options: method, scale (c).
    Source: `peft.tuners.deft.layer.DeftLinear`.
    """
    p = tensors["deft_P"]
    q, t = (p, p.relu()) if options["method"] == "relu" else (torch.linalg.qr(p).Q,) * 2
    inner = -product(t.T, before)
    if "deft_R" in tensors:
        inner.add_(tensors["deft_R"], alpha=number(options, "scale"))
    return add_product(before, q, inner)


def peanut(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scaling * B z`, z `[r, d_in]` what a small network makes of the weight's columns. Reads the weight twice.

    `z_0 = f(A W)`, then `z_i = f(E_i z_{i-1})` for each encoder, then for each decoder `z = f(F_i z) + z_j`, the z_j in reverse order.
    Tensors: peanut_A `[r, d_out]`, peanut_B `[d_out, r]`, peanut_encoders.0.weight … and peanut_decoders.0.weight … `[r, r]`.
    Options: activation (a name in `ACTIVATIONS`), scaling. Source: `peft.tuners.peanut.layer.Linear._compute_delta_weight`.
    """
    activate = ACTIVATIONS[str(options["activation"])]
    depth = sum(name.startswith("peanut_encoders.") for name in tensors)
    z = activate(product(tensors["peanut_A"], before))
    earlier = []
    for level in range(depth):
        earlier.append(z)
        z = activate(tensors[f"peanut_encoders.{level}.weight"] @ z)
    for level in range(depth):
        z = activate(tensors[f"peanut_decoders.{level}.weight"] @ z) + earlier.pop()
    return add_product(before, tensors["peanut_B"] * number(options, "scaling"), z)


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# By the names of transformers' activations: those without parameters of their own.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "gelu_python": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "swish": functional.silu,
    "mish": functional.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def osf(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + U_low diag(S_low) V_low - U_0 S_0 V_0`, the last term the weight's smallest singular values. Needs the whole matrix.

    Training began with the values that it takes away, from a decomposition in float32, rounded to the weight's dtype; so does this.
    Tensors: osf_svd_params.U_low `[d_out, n]`, .S_low `[n]`, .V_low `[n, d_in]`. Options: dtype (the base's, by its long name).
    Source: `peft.tuners.osf.layer.OSFLayer.update_layer`, `Linear.forward`.
    """
    u, s, v = (tensors[f"osf_svd_params.{name}_low"] for name in "USV")
    dtype = _DTYPES[str(options["dtype"])]
    all_u, all_s, all_v = torch.linalg.svd(whole(before).float(), full_matrices=False)
    kept = all_s.shape[0] - s.shape[0]
    own_u, own_s, own_v = (part.to(dtype).double() for part in (all_u[:, kept:], all_s[kept:], all_v[kept:]))
    left = torch.cat([u * s, -own_u * own_s], dim=1)
    return add_product(before, left, torch.cat([v, own_v]))


def frod(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`U (S + diag(λ)) Vᵀ`, U the columns of `W V⁻ᵀ` made unit vectors, S sparse. Reads the weight twice.

    Tensors: frod_V `[d_in, d_in]`, frod_s_indices `[2, n]` and frod_lambda_s_values `[n]` of S, frod_lambda_l `[d_in]`.
    Source: `peft.tuners.frod.layer.FrodLayer`, `Linear.get_delta_weight`.
    """
    v = tensors["frod_V"]
    solve = _solver(v)
    squares = torch.zeros(v.shape[1], dtype=torch.float64)
    for _, rows in blocks(before):
        squares += solve(rows).square().sum(dim=0)
    norms = squares.sqrt()
    inner = torch.diag(tensors["frod_lambda_l"])
    row, column = indices(tensors, "frod_s_indices", v.shape[0])
    inner.index_put_((row, column), tensors["frod_lambda_s_values"], accumulate=True)
    right = (inner @ v.T) * torch.where(norms > _SMALLEST_NORM, 1 / norms, 0.0)[:, None]
    return RowWise(before, lambda rows, first: solve(rows) @ right)


def _solver(v: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes `X V⁻ᵀ` of rows X; with the pseudo-inverse, as in training, when V has none."""
    factors, pivots, singular = torch.linalg.lu_factor_ex(v)
    if singular.item():
        inverse = torch.linalg.pinv(v, rtol=1e-6).T
        return lambda rows: rows @ inverse
    return lambda rows: torch.linalg.lu_solve(factors, pivots, rows, left=False, adjoint=True)
