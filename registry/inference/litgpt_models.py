"""litgpt models in memory: its own class computes, adapters are hooks on it, so that all of them share the base's weights."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import yaml

from registry.errors import CorruptFile, InvalidInput, MissingPackage
from registry.formats.litgpt import MODEL_CONFIG_FILE
from registry.inference import Device, LoadedDType, Message, Sampling, TokenScores, Weighed
from registry.inference.keeping import Recent, check_sum
from registry.inference.places import check_fits, folder_of_base, folder_of_checkpoint, merged_files, speech_of
from registry.inference.sampling import Chooser, enough_memory, pick_device, scores_of, spoken
from registry.manifest import BaseModel, Checkpoint

if TYPE_CHECKING:
    from registry.service import Registry

try:
    import litgpt
    import torch
    from litgpt.model import KVCache, build_mask_cache

    from registry.inference.litgpt_adapters import Loaded, load_adapter, put_on
    from registry.inference.litgpt_text import Speech, find_speech, until
except ModuleNotFoundError as error:
    raise MissingPackage(error.name or "litgpt", "litgpt") from error

_WEIGHTS_FILE = "lit_model.pth"


def open_litgpt(registry: Registry, base: BaseModel, *, device: Device, dtype: LoadedDType) -> LitgptRunner:
    """What computes with a base model; see `registry.inference.open_runner`."""
    return LitgptRunner(registry, base, folder_of_base(registry, base), pick_device(device), dtype)


def load_litgpt(
    registry: Registry, checkpoint: Checkpoint, base: BaseModel, *, merged: bool, device: Device, dtype: LoadedDType
) -> Any:
    """A model of litgpt as programs want it; see `registry.inference.load_model`."""
    if merged:
        return _merged(registry, checkpoint, base, pick_device(device), dtype)
    runner = open_litgpt(registry, base, device=device, dtype=dtype)
    runner.use(checkpoint)
    return runner.with_adapter


def _merged(registry: Registry, checkpoint: Checkpoint, base: BaseModel, place: str, dtype: LoadedDType) -> Any:
    """The merged model, computed into memory."""
    found = merged_files(registry, checkpoint)
    with enough_memory(f"the model {base.name}, merged", place):
        config, weights = (
            b"".join(map(bytes, registry.read_file(found, name))) for name in (MODEL_CONFIG_FILE, _WEIGHTS_FILE)
        )
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        return _built(yaml.safe_load(config), state, place, dtype)


def _built(config: Mapping[str, Any], state: Mapping[str, Any], place: str, dtype: LoadedDType) -> Any:
    """A model with these weights; they are not copied where they are as they shall be."""
    with torch.device("meta"):
        model = litgpt.GPT(_config(config))
    try:
        model.load_state_dict(_placed(_flat(state), place, dtype), assign=True)
    except RuntimeError as error:
        raise CorruptFile(_WEIGHTS_FILE, f"not the tensors that {MODEL_CONFIG_FILE} tells of") from error
    kind = model.transformer.wte.weight.dtype
    model.cos, model.sin = (each.to(kind) for each in model.rope_cache(device=torch.device(place)))
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(_with_true_mask)
    return model.eval().requires_grad_(False)


def _with_true_mask(attention: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What litgpt gets wrong where keys are remembered: its mask knows no window, and where scores are capped, true is added to them as 1."""
    x, cos, sin, mask, positions, *rest = given
    if mask is None or positions is None:
        return None
    window = attention.config.sliding_window_size if attention.apply_sliding_window_attention else None
    if window is not None:
        mask = mask & (torch.arange(mask.size(-1), device=mask.device) > positions[:, None] - window)
    mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
    return (x, cos, sin, mask, positions, *rest)


def _config(said: Mapping[str, Any]) -> Any:
    """litgpt's own configuration. A field of another version is left out where it says nothing."""
    known = {field.name for field in fields(litgpt.Config)}
    if strange := sorted(key for key, value in said.items() if key not in known and value):
        raise CorruptFile(MODEL_CONFIG_FILE, f"this version of litgpt does not know {', '.join(strange)}")
    return litgpt.Config(**{key: value for key, value in said.items() if key in known})


def _flat(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors by name, of a file of a model or of one of a training run."""
    inner = state.get("model")
    found = inner if isinstance(inner, Mapping) else state
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}


def _placed(state: Mapping[str, Any], place: str, dtype: LoadedDType) -> dict[str, Any]:
    """The same on a device; tensors that share their bytes do so still."""
    kind = None if dtype == "auto" else getattr(torch, dtype)
    moved: dict[tuple[int, Any], Any] = {}
    for tensor in state.values():
        moved.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(device=place, dtype=kind))
    return {name: moved[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


@final
class LitgptRunner:
    """A `registry.inference.Runner` of litgpt.

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
        self._config = _config(base.config)
        self._base_model: Any = None
        self._merged: Any = None
        self._loaded = Recent[Loaded]()  # by digest
        self._worn = ExitStack()  # takes off the base model what is on it
        self.speaker, self._name = "", base.name
        self._speakers: tuple[Path, ...] = (folder,)
        self._speeches: dict[str, Speech] = {}

    @property
    def context_tokens(self) -> int:
        """The longest text that it was made for."""
        return int(self._config.block_size)

    @property
    def with_adapter(self) -> Any:
        """The model of litgpt, with the adapter that is used on it."""
        return self._plain

    # -- who answers

    def use(self, what: Checkpoint | Weighed | None) -> None:
        """Have an adapter answer, a weighted sum, or the base alone."""
        weighed = [(what, 1.0)] if isinstance(what, Checkpoint) else list(what or ())
        if what is not None and not isinstance(what, Checkpoint):
            check_sum(weighed)
        loaded = [(self._load(checkpoint), weight) for checkpoint, weight in weighed]
        self._worn.close()
        self._worn = put_on(self._plain, loaded)
        self._merged = None
        self._speak_as(weighed[0][0] if weighed else None)

    def use_merged(self, checkpoint: Checkpoint) -> None:
        """Have the merged model answer; its weights are computed into memory."""
        merged_files(self._registry, checkpoint)  # is refused before anybody makes room for it
        self._worn.close()
        self._base_model = self._merged = None
        gc.collect()  # modules and hooks refer to each other
        self._merged = _merged(self._registry, checkpoint, self.base, self.device, self._dtype)
        self._speak_as(checkpoint)

    @property
    def _plain(self) -> Any:
        """The base model; a merged one that is in memory makes room for it."""
        if self._base_model is None:
            self._merged = None
            with enough_memory(f"the model {self.base.name}", self.device):
                state = torch.load(self._folder / _WEIGHTS_FILE, map_location="cpu", mmap=True, weights_only=True)
                self._base_model = _built(self.base.config, state, self.device, self._dtype)
        return self._base_model

    def _load(self, checkpoint: Checkpoint) -> Loaded:
        found = self._loaded.find(checkpoint.digest.hex)
        if found is None:
            check_fits(self._registry, checkpoint, self.base)
            folder, model = folder_of_checkpoint(self._registry, checkpoint), self._plain
            with enough_memory(f"the adapter {checkpoint.ref}", self.device):
                found = load_adapter(self._registry, checkpoint, folder, self.base, model)
            self._loaded.make_room()
            self._loaded.keep(checkpoint.digest.hex, found)
        return found

    def _speak_as(self, checkpoint: Checkpoint | None) -> None:
        """Whose tokenizer and prompt style count: the adapter's, where it has them."""
        own = () if checkpoint is None else (folder_of_checkpoint(self._registry, checkpoint),)
        self._speakers = (*own, self._folder)
        self.speaker = "" if checkpoint is None else speech_of(checkpoint)
        self._name = self.base.name if checkpoint is None else checkpoint.ref

    # -- text

    @property
    def _speech(self) -> Speech:
        if self.speaker not in self._speeches:
            self._speeches[self.speaker] = find_speech(self._speakers, self._config, self._name)
        return replace(self._speeches[self.speaker], name=self._name)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._speech.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        return self._speech.decode(ids)

    def prompt(self, messages: Sequence[Message], *, answering: bool = True) -> list[int]:
        """Tokens of a conversation, by the prompt style that it was trained with, or the chat template."""
        return self._speech.prompt(messages, answering=answering)

    # -- compute

    @property
    def _model(self) -> Any:
        return self._plain if self._merged is None else self._merged

    def _rows(self, batch: Sequence[Sequence[int]]) -> Any:
        longest = max(map(len, batch))
        if longest > self.context_tokens:
            raise InvalidInput("tokens", longest, f"{self.base.name} takes {self.context_tokens} at most")
        # what stands behind a text is not seen by its tokens
        return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=self.device)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Any:
        """For each token the scores of what could come next."""
        with enough_memory(f"{len(ids)} tokens", self.device):
            return self._model(self._rows([ids]))[0].float().cpu().numpy()

    @torch.no_grad()
    def scores(self, batch: Sequence[Sequence[int]]) -> list[TokenScores]:
        """How well each token of some texts is foreseen from those before it."""
        with enough_memory(f"{len(batch)} texts", self.device):
            found = self._model(self._rows(batch))
            return [scores_of(found[row, : len(ids)], ids) for row, ids in enumerate(batch)]

    def generate(self, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """What the model says next, in pieces as it comes."""
        yield from spoken(until(self._tokens(ids, sampling), self._speech.ends), self.decode)

    def _tokens(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token after token, as long as there is room."""
        chooser, model = Chooser(sampling), self._model
        given, seen, room = self._rows([ids]), 0, self.context_tokens
        with enough_memory(f"{len(ids)} tokens and an answer", self.device):
            memory = _Memory(model, min(len(ids) + sampling.max_tokens, room))
        for _ in range(min(sampling.max_tokens, room - len(ids) + 1)):
            with enough_memory(f"{len(ids)} tokens and an answer", self.device):
                scores = memory.next_scores(given, seen)
            token = chooser.choose(scores)
            yield token
            seen += given.size(1)
            given = torch.tensor([[token]], device=self.device)


@final
class _Memory:
    """Keys and values of the tokens that one answer has seen. It is on the model only while that computes, so that several answers do not mix.

    Args:
        model: who answers.
        size: tokens that there is room for.
    """

    def __init__(self, model: Any, size: int) -> None:
        weights, config = model.transformer.wte.weight, model.config
        place, kind = weights.device, weights.dtype
        width = model.rope_cache_length() + config.head_size - config.rope_n_elem
        keys, values = ((1, config.n_query_groups, size, each) for each in (width, config.head_size))
        self._model = model
        self._mask = build_mask_cache(size, place)
        self._caches = [KVCache(keys, values, place, kind) for _ in model.transformer.h]

    @torch.no_grad()
    def next_scores(self, given: Any, seen: int) -> Any:
        """Scores of what comes behind `given` [1, tokens], which come behind the `seen` first."""
        positions = torch.arange(seen, seen + given.size(1), device=given.device)
        model = self._model
        model.mask_cache = self._mask
        for block, cache in zip(model.transformer.h, self._caches, strict=True):
            block.attn.kv_cache = cache
        try:
            return model(given, positions, input_pos_maxp1=seen + given.size(1))[0, -1]
        finally:
            model.clear_kv_cache()
