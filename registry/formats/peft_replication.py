"""`layer_replication`: training stacked some of the base's layers several times, each with an adapter of its own.

In training the copies shared one weight; in the merged model, whose copies differ, each is written out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from registry.changes import Change, Resolution
from registry.errors import CorruptFile
from registry.formats.adapter import spec_like
from registry.formats.findings import misfit, unsupported
from registry.formats.peft import CONFIG_FILE
from registry.manifest import BaseModel, Finding
from registry.tensors import StoredTensor

_MAX_LAYERS = 2_000
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|h)\.)(\d+)(\..+)")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields of a configuration with one entry for each layer, and with the numbers of some layers.
_ENTRIES = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "sliding_windows",
    "moe_topk",
    "attention_layers",
)
_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "window_block_indices")
# Fields by which a layer's kind follows from its number, and the values with which all layers are of one kind. The second group says
# nothing beside `layer_types`.
_PERIODS: dict[str, object] = {
    "decoder_sparse_step": 1, "first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_interval": 1, "interleave_moe_layer_step": 1,
    "cross_attention_frequency": 1, "attn_layer_period": 1, "expert_layer_period": 1,
}  # fmt: skip
_KIND_PERIODS: dict[str, object] = {
    "sliding_window_pattern": 1,
    "full_attention_interval": 1,
    "use_sliding_window": False,
}
_ALTERNATING = ("gemma2", "gemma3_text", "cohere2", "gpt_oss")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The tensors of the model that was trained, by name: the base's own, or those of the replicated stack.

    `config` has the fields of the base's configuration that describe the stack.
    """

    tensors: Mapping[str, StoredTensor]
    removed: frozenset[str] = frozenset()
    config: Mapping[str, object] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, base: BaseModel, config: Mapping[str, Any]) -> Stack:
        """Stack a base model's layers as an adapter's configuration says.

        Raises:
            CorruptFile: the configuration's `layer_replication` is no list of ranges.
        """
        tensors = {tensor.spec.name: tensor for tensor in base.tensors}
        sources = _sources(config.get("layer_replication"))
        if not sources:
            return cls(tensors=tensors)
        beginnings, layers = _layers(tensors)
        if len(beginnings) != 1 or max(sources) >= layers:
            expected = f"one list of at least {max(sources) + 1} layers, as layer_replication says"
            found = f"lists {', '.join(beginnings) or 'none'} of {layers} layers"
            return cls(tensors=tensors, findings=(misfit("layers_differ", base.name, expected=expected, found=found),))
        stacked = dict(_stacked(tensors, beginnings[0], sources))
        return cls(
            tensors=stacked,
            removed=frozenset(tensors.keys() - stacked.keys()),
            config=dict(_fields(base.config, sources, layers)),
            findings=tuple(_unclear(base.config)),
        )

    def complete(self, found: Resolution) -> Resolution:
        """Add the layers that are only copied to what the adapter changes."""
        changed = {change.target.name for change in found.changes}
        copies = tuple(
            Change(target=spec_like(tensor.spec, name=name), source=tensor)
            for name, tensor in self.tensors.items()
            if name != tensor.spec.name and name not in changed
        )
        return replace(
            found,
            changes=(*found.changes, *copies),
            findings=(*self.findings, *found.findings),
            config={**self.config, **found.config},
            removed=self.removed | found.removed,
        )


def _sources(value: object) -> list[int]:
    """For each layer of the new stack the base's layer that it is a copy of."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(_is_range(each) for each in value):
        raise CorruptFile(CONFIG_FILE, f"layer_replication is {value!r}, expected a list of [first, last + 1]"[:200])
    if sum(last - first for first, last in value) > _MAX_LAYERS:
        raise CorruptFile(CONFIG_FILE, f"layer_replication makes more than {_MAX_LAYERS} layers")
    return [layer for first, last in value for layer in range(first, last)]


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in value)
        and 0 <= value[0] < value[1]
    )


def _layers(names: Mapping[str, object]) -> tuple[list[str], int]:
    """The beginnings of the names of all lists of layers, and how many layers the first has (0 when numbers are missing)."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER.fullmatch(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    first = next(iter(numbers.values()), set())
    return list(numbers), len(first) if first == set(range(len(first))) else 0


def _stacked(
    tensors: Mapping[str, StoredTensor], beginning: str, sources: Sequence[int]
) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor of the new stack, each layer's copies one after the other."""
    copies: dict[int, list[int]] = {}
    for layer, source in enumerate(sources):
        copies.setdefault(source, []).append(layer)
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None or match[1] != beginning:
            yield name, tensor
        else:
            for layer in copies.get(int(match[2]), ()):
                yield f"{beginning}{layer}{match[3]}", tensor


def _fields(config: Mapping[str, Any], sources: Sequence[int], layers: int) -> Iterator[tuple[str, object]]:
    for key in _COUNTS:
        if key in config:
            yield key, len(sources)
    for key in _ENTRIES:
        value = config.get(key)
        if isinstance(value, list) and len(value) == layers:
            yield key, [value[source] for source in sources]
    for key in _NUMBERS:
        value = config.get(key)
        if isinstance(value, list):
            yield key, [layer for layer, source in enumerate(sources) if source in value]


def _unclear(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What makes a copy another kind of layer than the one that it is a copy of, because kinds follow from numbers."""
    periods = _PERIODS if "layer_types" in config else {**_PERIODS, **_KIND_PERIODS}
    odd = [f"{key}={config[key]!r}" for key, plain in periods.items() if config.get(key) not in (None, plain)]
    if "layer_types" not in config and config.get("model_type") in _ALTERNATING:
        odd.append(f"a {config['model_type']} without layer_types")
    for found in odd:
        why = "a layer's kind follows from its number, which replication changes"
        yield unsupported("replication_unclear", "config.json", found=f"{found}: {why}", advice="serve it unmerged")
