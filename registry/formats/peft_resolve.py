"""Match a LoRA of PEFT with a base model: every tensor used, every target hit, every shape right, or a finding that says why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import final

from registry.changes import Change, Resolution, Tuned
from registry.formats.adapter import Adapter
from registry.formats.findings import ANOTHER_SAVE, unsupported, warning
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import LoraOptions, Scope, config_findings
from registry.formats.peft_experts import Experts
from registry.formats.peft_factors import Layer
from registry.formats.peft_heads import TaskHead
from registry.formats.peft_keys import parameter, plain_path, sort_keys
from registry.formats.peft_matching import Matching
from registry.formats.peft_replication import Stack
from registry.formats.peft_tokens import TokenRows, resolve_tokens
from registry.manifest import BaseModel
from registry.tensors import StoredTensor

_LOW_RANK_METHODS = ("lora", "dora")
_PARAMETERS = {
    "a": parameter("lora_A"),
    "b": parameter("lora_B"),
    "bias": parameter("lora_B", "bias"),
    "embedding_a": parameter("lora_embedding_A"),
    "embedding_b": parameter("lora_embedding_B"),
    "m": parameter("lora_magnitude_vector"),
    "diag": parameter("lora_diag"),
}
# What VeLoRA and MonteCLoRA only train with: at inference they are plain LoRA.
_TRAINING_ONLY = re.compile(r".+\.(?:lora_velora_embed|lora_monteclora_sampler)\b.*")
# Up to this PEFT (and in it) the output projection of an nn.MultiheadAttention gets its delta twice, in training as in its merge.
_DOUBLED_UP_TO = (0, 21)
_OUTPUT = ".base_layer.out_proj"


def resolve_peft(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers alone.

    Returns:
        The changes to the base's tensors, the configuration fields that change with them, and every finding. Changes are complete only
        when no finding is refused.

    Raises:
        CorruptFile: the configuration is not one.
    """
    head = TaskHead.of(adapter, base)
    return head.complete(_resolve(head.without(adapter), base))


def _resolve(adapter: Adapter, base: BaseModel) -> Resolution:
    if adapter.method == "trainable_tokens":
        return resolve_tokens(adapter, base)
    if adapter.method not in _LOW_RANK_METHODS:
        from registry.formats.peft_tuners import resolve_tuner  # noqa: PLC0415 - their tables take as long as all the rest

        return resolve_tuner(adapter, base)
    options, scope = LoraOptions.read(adapter.config), Scope.read(adapter.config)
    keys = sort_keys(adapter.tensors, _PARAMETERS, _TRAINING_ONLY)
    stack = Stack.of(base, adapter.config)
    matching = Matching(keys, scope, base, stack.tensors)
    matching.replace_whole()
    experts = Experts(matching, options, scope, adapter.config)
    modules = experts.take(keys.parts)
    matching.findings += config_findings(
        adapter, options, [*map(plain_path, modules), *experts.modules, *experts.parameters]
    )
    lora = _Lora(matching, options, str(adapter.config.get("peft_version") or ""))
    for module, parts in modules.items():
        lora.add(module, parts)
    lora.finish()
    TokenRows.read(adapter.config, "trainable_token_indices").put(keys.rows, matching)
    trained = [module for module in (*modules, *experts.modules) if not module.endswith(_OUTPUT)]
    return stack.complete(matching.finish(trained))


@final
class _Lora:
    """Makes changes of factors."""

    def __init__(self, matching: Matching, options: LoraOptions, version: str) -> None:
        self._matching, self._options, self._version = matching, options, version
        self._attentions: set[str] = set()
        self._outputs: set[str] = set()
        self._has_kernel = False

    def add(self, module: str, parts: Mapping[str, StoredTensor]) -> None:
        """Change the weight of a module, and its bias, by its factors."""
        is_embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{kind}" if is_embedding else kind) for kind in "ab")
        extra = {kind: parts.get(kind) for kind in self._options.extra}
        found = {kind: tensor for kind, tensor in extra.items() if tensor is not None}
        if a is None or b is None or len(found) < len(extra):
            self._refuse_missing(parts)
            return
        is_attention = self._is_attention(module)
        if is_attention:
            self._attentions.add(module)
        change = self._matching.change(module, a, "in_proj_weight" if is_attention else "weight")
        if change is None:
            return
        layer = Layer(
            module=module, a=a, b=b, extra=found, is_embedding=is_embedding, is_transposed=self._matching.is_transposed(module),
            scale=self._scale(module, a.spec.shape[0]), block=self._options.block_factor(plain_path(module)), blocks=self._options.blocks,
        )  # fmt: skip
        if self._is_layer(layer, change) and self._is_rank(layer) and self._is_shape(layer, change):
            self._matching.add(change, *layer.steps())
            self._add_bias(layer, parts.get("bias"), is_attention=is_attention or self._is_output(module))
        for kind in {"m", "diag"} - extra.keys():
            if kind in parts:
                self._matching.unused(parts[kind])

    def finish(self) -> None:
        """What can only be told of all modules together."""
        if self._has_kernel:
            self._warn("convolution", "a LoRA on a convolution with a kernel",
                       "right if it is not dilated and pads with zeros, which no file tells: PEFT's factors always do so")  # fmt: skip
        for module in sorted(self._attentions - self._outputs):
            self._matching.missed(f"{module}{_OUTPUT}", "factors of the output projection, too")
        if not self._outputs:
            return
        where = f"the output projection of {len(self._outputs)} nn.MultiheadAttention"
        numbers = re.match(r"(\d+)\.(\d+)", self._version)
        if numbers and (int(numbers[1]), int(numbers[2])) > _DOUBLED_UP_TO:
            self._unsupported("attention_output", CONFIG_FILE, f"{where}, peft_version {self._version}",
                              "whether this PEFT applies that delta once or twice is not known here: upgrade ckpt-registry")  # fmt: skip
        else:
            self._warn("attention_output", where, "PEFT applied its delta twice in training, and so does merging")

    def _refuse_missing(self, parts: Mapping[str, StoredTensor]) -> None:
        names = ("A", "B", *self._options.extra.values())
        where = next(iter(parts.values())).spec.name
        self._matching.refuse("missing_factor", where, expected=f"all of {', '.join(names)}", found="only some of them")

    # -- nn.MultiheadAttention

    def _is_attention(self, module: str) -> bool:
        """Whether a module is one, whose weight has a name of its own."""
        base, matching = self._matching.base, self._matching
        return matching.name(module) not in base and matching.name(module, "in_proj_weight") in base

    def _is_output(self, module: str) -> bool:
        return module.endswith(_OUTPUT) and self._is_attention(module.removesuffix(_OUTPUT))

    def _configured(self, module: str) -> str:
        """The path that the configuration knows a module by: an output projection goes with its attention."""
        return plain_path(module.removesuffix(_OUTPUT) if self._is_output(module) else module)

    def _scale(self, module: str, rank: int) -> float:
        scale = self._options.scale(self._configured(module), rank)
        if not self._is_output(module):
            return scale
        self._outputs.add(module.removesuffix(_OUTPUT))
        return 2 * scale

    # -- checks

    def _is_layer(self, layer: Layer, change: Change) -> bool:
        if not layer.is_of_one_kind:
            shapes = f"{list(layer.a.spec.shape)} and {list(layer.b.spec.shape)}"
            self._matching.refuse(
                "shape_mismatch",
                layer.a.spec.name,
                expected="A and B of one kind of layer",
                found=shapes,
                advice=ANOTHER_SAVE,
            )
        elif layer.is_grouped(change.target.shape):
            self._unsupported("layer_not_mergeable", layer.a.spec.name, "a LoRA on a grouped convolution",
                              "its A reads every channel, which the layer's weight cannot: serve it unmerged")  # fmt: skip
        else:
            return True
        return False

    def _is_rank(self, layer: Layer) -> bool:
        told = self._options.ranks.matching(self._configured(layer.module)) or [self._options.rank]
        if layer.rank == layer.b_rank and layer.rank in told:
            return True
        differs = layer.rank != layer.b_rank
        expected = f"A with {layer.b_rank} rows, as B has columns" if differs else f"rank {told[0]}, says {CONFIG_FILE}"
        self._matching.refuse(
            "rank_mismatch", layer.module, expected=expected, found=f"rank {layer.rank}", advice=ANOTHER_SAVE
        )
        return False

    def _is_shape(self, layer: Layer, change: Change) -> bool:
        weight = change.target.shape
        if weight != layer.made:
            self._matching.wrong_shape(layer.a, weight, found=f"A and B make {list(layer.made)}")
            return False
        wanted = {"m": layer.b.spec.shape[0], "diag": layer.rank}
        for kind, tensor in layer.extra.items():
            if tensor.spec.elements != wanted[kind] or (kind == "diag" and layer.rank >= min(weight)):
                self._matching.wrong_shape(tensor, [wanted[kind]])
                return False
        self._has_kernel = self._has_kernel or prod(layer.made[2:]) > 1
        return True

    # -- biases

    def _add_bias(self, layer: Layer, value: StoredTensor | None, *, is_attention: bool) -> None:
        """`lora_bias`. Extraction tools write such a bias without setting the flag."""
        if value is None:
            if self._options.has_bias and not (layer.is_embedding or is_attention):
                self._matching.missed(f"{layer.module}.lora_B.bias", "a bias of B, as lora_bias is set")
        elif is_attention or layer.extra:
            self._unsupported("bias_not_mergeable", value.spec.name, "a bias of B in such a layer",
                              "what it does in training is not what a bias of the layer does: serve it unmerged")  # fmt: skip
        elif self._matching.name(layer.module, "bias") not in self._matching.base:
            self._unsupported("bias_not_mergeable", value.spec.name, "a bias for a layer that has none",
                              "the base's architecture has no place for it: serve it unmerged")  # fmt: skip
        elif change := self._matching.change(layer.module, value, "bias"):
            if value.spec.shape != change.target.shape:
                self._matching.wrong_shape(value, change.target.shape)
                return
            step = Tuned(method="add", tensors={"value": value}, options={"scale": layer.scale})
            self._matching.add(change, step)

    # -- findings

    def _unsupported(self, code: str, where: str, found: str, advice: str) -> None:
        self._matching.findings.append(unsupported(code, where, found=found, advice=advice))

    def _warn(self, code: str, found: str, advice: str) -> None:
        self._matching.findings.append(warning(code, CONFIG_FILE, found=found, advice=advice))
