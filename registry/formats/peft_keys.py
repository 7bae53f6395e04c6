"""PEFT's tensor names: what each key of an adapter file is, and which module of the model it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.manifest import Finding, Level
from registry.tensors import StoredTensor

_WRAPPERS = re.compile(r"\b(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_KINDS = (
    ("lora_a", re.compile(r"(.+)\.lora_A(?:\.default)?\.weight")),
    ("lora_b", re.compile(r"(.+)\.lora_B(?:\.default)?\.weight")),
    ("embedding_a", re.compile(r"(.+)\.lora_embedding_A(?:\.default)?")),
    ("embedding_b", re.compile(r"(.+)\.lora_embedding_B(?:\.default)?")),
    ("magnitude", re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")),
    ("lora_bias", re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")),
    ("token_rows", re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")),
)
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(weight|bias)")
# A quantified group that is itself quantified inside: `(a+)+` takes exponential time on some names.
_NESTED_QUANTIFIER = re.compile(r"\((?:[^()\\]|\\.)*[+*}](?:[^()\\]|\\.)*\)[+*{]")
_MAX_PATTERN = 2_000


@dataclass(slots=True, kw_only=True)
class Factors:
    """The low-rank factors that belong to one module; `embedding` tells which of PEFT's two layouts they have."""

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    embedding: bool = False


@dataclass(slots=True, kw_only=True)
class Keys:
    """An adapter's tensors by what they are. Module paths are those of the training-time model, without PEFT's prefix."""

    factors: dict[str, Factors] = field(default_factory=dict)
    whole: dict[tuple[str, str], StoredTensor] = field(default_factory=dict)
    other: list[StoredTensor] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Every module named, in the order of the file."""
        return list(dict.fromkeys([*self.factors, *(module for module, _ in self.whole)]))


def sort_keys(tensors: Iterable[StoredTensor]) -> Keys:
    """Tell what every tensor is. Each ends in exactly one place of the result, or in a finding."""
    keys, seen = Keys(), dict[str, str]()
    for tensor in tensors:
        name = _WRAPPERS.sub("", tensor.spec.name).removeprefix("base_model.model.")
        if tensor.spec.elements == 0:
            keys.findings.append(
                misfit("empty_tensor", tensor.spec.name, expected="values", found=f"shape {list(tensor.spec.shape)}",
                       advice="the file was saved from sharded training without gathering: save it again")
            )  # fmt: skip
        elif name in seen:
            keys.findings.append(
                misfit("duplicate_tensor", tensor.spec.name, expected="one tensor for each parameter", found=seen[name])
            )
        else:
            seen[name] = tensor.spec.name
            _place(keys, name, tensor)
    return keys


def _place(keys: Keys, name: str, tensor: StoredTensor) -> None:
    for kind, pattern in _KINDS:
        if match := pattern.fullmatch(name):
            module = match[1].removesuffix(".base_layer")
            factors = keys.factors.setdefault(module, Factors()) if kind not in ("lora_bias", "token_rows") else None
            if factors is None:
                keys.other.append(tensor)
            elif kind == "magnitude":
                factors.magnitude = tensor
            else:
                factors.embedding = kind.startswith("embedding")
                setattr(factors, kind[-1], tensor)
            return
    if match := _WHOLE.fullmatch(name):
        keys.whole[match[1], match[2]] = tensor
    else:
        keys.other.append(tensor)


def misfit(code: str, where: str, *, expected: str, found: str, advice: str = "") -> Finding:
    """A refusal that says that adapter and base do not belong together."""
    return Finding(
        code=code, level=Level.REFUSED, where=where, expected=expected, found=found, advice=advice, fits=False
    )


def unsupported(code: str, where: str, *, found: str, advice: str) -> Finding:
    """A refusal to merge something that may well fit."""
    return Finding(code=code, level=Level.REFUSED, where=where, found=found, advice=advice)


class ModuleRules:
    """PEFT's rules for which modules a configuration targets.

    A list matches a module of that name or one ending in `.name`; text is a regular expression over the whole path, or `all-linear`.
    `exclude_modules` follows the same rules; `layers_to_transform` compares the first number in the path.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.targets: object = config.get("target_modules")
        self._exclude: object = config.get("exclude_modules")
        layers = config.get("layers_to_transform")
        self._layers = {layers} if isinstance(layers, int) else set(layers) if isinstance(layers, list) else None

    @property
    def names(self) -> Sequence[str]:
        """The names of a list of targets; empty for a pattern."""
        return sorted(map(str, self.targets)) if isinstance(self.targets, list) else ()

    def expects(self, module: str) -> bool | None:
        """Whether training must have given this module an adapter; None when the files alone cannot tell."""
        if self.targets is None or self.targets == "all-linear":
            return None
        hit = matches(self.targets, module)
        if not hit or self._exclude is None:
            return hit and self._in_layers(module)
        excluded = matches(self._exclude, module)
        return None if excluded is None else not excluded and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        number = next((int(part) for part in module.split(".") if part.isdigit()), None)
        return self._layers is None or number in self._layers


def matches(rule: object, module: str) -> bool | None:
    """Whether a list of names or a regular expression selects a module; None for a pattern that is not safe to run."""
    if isinstance(rule, list):
        return any(module == name or module.endswith(f".{name}") for name in map(str, rule))
    pattern = safe_pattern(rule)
    return None if pattern is None else pattern.fullmatch(module) is not None


def safe_pattern(rule: object) -> re.Pattern[str] | None:
    """Compile a pattern from a configuration, or None when it is malformed or could take exponential time."""
    if not isinstance(rule, str) or len(rule) > _MAX_PATTERN or _NESTED_QUANTIFIER.search(rule):
        return None
    try:
        return re.compile(rule)
    except re.error:
        return None


def look_up(pattern: Mapping[str, Any], module: str) -> Any:
    """PEFT's `rank_pattern` / `alpha_pattern`: the first key that matches the end of the path, in the file's order; None for no match."""
    for key, value in pattern.items():
        compiled = safe_pattern(rf"(?:.*\.)?(?:{key})")
        if compiled is not None and compiled.fullmatch(module):
            return value
    return None
