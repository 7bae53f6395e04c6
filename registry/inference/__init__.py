"""Models in memory: a base model loaded once, with adapters that are swapped, weighed together, or merged without being written.

Everything heavy is imported when a model is opened: transformers and peft come with `ckpt-registry[hf]`, litgpt with `ckpt-registry[litgpt]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, final, get_args

from registry.errors import InvalidInput
from registry.manifest import BaseFormat, BaseModel, Checkpoint

if TYPE_CHECKING:
    from registry.service import Registry

Device = Literal["auto", "cpu", "cuda", "mps"]
LoadedDType = Literal["auto", "float32", "bfloat16", "float16"]
Weighed = Sequence[tuple[Checkpoint, float]]


@final
@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is system, user or assistant."""

    role: str
    content: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How text is chosen: at most `max_tokens`; the likeliest token each time for a `temperature` of 0, else one at random among those that make
    up `top_p` of the probability. The same `seed` gives the same text on the same machine; None is another one each time.

    Raises:
        InvalidInput: a number is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInput("max_tokens", self.max_tokens, "expected 1 and more")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput("temperature", self.temperature, "expected 0 and more")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", self.top_p, "expected more than 0, up to 1")


@final
@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of a text, for each token but the first: `losses` are -log of its probability in nats (float64), `likeliest` tells whether it is the token
    that the model would choose (bool). Both are numpy arrays of one dimension.
    """

    losses: Any
    likeliest: Any


class Runner(Protocol):
    """One model in memory: a base with adapters on it, or a merged one in its place. It is loaded when it is first needed.

    Not to be used by several threads at once.
    """

    @property
    def base(self) -> BaseModel:
        """Which one."""

    @property
    def device(self) -> str:
        """Where it computes: cpu, cuda or mps."""

    @property
    def speaker(self) -> str:
        """Whose tokenizer and chat template count now, by what is in their files: where it is the same, tokens of a text are."""

    @property
    def context_tokens(self) -> int | None:
        """The longest text that it was made for; None where it does not say."""

    def use(self, what: Checkpoint | Weighed | None) -> None:
        """Have an adapter answer from now on, a weighted sum of several, or nobody but the base.

        Raises:
            Refused: it does not fit the base.
            InvalidRecipe: adapters of these kinds cannot be added up.
        """

    def use_merged(self, checkpoint: Checkpoint) -> None:
        """Have the model answer that merging the checkpoint gives. It is computed into memory and written nowhere; the base makes room for it.

        Raises:
            Refused: it cannot be merged.
        """

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without any that only open or close a document."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""

    def prompt(self, messages: Sequence[Message], *, answering: bool = True) -> list[int]:
        """Tokens of a conversation, by the chat template of the adapter that is used, else by the base's; ready to be answered.

        Raises:
            NoChatTemplate: neither has one.
        """

    def generate(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """What the model says next, in pieces as it comes; ends where the model does, or after `max_tokens`.

        Raises:
            OutOfMemory: the device has not enough.
        """

    def scores(self, batch: Sequence[Sequence[int]]) -> list[TokenScores]:
        """How well each token of some texts is foreseen from those before it. Several at once give the same as one by one.

        Args:
            batch: the tokens of each text, two at least.

        Raises:
            OutOfMemory: the device has not enough.
        """

    def logits(self, ids: Sequence[int]) -> Any:
        """For each token the scores of what could come next: a float32 array of tokens by vocabulary.

        Raises:
            OutOfMemory: the device has not enough.
        """


def check_place(device: str, dtype: str) -> None:
    """See that a device and a dtype are among those that there are.

    Raises:
        InvalidInput: one is not.
    """
    for name, value, known in (("device", device, get_args(Device)), ("dtype", dtype, get_args(LoadedDType))):
        if value not in known:
            raise InvalidInput(name, value, f"expected {', '.join(known)}")


def open_runner(
    registry: Registry, subject: Checkpoint | BaseModel, *, device: Device = "auto", dtype: LoadedDType = "auto"
) -> Runner:
    """What computes with a base model. A checkpoint that is given answers, so that the model is loaded at once.

    Args:
        registry: where they are.
        subject: a base model, or a checkpoint, whose base it is then.
        device: where to compute; `auto` takes a GPU where there is one.
        dtype: of the weights in memory; `auto` is that of the model's files.

    Raises:
        InvalidInput: no such device or dtype.
        MissingPackage: what loads such a model is not installed; says what to install.
        OutOfMemory: it does not fit.
        PathNotFound: the base model is not where it was.
        Refused: the checkpoint does not fit its base.
    """
    check_place(device, dtype)
    base = registry.base(subject.base.hex) if isinstance(subject, Checkpoint) else subject
    runner: Runner
    if base.format is BaseFormat.LITGPT:
        from registry.inference.litgpt_models import open_litgpt  # noqa: PLC0415 - loads torch

        runner = open_litgpt(registry, base, device=device, dtype=dtype)
    else:
        from registry.inference.hugging_face import open_hugging_face  # noqa: PLC0415 - loads torch

        runner = open_hugging_face(registry, base, device=device, dtype=dtype)
    if isinstance(subject, Checkpoint):
        runner.use(subject)
    return runner


def load_model(
    registry: Registry,
    checkpoint: Checkpoint,
    *,
    merged: bool = False,
    device: Device = "auto",
    dtype: LoadedDType = "auto",
) -> Any:
    """A checkpoint's model for a program of one's own: see `registry.service.Registry.load`."""
    check_place(device, dtype)
    base = registry.base(checkpoint.base.hex)
    if base.format is BaseFormat.LITGPT:
        from registry.inference.litgpt_models import load_litgpt  # noqa: PLC0415 - loads torch

        return load_litgpt(registry, checkpoint, base, merged=merged, device=device, dtype=dtype)
    from registry.inference.hugging_face import load_hugging_face  # noqa: PLC0415 - loads torch

    return load_hugging_face(registry, checkpoint, base, merged=merged, device=device, dtype=dtype)
