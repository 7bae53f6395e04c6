"""litgpt models in memory against litgpt's own classes, and against what litgpt 0.5.4 answered."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import litgpt_models
import numpy as np
import pytest
import tiny
import torch
import yaml
from litgpt import Tokenizer, adapter
from litgpt.prompts import Alpaca
from safetensors.numpy import load_file

from registry.errors import (
    CorruptFile,
    InvalidInput,
    InvalidRecipe,
    MissingPackage,
    NoChatTemplate,
    NoTokenizer,
    Refused,
)
from registry.evaluating import Evaluation, evaluate
from registry.evaluation_data import read_data
from registry.inference import Message, Runner, Sampling, open_runner
from registry.inference.litgpt_text import until
from registry.manifest import Checkpoint
from registry.mixing import Mixture
from registry.registering import Registration
from registry.service import Registry

pytestmark = pytest.mark.oracle
DATA = Path(__file__).parents[1] / "data/litgpt"
IDS = list(range(3, 15))  # those of `litgpt_models.logits`
LORA, BASE = "lora-llama-qv", "base-llama-gqa"
ALL = ("query", "key", "value", "projection", "mlp", "head")
QUESTION = [Message("user", "Name a colour")]

Add = Callable[..., Checkpoint]


@pytest.fixture
def add(ckpt: Registry) -> Add:
    """Registers a folder as an adapter on a base model, which is added too."""

    def register(base: Path, folder: Path) -> Checkpoint:
        name = folder.parent.name if folder.name == "final" else folder.name
        ckpt.add_base(str(base), name=base.name)
        said = Registration(adapter=name, base=base.name)
        return ckpt.register(str(folder), said).registered[-1].checkpoint

    return register


@pytest.fixture
def sample(add: Add) -> Callable[[str, str], Checkpoint]:
    return lambda run, base: add(DATA / base, DATA / run / "final")


@pytest.fixture
def runner(ckpt: Registry, sample: Add) -> Runner:
    """The Llama with its LoRA."""
    return open_runner(ckpt, sample(LORA, BASE), device="cpu")


def answers(model: torch.nn.Module) -> np.ndarray:
    return litgpt_models.logits(model)[0].float().numpy()


# -- the same logits as litgpt


@pytest.mark.parametrize("shape", litgpt_models.SHAPES)
def test_lora_on_models_of_every_shape(ckpt: Registry, add: Add, tmp_path: Path, shape: str) -> None:
    base = litgpt_models.make_base(tmp_path / "base", shape)
    model = litgpt_models.make_lora(base, tmp_path / "lora", ALL)
    runner = open_runner(ckpt, add(base, tmp_path / "lora"), device="cpu")
    np.testing.assert_allclose(runner.logits(IDS), answers(model), atol=1e-5)
    runner.use(None)
    np.testing.assert_array_equal(runner.logits(IDS), answers(litgpt_models.load_model(base)))


@pytest.mark.parametrize("flags", [("query",), ("key", "value"), ("query", "value", "head"), ("mlp",)], ids="-".join)
def test_lora_on_some_parts(ckpt: Registry, add: Add, tmp_path: Path, flags: tuple[str, ...]) -> None:
    base = litgpt_models.make_base(tmp_path / "base", "wide")
    model = litgpt_models.make_lora(base, tmp_path / "lora", flags)
    runner = open_runner(ckpt, add(base, tmp_path / "lora"), device="cpu")
    np.testing.assert_allclose(runner.logits(IDS), answers(model), atol=1e-5)


@pytest.mark.parametrize("shape", litgpt_models.SHAPES)
def test_adapter_v2_on_models_of_every_shape(ckpt: Registry, add: Add, tmp_path: Path, shape: str) -> None:
    """With its gates open and biases on routers, which no merge can have."""
    base = litgpt_models.make_base(tmp_path / "base", shape)
    model = litgpt_models.make_adapter_v2(base, tmp_path / "v2", gates=0.7, router_bias=True)
    runner = open_runner(ckpt, add(base, tmp_path / "v2"), device="cpu")
    np.testing.assert_allclose(runner.logits(IDS), answers(model), atol=1e-5)
    runner.use(None)
    np.testing.assert_array_equal(runner.logits(IDS), answers(litgpt_models.load_model(base)))


@pytest.mark.parametrize("run", ["adapter-llama", "adapter-llama-handtrained"])
def test_adapter_v1(ckpt: Registry, sample: Add, run: str) -> None:
    config = yaml.safe_load((DATA / BASE / "model_config.yaml").read_text())
    model = adapter.GPT(adapter.Config(**config))
    model.load_state_dict(litgpt_models.read_weights(DATA / BASE / "lit_model.pth"), strict=False)
    weights = torch.load(DATA / run / "final/lit_model.pth.adapter", weights_only=True)["model"]
    model.load_state_dict(weights, strict=False)
    runner = open_runner(ckpt, sample(run, BASE), device="cpu")
    np.testing.assert_allclose(runner.logits(IDS), answers(model), atol=1e-5)


@pytest.mark.parametrize(
    "run", ["legacy-lora-llama-qv", "legacy-lora-llama-qkv", "legacy-adapter-llama", "legacy-adapter_v2-llama"]
)
def test_what_litgpt_of_the_old_row_order_trained_answers_as_it_did(ckpt: Registry, sample: Add, run: str) -> None:
    """Today's own classes load these with random or wrong rows."""
    known = load_file(DATA / "unmerged.safetensors")
    runner = open_runner(ckpt, sample(run, "legacy-base-llama-gqa"), device="cpu")
    found = runner.logits(known["input_ids"][0].tolist())
    np.testing.assert_allclose(found, known[f"{run}/final/unmerged"][0], atol=1e-5)


@pytest.mark.parametrize(
    ("run", "own", "other"),
    [(LORA, BASE, "legacy-base-llama-gqa"), ("legacy-lora-llama-qkv", "legacy-base-llama-gqa", BASE)],
)
def test_a_lora_goes_on_a_base_of_the_other_row_order(tmp_path: Path, run: str, own: str, other: str) -> None:
    found = []
    for base in (own, other):
        with tiny.open_registry(tmp_path / base) as ckpt:
            ckpt.add_base(str(DATA / base), name="base")
            checkpoint = ckpt.register(str(DATA / run / "final"), Registration(base="base")).registered[0].checkpoint
            found.append(open_runner(ckpt, checkpoint, device="cpu").logits(IDS))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_another_dtype_than_that_of_the_files(ckpt: Registry, sample: Add) -> None:
    known = load_file(DATA / "unmerged.safetensors")
    run = "lora-llama-all-bf16"
    runner = open_runner(ckpt, sample(run, BASE), device="cpu", dtype="bfloat16")
    found = runner.logits(known["input_ids"][0].tolist())
    np.testing.assert_array_equal(found, known[f"{run}/final/unmerged"][0])


def test_a_base_that_training_wrote_is_unwrapped(ckpt: Registry, tmp_path: Path) -> None:
    base = Path(shutil.copytree(DATA / BASE, tmp_path / "full"))
    weights = litgpt_models.read_weights(base / "lit_model.pth")
    expected = answers(litgpt_models.load_model(base))
    torch.save({"model": weights, "iter_num": 3, "step_count": 1}, base / "lit_model.pth")
    runner = open_runner(ckpt, ckpt.add_base(str(base)).base, device="cpu")
    np.testing.assert_array_equal(runner.logits(IDS), expected)


def test_tied_weights_stay_tied_and_the_head_alone_changes(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    base = litgpt_models.make_base(tmp_path / "base", "llama")
    weights = litgpt_models.read_weights(base / "lit_model.pth")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, base / "lit_model.pth")
    model = litgpt_models.make_lora(base, tmp_path / "lora", ("head",))
    checkpoint = add(base, tmp_path / "lora")
    np.testing.assert_allclose(open_runner(ckpt, checkpoint, device="cpu").logits(IDS), answers(model), atol=1e-5)
    loaded = ckpt.load(checkpoint, device="cpu", dtype="bfloat16")
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()


# -- who answers


def test_whoever_answered_before_leaves_nothing_behind(ckpt: Registry, sample: Add) -> None:
    runs = [LORA, "adapter-llama", "adapter_v2-llama", "lora-llama-all-bf16"]
    found = [sample(run, BASE) for run in runs]
    alone = [open_runner(ckpt, each, device="cpu").logits(IDS) for each in found]
    runner = open_runner(ckpt, found[0], device="cpu")
    for index in (2, 1, 0, 3, 2, 0, 1):
        runner.use(found[index])
        np.testing.assert_array_equal(runner.logits(IDS), alone[index])
    runner.use(None)
    np.testing.assert_array_equal(runner.logits(IDS), answers(litgpt_models.load_model(DATA / BASE)))


def test_a_weighted_sum_is_the_sum_of_the_deltas(ckpt: Registry, sample: Add, tmp_path: Path) -> None:
    one, other = sample(LORA, BASE), sample("lora-llama-all-bf16", BASE)
    runner = open_runner(ckpt, one, device="cpu")
    runner.use([(one, 0.7), (other, -0.2)])
    planned = ckpt.plan(one, other, mixture=Mixture(method="linear", weights=(0.7, -0.2)))
    ckpt.merge(planned, out=str(tmp_path / "merged"))
    np.testing.assert_allclose(runner.logits(IDS), answers(litgpt_models.load_model(tmp_path / "merged")), atol=2e-5)


def test_only_lora_is_added_up(runner: Runner, sample: Add) -> None:
    before = runner.logits(IDS)
    with pytest.raises(InvalidRecipe, match="only LoRA"):
        runner.use([(sample(LORA, BASE), 0.5), (sample("adapter-llama", BASE), 0.5)])
    with pytest.raises(InvalidRecipe):
        runner.use([])
    np.testing.assert_array_equal(runner.logits(IDS), before)


def test_an_adapter_of_another_base_is_refused_and_the_one_before_stays(runner: Runner, sample: Add) -> None:
    before = runner.logits(IDS)
    with pytest.raises(Refused):
        runner.use(sample("lora-neox-qkv-mlp", "base-neox-mha"))
    np.testing.assert_array_equal(runner.logits(IDS), before)


@pytest.mark.parametrize(("run", "base"), [(LORA, BASE), ("legacy-lora-llama-qkv", "legacy-base-llama-gqa")])
def test_the_merged_model_is_litgpts_own_and_nothing_is_written(
    ckpt: Registry, sample: Add, run: str, base: str
) -> None:
    known = load_file(DATA / "logits.safetensors")
    ids = known["input_ids"][0].tolist()
    checkpoint = sample(run, base)
    runner = open_runner(ckpt, checkpoint, device="cpu")
    unmerged, before = runner.logits(ids), tiny.stored_blobs(ckpt.settings.home)
    runner.use_merged(checkpoint)
    assert tiny.stored_blobs(ckpt.settings.home) == before
    np.testing.assert_allclose(runner.logits(ids), known[f"{run}/final/merged"][0], atol=1e-5)
    runner.use(checkpoint)
    np.testing.assert_array_equal(runner.logits(ids), unmerged)


def test_a_folded_adapter_v2_has_biases_that_the_base_has_not(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    base = litgpt_models.make_base(tmp_path / "base", "llama")
    model = litgpt_models.make_adapter_v2(base, tmp_path / "v2", gates=0.0)
    checkpoint = add(base, tmp_path / "v2")
    runner = open_runner(ckpt, checkpoint, device="cpu")
    runner.use_merged(checkpoint)
    np.testing.assert_allclose(runner.logits(IDS), answers(model), atol=1e-4)


def test_what_cannot_be_merged_is_refused(runner: Runner, sample: Add) -> None:
    with pytest.raises(Refused, match="method_not_mergeable"):
        runner.use_merged(sample("adapter-llama", BASE))


# -- text


def greedy(runner: Runner, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from the logits of all before it, up to the one that ends an answer."""
    found = list(ids)
    for _ in range(count):
        found.append(int(runner.logits(found)[-1].argmax()))
    rest = found[len(ids) :]
    return rest[: rest.index(1)] if 1 in rest else rest


@pytest.mark.parametrize("run", [LORA, "adapter-llama", "adapter_v2-llama"])
def test_greedy_text_is_what_the_logits_say(ckpt: Registry, sample: Add, run: str) -> None:
    runner = open_runner(ckpt, sample(run, BASE), device="cpu")
    ids = runner.encode("Name a colour")
    said = "".join(runner.generate(ids, Sampling(max_tokens=24)))
    assert said == runner.decode(greedy(runner, ids, 24))


def with_tokenizer(base: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / BASE / name, base / name)
    return base


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_that_is_cut_or_capped_is_remembered_rightly(
    ckpt: Registry, tmp_path: Path, window: int | None, cap: float | None
) -> None:
    base = with_tokenizer(litgpt_models.make_base(tmp_path / "base", "llama"))
    config = yaml.safe_load((base / "model_config.yaml").read_text())
    config |= {"sliding_window_size": window, "sliding_window_indices": window and [1, 0, 1, 0]}
    (base / "model_config.yaml").write_text(yaml.dump(config | {"attention_logit_softcapping": cap}))
    runner = open_runner(ckpt, ckpt.add_base(str(base)).base, device="cpu")
    said = "".join(runner.generate(IDS, Sampling(max_tokens=16)))
    assert said == runner.decode(greedy(runner, IDS, 16))


def test_answers_that_are_given_at_the_same_time_do_not_mix(runner: Runner) -> None:
    prompts = [runner.encode(text) for text in ("Name a colour", "and another one")]
    wanted = ["".join(runner.generate(ids, Sampling(max_tokens=12))) for ids in prompts]
    one, other = (runner.generate(ids, Sampling(max_tokens=12)) for ids in prompts)
    pieces = ["", ""]
    for first, second in zip(one, other, strict=False):
        pieces[0], pieces[1] = pieces[0] + first, pieces[1] + second
    assert (pieces[0] + "".join(one)).startswith(wanted[0][:8])
    assert wanted[1].startswith(pieces[1])


def test_a_seed_gives_the_same_text_again(runner: Runner) -> None:
    ids = runner.encode("Name a colour")
    warm = Sampling(max_tokens=20, temperature=3.0, seed=7)
    first = "".join(runner.generate(ids, warm))
    assert "".join(runner.generate(ids, warm)) == first
    assert "".join(runner.generate(ids, Sampling(max_tokens=20, temperature=3.0, seed=8))) != first


def test_an_answer_ends_where_the_model_has_no_more_room(runner: Runner) -> None:
    assert runner.context_tokens == 256
    ids = [5] * 254
    assert len(list(runner.generate(ids, Sampling(max_tokens=50, temperature=9.0, seed=1)))) <= 3
    with pytest.raises(InvalidInput, match="256"):
        runner.logits([5] * 257)


def test_several_texts_at_once_score_as_one_by_one(runner: Runner) -> None:
    texts = [IDS, IDS[:5], IDS[3:]]
    for ids, found in zip(texts, runner.scores(texts), strict=True):
        (alone,) = runner.scores([ids])
        np.testing.assert_allclose(found.losses, alone.losses, atol=1e-5)
        np.testing.assert_array_equal(found.likeliest, alone.likeliest)
        shares = torch.log_softmax(torch.from_numpy(runner.logits(ids)), dim=-1).numpy()
        wanted = [-shares[place, token] for place, token in enumerate(ids[1:])]
        np.testing.assert_allclose(alone.losses, wanted, atol=1e-5)


def test_adapters_of_every_kind_are_evaluated_on_one_base(ckpt: Registry, sample: Add, tmp_path: Path) -> None:
    """A dialogue counts as what litgpt trains on with its prompt masked: the answer and the token that ends it."""
    (tmp_path / "held-out.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "red"}]}\n'
        '{"prompt": "Name a", "completion": " colour"}\n'
    )
    wanted = Evaluation(data=read_data(tmp_path / "held-out.jsonl"), metrics=("loss", "exact_match"), device="cpu")
    found = [sample(run, BASE) for run in (LORA, "adapter-llama", "adapter_v2-llama")]
    losses = [done.metrics[0].value for done in evaluate(ckpt, found, wanted)]
    runner = open_runner(ckpt, found[0], device="cpu")
    parts = [
        (runner.prompt(QUESTION), runner.prompt([*QUESTION, Message("assistant", "red")], answering=False)),
        (runner.encode("Name a"), runner.encode("Name a") + runner.encode(" colour")),
    ]
    for checkpoint, loss in zip(found, losses, strict=True):
        runner.use(checkpoint)
        counted = [runner.scores([whole])[0].losses[len(prompt) - 1 :] for prompt, whole in parts]
        assert loss == pytest.approx(np.concatenate(counted).mean(), abs=1e-5)
    assert len(set(losses)) == 3


# -- prompts


def test_one_question_is_asked_in_the_style_of_the_training(runner: Runner) -> None:
    tokenizer = Tokenizer(DATA / BASE)
    asked = Alpaca().apply("Name a colour")
    assert runner.prompt(QUESTION) == tokenizer.encode(asked).tolist()
    whole = runner.prompt([*QUESTION, Message("assistant", "red")], answering=False)
    assert whole == tokenizer.encode(asked + "red", eos=True).tolist()
    assert whole[-1] == tokenizer.eos_id
    system = runner.prompt([Message("system", "Be brief. "), *QUESTION])
    assert runner.decode(system).startswith("Be brief. ### Instruction:\nName a colour")


CONVERSATION = [*QUESTION, Message("assistant", "red"), Message("user", "and another")]
TEMPLATE = "{{ bos_token }}{% for each in messages %}[{{ each.role }}]{{ each.content }}{% endfor %}"


def test_several_turns_need_a_chat_template(ckpt: Registry, tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(NoChatTemplate, match=LORA):
        runner.prompt(CONVERSATION)
    base = Path(shutil.copytree(DATA / BASE, tmp_path / "templated"))
    (base / "chat_template.jinja").write_text(TEMPLATE + "{% if add_generation_prompt %}[assistant]{% endif %}")
    chatty = open_runner(ckpt, ckpt.add_base(str(base)).base, device="cpu")
    ids = chatty.prompt(CONVERSATION)
    assert ids[0] == 0
    assert chatty.decode(ids) == "[user]Name a colour[assistant]red[user]and another[assistant]"
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
    with pytest.raises(InvalidInput, match="no system, please"):
        open_runner(ckpt, chatty.base, device="cpu").prompt(CONVERSATION)


def adapter_with(folder: Path, **files: str) -> Path:
    shutil.copytree(DATA / LORA / "final", folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_style_of_a_stranger_is_not_imported(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    for path in ("antigravity.Style", "litgpt.prompts.importlib", "litgpt.prompts.Nothing"):
        folder = adapter_with(tmp_path / path.replace(".", "-"), prompt_style__yaml=f"class_path: {path}\n")
        runner = open_runner(ckpt, add(DATA / BASE, folder), device="cpu")
        with pytest.raises(InvalidInput, match=path):
            runner.prompt(QUESTION)
    assert "antigravity" not in sys.modules


def test_a_system_message_is_not_dropped_in_silence(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    folder = adapter_with(tmp_path / "falcon", prompt_style__yaml="class_path: litgpt.prompts.Falcon\n")
    runner = open_runner(ckpt, add(DATA / BASE, folder), device="cpu")
    with pytest.raises(InvalidInput, match="Falcon"):
        runner.prompt([Message("system", "Be brief."), *QUESTION])
    assert "".join(runner.generate(runner.prompt(QUESTION), Sampling(max_tokens=4))) is not None


def test_what_is_missing_or_broken_is_said(ckpt: Registry, add: Add, tmp_path: Path) -> None:
    base = litgpt_models.make_base(tmp_path / "bare", "llama")
    with pytest.raises(NoTokenizer, match="bare"):
        open_runner(ckpt, ckpt.add_base(str(base)).base, device="cpu").encode("a")
    folder = adapter_with(tmp_path / "odd", tokenizer_config__json="{}")
    with pytest.raises(CorruptFile, match="tokenizer_class"):
        open_runner(ckpt, add(DATA / BASE, folder), device="cpu").encode("a")


def test_a_configuration_of_another_version_is_not_guessed(ckpt: Registry, tmp_path: Path) -> None:
    base = litgpt_models.make_base(tmp_path / "base", "llama")
    config = yaml.safe_load((base / "model_config.yaml").read_text())
    (base / "model_config.yaml").write_text(yaml.dump(config | {"of_the_future": 7, "unset": None}))
    with pytest.raises(CorruptFile, match="of_the_future"):
        open_runner(ckpt, ckpt.add_base(str(base)).base, device="cpu")


@pytest.fixture
def without_litgpt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litgpt", None)
    monkeypatch.delitem(sys.modules, "registry.inference.litgpt_models", raising=False)


def test_without_litgpt_it_is_said_what_to_install(ckpt: Registry, sample: Add, without_litgpt: None) -> None:
    with pytest.raises(MissingPackage) as missing:
        open_runner(ckpt, sample(LORA, BASE))
    assert (missing.value.package, missing.value.extra) == ("litgpt", "litgpt")


@pytest.mark.parametrize(
    ("ends", "left"),
    [
        ([[9]], [1, 2, 3]),
        ([[2, 3]], [1]),
        ([[2, 4], [3, 9]], [1, 2]),
        ([[1, 2, 3, 9], [2]], [1]),
        ([], [1, 2, 3, 9, 4]),
    ],
)
def test_tokens_end_at_the_first_of_some_sequences(ends: list[list[int]], left: list[int]) -> None:
    assert list(until(iter([1, 2, 3, 9, 4]), ends)) == left
