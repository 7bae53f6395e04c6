"""The PEFT adapter that several others make together: where its factors go, and the configuration that goes with them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from registry.changes import Change, Combined, LowRank, Resolution, Tuned
from registry.formats.adapter import Adapter
from registry.formats.findings import unsupported
from registry.formats.peft_keys import parameter, plain_path, sort_keys
from registry.manifest import Finding, Format
from registry.tensors import StoredTensor

_MERGE = "`ckpt merge` puts them into the base together"
_PARAMETERS = {
    "a": parameter("lora_A"),
    "b": parameter("lora_B"),
    "embedding_a": parameter("lora_embedding_A"),
    "embedding_b": parameter("lora_embedding_B"),
}
_PREFIX = "base_model.model."
# Options that tell more about factors than their product does.
_UNFIT_FLAGS = ("ensure_weight_tying", "target_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module that gets factors `left [n, r] @ right [r, m]`, as its base weight is stored.

    `is_transposed`: the left factor is Aᵀ. `a_inner`, `b_inner`: the shapes of A behind the rank, and of B behind it (convolutions have more
    than a matrix).
    """

    module: str
    is_embedding: bool
    is_transposed: bool
    a_inner: tuple[int, ...]
    b_inner: tuple[int, ...]

    @property
    def names(self) -> tuple[str, str]:
        """What A and B are called in the file."""
        if self.is_embedding:
            return f"{_PREFIX}{self.module}.lora_embedding_A", f"{_PREFIX}{self.module}.lora_embedding_B"
        return f"{_PREFIX}{self.module}.lora_A.weight", f"{_PREFIX}{self.module}.lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What goes into the file, by the name of the base tensor: factors, and whole tensors under their key. Complete without findings only."""

    layers: Mapping[str, Layer] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def lay_out(adapters: Sequence[Adapter], united: Resolution, base_names: Collection[str]) -> Layout:
    """Find the place of every change in an adapter file.

    Args:
        adapters: the inputs, in the united folder.
        united: what they do together.
        base_names: of the base's tensors.
    """
    findings = [
        unsupported("not_combined", adapter.weights_file, found=f"a {adapter.format.value} adapter",
                    advice=f"only PEFT's LoRA adapters make a new adapter; {_MERGE}")
        for adapter in adapters
        if adapter.format is not Format.PEFT
    ]  # fmt: skip
    return Layout(findings=tuple(findings)) if findings else _Places(adapters, base_names).of(united)


@final
class _Places:
    def __init__(self, adapters: Sequence[Adapter], base_names: Collection[str]) -> None:
        self._base_names = base_names
        self._place: dict[StoredTensor, tuple[str, str]] = {}
        self._key: dict[StoredTensor, str] = {}
        self._flags = [flag for flag in _UNFIT_FLAGS if any(adapter.config.get(flag) for adapter in adapters)]
        for adapter in adapters:
            keys = sort_keys(adapter.tensors, _PARAMETERS)
            for module, parts in keys.parts.items():
                self._place |= {tensor: (plain_path(module), kind) for kind, tensor in parts.items()}
            for (module, leaf), tensor in keys.whole.items():
                base_layer = ".base_layer" if ".base_layer." in tensor.spec.name else ""
                self._key[tensor] = f"{_PREFIX}{plain_path(module)}{base_layer}.{leaf}"

    def of(self, united: Resolution) -> Layout:
        layers: dict[str, Layer] = {}
        whole: dict[str, str] = {}
        findings = list(self._unfit(united))
        for change in united.changes:
            steps, saved = list(_steps(change)), _replacements(change)
            name = change.target.name
            if saved and not steps and saved <= self._key.keys():
                keys = {self._key[tensor] for tensor in saved}
                whole[name] = min(keys)
                findings += [self._names_differ(name, keys)] if len(keys) > 1 else []
            elif steps and not saved and all(self._fits(step, change) for step in steps):
                found = dict.fromkeys(self._layer(step) for step in steps if isinstance(step, LowRank))
                layers[name] = next(iter(found))
                findings += [self._names_differ(name, {each.module for each in found})] if len(found) > 1 else []
            elif steps or saved:
                findings.append(
                    unsupported("not_combined", name, found="more than one low-rank product, or another tuner's parameters",
                                advice=f"only plain LoRA layers make a new adapter; {_MERGE}")
                )  # fmt: skip
        return Layout(layers=layers, whole=whole, findings=tuple(findings))

    def _unfit(self, united: Resolution) -> Iterator[Finding]:
        changed = sorted({*united.config} - {"tie_word_embeddings"})
        if changed or united.removed:
            yield unsupported("not_combined", "config.json", found=f"changes {', '.join(changed) or 'the set of tensors'}",
                              advice=f"a new adapter cannot say so; {_MERGE}")  # fmt: skip
        for flag in self._flags:
            yield unsupported(
                "not_combined",
                "adapter_config.json",
                found=flag,
                advice=f"only plain layers make a new adapter; {_MERGE}",
            )

    def _names_differ(self, name: str, found: set[str]) -> Finding:
        return unsupported("names_differ", name, found=", ".join(sorted(found)),
                           advice=f"trained on differently wrapped models, so no one name fits; {_MERGE}")  # fmt: skip

    def _fits(self, step: object, change: Change) -> bool:
        if not isinstance(step, LowRank) or not {step.left.tensor, step.right.tensor} <= self._place.keys():
            return False
        covers = (step.left.rows, step.right.columns) == change.shape
        return (
            covers
            and self._is_plain(change.target.name)
            and step.left.tensor.spec.elements == step.left.rows * step.left.columns
        )

    def _is_plain(self, name: str) -> bool:
        """Whether a weight is a layer's own: PEFT has ways of its own with the two matrices of `nn.MultiheadAttention`."""
        attention = name.removesuffix("out_proj.weight")
        return name.endswith(".weight") and f"{attention}in_proj_weight" not in self._base_names

    def _layer(self, step: LowRank) -> Layer:
        module, kind = self._place[step.left.tensor]
        transposed = kind.endswith("a")
        a, b = (step.left.tensor, step.right.tensor) if transposed else (step.right.tensor, step.left.tensor)
        return Layer(
            module=module,
            is_embedding=kind.startswith("embedding"),
            is_transposed=transposed,
            a_inner=a.spec.shape[1:],
            b_inner=b.spec.shape[2:],
        )


def _steps(change: Change) -> Iterator[LowRank | Tuned]:
    """Every step that any input makes."""
    for step in change.steps:
        if isinstance(step, Combined):
            for part in step.parts:
                yield from (each for each in part.steps if not isinstance(each, Combined))
        else:
            yield step


def _replacements(change: Change) -> set[StoredTensor]:
    parts = [part.replacement for step in change.steps if isinstance(step, Combined) for part in step.parts]
    return {tensor for tensor in (change.replacement, *parts) if tensor is not None}


def adapter_config(adapters: Sequence[Adapter], rank: int, targets: Sequence[str]) -> dict[str, Any]:
    """The `adapter_config.json` of factors whose scale is folded in: rank equals alpha, and nothing is left to patterns and flags.

    Args:
        adapters: the inputs; what does not concern the arithmetic comes from the first.
        rank: of all factors.
        targets: the modules that have some.
    """
    first = adapters[0].config
    saved = sorted({name for adapter in adapters for name in adapter.config.get("modules_to_save") or ()})
    biases = {str(adapter.config.get("bias") or "none") for adapter in adapters} - {"none"}
    return {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "revision": first.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "modules_to_save": saved or None,
        "bias": "all" if len(biases) > 1 else next(iter(biases), "none"),
    }
