"""Hugging Face models in memory: transformers computes, peft puts adapters on."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from registry.errors import InvalidRecipe, MissingPackage, NoChatTemplate, NoTokenizer
from registry.inference import Device, LoadedDType, Message, Sampling, TokenScores, Weighed
from registry.inference.keeping import KEPT_ADAPTERS, Recent, check_sum
from registry.inference.places import check_fits, folder_of_base, folder_of_checkpoint, merged_files, speech_of
from registry.inference.sampling import Chooser, enough_memory, pick_device, scores_of, spoken
from registry.manifest import BaseModel, Checkpoint, Format
from registry.results import Repository, RepositoryFile
from registry.tensors import MAX_HEADER_BYTES, StoredTensor, read_safetensors_header

if TYPE_CHECKING:
    from registry.service import Registry

try:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    raise MissingPackage(error.name or "transformers", "hf") from error

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_hugging_face(registry: Registry, base: BaseModel, *, device: Device, dtype: LoadedDType) -> HuggingFaceRunner:
    """What computes with a base model; see `registry.inference.open_runner`."""
    return HuggingFaceRunner(registry, base, folder_of_base(registry, base), pick_device(device), dtype)


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
            for name, tensor in _tensors(registry, found, file).items()
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
        place: the device that it is loaded on.
        dtype: what it is loaded as.
    """

    def __init__(self, registry: Registry, base: BaseModel, folder: Path, place: str, dtype: LoadedDType) -> None:
        self.base, self.device = base, place
        self._registry, self._folder, self._dtype = registry, folder, dtype
        self._config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self._base_model: Any = None
        self._peft: Any = None
        self._merged: Any = None
        self._on = Recent[str]()  # kinds of tuners, by the adapters' names on the model
        self._active: str | None = None
        self._tokenizers: dict[str, Any] = {}
        self.speaker, self._speaks_from, self._name = "", folder, base.name

    @property
    def context_tokens(self) -> int | None:
        """The longest text that it was made for."""
        return getattr(self._config, "max_position_embeddings", None)

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
        if what is None:
            self._active = None
            self.speaker, self._speaks_from, self._name = "", self._folder, self.base.name
        elif isinstance(what, Checkpoint):
            self._active = self._put_on(what)
            self._speak_as(what)
        else:
            self._active = self._put_on_sum(what)
            self._speak_as(what[0][0])
        self._merged = None

    def use_merged(self, checkpoint: Checkpoint) -> None:
        """Have the merged model answer; its weights are computed into memory."""
        merged_files(self._registry, checkpoint)  # is refused before anybody makes room for it
        self._base_model = self._peft = self._merged = self._active = None
        self._on.clear()
        gc.collect()  # modules and hooks refer to each other
        self._merged = _merged(self._registry, checkpoint, self.base, self._folder, self.device, self._dtype)
        self._speak_as(checkpoint)

    @property
    def _plain(self) -> Any:
        """The base model; a merged one that is in memory makes room for it."""
        if self._base_model is None:
            self._merged = None
            with enough_memory(f"the model {self.base.name}", self.device):
                self._base_model = _loaded(self._folder, self._dtype).to(self.device).eval()
        return self._base_model

    def _speak_as(self, checkpoint: Checkpoint) -> None:
        """Whose tokenizer counts: the adapter's, where it has one."""
        folder = folder_of_checkpoint(self._registry, checkpoint)
        has_own = _has_tokenizer(folder)
        self.speaker, self._speaks_from = (speech_of(checkpoint), folder) if has_own else ("", self._folder)
        self._name = checkpoint.ref

    def _put_on(self, checkpoint: Checkpoint, together: int = 1) -> str:
        """Its name on the model, where it is then with as many others as are needed `together`."""
        name = checkpoint.digest.short
        if self._on.find(name):
            return name
        check_fits(self._registry, checkpoint, self.base)
        if checkpoint.manifest.format is not Format.PEFT:
            raise InvalidRecipe("checkpoint", checkpoint.ref, "not an adapter of PEFT: `ckpt convert` makes one of it")
        folder = folder_of_checkpoint(self._registry, checkpoint)
        self._make_room(checkpoint.manifest.method, max(KEPT_ADAPTERS, together))
        with enough_memory(f"the adapter {checkpoint.ref}", self.device):
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._plain, folder, adapter_name=name).eval()
            else:
                self._peft.load_adapter(folder, adapter_name=name)
        self._on.keep(name, checkpoint.manifest.method)
        return name

    def _make_room(self, method: str, most: int) -> None:
        """Adapters of one kind only are on the model at once, and not too many."""
        if self._peft is None:
            return
        if {*self._on.values()} != {method}:
            self._base_model, self._peft = self._peft.unload(), None
            self._on.clear()
        for name in self._on.make_room(most):
            self._peft.delete_adapter(name)

    def _put_on_sum(self, weighed: Weighed) -> str:
        """One adapter that adds several deltas up, each with its weight: exactly, by joining their factors."""
        check_sum(weighed)
        name = "+".join(f"{checkpoint.digest.short}:{weight:g}" for checkpoint, weight in weighed).replace(".", "_")
        if self._on.find(name):
            return name
        names = [self._put_on(checkpoint, len(weighed)) for checkpoint, _ in weighed]
        weights = [weight for _, weight in weighed]
        try:
            cast("Any", self._peft).add_weighted_adapter(names, weights, adapter_name=name, combination_type="cat")
        except ValueError as error:  # such as weights of the base that each replaces whole
            raise InvalidRecipe("checkpoints", name, f"peft cannot add them up: {error}") from error
        self._on.keep(name, "lora")
        return name

    # -- text

    @property
    def _tokenizer(self) -> Any:
        if self.speaker not in self._tokenizers:
            if not _has_tokenizer(self._speaks_from):
                raise NoTokenizer(self._name)
            self._tokenizers[self.speaker] = AutoTokenizer.from_pretrained(self._speaks_from, local_files_only=True)
        return self._tokenizers[self.speaker]

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


def _tensors(registry: Registry, found: Repository, file: RepositoryFile) -> dict[str, Any]:
    """The tensors of a file, all in one buffer, so that they are in memory once."""
    data, filled = bytearray(file.size_bytes), 0
    for piece in registry.read_file(found, file.path):
        data[filled : filled + len(piece)] = piece
        filled += len(piece)
    header = read_safetensors_header(io.BytesIO(data[: 8 + MAX_HEADER_BYTES]), file.path, len(data))
    return {each.spec.name: _tensor(data, each) for each in header.tensors}


def _tensor(data: bytearray, stored: StoredTensor) -> Any:
    spec = stored.spec
    kind = getattr(torch, spec.dtype.long_name)
    if not spec.size_bytes:
        return torch.empty(spec.shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind, count=spec.elements, offset=stored.offset_bytes).reshape(spec.shape)
