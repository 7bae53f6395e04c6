"""PEFT's tensor names: what each key of an adapter file is, and which module of the model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from registry.formats.findings import misfit
from registry.manifest import Finding
from registry.tensors import StoredTensor

_PREFIX, _MODEL_PREFIX = "base_model.", "base_model.model."
_WRAPPERS = re.compile(r"\b(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_INSERTED = re.compile(r"\.(?:base_layer|token_adapter)(?=\.|$)")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.|$)")
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
# Values from before training, which PEFT saves along: of saved modules, and of single rows.
_ORIGINAL = re.compile(
    r".+\.original_module\..+|.+\.(?:trainable_tokens_original|token_adapter\.token_indices)(?:\.default)?"
)
_TUNER = re.compile(r"(?:.+\.)?(?:lora|trainable_tokens)_.+")


def parameter(name: str, leaf: str = "weight") -> re.Pattern[str]:
    """The keys of a tuner's parameter, with the module in group 1.

    Trainers that save without PEFT leave the adapter's name, `default`, inside. A parameter that is a module has its `weight` (or another
    `leaf`, which then must be there) behind it.
    """
    end = r"(?:\.weight)?" if leaf == "weight" else rf"\.{leaf}"
    return re.compile(rf"(.+)\.{name}(?:\.default)?{end}")


def plain_path(module: str) -> str:
    """A module's path without what PEFT puts into it around the module that was there."""
    return _INSERTED.sub("", module)


@dataclass(slots=True, kw_only=True)
class Keys:
    """An adapter's tensors by what they are. Module paths are those of the training-time model, without PEFT's prefix.

    `parts` are the tuner's own, by module (as it stands in the key, with `base_layer` in it where tuners are nested) and by parameter.
    `whole` are values that replace the base's, by module and name in it (`weight`, `bias`, …), `rows` values of single rows. `shared` are
    tensors of the whole adapter, by what follows `base_model.`. `copies` are second copies that PEFT wrote of tensors in `whole`, the
    values from before training, and what only training needs; nothing is made of them. `other` is what nobody here knows.
    """

    parts: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    whole: dict[tuple[str, str], StoredTensor] = field(default_factory=dict)
    rows: dict[str, StoredTensor] = field(default_factory=dict)
    shared: dict[str, StoredTensor] = field(default_factory=dict)
    copies: list[StoredTensor] = field(default_factory=list)
    other: list[StoredTensor] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Every module named, in the order of the file."""
        return list(dict.fromkeys([*map(plain_path, self.parts), *(module for module, _ in self.whole), *self.rows]))

    def first(self, module: str) -> StoredTensor:
        """One of the tuner's tensors of a module."""
        return self.rows[module] if module in self.rows else next(iter(self.parts[module].values()))


def sort_keys(
    tensors: Iterable[StoredTensor],
    parameters: Mapping[str, re.Pattern[str]],
    training_only: re.Pattern[str] | None = None,
    *,
    may_be_empty: bool = False,
) -> Keys:
    """Tell what every tensor is. Each ends in exactly one place of the result, or in a finding.

    Args:
        tensors: of an adapter file.
        parameters: the tuner's own: what matches the whole key (PEFT's prefix taken off), with the module in group 1.
        training_only: keys of what the tuner saves but does not need to answer.
        may_be_empty: a tensor without elements is one like any other, as when a rank was pruned to nothing.
    """
    keys, seen, doubles = Keys(), dict[_Place, str](), dict[tuple[str, str], StoredTensor]()
    for tensor in tensors:
        name = _WRAPPERS.sub("", tensor.spec.name)
        is_extra = training_only is not None and training_only.fullmatch(name) is not None
        place = _Place("copies", name) if is_extra else _classify(name, parameters)
        if tensor.spec.elements == 0 and not may_be_empty:
            keys.findings.append(
                misfit("empty_tensor", tensor.spec.name, expected="values", found=f"shape {list(tensor.spec.shape)}",
                       advice="the file was saved from sharded training without gathering: save it again")
            )  # fmt: skip
        elif place.kind == "whole" and _SAVED.search(place.module):
            doubles[_SAVED.sub("", place.module), place.parameter] = tensor
        elif place in seen:
            keys.findings.append(
                misfit("duplicate_tensor", tensor.spec.name, expected="one tensor for each parameter", found=seen[place])
            )  # fmt: skip
        else:
            seen[place] = tensor.spec.name
            _put(keys, place, tensor)
    for at, tensor in doubles.items():
        if at in keys.whole:
            keys.copies.append(tensor)
        else:
            keys.whole[at] = tensor
    return keys


class _Place(NamedTuple):
    """Where a tensor belongs in `Keys`."""

    kind: str
    module: str
    parameter: str = ""


def _classify(name: str, parameters: Mapping[str, re.Pattern[str]]) -> _Place:
    if name.startswith(_PREFIX) and not name.startswith(_MODEL_PREFIX):
        return _Place("shared", name.removeprefix(_PREFIX))
    name = name.removeprefix(_MODEL_PREFIX)
    for kind, pattern in parameters.items():
        if match := pattern.fullmatch(name):
            return _Place("parts", match[1], kind)
    if _ORIGINAL.fullmatch(name):
        return _Place("copies", name)
    if match := _ROWS.fullmatch(name):
        return _Place("rows", match[1])
    module, _, leaf = name.rpartition(".")
    if not module or _TUNER.fullmatch(name):
        return _Place("other", name)
    return _Place("whole", plain_path(module), leaf)


def _put(keys: Keys, place: _Place, tensor: StoredTensor) -> None:
    if place.kind == "parts":
        keys.parts.setdefault(place.module, {})[place.parameter] = tensor
    elif place.kind == "whole":
        keys.whole[place.module, place.parameter] = tensor
    elif place.kind == "rows":
        keys.rows[place.module] = tensor
    elif place.kind == "shared":
        keys.shared[place.module] = tensor
    else:
        (keys.copies if place.kind == "copies" else keys.other).append(tensor)
