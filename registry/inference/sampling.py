"""The next token, and its text: what all models in memory do in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

from registry.errors import InvalidInput, OutOfMemory
from registry.inference import Sampling, TokenScores

if TYPE_CHECKING:
    import torch

# What decoders put where a character is not complete yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@final
class Chooser:
    """Chooses tokens by their scores.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        import torch  # noqa: PLC0415 - takes a second, and is here when models are

        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def choose(self, scores: torch.Tensor) -> int:
        """One token.

        Args:
            scores: of every token, one row.
        """
        import torch  # noqa: PLC0415

        row = scores.detach().float().cpu()
        if self._sampling.temperature == 0:
            return int(row.argmax())
        shares = torch.softmax(row / self._sampling.temperature, dim=-1)
        ordered, places = shares.sort(descending=True)
        # the first one is always kept, and so is the one that completes the share
        ordered[ordered.cumsum(0) - ordered >= self._sampling.top_p] = 0.0
        return int(places[torch.multinomial(ordered, 1, generator=self._random)])


def spoken(ids: Iterator[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of tokens, as they come. What is no whole character yet waits for its rest."""
    seen: list[int] = []
    said = ""
    for token in ids:
        seen.append(token)
        text = decode(seen)
        if text.startswith(said) and len(text) > len(said) and not text.endswith(_INCOMPLETE):
            yield text[len(said) :]
            said = text
    rest = decode(seen)[len(said) :]
    if rest:
        yield rest


def scores_of(logits: torch.Tensor, ids: Sequence[int]) -> TokenScores:
    """How well the tokens of one text are foreseen.

    Args:
        logits: tokens by vocabulary, as the model gave them for these tokens.
        ids: the tokens.
    """
    import torch  # noqa: PLC0415

    wanted = torch.tensor(list(ids[1:]), device=logits.device)
    shares = torch.log_softmax(logits[:-1].float(), dim=-1)
    losses = -shares.gather(1, wanted[:, None])[:, 0].double().cpu().numpy()
    return TokenScores(losses, (shares.argmax(dim=-1) == wanted).cpu().numpy())


@contextmanager
def enough_memory(what: str, device: str) -> Iterator[None]:
    """Memory that runs out is said in our words.

    Raises:
        OutOfMemory: the device has not enough.
    """
    import torch  # noqa: PLC0415

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(what, device) from error
    except RuntimeError as error:  # the CPU's allocator has no class of its own
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise OutOfMemory(what, device) from error


def pick_device(wanted: str) -> str:
    """Where to compute: what was asked for, or the fastest there is.

    Raises:
        InvalidInput: this machine has no such device.
    """
    import torch  # noqa: PLC0415

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there[wanted]:
        raise InvalidInput("device", wanted, "this machine has none that torch can use")
    return wanted
