"""Pictures: that they are drawn the same each time, and how large they are. What they show was looked at."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import factories
import pytest

from registry.comparing import Difference, WeightPair
from registry.curves import chart
from registry.errors import InvalidInput
from registry.plots import curves, heat_map


def difference(names: Iterable[str], relative: float = 0.5) -> Difference:
    return Difference(
        one=factories.checkpoint(version=1), other=factories.checkpoint(version=2), fields=(), metrics=(), unmerged=("", ""),
        weights=tuple(WeightPair(name=name, norms=(2.0, 1.0), distance=2 * relative) for name in names),
    )  # fmt: skip


def size(png: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    return width, height


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_values_give_the_same_bytes(tmp_path: Path, ending: str) -> None:
    found = difference(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3))
    points = chart([factories.checkpoint(version=n, step=n, metrics={"eval_loss": 1 / n}) for n in (1, 2, 3)])
    for number in (1, 2):
        heat_map(found, tmp_path / f"map{number}.{ending}")
        curves([points], tmp_path / f"curve{number}.{ending}")
    for kind in ("map", "curve"):
        first, second = ((tmp_path / f"{kind}{number}.{ending}").read_bytes() for number in (1, 2))
        assert first == second


@pytest.mark.parametrize(("layers", "highest"), [(1, 600), (80, 2500)])
def test_few_and_many_layers_fit(tmp_path: Path, layers: int, highest: int) -> None:
    modules = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    heat_map(difference(f"model.layers.{n}.{m}.weight" for n in range(layers) for m in modules), tmp_path / "map.png")
    width, height = size(tmp_path / "map.png")
    assert width < 1000
    assert 400 < height < highest


def test_experts_of_a_layer_are_one_module(tmp_path: Path) -> None:
    heat_map(difference(f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(128)), tmp_path / "experts.png")
    heat_map(difference(["model.layers.0.mlp.experts.0.up_proj.weight"]), tmp_path / "expert.png")
    assert size(tmp_path / "experts.png") == size(tmp_path / "expert.png")


def test_equal_checkpoints_look_equal_and_weights_in_no_layer_are_named(tmp_path: Path) -> None:
    """Numbers in the picture's text: the scale goes from 0 to 1 though every value is 0."""
    heat_map(difference(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"], relative=0.0), tmp_path / "same.svg")
    text = (tmp_path / "same.svg").read_text()
    assert "<!-- in no layer: lm_head 0.00 -->" in text
    assert "<!-- 1.0 -->" in text


def test_without_a_numbered_layer_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        heat_map(difference(["lm_head.weight"]), tmp_path / "map.png")


def test_more_runs_than_colours(tmp_path: Path) -> None:
    many = [factories.checkpoint(version=n, step=n, run=f"r{n % 40}", metrics={"loss": 1 / n}) for n in range(1, 121)]
    curves([chart(many, "loss"), chart(many[:1], "loss")], tmp_path / "curves.png")
    assert size(tmp_path / "curves.png")[0] == 1125
