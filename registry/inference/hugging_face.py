"""Hugging Face models in memory: transformers computes, peft puts adapters on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from registry.errors import InvalidRecipe, MissingPackage, NoChatTemplate, NoTokenizer
from registry.inference import Device, LoadedDType, Message, Sampling, TokenScores, Weighed
from registry.inference.places import check_fits, folder_of_base, folder_of_checkpoint, merged_files
from registry.inference.sampling import Chooser, enough_memory, pick_device, scores_of, spoken
from registry.manifest import BaseModel, Checkpoint, Format

if TYPE_CHECKING:
    from registry.service import Registry

try:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    raise MissingPackage(error.name or "transformers", "hf") from error

_KEPT_ADAPTERS = 4  # on the model at once; the one used longest ago makes room
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_hugging_face(registry: Registry, base: BaseModel, *, device: Device, dtype: LoadedDType) -> HuggingFaceRunner:
    """Load a base model; see `registry.inference.open_runner`."""
    folder, place = folder_of_base(registry, base), pick_device(device)
    with enough_memory(f"the model {base.name}", place):
        model = _loaded(folder, dtype).to(place)
    return HuggingFaceRunner(registry, base, folder, model.eval(), dtype)


def load_hugging_face(
    registry: Registry, checkpoint: Checkpoint, base: BaseModel, *, merged: bool, device: Device, dtype: LoadedDType
) -> Any:
    """A model of transformers as programs want it; see `registry.inference.load_model`."""
    if merged:
        return _merged(registry, checkpoint, base, folder_of_base(registry, base), pick_device(device), dtype)
    runner = open_hugging_face(registry, base, device=device, dtype=dtype)
    runner.use(checkpoint)
    return runner.with_adapter


def _merged(
    registry: Registry, checkpoint: Checkpoint, base: BaseModel, folder: Path, place: str, dtype: LoadedDType
) -> Any:
    """The merged model, computed into memory."""
    found = merged_files(registry, checkpoint)
    with enough_memory(f"the model {base.name}, merged", place):
        state = {
            name: tensor
            for file in found.files
            if file.path.endswith(".safetensors")
            for name, tensor in _tensors(b"".join(map(bytes, registry.read_file(found, file.path)))).items()
        }
        config = AutoConfig.from_pretrained(folder)
        for file in found.files:
            if file.path == "config.json":
                data = b"".join(map(bytes, registry.read_file(found, file.path)))
                config = type(config).from_dict(json.loads(data))
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]
        return _loaded(None, dtype, kind, config=config, state_dict=state).to(place).eval()


def _loaded(folder: Path | None, dtype: LoadedDType, kind: Any = AutoModelForCausalLM, **given: Any) -> Any:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return kind.from_pretrained(folder, dtype=_dtype(dtype), local_files_only=True, **given)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _dtype(name: LoadedDType) -> Any:
    return name if name == "auto" else getattr(torch, name)


@final
class HuggingFaceRunner:
    """A `registry.inference.Runner` of transformers and peft.

    Args:
        registry: where checkpoints are.
        base: the model.
        folder: its files.
        model: the same, loaded.
        dtype: what it was loaded as.
    """

    def __init__(self, registry: Registry, base: BaseModel, folder: Path, model: Any, dtype: LoadedDType) -> None:
        self.base = base
        self._registry, self._folder, self._dtype = registry, folder, dtype
        self._plain: Any = model
        self._peft: Any = None
        self._merged: Any = None
        self._on: dict[str, str] = {}  # name on the model: kind of tuner, the one used last at the end
        self._active: str | None = None
        self._tokenizers: dict[Path, Any] = {}
        self._speaker = folder
        self._name = base.name

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self._plain.device.type)

    @property
    def context_tokens(self) -> int | None:
        """The longest text that it was made for."""
        return getattr(self._plain.config, "max_position_embeddings", None)

    @property
    def with_adapter(self) -> Any:
        """The model of peft, with the adapter that is used."""
        if self._active is None:
            return self._plain
        self._peft.set_adapter(self._active)
        return self._peft

    # -- who answers

    def use(self, what: Checkpoint | Weighed | None) -> None:
        """Have an adapter answer, a weighted sum, or the base alone."""
        self._merged = None
        if what is None:
            self._active, self._speaker, self._name = None, self._folder, self.base.name
        elif isinstance(what, Checkpoint):
            self._active = self._put_on(what)
            self._speak_as(what)
        else:
            self._active = self._put_on_sum(what)
            self._speak_as(what[0][0])

    def use_merged(self, checkpoint: Checkpoint) -> None:
        """Have the merged model answer; its weights are computed into memory."""
        self._merged = _merged(self._registry, checkpoint, self.base, self._folder, self.device, self._dtype)
        self._speak_as(checkpoint)

    def _speak_as(self, checkpoint: Checkpoint) -> None:
        """Whose tokenizer counts: the adapter's, where it has one."""
        self._name = checkpoint.ref
        folder = folder_of_checkpoint(self._registry, checkpoint)
        self._speaker = folder if _has_tokenizer(folder) else self._folder

    def _put_on(self, checkpoint: Checkpoint, together: int = 1) -> str:
        """Its name on the model, where it is then with as many others as are needed `together`."""
        name = checkpoint.digest.short
        if name in self._on:
            self._on[name] = self._on.pop(name)
            return name
        check_fits(self._registry, checkpoint, self.base)
        if checkpoint.manifest.format is not Format.PEFT:
            raise InvalidRecipe("checkpoint", checkpoint.ref, "not an adapter of PEFT: `ckpt convert` makes one of it")
        folder = folder_of_checkpoint(self._registry, checkpoint)
        self._make_room(checkpoint.manifest.method, max(_KEPT_ADAPTERS, together))
        with enough_memory(f"the adapter {checkpoint.ref}", self.device):
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._plain, folder, adapter_name=name).eval()
            else:
                self._peft.load_adapter(folder, adapter_name=name)
        self._on[name] = checkpoint.manifest.method
        return name

    def _make_room(self, method: str, most: int) -> None:
        """Adapters of one kind only are on the model at once, and not too many."""
        if self._peft is None:
            return
        if set(self._on.values()) != {method}:
            self._plain, self._peft = self._peft.unload(), None
            self._on.clear()
        while len(self._on) >= most:
            oldest = next(iter(self._on))
            self._peft.delete_adapter(oldest)
            del self._on[oldest]

    def _put_on_sum(self, weighed: Weighed) -> str:
        """One adapter that adds several deltas up, each with its weight: exactly, by joining their factors."""
        if not weighed:
            raise InvalidRecipe("checkpoints", "", "expected at least one")
        if odd := next((each for each, _ in weighed if each.manifest.method != "lora"), None):
            raise InvalidRecipe("method", odd.manifest.method, f"only LoRA can be added up unmerged; {odd.ref} is none")
        name = "+".join(f"{checkpoint.digest.short}:{weight:g}" for checkpoint, weight in weighed).replace(".", "_")
        if name in self._on:
            return name
        names = [self._put_on(checkpoint, len(weighed)) for checkpoint, _ in weighed]
        weights = [weight for _, weight in weighed]
        cast("Any", self._peft).add_weighted_adapter(names, weights, adapter_name=name, combination_type="cat")
        self._on[name] = "lora"
        return name

    # -- text

    @property
    def _tokenizer(self) -> Any:
        if self._speaker not in self._tokenizers:
            if not _has_tokenizer(self._speaker):
                raise NoTokenizer(self._name)
            self._tokenizers[self._speaker] = AutoTokenizer.from_pretrained(self._speaker, local_files_only=True)
        return self._tokenizers[self._speaker]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt(self, messages: Sequence[Message], *, answering: bool = True) -> list[int]:
        """Tokens of a conversation, by the chat template."""
        if not self._tokenizer.chat_template:
            raise NoChatTemplate(self._name)
        turns = [{"role": each.role, "content": each.content} for each in messages]
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=answering, tokenize=False)
        return self.encode(text)

    # -- compute

    @property
    def _model(self) -> Any:
        return self._merged if self._merged is not None else self._peft or self._plain

    def _scores(self, rows: Any, **given: Any) -> Any:
        """The model's answer to rows of tokens, by whoever answers."""
        model = self._model
        if model is not self._peft or self._peft is None:
            return model(input_ids=rows, **given)
        if self._active is None:
            with self._peft.disable_adapter():
                return self._peft(input_ids=rows, **given)
        self._peft.set_adapter(self._active)
        return self._peft(input_ids=rows, **given)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Any:
        """For each token the scores of what could come next."""
        with enough_memory(f"{len(ids)} tokens", self.device):
            return self._scores(self._row(ids)).logits[0].float().cpu().numpy()

    def _row(self, ids: Sequence[int]) -> Any:
        return torch.tensor([list(ids)], device=self.device)

    @torch.no_grad()
    def scores(self, batch: Sequence[Sequence[int]]) -> list[TokenScores]:
        """How well each token of some texts is foreseen from those before it."""
        longest = max(map(len, batch))
        rows = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=self.device)
        with enough_memory(f"{len(batch)} texts of {longest} tokens", self.device):
            found = self._scores(rows, attention_mask=mask).logits
            return [scores_of(found[row, : len(ids)], ids) for row, ids in enumerate(batch)]

    def generate(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """What the model says next, in pieces as it comes."""
        yield from spoken(self._tokens(ids, sampling), self.decode)

    def _tokens(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        chooser, ends = Chooser(sampling), self._ends()
        given, past = list(ids), None
        for _ in range(sampling.max_tokens):
            with torch.no_grad(), enough_memory(f"{len(ids)} tokens and an answer", self.device):
                found = self._scores(self._row(given), past_key_values=past, use_cache=True)
            token = chooser.choose(found.logits[0, -1])
            if token in ends:
                return
            yield token
            given, past = [token], found.past_key_values

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        model = self._model
        settings = getattr(model, "generation_config", None)
        found = {getattr(settings, "eos_token_id", None), self._tokenizer.eos_token_id}
        return {
            token
            for each in found
            for token in (each if isinstance(each, (list, tuple)) else [each])
            if token is not None
        }


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _tensors(data: bytes) -> dict[str, Any]:
    from safetensors.torch import load  # noqa: PLC0415 - comes with torch

    return cast("dict[str, Any]", load(data))
