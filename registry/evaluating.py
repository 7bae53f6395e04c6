"""Evaluate checkpoints on data: the base model is loaded once, adapters are swapped, and what was measured is recorded with the data's digest.

`loss` is the mean of -log p over all tokens that count, in nats; `ppl` is e to its power. `accuracy` is the share of choices that are right, by
the likelihood of each choice as a whole; where there are no choices, the share of the counted tokens that are the likeliest. `exact_match` is
the share of completions and last turns that the model writes to the letter, taking the likeliest token each time; blanks around do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from registry.errors import InvalidInput
from registry.evaluation_data import Choice, Completion, Dialogue, EvaluationData, Example, Text
from registry.inference import Device, LoadedDType, Runner, Sampling, check_place, open_runner
from registry.manifest import Checkpoint, Direction, Metric
from registry.progress import Progress, silent

if TYPE_CHECKING:
    from registry.service import Registry

MetricKind = Literal["loss", "ppl", "accuracy", "exact_match"]
DIRECTIONS: Mapping[MetricKind, Direction] = {
    "loss": "lower",
    "ppl": "lower",
    "accuracy": "higher",
    "exact_match": "higher",
}
_ANSWER_TOKENS = 32  # more than the right answer has, so that a longer one is seen to be wrong


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to measure and how. `name` begins the names of the metrics: `hard/loss`.

    Raises:
        InvalidInput: no such device or dtype.
    """

    data: EvaluationData
    metrics: tuple[MetricKind, ...] = ("loss",)
    name: str = ""
    batch_size: int = 8
    device: Device = "auto"
    dtype: LoadedDType = "auto"

    def __post_init__(self) -> None:
        check_place(self.device, self.dtype)

    def name_of(self, kind: MetricKind) -> str:
        """What a metric is recorded as."""
        return f"{self.name}/{kind}" if self.name else kind


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A checkpoint and what was measured on it; `is_known`: on the same data, before."""

    checkpoint: Checkpoint
    metrics: tuple[Metric, ...]
    is_known: bool = False


def evaluate(
    registry: Registry,
    checkpoints: Sequence[Checkpoint],
    wanted: Evaluation,
    *,
    again: bool = False,
    progress: Progress = silent,
) -> Iterator[Evaluated]:
    """Measure checkpoints and record what was found, each as soon as it is known.

    Args:
        registry: where they are.
        checkpoints: which; those of one base model are measured one after the other.
        wanted: what to measure.
        again: measure also what is known.
        progress: told of the examples that are done.

    Raises:
        InvalidInput: the data has nothing that a metric could be measured on.
        MissingPackage, OutOfMemory, PathNotFound, Refused, NoTokenizer, NoChatTemplate: as `registry.inference`.
    """
    check_kinds(wanted)
    bases: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        bases.setdefault(checkpoint.base.hex, []).append(checkpoint)
    for base, found in bases.items():
        runner: Runner | None = None
        tokens = Tokens(wanted.data.path)
        for checkpoint in found:
            known = () if again else known_metrics(checkpoint, wanted)
            if len(known) == len(wanted.metrics):
                yield Evaluated(checkpoint=checkpoint, metrics=known, is_known=True)
                continue
            runner = runner or open_runner(registry, registry.base(base), device=wanted.device, dtype=wanted.dtype)
            runner.use(checkpoint)
            advance = _telling(progress, checkpoint, len(wanted.data.examples))
            metrics = measure(runner, wanted, checkpoint, tokens, advance=advance)
            registry.add_metrics(checkpoint, metrics)
            yield Evaluated(checkpoint=checkpoint, metrics=metrics)


def _telling(progress: Progress, checkpoint: Checkpoint, total: int) -> Callable[[int], None]:
    return lambda done: progress(f"evaluating {checkpoint.ref}", done, total)


def known_metrics(checkpoint: Checkpoint, wanted: Evaluation) -> tuple[Metric, ...]:
    """What was measured on a checkpoint already, on this very data."""
    latest = {metric.name: metric for metric in checkpoint.metrics}
    found = (latest.get(wanted.name_of(kind)) for kind in wanted.metrics)
    return tuple(metric for metric in found if metric is not None and metric.data == wanted.data.digest)


def check_kinds(wanted: Evaluation) -> None:
    """See that each metric can be measured on the data.

    Raises:
        InvalidInput: one cannot.
    """
    kinds = {type(example) for _, example in wanted.data.examples}
    if "exact_match" in wanted.metrics and not kinds & {Completion, Dialogue}:
        raise InvalidInput("--metric", "exact_match", f"{wanted.data.path} has no completions and no messages")
    if Choice in kinds and kinds != {Choice}:
        raise InvalidInput(wanted.data.path, "", "choices and other examples cannot be measured together")


def measure(
    runner: Runner,
    wanted: Evaluation,
    checkpoint: Checkpoint,
    tokens: Tokens | None = None,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Metric, ...]:
    """Measure whoever answers now.

    Args:
        runner: the model.
        wanted: what to measure.
        checkpoint: whose step the metrics get.
        tokens: the examples as those before have left them.
        advance: told of the examples that are done.
    """
    totals, tokens = _Totals(), tokens or Tokens(wanted.data.path)
    scored = [each for kind, each in (("loss", _score), ("exact_match", _write)) if _needs(wanted, kind)]
    for start in range(0, len(wanted.data.examples), wanted.batch_size):
        part = wanted.data.examples[start : start + wanted.batch_size]
        for measure_part in scored:
            measure_part(runner, tokens, part, totals)
        advance(len(part))
    values = totals.values()
    return tuple(
        Metric(
            name=wanted.name_of(kind),
            value=values[kind],
            step=checkpoint.step,
            split="eval",
            direction=DIRECTIONS[kind],
            data=wanted.data.digest,
        )
        for kind in wanted.metrics
    )


def _needs(wanted: Evaluation, kind: str) -> bool:
    return "exact_match" in wanted.metrics if kind == "exact_match" else bool({*wanted.metrics} - {"exact_match"})


@dataclass(slots=True)
class _Totals:
    """Sums over the examples so far."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    likeliest: int = 0
    right: int = 0
    chosen: int = 0
    written: int = 0
    to_write: int = 0

    def values(self) -> Mapping[MetricKind, float]:
        loss = math.fsum(self.losses) / self.tokens if self.tokens else math.nan
        by_token = self.likeliest / self.tokens if self.tokens else math.nan
        return {
            "loss": loss,
            "ppl": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan,
            "accuracy": self.right / self.chosen if self.chosen else by_token,
            "exact_match": self.written / self.to_write if self.to_write else math.nan,
        }


@final
@dataclass(frozen=True, slots=True)
class _Scored:
    """The tokens of a text, and which of them count."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """Tokens to go on from, what should come, and for how many tokens it is waited."""

    ids: tuple[int, ...]
    wanted: str
    sampling: Sampling


_Lines = Sequence[tuple[int, Example]]


@final
@dataclass(slots=True)
class Tokens:
    """Examples as tokens: made for the first checkpoint, and kept for those after it that are spoken to in the same way.

    Args:
        path: of the data, for errors.
    """

    path: str
    _speaker: str = ""
    _scored: dict[int, list[_Scored]] = field(default_factory=dict)
    _asked: dict[int, _Asked] = field(default_factory=dict)

    def scored(self, runner: Runner, number: int, example: Example) -> list[_Scored]:
        """What is to be scored of an example: of a choice, each with its prompt.

        Raises:
            InvalidInput: it is too short or too long.
        """
        self._speak_as(runner)
        if number not in self._scored:
            found = _texts(runner, self.path, number, example)
            for each in found:
                self._check_length(runner, number, len(each.ids))
            self._scored[number] = found
        return self._scored[number]

    def asked(self, runner: Runner, number: int, example: Completion | Dialogue) -> _Asked:
        """What the model is to answer, and what with.

        Raises:
            InvalidInput: it is too long.
        """
        self._speak_as(runner)
        if number not in self._asked:
            found = _question(runner, example)
            self._check_length(runner, number, len(found.ids))
            self._asked[number] = found
        return self._asked[number]

    def _speak_as(self, runner: Runner) -> None:
        if self._speaker != runner.speaker:
            self._scored.clear()
            self._asked.clear()
            self._speaker = runner.speaker

    def _check_length(self, runner: Runner, number: int, count: int) -> None:
        if runner.context_tokens is not None and count > runner.context_tokens:
            reason = f"{runner.base.name} takes {runner.context_tokens} at most"
            raise InvalidInput(f"{self.path} line {number}", f"{count} tokens", reason)


def _score(runner: Runner, tokens: Tokens, part: _Lines, totals: _Totals) -> None:
    """Add what the tokens of some examples tell."""
    texts = [(number, example, text) for number, example in part for text in tokens.scored(runner, number, example)]
    found = runner.scores([text.ids for _, _, text in texts])
    sums: dict[int, list[float]] = {}
    for (number, example, text), scores in zip(texts, found, strict=True):
        counted = [place for place, counts in enumerate(text.counts[1:]) if counts]
        loss = math.fsum(float(scores.losses[place]) for place in counted)
        if isinstance(example, Choice):
            sums.setdefault(number, []).append(loss)
            if len(sums[number]) - 1 != example.answer:
                continue
        totals.losses.append(loss)
        totals.tokens += len(counted)
        totals.likeliest += sum(bool(scores.likeliest[place]) for place in counted)
    for number, example in part:
        if isinstance(example, Choice):
            totals.chosen += 1
            totals.right += sums[number].index(min(sums[number])) == example.answer


def _texts(runner: Runner, path: str, number: int, example: Example) -> list[_Scored]:
    if isinstance(example, Text):
        return [_joined(path, number, [], runner.encode(example.text), counts_all=True)]
    if isinstance(example, Completion):
        return [_joined(path, number, runner.encode(example.prompt), runner.encode(example.completion))]
    if isinstance(example, Choice):
        prompt = runner.encode(example.prompt)
        return [_joined(path, number, prompt, runner.encode(choice)) for choice in example.choices]
    return [_dialogue(runner, path, number, example)]


def _joined(path: str, number: int, prompt: list[int], rest: list[int], *, counts_all: bool = False) -> _Scored:
    ids = (*prompt, *rest)
    if len(ids) < 2 or not rest:
        raise InvalidInput(f"{path} line {number}", "", "too short: nothing in it can be foreseen")
    return _Scored(ids, tuple(counts_all or place >= len(prompt) for place in range(len(ids))))


def _dialogue(runner: Runner, path: str, number: int, example: Dialogue) -> _Scored:
    """Of a conversation only what the assistant says counts: what its template adds when a turn of theirs is added."""
    whole = runner.prompt(example.messages, answering=False)
    counts = [False] * len(whole)
    for turn, message in enumerate(example.messages):
        if message.role == "assistant":
            before = runner.prompt(example.messages[:turn])
            after = runner.prompt(example.messages[: turn + 1], answering=False)
            if whole[: len(after)] != after or after[: len(before)] != before:
                reason = "the chat template rewrites earlier turns, so that it cannot be told what the assistant says"
                raise InvalidInput(f"{path} line {number}", "", reason)
            counts[len(before) : len(after)] = [True] * (len(after) - len(before))
    return _Scored(tuple(whole), tuple(counts))


def _write(runner: Runner, tokens: Tokens, part: _Lines, totals: _Totals) -> None:
    """Have the model write what should be there, and compare."""
    for number, example in part:
        if isinstance(example, (Completion, Dialogue)):
            asked = tokens.asked(runner, number, example)
            totals.to_write += 1
            totals.written += _is_written(runner.generate(asked.ids, asked.sampling), asked.wanted)


def _question(runner: Runner, example: Completion | Dialogue) -> _Asked:
    if isinstance(example, Completion):
        ids, wanted = runner.encode(example.prompt), example.completion
    else:
        ids, wanted = runner.prompt(example.messages[:-1]), example.messages[-1].content
    return _Asked(tuple(ids), wanted, Sampling(max_tokens=len(runner.encode(wanted)) + _ANSWER_TOKENS))


def _is_written(pieces: Iterator[str], wanted: str) -> bool:
    """Whether a text comes out; it is not waited for longer than it can be right."""
    said, right = "", wanted.strip()
    for piece in pieces:
        said += piece
        if not right.startswith(said.strip()[: len(right)]) or len(said.strip()) > len(right):
            return False
    return said.strip() == right
