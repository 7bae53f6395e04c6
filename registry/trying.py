"""Try a checkpoint before it is merged: base, adapter and merged model answer the same prompts, and what differs is measured.

The adapter's own answer is what the others are compared on: wherever one of its tokens was chosen, the scores of all tokens that unmerged and
merged weights give. The merged model is computed into memory and written nowhere.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from registry.errors import InvalidInput, NoChatTemplate, NoTokenizer, PathNotFound
from registry.inference import Device, LoadedDType, Message, Runner, Sampling, check_place, open_runner
from registry.manifest import BaseModel, Checkpoint, Level, Metric, digest_of
from registry.progress import Progress, silent

if TYPE_CHECKING:
    from registry.service import Registry

DIFFERENCE, AGREEMENT, SPEED = "try/logit_difference", "try/agreement", "try/tokens_per_second"
PROMPTS = (
    "Say hello.",
    "Who are you, and what can you do for me?",
    "Explain in one sentence why the sky is blue.",
    "Write a short e-mail that moves a meeting to Thursday.",
    "What is 17 times 23?",
    "Translate into French: where is the railway station?",
    "Write a Python function that reverses a string.",
    "List three things to pack for a rainy day.",
)
# The scores of every answer are kept until the merged model has given its own: a handful, not a data set.
MOST_PROMPTS = 32
_SHOWN = 60


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trying:
    """What to try: each of `prompts` with answers of `max_tokens` at most, the likeliest token each time.

    Raises:
        InvalidInput: no prompts, or too many; no such device or dtype.
    """

    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 48
    device: Device = "auto"
    dtype: LoadedDType = "auto"

    def __post_init__(self) -> None:
        check_place(self.device, self.dtype)
        if not 1 <= len(self.prompts) <= MOST_PROMPTS:
            reason = f"expected 1 to {MOST_PROMPTS}; `ckpt eval` measures on more"
            raise InvalidInput("prompts", len(self.prompts), reason)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One prompt and the answers to it. `base` is None where the base model cannot read the adapter's tokens, `merged` where nothing is merged.

    `tokens` are the adapter's; `largest` and `mean` are absolute differences of scores, `agreed` counts the `places` where unmerged and merged
    weights would choose the same token.
    """

    prompt: str
    base: str | None
    adapter: str
    merged: str | None = None
    tokens: int = 0
    largest: float | None = None
    mean: float | None = None
    agreed: int = 0
    places: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What trying has shown. `unmerged_because` is why nothing was merged, else empty; `tokens_per_second` are by who answered (base, adapter,
    merged). `data` names prompts and length, as a metric's does.
    """

    checkpoint: Checkpoint
    trials: tuple[Trial, ...]
    device: str
    tokens_per_second: dict[str, float]
    unmerged_because: str
    data: str

    @property
    def largest(self) -> float | None:
        """The largest difference between a score of the unmerged and one of the merged model; None where nothing was merged."""
        return max((each.largest for each in self.trials if each.largest is not None), default=None)

    @property
    def mean(self) -> float | None:
        """The mean difference, each prompt counting the same."""
        found = [each.mean for each in self.trials if each.mean is not None]
        return statistics.fmean(found) if found else None

    @property
    def agreement(self) -> float | None:
        """Share of the places where both would choose the same token, 0 to 1."""
        places = sum(each.places for each in self.trials)
        return sum(each.agreed for each in self.trials) / places if places else None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is recorded, so that policies can ask for it."""
        step, data, agreement = self.checkpoint.step, self.data, self.agreement
        found = [Metric(name=SPEED, value=self.tokens_per_second["adapter"], step=step, direction="higher", data=data)]
        if self.largest is not None and agreement is not None:
            found.append(Metric(name=DIFFERENCE, value=self.largest, step=step, direction="lower", data=data))
            found.append(Metric(name=AGREEMENT, value=agreement, step=step, direction="higher", data=data))
        return tuple(metric for metric in found if not math.isnan(metric.value))

    @property
    def note(self) -> str:
        """The same for people, with a short table in Markdown."""
        speeds = ", ".join(f"{name} {speed:.3g}" for name, speed in self.tokens_per_second.items())
        facts = [f"tried on {len(self.trials)} prompts on {self.device}; tokens per second: {speeds}"]
        if self.largest is None or self.mean is None or self.agreement is None:
            facts.append(f"not merged: {self.unmerged_because}")
        else:
            facts.append(
                f"unmerged and merged: scores differ by {self.largest:.3g} at most, {self.mean:.3g} on average"
            )
            facts.append(f"{self.agreement:.1%} of the tokens are the same")
        rows = [[each.prompt, each.base or "", each.adapter, each.merged or ""] for each in self.trials]
        table = [["prompt", "base", "adapter", "merged"], ["---"] * 4, *rows]
        return "; ".join(facts) + "\n\n" + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table)


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: of JSON lines their `prompt`, else each line that says something.

    Raises:
        InvalidInput: a line is not what it should be.
        PathNotFound: no such file.
    """
    try:
        lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except OSError as error:
        raise PathNotFound(str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(str(path), "", "expected text in UTF-8") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return tuple(line.strip() for _, line in lines)
    return tuple(_prompt(path, number, line) for number, line in lines)


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"{path} line {number}", line[:80], "expected a JSON object with 'prompt'") from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidInput(f"{path} line {number}", line[:80], "expected text as its 'prompt'")
    return prompt


def try_checkpoint(
    registry: Registry,
    checkpoint: Checkpoint,
    wanted: Trying,
    *,
    records: bool = True,
    progress: Progress = silent,
) -> Tried:
    """Have base, adapter and merged model answer, compare the latter two, and record what was found as metrics and a note.

    Args:
        registry: where the checkpoint is.
        checkpoint: which.
        wanted: what to try it with.
        records: False only shows.
        progress: told of each answer.

    Raises:
        NoTokenizer: neither adapter nor base has one.
        MissingPackage, OutOfMemory, PathNotFound, Refused: as `registry.inference`.
    """
    because = unmergeable(registry, checkpoint)
    total = len(wanted.prompts) * (2 if because else 3)
    runner = open_runner(registry, checkpoint, device=wanted.device, dtype=wanted.dtype)
    found = _answers(runner, checkpoint, wanted, not because, lambda who: progress(f"{who} answers", 1, total))
    tried = Tried(
        checkpoint=checkpoint,
        trials=tuple(each.trial(prompt) for each, prompt in zip(found, wanted.prompts, strict=True)),
        device=runner.device,
        tokens_per_second=_speeds(found),
        unmerged_because=because,
        data=digest_of([list(wanted.prompts), wanted.max_tokens]).hex,
    )
    if records:
        registry.add_metrics(checkpoint, tried.metrics)
        registry.note(checkpoint, tried.note)
    return tried


def unmergeable(registry: Registry, checkpoint: Checkpoint) -> str:
    """Why a checkpoint cannot be merged into its base; empty where it can."""
    refused = [each for each in registry.check(checkpoint).findings if each.level is Level.REFUSED]
    found = (f"{each.code.replace('_', ' ')}{f': {each.found}' if each.found else ''}" for each in refused)
    return "; ".join(dict.fromkeys(found))


@dataclass(slots=True)
class _Answered:
    """A prompt with what has come of it so far. `scores` are the adapter's where it chose a token: places by vocabulary, float32."""

    ids: list[int]
    answer: list[int] = field(default_factory=list)
    scores: Any = None
    texts: dict[str, str] = field(default_factory=dict)
    speeds: dict[str, tuple[int, float]] = field(default_factory=dict)
    largest: float | None = None
    mean: float | None = None
    agreed: int = 0

    def trial(self, prompt: str) -> Trial:
        base, merged = self.texts.get("base"), self.texts.get("merged")
        return Trial(
            prompt=prompt,
            base=base,
            adapter=self.texts["adapter"],
            merged=merged,
            tokens=len(self.answer),
            largest=self.largest,
            mean=self.mean,
            agreed=self.agreed,
            places=0 if merged is None else len(self.answer) + 1,
        )


def _answers(
    runner: Runner, checkpoint: Checkpoint, wanted: Trying, is_merged: bool, advance: Callable[[str], None]
) -> list[_Answered]:
    """Everybody's answers to every prompt. The merged model comes last: it takes the base's place in memory."""
    found = [_Answered(_prompt_ids(runner, prompt, wanted)) for prompt in wanted.prompts]
    sampling = Sampling(max_tokens=wanted.max_tokens)
    for each in found:
        _speak(runner, each, "adapter", sampling)
        each.answer = runner.encode(each.texts["adapter"])
        each.scores = _scores(runner, each) if is_merged else None
        advance("adapter")
    runner.use(None)
    for each in found:
        if _is_read_by(runner.base, each.ids):
            _speak(runner, each, "base", sampling)
        advance("base")
    if is_merged:
        runner.use_merged(checkpoint)
        for each in found:
            _speak(runner, each, "merged", sampling)
            _compare(each, _scores(runner, each))
            advance("merged")
    return found


def _prompt_ids(runner: Runner, prompt: str, wanted: Trying) -> list[int]:
    """A prompt as a conversation that is to be answered; as it is where nobody knows how to write one."""
    try:
        ids = runner.prompt([Message("user", prompt)])
    except NoChatTemplate:
        ids = runner.encode(prompt)
    room = runner.context_tokens
    if not ids or (room is not None and len(ids) + wanted.max_tokens > room):
        reason = f"{len(ids)} tokens; with the answer, 1 to {room} are what the model takes: see --max-tokens"
        raise InvalidInput("prompt", prompt[:_SHOWN], reason)
    return ids


def _is_read_by(base: BaseModel, ids: Sequence[int]) -> bool:
    """Whether a base model knows all of some tokens: an adapter may have added some."""
    words = base.config.get("vocab_size", base.config.get("padded_vocab_size"))
    return not isinstance(words, int) or max(ids) < words


def _speak(runner: Runner, answered: _Answered, who: str, sampling: Sampling) -> None:
    started = time.perf_counter()
    try:
        text = "".join(runner.generate(answered.ids, sampling))
        seconds = time.perf_counter() - started
        tokens = len(runner.encode(text))
    except NoTokenizer:
        if who == "base":  # whose tokenizer came with the adapter: nobody can tell what it would say
            return
        raise
    answered.texts[who] = text
    answered.speeds[who] = tokens, seconds


def _speeds(found: Sequence[_Answered]) -> dict[str, float]:
    """Tokens per second of everybody, over all prompts."""
    speeds = {}
    for who in ("base", "adapter", "merged"):
        taken = [each.speeds[who] for each in found if who in each.speeds]
        if taken:
            speeds[who] = sum(tokens for tokens, _ in taken) / max(sum(seconds for _, seconds in taken), 1e-9)
    return speeds


def _scores(runner: Runner, answered: _Answered) -> Any:
    """The scores wherever the adapter chose a token, the last of which ended its answer."""
    return runner.logits([*answered.ids, *answered.answer])[len(answered.ids) - 1 :]


def _compare(answered: _Answered, merged: Any) -> None:
    difference = np.abs(answered.scores - merged, dtype=np.float32)
    answered.largest, answered.mean = float(difference.max()), float(difference.mean(dtype=np.float64))
    answered.agreed = int((answered.scores.argmax(axis=-1) == merged.argmax(axis=-1)).sum())
    answered.scores = None


def over_tolerance(tried: Tried, tolerance: float) -> Iterator[str]:
    """What of a trial is more than may be, in sentences.

    Args:
        tried: what was found.
        tolerance: the largest difference of scores that may be.
    """
    if tried.largest is None:
        yield f"it could not be merged: {tried.unmerged_because}"
    elif not tried.largest <= tolerance:
        yield f"scores differ by {tried.largest:.3g}, more than {tolerance:g}"
