"""Changes that depend on the weight that they change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from registry.merge.tuners.dependent import ACTIVATIONS, deft, frod, glora, glora_bias, hira, osf, peanut
from registry.merge.weight import Dense, Weight, whole

SHAPES = [(6, 4), (4, 6), (5, 5)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def in_pieces(weight: Weight) -> Tensor:
    """All rows, asked for one by one and backwards."""
    rows = [weight.rows(number, number + 1) for number in reversed(range(weight.shape[0]))]
    return torch.cat(rows[::-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_hira_scales_every_element(shape: tuple[int, int]) -> None:
    weight, a, b = random(*shape), random(2, shape[1]), random(shape[0], 2)
    assert torch.allclose(in_pieces(hira({"hira_A": a, "hira_B": b}, {}, Dense(weight))), weight * (1 + b @ a))
    embedding = {"hira_embedding_A": b.T.contiguous(), "hira_embedding_B": a.T.contiguous()}
    assert torch.allclose(in_pieces(hira(embedding, {}, Dense(weight))), weight * (1 + b @ a))


def test_hira_of_a_convolution_is_that_of_the_flattened_kernel() -> None:
    weight, a, b = random(3, 2, 5), random(2, 2, 5), random(3, 2, 1)
    found = whole(hira({"hira_A": a, "hira_B": b}, {}, Dense(weight.flatten(1)))).view(3, 2, 5)
    assert torch.allclose(found, weight * (1 + torch.einsum("ort,rik->oik", b, a)))


@pytest.mark.parametrize("form", ["product", "column", "number", "zeros"])
def test_glora_in_every_form(form: str) -> None:
    weight, bias = random(4, 3), random(4, 1)
    tensors: dict[str, Tensor] = {"W": weight, "glora_D.X": random(4), "glora_E.X": random(1)}
    a: Tensor | float = 0.0
    b: Tensor | float = 0.0
    c = torch.zeros(3, 1).double()
    if form == "product":
        tensors |= {f"glora_{side}.Xd": random(4, 2) for side in "AB"} | {
            f"glora_{side}.Xu": random(2, 3) for side in "AB"
        }
        tensors |= {"glora_C.Xd": random(3, 2), "glora_C.Xu": random(2, 1)}
        a = b = tensors["glora_A.Xd"] @ tensors["glora_A.Xu"]
        c = tensors["glora_C.Xd"] @ tensors["glora_C.Xu"]
    elif form == "zeros":
        nothing = torch.zeros(4, 3).double()
        tensors |= {"glora_A.zeros": nothing, "glora_B.zeros": nothing, "glora_C.zeros": c}
    else:
        size = (4, 1) if form == "column" else (1,)
        a, b, c = random(*size), random(*size) * 2, random(3, 1)
        tensors |= {"glora_A.X": a, "glora_B.X": b, "glora_C.X": c}
    assert torch.allclose(in_pieces(glora(tensors, {}, Dense(weight))), weight * (1 + a) + b)
    expected = bias + bias * tensors["glora_D.X"][:, None] + tensors["glora_E.X"] + weight @ c
    assert torch.allclose(in_pieces(glora_bias(tensors, {}, Dense(bias))), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_deft_replaces_what_the_weight_has_in_a_subspace(shape: tuple[int, int]) -> None:
    weight, p, r = random(*shape), random(shape[0], 2), random(2, shape[1])
    q = torch.linalg.qr(p).Q
    found = in_pieces(deft({"deft_P": p, "deft_R": r}, {"method": "qr", "scale": 3.0}, Dense(weight)))
    assert torch.allclose(q.T @ found, 3 * r)
    assert torch.allclose(found - q @ q.T @ found, weight - q @ q.T @ weight)
    emptied = whole(deft({"deft_P": p}, {"method": "qr", "scale": 3.0}, Dense(weight)))
    assert torch.allclose(q.T @ emptied, torch.zeros(2, shape[1]).double())
    relu = whole(deft({"deft_P": p}, {"method": "relu", "scale": 3.0}, Dense(weight)))
    assert torch.allclose(relu, weight - p @ (p.clamp(min=0).T @ weight))


def test_peanut_runs_a_network_over_the_columns() -> None:
    weight, a, b, e, f = random(5, 4), random(2, 5), random(5, 2), random(2, 2), random(2, 2) * 2
    tensors = {"peanut_A": a, "peanut_B": b, "peanut_encoders.0.weight": e, "peanut_decoders.0.weight": f}
    found = in_pieces(peanut(tensors, {"activation": "tanh", "scaling": 0.5}, Dense(weight)))
    for column in range(4):
        z = torch.tanh(a @ weight[:, column])
        z = torch.tanh(f @ torch.tanh(e @ z)) + z
        assert torch.allclose(found[:, column], weight[:, column] + 0.5 * b @ z)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_their_name(name: str) -> None:
    values = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](values), ACT2FN[name](values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_osf_keeps_the_largest_singular_values_and_takes_the_others_from_the_file(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    own = {"osf_svd_params.U_low": u[:, 1:], "osf_svd_params.S_low": s[1:], "osf_svd_params.V_low": v[1:]}
    assert torch.allclose(in_pieces(osf(own, {"dtype": "float64"}, Dense(weight))), weight, rtol=0, atol=1e-5)
    halved = {**own, "osf_svd_params.S_low": s[1:] / 2}
    found = torch.linalg.svdvals(whole(osf(halved, {"dtype": "float64"}, Dense(weight))))
    assert torch.allclose(found, torch.cat([s[:1], s[1:] / 2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_osf_that_has_not_been_trained_changes_nothing_on_a_16_bit_base(dtype: str) -> None:
    """Its factors were rounded when it began; were they taken for exact, the weight would move by that much."""
    weight = random(6, 5)
    u, s, v = (
        part.to(getattr(torch, dtype)).double() for part in torch.linalg.svd(weight.float(), full_matrices=False)
    )
    own = {"osf_svd_params.U_low": u[:, 2:], "osf_svd_params.S_low": s[2:], "osf_svd_params.V_low": v[2:]}
    assert torch.allclose(whole(osf(own, {"dtype": dtype}, Dense(weight))), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_frod_with_the_norms_it_starts_from_is_the_weight(shape: tuple[int, int]) -> None:
    weight, v = random(*shape), random(shape[1], shape[1])
    norms = torch.linalg.solve(v, weight.T).T.norm(dim=0)
    nothing = {"frod_s_indices": torch.zeros(2, 0, dtype=torch.int64), "frod_lambda_s_values": torch.zeros(0).double()}
    assert torch.allclose(in_pieces(frod({"frod_V": v, "frod_lambda_l": norms, **nothing}, {}, Dense(weight))), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_frod_mixes_the_unit_columns(shape: tuple[int, int]) -> None:
    weight, v, strengths = random(*shape), random(shape[1], shape[1]), random(shape[1])
    unit = torch.nn.functional.normalize(torch.linalg.solve(v, weight.T).T, dim=0)
    mixed = torch.diag(strengths)
    mixed[0, 2] += 0.25
    mixed[3, 1] -= 4
    sparse = {
        "frod_s_indices": torch.tensor([[0, 3], [2, 1]]),
        "frod_lambda_s_values": torch.tensor([0.25, -4.0]).double(),
    }
    found = in_pieces(frod({"frod_V": v, "frod_lambda_l": strengths, **sparse}, {}, Dense(weight)))
    assert torch.allclose(found, unit @ mixed @ v.T)


def test_frod_of_dependent_columns_takes_the_pseudo_inverse() -> None:
    weight, v = random(4, 3), torch.diag(torch.tensor([1.0, 2.0, 0.0])).double()
    nothing = {"frod_s_indices": torch.zeros(2, 0, dtype=torch.int64), "frod_lambda_s_values": torch.zeros(0).double()}
    norms = weight.norm(dim=0) / torch.tensor([1.0, 2.0, 1.0])
    found = whole(frod({"frod_V": v, "frod_lambda_l": norms, **nothing}, {}, Dense(weight)))
    assert torch.allclose(found, weight * torch.tensor([1.0, 1.0, 0.0]))
