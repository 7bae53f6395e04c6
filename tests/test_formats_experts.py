"""How a base's files have experts: numbered modules, or one tensor for each parameter."""

from __future__ import annotations

import pytest

from registry.formats.experts import Layout, Piece, Slot
from registry.tensors import DType, StoredTensor, TensorSpec

PLACE = "layers.0.mlp.experts"


def stored(**shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    """Tensors of a base by what follows the container's name; `__` stands for a dot."""
    names = {f"{PLACE}.{name.replace('__', '.').lstrip('_')}": shape for name, shape in shapes.items()}
    return {name: StoredTensor(TensorSpec(name, DType.BF16, shape), "model", 0) for name, shape in names.items()}


NUMBERED = stored(
    **{f"_{expert}__gate_proj__weight": (6, 4) for expert in range(3)},
    **{f"_{expert}__up_proj__weight": (6, 4) for expert in range(3)},
    **{f"_{expert}__down_proj__weight": (4, 6) for expert in range(3)},
)
ONE_TENSOR = stored(down_proj=(3, 4, 6), gate_up_proj=(3, 12, 4), gate_up_proj_bias=(3, 12))


def test_parameters_come_in_the_order_of_their_class() -> None:
    assert Layout(ONE_TENSOR).names(PLACE) == ["gate_up_proj", "gate_up_proj_bias", "down_proj"]
    assert Layout(NUMBERED).names(PLACE) == ["gate_up_proj", "down_proj"]


def test_an_order_that_nobody_knows_is_none() -> None:
    assert Layout(stored(w1=(12, 4), v1=(12, 4))).names(PLACE) == []
    assert Layout(stored(w1=(12, 4))).names(PLACE) == ["w1"]


def test_experts_without_gates_have_ups() -> None:
    layout = Layout(stored(_0__up_proj__weight=(6, 4), _0__down_proj__weight=(4, 6)))
    assert layout.names(PLACE) == ["up_proj", "down_proj"]


def test_pieces_of_one_tensor_are_its_rows() -> None:
    found = Layout(ONE_TENSOR).parameter(PLACE, "gate_up_proj")
    assert found is not None
    assert (found.shape, found.has_experts) == ((12, 4), True)
    assert found.experts[2] == (Piece(name=f"{PLACE}.gate_up_proj", start=0, rows=12, at=24),)


def test_a_matrix_without_experts_is_one_piece() -> None:
    found = Layout(ONE_TENSOR).parameter(PLACE, "gate_up_proj_bias")
    assert found is not None
    assert (found.shape, len(found.experts), found.has_experts) == ((3, 12), 1, False)


def test_pieces_of_numbered_experts_are_their_modules() -> None:
    found = Layout(NUMBERED).parameter(PLACE, "gate_up_proj")
    assert found is not None
    assert found.shape == (12, 4)
    assert found.experts[1] == (
        Piece(name=f"{PLACE}.1.gate_proj.weight", start=0, rows=6),
        Piece(name=f"{PLACE}.1.up_proj.weight", start=6, rows=6),
    )


@pytest.mark.parametrize(
    "odd", [{"_1__up_proj__weight": (6, 5)}, {"_1__up_proj__weight": (5, 4)}, {"_1__up_proj__weight": (6, 4, 1)}]
)
def test_experts_that_differ_make_no_parameter(odd: dict[str, tuple[int, ...]]) -> None:
    assert Layout(NUMBERED | stored(**odd)).parameter(PLACE, "gate_up_proj") is None


def test_a_missing_expert_makes_no_parameter() -> None:
    some = {name: tensor for name, tensor in NUMBERED.items() if ".1.up_proj" not in name}
    assert Layout(some).parameter(PLACE, "gate_up_proj") is None
    assert Layout(some).parameter(PLACE, "down_proj") is not None


def test_a_numbered_experts_module_has_its_slot_in_one_tensor() -> None:
    layout = Layout(ONE_TENSOR)
    for leaf in ("up_proj", "w3"):
        assert layout.slot(f"{PLACE}.2.{leaf}") == Slot(name=f"{PLACE}.gate_up_proj", expert=2, part=1, parts=2)
    assert layout.slot(f"{PLACE}.2.w2") == Slot(name=f"{PLACE}.down_proj", expert=2, part=0, parts=1)
    assert layout.slot(f"{PLACE}.2.other") is None
    assert Layout(NUMBERED).slot(f"{PLACE}.2.up_proj") is None


def test_every_expert_has_the_same_slots() -> None:
    assert list(Layout(ONE_TENSOR).slots_like([f"{PLACE}.1.w1"])) == [f"{PLACE}.{expert}.w1" for expert in range(3)]


def test_a_whole_parameter_is_split_into_the_bytes_of_numbered_experts() -> None:
    whole = StoredTensor(TensorSpec("saved", DType.F32, (3, 12, 4)), "adapter", 1000)
    found = Layout(NUMBERED).split(f"{PLACE}.gate_up_proj", whole)
    assert [name.removeprefix(f"{PLACE}.") for name, _ in found][:3] == [
        "0.gate_proj.weight",
        "0.up_proj.weight",
        "1.gate_proj.weight",
    ]
    assert [part.offset_bytes for _, part in found] == [1000 + 6 * 4 * 4 * index for index in range(6)]
    assert {(part.spec.shape, part.file) for _, part in found} == {((6, 4), "adapter")}
    assert Layout(ONE_TENSOR).split(f"{PLACE}.gate_up_proj", whole) == [(f"{PLACE}.gate_up_proj", whole)]
