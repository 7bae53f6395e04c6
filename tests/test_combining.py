"""New adapters made of several: what is in them, what they lose, where they come from, and what cannot be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from merging import read_weights
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from registry.changes import Change, LowRank, Matrix, Resolution
from registry.combining import Making, grid, last_of
from registry.errors import InUse, InvalidInput, InvalidRecipe, NotFinite, NothingMerged, Refused
from registry.formats import Adapter
from registry.formats.peft_combined import lay_out
from registry.manifest import Checkpoint, Format, Metric, Origin
from registry.mixing import Mixture
from registry.registering import Registration
from registry.selection import best
from registry.service import Registry
from registry.tensors import DType, StoredTensor, TensorSpec

Q, V, DOWN = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"
Make = Callable[..., Checkpoint]
Values = NDArray[np.float64]


@pytest.fixture
def make(ckpt: Registry, base: Path, tmp_path: Path) -> Make:
    """Registers an adapter of its own name on one base; `whole` are tensors that it saves whole, by PEFT's key."""

    def register(name: str, whole: dict[str, NDArray[np.float32]] | None = None, **options: Any) -> Checkpoint:
        folder = tiny.write_adapter(tmp_path / name, base=base, **options)
        if whole:
            path = folder / "adapter_model.safetensors"
            save_file({**load_file(path), **whole}, path, {"format": "pt"})
        return ckpt.register(str(folder), Registration(adapter=name)).registered[0].checkpoint

    return register


def files_of(ckpt: Registry, checkpoint: Checkpoint, folder: Path) -> Path:
    target = folder / f"pulled-{checkpoint.digest.short}"
    ckpt.pull(checkpoint, target)
    return target


def delta(folder: Path, module: str, scale: float) -> Values:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scale * (b @ a)


def assert_merges_alike(ckpt: Registry, one: Checkpoint, *inputs: Checkpoint, folder: Path, **mixture: Any) -> None:
    """A combined adapter, merged, gives what merging its inputs together gives, up to the rounding of factors and results to float32."""
    for name, checkpoints, how in (("one", (one,), {}), ("all", inputs, mixture)):
        ckpt.merge(ckpt.plan(*checkpoints, mixture=Mixture(**how)), out=str(folder / name))
    found, expected = read_weights(folder / "one"), read_weights(folder / "all")
    assert found.keys() == expected.keys()
    for tensor, values in found.items():
        assert np.allclose(values.numpy(), expected[tensor].numpy(), rtol=1e-5, atol=2e-5), tensor


# -- exact


def test_a_combined_adapter_is_the_weighted_sum_at_the_summed_rank(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2, rank=6, targets=("q_proj", "down_proj"))
    made = ckpt.combine(a, b, mixture=Mixture(weights=(0.7, -0.3)))
    assert (made.rank, made.lost, made.worst) == (10, 0.0, ("", 0.0))
    folder = files_of(ckpt, made.checkpoint, tmp_path)
    both = 0.7 * delta(tmp_path / "a", Q, 2.0) - 0.3 * delta(tmp_path / "b", Q, 2.0)
    for module, expected in (
        (Q, both), (V, 0.7 * delta(tmp_path / "a", V, 2.0)), (DOWN, -0.3 * delta(tmp_path / "b", DOWN, 2.0)),
    ):  # fmt: skip
        assert np.allclose(delta(folder, module, 1.0), expected, rtol=1e-5, atol=1e-5)
    assert_merges_alike(ckpt, made.checkpoint, a, b, weights=(0.7, -0.3), folder=tmp_path)


def test_scaling_flags_and_patterns_of_the_inputs_are_folded_in(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a = make("a", seed=1, config={"use_rslora": True, "alpha_pattern": {"q_proj": 3}})
    b = make("b", seed=2, config={"lora_alpha": 1})
    made = ckpt.combine(a, b)
    folder = files_of(ckpt, made.checkpoint, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert not config.keys() & {"use_rslora", "rank_pattern", "alpha_pattern"}
    expected = (delta(tmp_path / "a", Q, 3 / 4**0.5) + delta(tmp_path / "b", Q, 1 / 4)) / 2
    assert np.allclose(delta(folder, Q, 1.0), expected, rtol=1e-5, atol=1e-5)
    assert_merges_alike(ckpt, made.checkpoint, a, b, folder=tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"lambda": 0.4}), ("average", {}), ("interpolate", {"t": 0.3}), ("ema", {"decay": 0.9}),
        ("slerp", {"t": 0.3}), ("nuslerp", {}), ("multislerp", {}), ("karcher", {}), ("model_stock", {}),
    ],
)  # fmt: skip
def test_every_exact_method_makes_the_adapter_that_merging_makes(
    ckpt: Registry, make: Make, tmp_path: Path, method: str, options: dict[str, float]
) -> None:
    a, b = make("a", seed=1), make("b", seed=1, config={"lora_alpha": 3})
    c = make("c", seed=2)
    inputs = (a, c) if method in ("slerp", "nuslerp", "interpolate") else (a, b, c)
    made = ckpt.combine(*inputs, mixture=Mixture(method=method, options=options))
    assert made.lost == 0.0
    assert_merges_alike(ckpt, made.checkpoint, *inputs, method=method, options=options, folder=tmp_path)


def test_tensors_saved_whole_go_along(ckpt: Registry, make: Make, base: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    key, head = "base_model.model.lm_head.weight", random.standard_normal((32, 16)).astype(np.float32)
    a = make("a", seed=1, config={"modules_to_save": ["lm_head"]}, whole={key: head})
    b = make("b", seed=2)
    made = ckpt.combine(a, b, mixture=Mixture(weights=(0.25, 0.75)))
    folder = files_of(ckpt, made.checkpoint, tmp_path)
    before = load_file(base / "model.safetensors")["lm_head.weight"].astype(np.float64)
    found = load_file(folder / "adapter_model.safetensors")[key]
    assert np.array_equal(found, (before + 0.25 * (head - before)).astype(np.float32))
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    assert_merges_alike(ckpt, made.checkpoint, a, b, weights=(0.25, 0.75), folder=tmp_path)


def test_inputs_without_weight_leave_no_trace(ckpt: Registry, make: Make) -> None:
    made = ckpt.combine(make("a", seed=1), make("b", seed=2, rank=6), mixture=Mixture(weights=(1.0, 0.0)))
    assert made.rank == 4
    with pytest.raises(NothingMerged):
        ckpt.combine(ckpt.resolve("a"), ckpt.resolve("b"), mixture=Mixture(weights=(0.0, 0.0)))


def test_what_cancels_out_or_overflows_is_no_adapter(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=1, config={"lora_alpha": 4})
    with pytest.raises(NothingMerged):
        ckpt.combine(a, b, mixture=Mixture(method="task_arithmetic", options={"lambda": 0.0}))
    with pytest.raises(NotFinite):
        ckpt.combine(a, b, mixture=Mixture(weights=(3e38, 3e38)))
    assert [each.ref for each in ckpt.checkpoints()] == ["a@v1", "b@v1"]


def test_targets_are_named_shortly_only_where_that_is_exact(
    ckpt: Registry, make: Make, base: Path, tmp_path: Path
) -> None:
    first_layer = {"target_modules": ["model.layers.0.self_attn.q_proj"]}
    folder = tiny.write_adapter(tmp_path / "part", base=base, targets=("q_proj",), config=first_layer)
    path = folder / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if ".layers.0." in name}, path)
    part = ckpt.register(str(folder)).registered[0].checkpoint
    assert ckpt.combine(part, mixture=Mixture(weights=(0.5,))).checkpoint.manifest.targets == (
        "model.layers.0.self_attn.q_proj",
    )
    assert ckpt.combine(part, make("a")).checkpoint.manifest.targets == ("q_proj", "v_proj")


def test_the_tokenizer_goes_along(ckpt: Registry, base: Path, tmp_path: Path) -> None:
    checkpoints = []
    for number in range(2):
        folder = tiny.write_adapter(tmp_path / f"adapter-{number}", base=base, seed=number)
        tiny.write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 1}}})
        tiny.write_json(folder / "trainer_state.json", {"global_step": 7, "log_history": []})
        checkpoints.append(ckpt.register(str(folder)).registered[0].checkpoint)
    made = ckpt.combine(*checkpoints).checkpoint
    assert [entry.path for entry in made.manifest.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    assert made.manifest.tokenizer
    assert made.step is None


# -- cut to a rank


def test_a_sum_cut_to_a_rank_is_the_nearest_there_is_and_the_loss_is_told(
    ckpt: Registry, make: Make, tmp_path: Path
) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    made = ckpt.combine(a, b, rank=3)
    folder = files_of(ckpt, made.checkpoint, tmp_path)
    exact = {m: (delta(tmp_path / "a", m, 2.0) + delta(tmp_path / "b", m, 2.0)) / 2 for m in modules()}
    lost = wanted = 0.0
    shares = {}
    for module, values in exact.items():
        u, sizes, v = np.linalg.svd(values)
        nearest = (u[:, :3] * sizes[:3]) @ v[:3]
        assert np.allclose(delta(folder, module, 1.0), nearest, rtol=1e-4, atol=1e-4)
        lost, wanted = lost + (sizes[3:] ** 2).sum(), wanted + (sizes**2).sum()
        shares[module] = float(((sizes[3:] ** 2).sum() / (sizes**2).sum()) ** 0.5)
    assert made.rank == 3
    assert made.lost == pytest.approx((lost / wanted) ** 0.5, rel=1e-4)
    worst = max(shares, key=lambda module: shares[module])
    assert made.worst == (f"model.{worst}.weight", pytest.approx(shares[worst], rel=1e-4))
    assert made.checkpoint.origin is not None
    assert made.checkpoint.origin.detail["lost"] == made.lost


def modules() -> list[str]:
    return [f"layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]


def test_cat_and_svd_are_the_sum_whole_and_cut(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2, rank=6)
    cat = ckpt.combine(a, b, mixture=Mixture(method="cat", weights=(1.0, 1.0)))
    svd = ckpt.combine(a, b, mixture=Mixture(method="svd", weights=(1.0, 1.0)))
    assert (cat.rank, svd.rank, str(cat.checkpoint.adapter), str(svd.checkpoint.adapter)) == (
        10,
        6,
        "a-b-cat",
        "a-b-svd",
    )
    assert cat.recipe == svd.recipe
    assert svd.lost > 0
    with pytest.raises(InvalidRecipe):
        ckpt.combine(a, b, mixture=Mixture(method="cat"), rank=3)


def test_ranks_beyond_what_there_is_are_padded_with_zeros(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2, rank=2, targets=("down_proj",))
    made = ckpt.combine(a, b, rank=40)
    assert made.rank == 4  # down_proj has 2, and zeros
    assert made.lost == pytest.approx(0.0, abs=1e-6)
    assert_merges_alike(ckpt, made.checkpoint, a, b, folder=tmp_path)


def test_elementwise_methods_are_cut_from_full_rank(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    mixture = {"method": "ties", "options": {"density": 0.4}}
    with pytest.raises(InvalidRecipe) as caught:
        ckpt.combine(a, b, mixture=Mixture(**mixture))
    assert caught.value.field == "rank"
    whole = ckpt.combine(a, b, mixture=Mixture(**mixture), rank=16)
    assert whole.lost == pytest.approx(0.0, abs=1e-6)
    assert_merges_alike(ckpt, whole.checkpoint, a, b, **mixture, folder=tmp_path)
    assert 0.05 < ckpt.combine(a, b, mixture=Mixture(**mixture), rank=6).lost < 0.9


# -- where they come from


def test_what_it_was_made_of_is_recorded(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    making = Making(adapter="team/both", note="for the demo", tags={"team": "nlu"})
    made = ckpt.combine(a, b, mixture=Mixture(weights=(0.7, 0.3)), making=making)
    found = ckpt.resolve("team/both")
    assert found == made.checkpoint
    assert found.origin == Origin(
        action="combine",
        parents=("a@v1", "b@v1"),
        detail={
            "method": "linear", "shares": [0.7, 0.3], "options": {}, "rank": 8, "lost": 0.0,
            "inputs": [a.digest.hex, b.digest.hex],
        },
    )  # fmt: skip
    assert (found.base, found.source, found.run) == (a.base, "combine of a@v1, b@v1", "combined")
    assert (found.notes[0].text, found.tags) == ("for the demo", {"team": "nlu"})
    assert ckpt.details(a).children == ckpt.details(b).children == ("team/both@v1",)
    with pytest.raises(InUse, match="team/both@v1"):
        ckpt.remove(a)
    assert ckpt.history()[-1].action == "register"


def test_the_same_again_is_known(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    first, again = ckpt.combine(a, b), ckpt.combine(a, b)
    assert (first.created, again.created) == (True, False)
    assert first.checkpoint == again.checkpoint
    assert str(first.checkpoint.adapter) == "a-b-linear"


def test_a_combined_adapter_is_combined_again(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b, c = (make(name, seed=seed) for seed, name in enumerate("abc"))
    half = ckpt.combine(a, b).checkpoint
    made = ckpt.combine(half, c, mixture=Mixture(weights=(2 / 3, 1 / 3))).checkpoint
    assert_merges_alike(ckpt, made, a, b, c, folder=tmp_path)


# -- along a run


def test_a_run_is_averaged_up_to_a_checkpoint_and_its_copies_count_once(
    ckpt: Registry, base: Path, tmp_path: Path
) -> None:
    run = tiny.write_run(
        tmp_path / "bot", base=base, steps=(10, 20, 30)
    )  # its final adapter has the weights of step 30
    assert len(ckpt.register(str(run)).registered) == 4
    assert [each.step for each in last_of(ckpt.trail(ckpt.resolve("bot@run:1")), 2)] == [20, 30]
    assert [each.step for each in last_of(ckpt.trail(ckpt.resolve("bot@run:bot")), None)] == [10, 20, 30]
    assert [each.step for each in last_of(ckpt.trail(ckpt.resolve("bot@step:20")), 2)] == [10, 20]
    for count in (0, 4):
        with pytest.raises(InvalidRecipe, match="3 checkpoints with weights of their own"):
            last_of(ckpt.trail(ckpt.resolve("bot")), count)
    made = ckpt.combine(*last_of(ckpt.trail(ckpt.resolve("bot")), 3), mixture=Mixture(method="average")).checkpoint
    folder = files_of(ckpt, made, tmp_path)
    mean = sum(delta(run / f"checkpoint-{step}", Q, 2.0) for step in (10, 20, 30)) / 3
    assert np.allclose(delta(folder, Q, 1.0), mean, rtol=1e-5, atol=1e-5)
    assert str(made.adapter) == "bot-average"


# -- candidates


def test_candidates_are_versions_of_one_adapter_that_metrics_rank(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    made = ckpt.candidates(a, b, mixture=Mixture(method="interpolate"), option="t", values=grid("0:1:0.5"))
    assert [(each.checkpoint.ref, each.checkpoint.tags["t"], each.rank) for each in made] == [
        ("a-b-sweep@v1", "0", 4), ("a-b-sweep@v2", "0.5", 8), ("a-b-sweep@v3", "1", 4),
    ]  # fmt: skip
    for each, value in zip(made, (0.7, 0.9, 0.2), strict=True):
        ckpt.add_metrics(each.checkpoint, [Metric(name="accuracy", value=value)])
    ranking = best(ckpt.checkpoints("a-b-sweep"), metric="accuracy")
    chosen = ranking.groups[0].checkpoints[0]
    assert chosen.tags["t"] == "0.5"
    assert_merges_alike(ckpt, chosen, a, b, method="interpolate", options={"t": 0.5}, folder=tmp_path)


def test_seeds_make_candidates_too(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    made = ckpt.candidates(
        a, b, mixture=Mixture(method="dare_linear"), option="seed", values=grid("1,2"), rank=8, making=Making(adapter="draws")
    )  # fmt: skip
    assert len({each.checkpoint.digest for each in made}) == 2
    assert [each.checkpoint.tags for each in made] == [{"seed": "1"}, {"seed": "2"}]


def test_ranges_and_lists() -> None:
    assert [str(value) for value in grid("0:1:0.1")] == ["0.0", *(f"0.{n}" for n in range(1, 10)), "1.0"]
    assert grid("0:1:0.3") == tuple(map(Decimal, ("0", "0.3", "0.6", "0.9")))
    assert grid("1:0:-0.5") == tuple(map(Decimal, ("1", "0.5", "0")))
    assert grid("0.5,0.7,0.5") == (Decimal("0.5"), Decimal("0.7"))


@pytest.mark.parametrize("text", ["", "0:1", "0:1:0", "0:1:-0.1", "a:1:0.1", "0:1:0.0001", "nan", "0:inf:1", "1,,2"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(InvalidInput):
        grid(text)


# -- what cannot be made


def codes(act: Callable[[], object]) -> set[str]:
    with pytest.raises(Refused) as caught:
        act()
    return {each.code for each in caught.value.report.findings if each.level.value == "refused"}


def test_litgpt_adapters_are_sent_to_merge(ckpt: Registry, tmp_path: Path) -> None:
    base = tiny.write_litgpt_base(tmp_path / "litgpt")
    run = tiny.write_litgpt_run(tmp_path / "run", base=str(base))
    one, two, _ = (each.checkpoint for each in ckpt.register(str(run)).registered)
    with pytest.raises(Refused) as caught:
        ckpt.combine(one, two)
    assert {each.code for each in caught.value.report.findings if each.level.value == "refused"} == {"not_combined"}
    assert any("ckpt merge" in each.advice for each in caught.value.report.findings)


def test_grown_vocabularies_are_sent_to_merge(ckpt: Registry, make: Make) -> None:
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    grown: dict[str, Any] = {
        "config": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "whole": {name: np.ones((36, 16), np.float32) for name in names},
    }
    a, b = make("a", seed=1, **grown), make("b", seed=2, **grown)
    assert codes(lambda: ckpt.combine(a, b)) == {"not_combined"}


def test_differently_wrapped_models_have_no_common_names(
    ckpt: Registry, make: Make, base: Path, tmp_path: Path
) -> None:
    folder = tiny.write_adapter(tmp_path / "wrapped", base=base, seed=2)
    path = folder / "adapter_model.safetensors"
    renamed = {
        name.replace("base_model.model.", "base_model.model.inner."): values for name, values in load_file(path).items()
    }
    save_file(renamed, path, {"format": "pt"})
    wrapped = ckpt.register(str(folder)).registered[0].checkpoint
    assert codes(lambda: ckpt.combine(make("a"), wrapped)) == {"names_differ"}
    assert ckpt.plan(ckpt.resolve("a"), wrapped).report.verdict.value != "refused"


def test_bases_must_be_the_same(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    other = tiny.write_adapter(tmp_path / "other", base=tiny.write_base(tmp_path / "another", seed=9))
    theirs = ckpt.register(str(other)).registered[0].checkpoint
    assert codes(lambda: ckpt.combine(make("a"), theirs)) == {"base_weights"}
    assert codes(
        lambda: ckpt.candidates(ckpt.resolve("a"), theirs, mixture=Mixture(), option="t", values=grid("0,1"))
    ) == {"base_weights"}


def test_a_rank_is_at_least_one(ckpt: Registry, make: Make) -> None:
    with pytest.raises(InvalidRecipe):
        ckpt.combine(make("a"), rank=0)


def attention(name: str) -> tuple[Adapter, Resolution]:
    """An adapter with factors for one matrix, and what it does to the base's."""
    shapes = {"A": (2, 6), "B": (4, 2)}
    a, b = (
        StoredTensor(TensorSpec(f"base_model.model.{name}.lora_{factor}.weight", DType.F32, shape), "w", 0)
        for factor, shape in shapes.items()
    )
    adapter = Adapter(
        format=Format.PEFT, method="lora", rank=2, alpha=2.0, scaling="alpha/r", targets=(name,), base_name="", weights_file="w",
        tensors=(a, b), config={}, files=("w",),
    )  # fmt: skip
    step = LowRank(left=Matrix.of(b), right=Matrix.of(a), scale=1.0)
    target = TensorSpec(f"{name}.weight", DType.F32, (4, 6))
    change = Change(target=target, source=StoredTensor(target, "base", 0), steps=(step,))
    return adapter, Resolution(changes=(change,), findings=())


def test_matrices_that_peft_treats_in_its_own_way_are_sent_to_merge() -> None:
    adapter, united = attention("attn.out_proj")
    of_one_module = lay_out([adapter], united, {"attn.out_proj.weight", "attn.in_proj_weight"})
    assert [each.code for each in of_one_module.findings] == ["not_combined"]
    plain = lay_out([adapter], united, {"attn.out_proj.weight", "attn.q_proj.weight"})
    assert not plain.findings
    assert plain.layers["attn.out_proj.weight"].module == "attn.out_proj"


@pytest.mark.parametrize("flag", ["ensure_weight_tying", "target_parameters"])
def test_flags_that_say_more_than_factors_are_sent_to_merge(flag: str) -> None:
    adapter, united = attention("attn.q_proj")
    flagged = replace(adapter, config={flag: True})
    assert [each.found for each in lay_out([adapter, flagged], united, {"attn.q_proj.weight"}).findings] == [flag]
