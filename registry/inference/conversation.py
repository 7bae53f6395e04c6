"""A conversation with a model: the turns so far, who answers, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from registry.errors import InvalidInput, InvalidRecipe, InvalidReference
from registry.inference import Device, LoadedDType, Message, Runner, Sampling, open_runner
from registry.manifest import Checkpoint

if TYPE_CHECKING:
    from registry.service import Registry

_WEIGHED = re.compile(r"(?P<ref>.+?)(?::(?P<weight>-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)))?")
_BARE_NUMBER = re.compile(r"[^@:]+@(?:step|run):[^:]+")


@final
@dataclass(frozen=True, slots=True)
class Speaker:
    """Who answers: a checkpoint, a weighted sum of several, or, merged, the model that one of them gives."""

    name: str
    weighed: tuple[tuple[Checkpoint, float], ...]
    is_merged: bool = False

    @property
    def only(self) -> Checkpoint | None:
        """The one checkpoint with its whole weight; None for a sum."""
        (checkpoint, weight), *rest = self.weighed
        return None if rest or weight != 1 else checkpoint


def parse_weighed(text: str) -> list[tuple[str, float]]:
    """References and weights out of `A:0.7+B:0.3`, or one reference.

    Raises:
        InvalidReference: a part is empty.
        InvalidRecipe: some parts have a weight and others none.
    """
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise InvalidReference(text, "expected A:0.7+B:0.3")
    if len(parts) == 1:
        return [(text.strip(), 1.0)]
    found = []
    for part in parts:
        match = None if _BARE_NUMBER.fullmatch(part) else _WEIGHED.fullmatch(part)
        found.append((match["ref"], float(match["weight"])) if match and match["weight"] else (part, None))
    given = [weight for _, weight in found]
    if None in given and any(weight is not None for weight in given):
        raise InvalidRecipe("weights", text, "give each a weight, or none")
    share = 1 / len(found)
    return [(ref, share if weight is None else weight) for ref, weight in found]


def find_speaker(registry: Registry, text: str, *, is_merged: bool = False) -> Speaker:
    """Who a text means.

    Raises:
        InvalidReference, NotFound, Ambiguous: as `Registry.resolve`.
        InvalidRecipe: a sum is to be merged: that is `ckpt combine`.
    """
    weighed = tuple((registry.resolve(ref), weight) for ref, weight in parse_weighed(text))
    if is_merged and len(weighed) > 1:
        raise InvalidRecipe("merged", text, "a sum answers unmerged; `ckpt combine` makes one adapter of it")
    names = [checkpoint.ref if len(weighed) == 1 else f"{checkpoint.ref}:{weight:g}" for checkpoint, weight in weighed]
    return Speaker("+".join(names) + (" merged" if is_merged else ""), weighed, is_merged)


@final
@dataclass(slots=True)
class Conversation:
    """Turns and who takes them. The model is loaded for the first speaker; others are put on as they speak.

    Args:
        registry: where checkpoints are.
        speaker: who answers.
        sampling: how.
        system: what goes before everything.
        device, dtype: as `registry.inference.open_runner`.
        messages: the turns so far.
    """

    registry: Registry
    speaker: Speaker
    sampling: Sampling
    system: str = ""
    device: Device = "auto"
    dtype: LoadedDType = "auto"
    messages: list[Message] = field(default_factory=list)
    _runner: Runner | None = None
    _speaking: Speaker | None = None

    def runner_for(self, speaker: Speaker) -> Runner:
        """The model with somebody speaking. Another base model is loaded where that is theirs.

        Raises:
            Refused, OutOfMemory, MissingPackage, PathNotFound: as `open_runner`.
        """
        first = speaker.weighed[0][0]
        if self._runner is None or self._runner.base.digest != first.base:
            self._runner = self._speaking = None  # before the next one takes its place
            base = self.registry.base(first.base.hex)
            self._runner = open_runner(self.registry, base, device=self.device, dtype=self.dtype)
        if self._speaking != speaker:
            self._speaking = None  # nobody knows who answers where this fails
            if speaker.is_merged:
                self._runner.use_merged(first)
            else:
                self._runner.use(speaker.only or speaker.weighed)
            self._speaking = speaker
        return self._runner

    def switch(self, speaker: Speaker) -> None:
        """Have somebody else answer from now on; who answered before stays where that fails."""
        self.runner_for(speaker)
        self.speaker = speaker

    def ask(self, text: str) -> Iterator[str]:
        """Say something, and get the answer in pieces. The turn is kept when the answer is complete or was stopped after it began."""
        yield from self._answered([*self.messages, Message("user", text)], self.speaker, keeps=True)

    def ask_another(self, text: str, speaker: Speaker) -> Iterator[str]:
        """What somebody else would answer; nothing of it is kept."""
        yield from self._answered([*self.messages, Message("user", text)], speaker, keeps=False)

    def go_on(self, text: str) -> Iterator[str]:
        """How a text goes on as it is, without a chat template and without the turns so far."""
        runner = self.runner_for(self.speaker)
        ids = runner.encode(text)
        yield from runner.generate(ids, self._limited(runner, len(ids)))

    def _answered(self, messages: Sequence[Message], speaker: Speaker, *, keeps: bool) -> Iterator[str]:
        runner = self.runner_for(speaker)
        opened = [Message("system", self.system)] if self.system else []
        ids = runner.prompt([*opened, *messages])
        said: list[str] = []
        try:
            for piece in runner.generate(ids, self._limited(runner, len(ids))):
                said.append(piece)
                yield piece
        finally:
            if keeps and said:
                self.messages[:] = [*messages, Message("assistant", "".join(said))]

    def _limited(self, runner: Runner, count: int) -> Sampling:
        """No more than the model has room for.

        Raises:
            InvalidInput: there is no room for an answer.
        """
        room = None if runner.context_tokens is None else runner.context_tokens - count
        if room is None or room >= self.sampling.max_tokens:
            return self.sampling
        if room < 1:
            reason = f"{runner.base.name} takes {runner.context_tokens} at most, with the answer"
            raise InvalidInput("conversation", f"{count} tokens", reason)
        return replace(self.sampling, max_tokens=room)
