"""`ckpt diff` and `ckpt plot`: from what is typed to what is printed and drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from commands import Ckpt

from registry import connect
from registry.manifest import Metric

LITGPT = Path(__file__).parents[1] / "data/litgpt"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def bot(ckpt: Ckpt, tmp_path: Path) -> Ckpt:
    """A registry with `bot`, a run of three steps, and `wide` on the same base."""
    base = tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path / "bot", base=base, steps=(10, 20, 30))
    tiny.write_adapter(tmp_path / "wide", base=base, rank=8, targets=("q_proj", "up_proj"))
    for name in ("bot", "wide"):
        assert ckpt("register", name).code == 0
    return ckpt


def test_a_difference_is_shown(bot: Ckpt) -> None:
    result = bot("diff", "bot@v1", "wide")
    assert result.code == 0
    assert "rank" in result.out
    assert "model.layers.0.mlp.up_proj.weight" in result.out
    assert "6 weights" in result.err
    found = bot("diff", "bot@v1", "wide", "--json").json
    assert (found["one"], found["other"], found["same"]) == ("bot@v1", "wide@v1", False)
    assert {pair["name"] for pair in found["weights"]} >= {"model.layers.1.self_attn.v_proj.weight"}


def test_metrics_say_what_is_better(bot: Ckpt) -> None:
    lines = bot("diff", "bot@v1", "bot@v3").out.splitlines()
    assert next(line for line in lines if line.startswith("eval_loss")).endswith("-0.2 better")


def test_the_same_checkpoint_twice(bot: Ckpt) -> None:
    result = bot("diff", "bot@v1", "bot@v1")
    assert (result.code, "the same files" in result.err) == (0, True)


def test_different_bases(bot: Ckpt, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "other-base", seed=5)
    tiny.write_adapter(tmp_path / "stranger", base=base)
    assert bot("register", "stranger").code == 0
    result = bot("diff", "bot", "stranger")
    assert result.code == 5
    assert "base (" in result.err
    assert "other-base (" in result.err


@pytest.mark.parametrize("name", ["diff.png", "diff.svg"])
def test_pictures_are_drawn(bot: Ckpt, tmp_path: Path, name: str) -> None:
    assert bot("diff", "bot@v1", "wide", "--plot", name).code == 0
    assert bot("plot", "bot", "--metric", "loss", "--metric", "eval_loss", "--out", f"curve-{name}").code == 0
    for path in (tmp_path / name, tmp_path / f"curve-{name}"):
        data = path.read_bytes()
        assert data.startswith(PNG) if name.endswith("png") else b"<svg" in data


def test_a_curve_in_the_terminal(bot: Ckpt) -> None:
    result = bot("plot", "bot", "--metric", "loss")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "loss"
    assert "★ bot@v3  step 30  1.7" in lines
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.out


def test_points_as_json(bot: Ckpt) -> None:
    (found,) = bot("plot", "bot", "--metric", "loss", "--json").json
    assert (found["metric"], found["best"]) == ("loss", "bot@v3")
    assert [(point["step"], point["ref"]) for point in found["points"]] == [
        (10, "bot@v1"),
        (20, "bot@v2"),
        (30, "bot@v3"),
    ]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("plot", "nothing"), 3, "no adapter 'nothing'"),
        (("plot", "bot", "--metric", "nope"), 3, "nope"),
        (("plot", "wide"), 3, "metric"),
        (("plot", "bot", "--metric", "loss", "--out", "x.gif"), 2, ".png"),
        (("plot", "bot", "--metric", "loss", "--out", "no/such/place.png"), 8, "no such file"),
        (("diff", "bot", "nobody"), 3, "nobody"),
        (("diff", "bot@v1", "bot@v2", "--plot", "x.bmp"), 2, ".png"),
    ],
)
def test_wrong_words(bot: Ckpt, words: tuple[str, ...], code: int, said: str) -> None:
    result = bot(*words)
    assert result.code == code
    assert said in result.err


def test_without_matplotlib_the_command_to_install_it_is_said(bot: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for words in (
        ("plot", "bot", "--metric", "loss", "--out", "x.png"),
        ("diff", "bot@v1", "bot@v2", "--plot", "x.png"),
    ):
        result = bot(*words)
        assert (result.code, result.out) == (2, "")
        assert "ckpt-registry[plot]" in result.err


def test_a_declared_direction_decides_what_is_better(bot: Ckpt) -> None:
    """Nothing in the name tells; what is declared for one side is enough."""
    assert bot("metric", "add", "bot@v1", "regret=3").code == 0
    assert bot("metric", "add", "bot@v2", "regret=2", "--min").code == 0
    line = next(line for line in bot("diff", "bot@v1", "bot@v2").out.splitlines() if line.startswith("regret"))
    assert line.endswith("-1 better")


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_table(bot: Ckpt) -> None:
    result = bot("diff", "bot@v1", "wide", "--plot", "no/such/place.png")
    assert result.code == 8
    assert "up_proj" in result.out


def test_what_is_no_change_of_weights_is_said_not_to_be_compared(ckpt: Ckpt) -> None:
    """A gated prefix, beside scales and shifts that are compared."""
    for name in ("adapter_v2-llama", "lora-llama-qv"):
        assert ckpt("register", str(LITGPT / name), "--base", str(LITGPT / "base-llama-gqa")).code == 0
    result = ckpt("diff", "adapter_v2-llama", "lora-llama-qv")
    assert result.code == 0
    assert "not compared of adapter_v2-llama@v1: gated_prefix" in result.err
    assert "transformer.h.0" in result.out


def test_numbers_of_other_data_are_not_called_better(bot: Ckpt) -> None:
    with connect() as registry:
        for ref in ("bot@v1", "bot@v2"):
            registry.add_metrics(registry.resolve(ref), [Metric(name="hard/loss", value=1.0, data=ref.ljust(64, "0"))])
    line = next(line for line in bot("diff", "bot@v1", "bot@v2").out.splitlines() if line.startswith("hard/loss"))
    assert line.endswith("measured on other data")
