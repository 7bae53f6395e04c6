"""Match an Adapter v1 or v2 of litgpt with a litgpt base model.

Adapter v1 adds a second attention, over learned tokens and by a gate for each head, to all but the first layers. That is no change of
weights: `Omission`. Adapter v2 has the same, and besides computes every linear layer as `scale * (W x + b + shift)` and trains the norms,
which folds exactly into `W' = diag(scale) W`, `b' = scale * (b + shift)` and new norms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

from registry.changes import Change, Resolution, Tuned
from registry.formats.adapter import Adapter
from registry.formats.findings import OTHER_BASE, misfit, unsupported
from registry.formats.litgpt_heads import FUSED, Heads, flag_of
from registry.manifest import BaseModel, Finding
from registry.omissions import GatedPrefix, Omission, RouterBias
from registry.tensors import StoredTensor, TensorSpec

_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_TOKENS, _GATE = "attn.adapter_wte.weight", "attn.gating_factor"
_NORMS = re.compile(r"(?:transformer\.h\.\d+\.norm_[12]|transformer\.ln_f)\.(?:weight|bias)")
# A fused matrix has these names in the two row orders, and no other tells them apart.
_ANOTHER_ROW_ORDER = (
    "use a base in the row order (`attn.attn` until litgpt 0.5.4, `attn.qkv` since) that it was trained with"
)


def resolve_adapter_v1(adapter: Adapter, base: BaseModel) -> Resolution:
    """An Adapter v1: nothing but the prefix, which cannot be merged."""
    matched = _Matched(adapter, base)
    matched.prefix_layers()
    matched.refuse_unused()
    finding = unsupported(
        "method_not_mergeable", adapter.weights_file, found=adapter.method,
        advice="its gated prefix is not a change of weights: run it unmerged with `litgpt generate_adapter`",
    )  # fmt: skip
    omitted = Omission(finding=finding, zeros=frozenset(matched.gates()))
    return Resolution(changes=(), findings=tuple(matched.findings), omitted=(omitted,))


def resolve_adapter_v2(adapter: Adapter, base: BaseModel) -> Resolution:
    """An Adapter v2: scales, shifts and norms fold; the prefix does not, nor does a bias of a router, which has none in litgpt."""
    matched = _Matched(adapter, base)
    linears, layers = matched.linears(), matched.prefix_layers()
    changes = (*(change for linear in linears for change in linear.changes()), *matched.norms())
    matched.refuse_unused()
    if matched.findings:
        return Resolution(changes=changes, findings=tuple(matched.findings))
    return Resolution(
        changes=changes,
        findings=(),
        config=dict(_biases(linears, base)),
        omitted=(*_prefix(matched, linears, layers), *_routers(linears)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """A linear layer of the base, and what an Adapter v2 does to its output. Layer -1 is the head."""

    module: str
    layer: int
    weight: StoredTensor
    bias: StoredTensor | None
    scale: StoredTensor
    shift: StoredTensor

    @property
    def is_router(self) -> bool:
        """Whether it chooses among experts."""
        return self.module.endswith(".mlp.gate")

    def changes(self) -> Iterator[Change]:
        scale = Tuned(method="adapter_v2", tensors={"scale": self.scale})
        yield Change(target=self.weight.spec, source=self.weight, steps=(scale,))
        if not self.is_router:
            spec = self.bias.spec if self.bias else _bias_of(self.module, self.weight.spec)
            both = replace(scale, tensors={"scale": self.scale, "shift": self.shift})
            yield Change(target=spec, source=self.bias, steps=(both,))


def _bias_of(module: str, weight: TensorSpec) -> TensorSpec:
    return TensorSpec(f"{module}.bias", weight.dtype, weight.shape[:1])


def _biases(linears: list[_Linear], base: BaseModel) -> Iterator[tuple[str, bool]]:
    """Fields of `model_config.yaml` that must say now that linear layers have biases: the head has its own, the rest (but routers) one."""
    for key, of_head in (("bias", False), ("lm_head_bias", True)):
        is_new = any(not linear.bias and not linear.is_router for linear in linears if (linear.layer < 0) is of_head)
        if is_new and base.config.get(key) is not True:
            yield key, True


def _prefix(matched: _Matched, linears: list[_Linear], layers: list[int]) -> Iterator[Omission]:
    fused = {linear.layer: linear for linear in linears if linear.module.endswith(FUSED)}
    if layers:
        finding = unsupported(
            "gated_prefix", _GATE, found=f"attention over learned tokens, from layer {layers[0]} on, which is no change of weights",
            advice="run it unmerged with `litgpt generate_adapter_v2`, or let `--allow-lossy` leave that part out",
        )  # fmt: skip
        parts = tuple(matched.prefix(fused[layer]) for layer in layers)
        yield Omission(finding=finding, zeros=frozenset(matched.gates()), parts=parts)


def _routers(linears: list[_Linear]) -> Iterator[Omission]:
    routers = [linear for linear in linears if linear.is_router]
    if routers:
        finding = unsupported(
            "router_bias", "mlp.gate.adapter_bias", found=f"biases on {len(routers)} routers, which have none in litgpt",
            advice="run it unmerged with `litgpt generate_adapter_v2`, or let `--allow-lossy` leave them out",
        )  # fmt: skip
        parts = tuple(RouterBias(layer=each.layer, scale=each.scale, shift=each.shift) for each in routers)
        yield Omission(finding=finding, zeros=frozenset(each.shift.spec.name for each in routers), parts=parts)


@final
@dataclass(slots=True)
class _Matched:
    """An adapter's tensors beside a base's. Each that finds its place is taken out of `left`."""

    adapter: Adapter
    model: BaseModel
    findings: list[Finding] = field(default_factory=list)
    tensors: Mapping[str, StoredTensor] = field(init=False)
    base: Mapping[str, StoredTensor] = field(init=False)
    heads: Heads = field(init=False)
    left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {tensor.spec.name: tensor for tensor in self.adapter.tensors}
        self.base = {tensor.spec.name: tensor for tensor in self.model.tensors}
        self.heads = Heads.from_config(self.model.config)
        self.left = set(self.tensors)

    def linears(self) -> list[_Linear]:
        """Every linear layer of the base, each with its scale and shift. An adapter has them for all or is incomplete."""
        found = []
        for name, weight in self.base.items():
            module = name.removesuffix(".weight")
            if module == name or not flag_of(module) or len(weight.spec.shape) != 2:
                continue
            rows = weight.spec.shape[:1]
            scale, shift = (self._take(f"{module}.adapter_{kind}", (rows,)) for kind in ("scale", "bias"))
            if scale and shift:
                bias = self.base.get(f"{module}.bias")
                found.append(
                    _Linear(module=module, layer=_layer_of(module), weight=weight, bias=bias, scale=scale, shift=shift)
                )
        return found

    def norms(self) -> Iterator[Change]:
        """The norms, which the adapter has anew."""
        for name, tensor in self.base.items():
            if _NORMS.fullmatch(name) and (own := self._take(name, (tensor.spec.shape,))):
                yield Change(target=tensor.spec, source=tensor, replacement=own)

    def prefix_layers(self) -> list[int]:
        """The layers with a prefix: all from some layer on."""
        names = (_TOKENS, _GATE)
        given = [_layer_of(name) for name in self.tensors if name.endswith(names)]
        layers = [number for number in range(min(given, default=0), self._layers()) if given]
        heads, width = self.heads.groups * self.heads.per_group, self.model.config["n_embd"]
        for layer in layers:
            tokens, gate = (f"transformer.h.{layer}.{name}" for name in names)
            length = self.tensors[tokens].spec.shape[:1] if tokens in self.tensors else (1,)
            self._take(tokens, ((*length, width),))
            self._take(gate, ((1, 1, heads, 1), (1, heads, 1, 1)))  # the second until 2023-08
        return layers

    def gates(self) -> Iterator[str]:
        """Names of the gates."""
        return (name for name in self.tensors if name.endswith(_GATE))

    def prefix(self, fused: _Linear) -> GatedPrefix:
        """What a layer's prefix is made of.

        Since litgpt 0.5.5 it takes its rows of the fused matrix where they were before, though that is in another order now.
        """
        block = f"transformer.h.{fused.layer}"
        rows = tuple(at for _, at, _ in self.heads.interleaved("value"))
        start = next(at for _, at, _ in self.heads.concatenated("value"))
        stacked = tuple(range(start, self.heads.rows, self.heads.size))
        return GatedPrefix(
            layer=fused.layer,
            gate=self.tensors[f"{block}.{_GATE}"],
            tokens=self.tensors[f"{block}.{_TOKENS}"],
            weight=fused.weight,
            bias=fused.bias,
            scale=fused.scale,
            shift=fused.shift,
            norm=self.tensors.get(f"{block}.norm_1.weight"),
            norm_bias=self.tensors.get(f"{block}.norm_1.bias"),
            norm_offset=float("Gemma" in str(self.model.config.get("name"))),
            rows=rows,
            own_rows=rows if fused.module.endswith(".attn.attn") else stacked,
            size=self.heads.size,
        )

    def refuse_unused(self) -> None:
        """Name what found no place."""
        for name in sorted(self.left):
            module = _in_other_order(name).rpartition(".")[0]
            advice = _ANOTHER_ROW_ORDER if f"{module}.weight" in self.base else OTHER_BASE
            expected = "a linear layer, norm or attention of the base"
            self.findings.append(misfit("no_base_tensor", name, expected=expected, found="none", advice=advice))

    def _layers(self) -> int:
        return 1 + max((_layer_of(name) for name in self.base), default=-1)

    def _take(self, name: str, shapes: tuple[tuple[int, ...], ...]) -> StoredTensor | None:
        """A tensor of the adapter that there must be, of one of some shapes."""
        tensor = self.tensors.get(name)
        if tensor is None:
            advice = _ANOTHER_ROW_ORDER if _in_other_order(name) in self.tensors else "the adapter is incomplete"
            self.findings.append(misfit("target_missed", name, expected="in the file", found="missing", advice=advice))
            return None
        self.left.discard(name)
        if tensor.spec.shape in shapes:
            return tensor
        self.findings.append(
            misfit("shape_mismatch", name, expected=f"{list(shapes[0])}", found=f"{list(tensor.spec.shape)}", advice=OTHER_BASE)
        )  # fmt: skip
        return None


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _in_other_order(name: str) -> str:
    """What a tensor of a fused matrix is called in the other row order; empty text for any other tensor."""
    for old, new in (FUSED, FUSED[::-1]):
        if f"{old}." in name:
            return name.replace(f"{old}.", f"{new}.")
    return ""
