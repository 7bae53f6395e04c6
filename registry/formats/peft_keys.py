"""PEFT's tensor names: what each key of an adapter file is, and which module of the model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from registry.formats.findings import misfit
from registry.manifest import Finding
from registry.tensors import StoredTensor

_WRAPPERS = re.compile(r"\b(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
# Trainers that save without PEFT leave the adapter's name, `default`, inside the keys.
_KINDS = {
    "a": re.compile(r"(.+)\.lora_A(?:\.default)?\.weight"),
    "b": re.compile(r"(.+)\.lora_B(?:\.default)?\.weight"),
    "embedding_a": re.compile(r"(.+)\.lora_embedding_A(?:\.default)?"),
    "embedding_b": re.compile(r"(.+)\.lora_embedding_B(?:\.default)?"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"),
    "weight": re.compile(r"(.+)(?<!\.lora_A)(?<!\.lora_B)\.weight"),
    "bias": re.compile(r"(.+)(?<!\.lora_A)(?<!\.lora_B)\.bias"),
}
_OTHER = re.compile(r".+\.(?:lora_[A-Za-z_]+|trainable_tokens_\w+|token_adapter)\b.*")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?$")
_ORIGINAL = re.compile(r".+\.original_module\.(?:weight|bias)")


@dataclass(slots=True, kw_only=True)
class Factors:
    """The low-rank factors that belong to one module; `embedding` tells which of PEFT's two layouts they have."""

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    embedding: bool = False

    @property
    def tensors(self) -> list[StoredTensor]:
        """Those that are there."""
        return [tensor for tensor in (self.a, self.b, self.magnitude) if tensor is not None]


@dataclass(slots=True, kw_only=True)
class Keys:
    """An adapter's tensors by what they are. Module paths are those of the training-time model, without PEFT's prefix.

    `whole` are values that replace the base's. `copies` are second copies that PEFT wrote of tensors in `whole`, and the values those had
    before training; nothing is made of them.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    whole: dict[tuple[str, str], StoredTensor] = field(default_factory=dict)
    copies: list[StoredTensor] = field(default_factory=list)
    other: list[StoredTensor] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Every module named, in the order of the file."""
        return list(dict.fromkeys([*self.factors, *(module for module, _ in self.whole)]))


def sort_keys(tensors: Iterable[StoredTensor]) -> Keys:
    """Tell what every tensor is. Each ends in exactly one place of the result, or in a finding."""
    keys, seen, doubles = Keys(), dict[tuple[str, str], str](), dict[tuple[str, str], StoredTensor]()
    for tensor in tensors:
        name = _WRAPPERS.sub("", tensor.spec.name).removeprefix("base_model.model.")
        module, kind = _classify(name)
        if tensor.spec.elements == 0:
            keys.findings.append(
                misfit("empty_tensor", tensor.spec.name, expected="values", found=f"shape {list(tensor.spec.shape)}",
                       advice="the file was saved from sharded training without gathering: save it again")
            )  # fmt: skip
        elif kind in ("weight", "bias") and _SAVED.search(module):
            doubles[_SAVED.sub("", module), kind] = tensor
        elif (module, kind) in seen:
            keys.findings.append(
                misfit("duplicate_tensor", tensor.spec.name, expected="one tensor for each parameter", found=seen[module, kind])
            )  # fmt: skip
        else:
            seen[module, kind] = tensor.spec.name
            _place(keys, module, kind, tensor)
    for place, tensor in doubles.items():
        if place in keys.whole:
            keys.copies.append(tensor)
        else:
            keys.whole[place] = tensor
    return keys


def _classify(name: str) -> tuple[str, str]:
    """Module and kind; `original` for what a saved module was before training, empty kind for what nobody here knows."""
    if _ORIGINAL.fullmatch(name):
        return name, "original"
    for kind, pattern in _KINDS.items():
        if match := pattern.fullmatch(name):
            known = kind not in ("weight", "bias") or not _OTHER.fullmatch(name)
            return (match[1].removesuffix(".base_layer"), kind) if known else (name, "")
    return name, ""


def _place(keys: Keys, module: str, kind: str, tensor: StoredTensor) -> None:
    if kind == "original":
        keys.copies.append(tensor)
    elif kind == "":
        keys.other.append(tensor)
    elif kind in ("weight", "bias"):
        keys.whole[module, kind] = tensor
    else:
        factors = keys.factors.setdefault(module, Factors())
        factors.embedding = factors.embedding or kind.startswith("embedding")
        setattr(factors, kind.removeprefix("embedding_"), tensor)
