"""Merging several adapters into their base: what becomes of each tensor, and what cannot go together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from factories import digest
from merging import assert_rounded_once, read_weights, same
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from registry.changes import Change, Combined, LowRank, Matrix, Resolution
from registry.errors import CorruptFile, InvalidRecipe, NothingMerged, PathNotFound, Refused
from registry.formats.base_model import Embeddings
from registry.locations import LocalLocation
from registry.manifest import Checkpoint, Recipe, RecipeInput
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry
from registry.tensors import DType, StoredTensor, TensorSpec, read_safetensors_header
from registry.united import UnitedFolder, unite, without_copies

Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
DOWN, EMBEDDING, HEAD = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(ckpt: Registry, base: Path, tmp_path: Path) -> Make:
    """Registers an adapter of its own name on one base; `whole` are tensors that it saves whole, by PEFT's key."""

    def register(name: str, whole: dict[str, NDArray[np.float32]] | None = None, **options: Any) -> Checkpoint:
        folder = tiny.write_adapter(tmp_path / name, base=options.pop("base", base), **options)
        if whole:
            path = folder / "adapter_model.safetensors"
            save_file({**load_file(path), **whole}, path, {"format": "pt"})
        return ckpt.register(str(folder), Registration(adapter=name)).registered[0].checkpoint

    return register


def merged(ckpt: Registry, out: Path, *inputs: Checkpoint, **mixture: Any) -> dict[str, Tensor]:
    ckpt.merge(ckpt.plan(*inputs, mixture=Mixture(**mixture)), out=str(out))
    return read_weights(out)


def delta(folder: Path, name: str, scale: float = 2.0) -> NDArray[np.float64]:
    """What a tiny adapter adds to a weight, in float64; zero where it has no factors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{key}.lora_A.weight" not in tensors:
        return np.zeros(1)
    a, b = (tensors[f"{key}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scale * (b @ a)


def weight(base: Path, name: str) -> NDArray[np.float64]:
    return load_file(base / "model.safetensors")[name].astype(np.float64)


def refused(act: Callable[[], object]) -> dict[str, str]:
    """Codes of a refusal, with where each was found."""
    with pytest.raises(Refused) as caught:
        act()
    return {each.code: each.where for each in caught.value.report.findings if each.level.value == "refused"}


# -- sums


def test_a_weighted_sum_is_rounded_once_from_the_exact_value(
    ckpt: Registry, make: Make, base: Path, tmp_path: Path
) -> None:
    a, b = make("a", seed=1), make("b", seed=2, rank=6, targets=("q_proj", "down_proj"))
    planned = ckpt.plan(a, b, mixture=Mixture(weights=(0.7, -0.3)), dtype=DType.BF16)
    ckpt.merge(planned, out=str(tmp_path / "out"))
    found = read_weights(tmp_path / "out")
    for name in (Q, K, V, DOWN):
        exact = torch.from_numpy(
            weight(base, name) + 0.7 * delta(tmp_path / "a", name) - 0.3 * delta(tmp_path / "b", name)
        )
        assert_rounded_once(found[name], exact, torch.tensor(1e-12))


def test_without_weights_a_sum_is_the_mean(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    inputs = [make(name, seed=seed) for seed, name in enumerate("abc")]
    mean = merged(ckpt, tmp_path / "mean", *inputs)
    assert not same(mean, merged(ckpt, tmp_path / "average", *inputs, method="average"))
    assert not same(mean, merged(ckpt, tmp_path / "said", *inputs, weights=(1 / 3,) * 3))


def test_all_weight_on_one_input_is_that_input_alone(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    alone = merged(ckpt, tmp_path / "alone", a)
    for number, mixture in enumerate(
        [
            {"weights": (1.0, 0.0)},
            {"method": "interpolate", "options": {"t": 0.0}},
            {"method": "ema", "options": {"decay": 0.0}},
        ]
    ):
        order = (b, a) if mixture.get("method") == "ema" else (a, b)
        assert not same(alone, merged(ckpt, tmp_path / str(number), *order, **mixture))


def test_one_input_can_be_scaled(ckpt: Registry, make: Make, base: Path, tmp_path: Path) -> None:
    found = merged(ckpt, tmp_path / "out", make("a"), weights=(0.5,))
    assert np.allclose(found[Q].numpy(), weight(base, Q) + 0.5 * delta(tmp_path / "a", Q), rtol=1e-6, atol=1e-6)


def test_sums_of_factors_stay_low_rank_steps_and_others_are_combined(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=2, targets=("q_proj", "k_proj"))
    kinds = {
        method: {
            change.target.name: [type(step) for step in change.steps]
            for change in ckpt.plan(a, b, mixture=Mixture(method=method)).plan.computed
        }
        for method in ("average", "ties")
    }
    assert kinds["average"][Q] == [LowRank, LowRank]
    assert kinds["average"][K] == [LowRank]
    assert kinds["ties"] == {name: [Combined] for name in kinds["average"]}


def test_an_input_that_leaves_a_tensor_alone_counts_as_zero(
    ckpt: Registry, make: Make, base: Path, tmp_path: Path
) -> None:
    """Model stock's share depends on how many inputs there are: those that do not touch the tensor are among them."""
    inputs = [make("a"), make("b", config={"lora_alpha": 2}), make("c", targets=("v_proj",))]
    found = merged(ckpt, tmp_path / "out", *inputs, method="model_stock")
    mean_cosine = 1 / 3  # a and b point the same way, c nowhere
    share = 3 * mean_cosine / (1 + 2 * mean_cosine)
    total = delta(tmp_path / "a", Q) + delta(tmp_path / "b", Q, scale=0.5)
    assert np.allclose(found[Q].numpy(), weight(base, Q) + share * total / 3, rtol=1e-5, atol=1e-5)


def test_tensors_saved_whole_are_task_vectors_with_the_same_shares(
    ckpt: Registry, make: Make, base: Path, tmp_path: Path
) -> None:
    head = np.random.default_rng(5).standard_normal((32, 16)).astype(np.float32)
    a = make("a", seed=1, config={"modules_to_save": ["lm_head"]}, whole={"base_model.model.lm_head.weight": head})
    b = make("b", seed=2)
    found = merged(ckpt, tmp_path / "out", a, b, weights=(0.25, 0.75))
    expected = weight(base, HEAD) + 0.25 * (head.astype(np.float64) - weight(base, HEAD))
    assert np.array_equal(found[HEAD].numpy(), expected.astype(np.float32))


def test_litgpt_adapters_go_together_too(ckpt: Registry, tmp_path: Path) -> None:
    base = tiny.write_litgpt_base(tmp_path / "litgpt")
    run = tiny.write_litgpt_run(tmp_path / "run", base=str(base))
    inputs = [each.checkpoint for each in ckpt.register(str(run), Registration(adapter="lit")).registered]
    singles = []
    for each in inputs[:2]:
        ckpt.merge(ckpt.plan(each), out=str(tmp_path / each.digest.hex))
        singles.append(torch.load(tmp_path / each.digest.hex / "lit_model.pth"))
    ckpt.merge(ckpt.plan(*inputs[:2]), out=str(tmp_path / "both"))
    found = torch.load(tmp_path / "both" / "lit_model.pth")
    name = "transformer.h.0.attn.qkv.weight"
    assert torch.allclose(found[name], (singles[0][name] + singles[1][name]) / 2, atol=1e-5)
    assert not torch.allclose(found[name], singles[0][name], atol=1e-2)


# -- the record


def test_merge_json_tells_inputs_weights_method_and_options_but_no_names(
    ckpt: Registry, make: Make, tmp_path: Path
) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    result = ckpt.merge(
        ckpt.plan(a, b, mixture=Mixture(method="dare_ties", weights=(0.5, 0.25), options={"density": 0.75, "seed": 9})),
        out=str(tmp_path / "out"),
    )
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [(each["digest"], each["weight"]) for each in told["inputs"]] == [
        (str(a.digest), 0.5),
        (str(b.digest), 0.25),
    ]
    assert told["recipe"]["method"] == "dare_ties"
    assert told["recipe"]["options"] == {"density": 0.75, "lambda": 1.0, "seed": 9}
    assert told["shares"] is None
    assert "a@v1" not in json.dumps(told)
    assert result.merged.checkpoints == ("a@v1", "b@v1")
    assert ckpt.merged()[0].recipe == result.merged.recipe


def test_the_same_recipe_finds_its_result_and_every_part_of_it_counts(
    ckpt: Registry, make: Make, tmp_path: Path
) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    mixtures: list[dict[str, Any]] = [
        {}, {"weights": (0.4, 0.6)}, {"method": "average"}, {"method": "ties"}, {"method": "ties", "options": {"density": 0.4}},
    ]  # fmt: skip
    results = [ckpt.merge(ckpt.plan(a, b, mixture=Mixture(**mixture))) for mixture in mixtures]
    assert len({each.merged.recipe.digest for each in results}) == len(mixtures)
    assert not ckpt.merge(ckpt.plan(a, b)).created
    assert ckpt.merge(ckpt.plan(b, a)).created


def test_history_and_lineage_name_every_input(ckpt: Registry, make: Make) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    result = ckpt.merge(ckpt.plan(a, b)).merged
    event = ckpt.history()[-1]
    assert (event.action, event.subject, event.detail["with"]) == ("merge", "a@v1", ["b@v1"])
    assert [each.digest for each in ckpt.details(b).merged] == [result.digest]


# -- what cannot go together


def test_inputs_on_different_bases_are_refused_and_both_named(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    a, b = make("a"), make("b", base=tiny.write_base(tmp_path / "other", seed=9))
    with pytest.raises(Refused) as caught:
        ckpt.plan(a, b)
    (finding,) = caught.value.report.findings
    assert (finding.code, finding.where) == ("base_weights", "b@v1")
    assert a.base_name in finding.expected
    assert b.base_name in finding.found


def test_a_finding_says_whose_it_is(ckpt: Registry, make: Make) -> None:
    broken = make("b", seed=2, config={"use_qalora": True})
    found = refused(lambda: ckpt.plan(make("a"), broken))
    assert found == {"method_not_mergeable": "b@v1: adapter_config.json"}


@pytest.mark.parametrize(
    ("mixture", "field"),
    [
        ({"weights": (1.0,)}, "weights"),
        ({"method": "tise"}, "method"),
        ({"method": "linear", "options": {"density": 0.5}}, "density"),
        ({"method": "ties", "options": {"density": 1.5}}, "density"),
        ({"method": "interpolate", "weights": (0.5, 0.5)}, "weights"),
        ({"method": "average", "weights": (1.0, -1.0)}, "weights"),
    ],
)
def test_recipes_that_make_no_sense(ckpt: Registry, make: Make, mixture: dict[str, Any], field: str) -> None:
    a, b = make("a", seed=1), make("b", seed=2)
    with pytest.raises(InvalidRecipe):
        ckpt.plan()
    with pytest.raises(InvalidRecipe) as caught:
        ckpt.plan(a, b, mixture=Mixture(**mixture))
    assert caught.value.field == field


def test_weights_of_zero_leave_nothing_to_merge(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    with pytest.raises(NothingMerged):
        merged(ckpt, tmp_path / "out", make("a", seed=1), make("b", seed=2), weights=(0.0, 0.0))
    assert not (tmp_path / "out").exists()


# -- vocabulary and embeddings


def grown(seed: int, rows: int = 36) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    return {
        "config": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "whole": {name: random.standard_normal((rows, 16)).astype(np.float32) for name in names},
    }


def test_grown_vocabularies_of_all_inputs_are_averaged(ckpt: Registry, make: Make, tmp_path: Path) -> None:
    one, two = grown(3), grown(4)
    a, b = make("a", seed=1, **one), make("b", seed=2, **two)
    found = merged(ckpt, tmp_path / "out", a, b, weights=(0.25, 0.75))
    key = "base_model.model.lm_head.weight"
    expected = 0.25 * one["whole"][key].astype(np.float64) + 0.75 * two["whole"][key].astype(np.float64)
    assert np.array_equal(found[HEAD].numpy(), expected.astype(np.float32))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 36


@pytest.mark.parametrize(
    ("second", "mixture"),
    [({}, {}), (grown(4, rows=40), {}), (grown(4), {"weights": (1.0, 1.0)}), (grown(4), {"method": "ties"})],
    ids=["one stays", "other sizes", "no mean", "not linear"],
)
def test_vocabularies_that_do_not_go_together(
    ckpt: Registry, make: Make, second: dict[str, Any], mixture: dict[str, Any]
) -> None:
    a, b = make("a", seed=1, **grown(3)), make("b", seed=2, **second)
    assert refused(lambda: ckpt.plan(a, b, mixture=Mixture(**mixture))).keys() & {"config_disagrees", "shapes_disagree"}


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, DType.F32, (4, 2))


def step(file: str) -> LowRank:
    left, right = (
        StoredTensor(TensorSpec(side, DType.F32, shape), file, 0) for side, shape in (("l", (4, 1)), ("r", (1, 2)))
    )
    return LowRank(left=Matrix.of(left), right=Matrix.of(right), scale=1.0)


def test_what_one_input_does_to_tied_embeddings_is_done_to_both_sides_when_another_unties_them() -> None:
    shared = StoredTensor(spec(EMBEDDING), "model.safetensors", 8)
    unties = Resolution(
        changes=(Change(target=spec(HEAD), source=shared, steps=(step("0/a"),)),),
        findings=(),
        config={"tie_word_embeddings": False},
    )
    stays = Resolution(changes=(Change(target=spec(EMBEDDING), source=shared, steps=(step("1/a"),)),), findings=())
    recipe = Recipe(
        base=digest("base"),
        inputs=tuple(RecipeInput(checkpoint=digest(name), weight=0.5) for name in "ab"),
        method="linear",
    )
    united = unite([unties, stays], recipe, Embeddings(input_name=EMBEDDING, head_name=HEAD, tied=True))
    files = {
        change.target.name: [each.left.tensor.file for each in low_rank(change.steps)] for change in united.changes
    }
    assert files == {HEAD: ["0/a", "1/a"], EMBEDDING: ["1/a"]}
    assert united.config == {"tie_word_embeddings": False}
    assert not united.findings


def pair(**second: Any) -> Resolution:
    """Two inputs that change one tensor, the second as told."""
    shared = StoredTensor(spec(Q), "model.safetensors", 8)
    change = Change(target=spec(Q), source=shared, steps=(step("0/a"),))
    source = replace(shared, spec=spec(second.pop("source", Q)))
    other = replace(change, source=source, steps=(step("1/a"),), columns=second.pop("columns", None))
    both = [Resolution(changes=(change,), findings=()), Resolution(changes=(other,), findings=(), **second)]
    inputs = tuple(RecipeInput(checkpoint=digest(name), weight=0.5) for name in "ab")
    return unite(both, Recipe(base=digest("base"), inputs=inputs), None)


def test_what_inputs_make_of_the_model_must_agree_but_flags_add_up() -> None:
    assert not pair().findings
    flags = pair(config={"bias": True})
    assert (flags.config, flags.findings) == ({"bias": True}, ())
    assert [(each.code, each.where) for each in pair(config={"num_hidden_layers": 3}).findings] == [
        ("config_disagrees", "config.json: num_hidden_layers")
    ]
    assert [(each.code, each.where) for each in pair(removed=frozenset({K})).findings] == [("config_disagrees", K)]
    for odd in ({"columns": 1}, {"source": V}):
        assert [(each.code, each.where) for each in pair(**odd).findings] == [("shapes_disagree", Q)]


def test_a_copy_of_the_bases_own_tensor_replaces_nothing(base: Path, ckpt: Registry, tmp_path: Path) -> None:
    known = ckpt.add_base(str(base)).base
    values = load_file(base / "model.safetensors")
    for name, copy in {
        "same": values[HEAD],
        "other": values[HEAD] + 1,
        "half": values[HEAD].astype(np.float16),
    }.items():
        (tmp_path / name).mkdir()
        save_file({"head": copy}, tmp_path / name / "w")
        location = LocalLocation(tmp_path / name)
        with location.open("w") as stream:
            (saved,) = read_safetensors_header(stream, "w", location.files()["w"]).tensors
        source = next(tensor for tensor in known.tensors if tensor.spec.name == HEAD)
        change = Change(target=source.spec, source=source, replacement=saved)
        found = without_copies(Resolution(changes=(change, change), findings=()), location, known)
        assert [each.replacement for each in found.changes] == [None if name == "same" else saved] * 2


def low_rank(steps: Sequence[object]) -> list[LowRank]:
    return [each for each in steps if isinstance(each, LowRank)]


# -- files


def test_the_result_gets_the_tokenizer_of_the_first_input_that_has_one(
    ckpt: Registry, base: Path, tmp_path: Path
) -> None:
    checkpoints = []
    for number, text in enumerate(["", "one", "two"]):
        folder = tiny.write_adapter(tmp_path / f"adapter-{number}", base=base, seed=number)
        if text:
            tiny.write_json(folder / "tokenizer.json", {"model": {"vocab": {text: 1}}})
        checkpoints.append(ckpt.register(str(folder)).registered[0].checkpoint)
    planned = ckpt.plan(*checkpoints)
    ckpt.merge(planned, out=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"model": {"vocab": {"one": 1}}}
    (odd,) = [each for each in planned.report.findings if each.code == "tokenizers_differ"]
    assert odd.where == "adapter-2@v1: tokenizer.json"
    warning = json.loads((tmp_path / "out" / "merge.json").read_text())["warnings"][0]
    assert checkpoints[1].digest.short in warning["expected"]


@pytest.fixture
def folders(tmp_path: Path) -> UnitedFolder:
    for number, text in enumerate(("first", "second")):
        (tmp_path / text).mkdir()
        (tmp_path / text / "weights").write_bytes(text.encode())
        (tmp_path / text / f"only-{number}").touch()
    return UnitedFolder([LocalLocation(tmp_path / "first"), LocalLocation(tmp_path / "second")], leading=1)


def test_files_of_a_united_folder_are_numbered_and_the_leading_inputs_have_their_own_names(
    folders: UnitedFolder,
) -> None:
    assert folders.files() == {"0/weights": 5, "0/only-0": 0, "1/weights": 6, "1/only-1": 0, "weights": 6, "only-1": 0}
    for path, text in {"0/weights": b"first", "1/weights": b"second", "weights": b"second"}.items():
        with folders.open(path) as stream:
            assert stream.read() == text
        buffer = bytearray(2)
        folders.read_into(path, 1, memoryview(buffer))
        assert bytes(buffer) == text[1:3]
        local = folders.local_path(path)
        assert local is not None
        assert local.read_bytes() == text
    assert folders.identity("0/weights") != folders.identity("weights") == folders.identity("1/weights")
    folders.close()


def test_a_united_folder_fails_like_its_parts(folders: UnitedFolder) -> None:
    with pytest.raises(PathNotFound):
        folders.open("2/weights")
    with pytest.raises(CorruptFile):
        folders.read_into("0/weights", 4, memoryview(bytearray(9)))
    assert folders.url.count(" + ") == 1
