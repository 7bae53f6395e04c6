"""Evaluation against transformers' own loss and loops written by hand, and what is recorded of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trained

from registry.errors import InvalidInput, MixedData
from registry.evaluating import Evaluation, Tokens, evaluate, measure
from registry.evaluation_data import read_data
from registry.inference import Message, Runner, open_runner
from registry.service import Registry

pytestmark = pytest.mark.oracle


def lines(path: Path, *examples: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in examples))
    return path


class ByHand:
    """A checkpoint's model, as transformers and peft load it."""

    def __init__(self, runs: Path, step: int) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(runs / "base")
        plain = AutoModelForCausalLM.from_pretrained(runs / "base")
        self.model = PeftModel.from_pretrained(plain, runs / f"bot/checkpoint-{step}").eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def loss(self, ids: list[int], labels: list[int]) -> tuple[float, int]:
        """Sum and count, from the mean that the model itself gives."""
        import torch

        counted = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            mean = self.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        return float(mean) * counted, counted

    def logits(self, ids: list[int]) -> object:
        import torch

        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0]


def value(registry: Registry, ref: str, name: str) -> float:
    found = registry.resolve(ref).metric(name)
    assert found is not None
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_that_of_transformers_on_every_kind_of_text(
    registered: Registry, runs: Path, tmp_path: Path, batch_size: int
) -> None:
    hand = ByHand(runs, 120)
    texts = ["the sky is red", "what colour is the grass", "the moon is grey and pink"]
    data = lines(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    wanted = Evaluation(data=read_data(data), metrics=("loss", "ppl", "accuracy"), name="texts", batch_size=batch_size)
    (found,) = evaluate(registered, [registered.resolve("bot@step:120")], wanted)
    sums = [hand.loss(hand.ids(text), hand.ids(text)) for text in texts]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    measured = {metric.name: metric.value for metric in found.metrics}
    assert measured["texts/loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["texts/ppl"] == pytest.approx(math.exp(expected), rel=1e-5)
    likeliest = [
        int(hand.logits(hand.ids(text))[place].argmax()) == token
        for text in texts
        for place, token in enumerate(hand.ids(text)[1:])
    ]  # type: ignore[index]
    assert measured["texts/accuracy"] == pytest.approx(sum(likeliest) / len(likeliest))


def test_only_what_the_assistant_says_counts(registered: Registry, runs: Path, tmp_path: Path) -> None:
    hand = ByHand(runs, 120)
    data = trained.write_data(tmp_path / "talk.jsonl", 6)
    wanted = Evaluation(data=read_data(data), metrics=("loss", "exact_match"), name="talk")
    (found,) = evaluate(registered, [registered.resolve("bot@step:120")], wanted)
    total, count, right = 0.0, 0, 0
    for each in (json.loads(line) for line in data.read_text().splitlines()):
        question, answer = (message["content"] for message in each["messages"])
        before = hand.ids(f"<|user|>{question}<|end|><|assistant|>")
        after = hand.ids(f"{answer}<|end|>")
        loss, counted = hand.loss([*before, *after], [*[-100] * len(before), *after])
        total, count = total + loss, count + counted
        right += _generated(hand, before) == answer
    measured = {metric.name: metric.value for metric in found.metrics}
    assert measured["talk/loss"] == pytest.approx(total / count, rel=1e-5)
    assert measured["talk/exact_match"] == right / 6


def _generated(hand: ByHand, ids: list[int]) -> str:
    import torch

    found = hand.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    return str(hand.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)).strip()


def test_choices_are_judged_by_their_likelihood(registered: Registry, runs: Path, tmp_path: Path) -> None:
    hand = ByHand(runs, 120)
    examples = [
        {
            "prompt": f"<|user|>what colour is the {thing}<|end|><|assistant|>the {thing} is",
            "choices": [f" {colour}" for colour in trained.COLOURS],
            "answer": number % 6,
        }
        for number, thing in enumerate(trained.THINGS)
    ]
    wanted = Evaluation(
        data=read_data(lines(tmp_path / "choices.jsonl", *examples)), metrics=("accuracy",), name="choices"
    )
    (found,) = evaluate(registered, [registered.resolve("bot@step:120")], wanted)
    right = 0
    for each in examples:
        prompt = hand.ids(str(each["prompt"]))
        sums = [
            hand.loss([*prompt, *hand.ids(choice)], [*[-100] * len(prompt), *hand.ids(choice)])[0]
            for choice in each["choices"]  # type: ignore[attr-defined]
        ]
        right += sums.index(min(sums)) == each["answer"]
    assert found.metrics[0].value == pytest.approx(right / len(examples))
    assert right > len(examples) / 2


def test_the_trainers_own_evaluation_agrees(registered: Registry, runs: Path, tmp_path: Path) -> None:
    said = {each["step"]: each["eval_loss"] for each in _log(runs) if "eval_loss" in each}
    best = min(said, key=lambda step: said[step])
    assert best != max(said), "the best checkpoint is not the last"
    assert value(registered, f"bot@step:{best}", "eval_loss") == pytest.approx(said[best], rel=1e-6)


def _log(runs: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((runs / "bot/checkpoint-120/trainer_state.json").read_text())[
        "log_history"
    ]
    return found


def test_every_checkpoint_is_measured_once_with_the_base_loaded_once(registered: Registry, tmp_path: Path) -> None:
    wanted = Evaluation(data=read_data(trained.write_data(tmp_path / "hard.jsonl", 5)), name="hard")
    checkpoints = registered.checkpoints("bot")
    told: list[tuple[str, int, int]] = []
    found = list(evaluate(registered, checkpoints, wanted, progress=lambda *said: told.append(said)))
    assert [each.is_known for each in found] == [False] * len(checkpoints)
    assert sum(done for _, done, _ in told) == 5 * len(checkpoints)
    values = {each.checkpoint.step: each.metrics[0].value for each in found}
    assert values[120] < values[20]
    metric = registered.resolve("bot@step:120").metrics[-1]
    assert (metric.name, metric.split, metric.direction, metric.step) == ("hard/loss", "eval", "lower", 120)
    assert metric.data == wanted.data.digest
    assert all(each.is_known for each in evaluate(registered, registered.checkpoints("bot"), wanted))
    best = registered.rank("bot", metric="hard/loss").groups[0].checkpoints[0]
    assert best.metric("hard/loss") == min(values.values())


def test_what_was_measured_on_other_data_is_not_compared(registered: Registry, tmp_path: Path) -> None:
    first = Evaluation(data=read_data(trained.write_data(tmp_path / "hard.jsonl", 5)), name="hard")
    other = Evaluation(data=read_data(trained.write_data(tmp_path / "hard.jsonl", 6)), name="hard")
    part = Evaluation(data=read_data(tmp_path / "hard.jsonl", 5), name="hard")
    assert len({first.data.digest, other.data.digest, part.data.digest}) == 3
    list(evaluate(registered, [registered.resolve("bot@step:20")], first))
    (again,) = evaluate(registered, [registered.resolve("bot@step:40")], other)
    assert not again.is_known
    with pytest.raises(MixedData):
        registered.rank("bot", metric="hard/loss")


def test_the_base_alone_can_be_measured(registered: Registry, tmp_path: Path) -> None:
    checkpoint = registered.resolve("bot@step:120")
    wanted = Evaluation(data=read_data(trained.write_data(tmp_path / "hard.jsonl", 5)), name="hard")
    runner = open_runner(registered, checkpoint, device="cpu")
    with_adapter = measure(runner, wanted, checkpoint)[0].value
    runner.use(None)
    assert measure(runner, wanted, checkpoint)[0].value > 2 * with_adapter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing in it"),
        ("{", "line 1"),
        ("[1]", "expected a JSON object"),
        ('{"txt": "a"}', "expected text; prompt and completion"),
        ('{"text": ""}', "it is empty"),
        ('{"text": "a b"}\n\n{"prompt": 1, "completion": "x"}', "line 3: prompt"),
        ('{"messages": []}', "last turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "expected system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "last turn"),
        ('{"prompt": "a", "choices": ["x"], "answer": 0}', "two and more"),
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "0 to 1"),
    ],
)
def test_data_of_another_kind_is_refused_by_line_and_field(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        read_data(tmp_path / "data.jsonl")
    assert words in f"{refused.value.field} {refused.value.reason}"


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(registered: Registry, tmp_path: Path) -> None:
    data = read_data(lines(tmp_path / "texts.jsonl", {"text": "the sky"}))
    with pytest.raises(InvalidInput, match="exact_match"):
        list(evaluate(registered, [], Evaluation(data=data, metrics=("exact_match",))))
    short = read_data(lines(tmp_path / "short.jsonl", {"text": "s"}))
    with pytest.raises(InvalidInput, match="line 1"):
        list(evaluate(registered, [registered.resolve("bot")], Evaluation(data=short)))


class Counted:
    """A runner that counts the conversations it is asked to write."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.prompts = runner, 0

    def prompt(self, messages: Sequence[Message], *, answering: bool = True) -> list[int]:
        self.prompts += 1
        return self.runner.prompt(messages, answering=answering)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


def test_dialogues_are_made_tokens_once_for_all_checkpoints(registered: Registry, tmp_path: Path) -> None:
    data = read_data(trained.write_data(tmp_path / "hard.jsonl", 5))
    wanted = Evaluation(data=data, name="hard", metrics=("loss", "exact_match"))
    first, second = registered.resolve("bot@step:20"), registered.resolve("bot@step:120")
    runner: Any = Counted(open_runner(registered, first, device="cpu"))
    tokens = Tokens(data.path)
    measure(runner, wanted, first, tokens)
    once = runner.prompts
    runner.use(second)
    found = measure(runner, wanted, second, tokens)
    assert runner.prompts == once > 0
    assert found == measure(open_runner(registered, second, device="cpu"), wanted, second)


def test_more_tokens_than_the_model_takes_are_refused_by_line(registered: Registry, tmp_path: Path) -> None:
    data = read_data(lines(tmp_path / "long.jsonl", {"text": "the sky"}, {"text": "what colour is the sky " * 60}))
    with pytest.raises(InvalidInput) as refused:
        list(evaluate(registered, [registered.resolve("bot")], Evaluation(data=data)))
    assert refused.value.field.endswith("long.jsonl line 2")
    assert "128 at most" in refused.value.reason


def test_a_limit_that_takes_all_lines_is_the_same_data(tmp_path: Path) -> None:
    path = trained.write_data(tmp_path / "hard.jsonl", 5)
    assert read_data(path, 5).digest == read_data(path, 9).digest == read_data(path).digest


def test_a_device_that_is_none_is_refused_even_where_all_is_known(tmp_path: Path) -> None:
    data = read_data(trained.write_data(tmp_path / "hard.jsonl", 5))
    with pytest.raises(InvalidInput, match="tpu"):
        Evaluation(data=data, device="tpu")  # type: ignore[arg-type]
