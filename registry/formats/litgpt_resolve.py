"""Match a litgpt adapter's tensors with a litgpt base model.

Two row orders of the fused query-key-value matrix exist, told apart by name alone: `attn.qkv` (litgpt >= 0.5.5) has all query rows, then
all key, then all value rows; `attn.attn` (<= 0.5.4) has, for each key-value group, its query heads, its key head, its value head.
`q`, `k` below are the row counts of query and key; value has as many as key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.changes import Change, LowRank, Resolution, Rows
from registry.errors import CorruptFile
from registry.formats.adapter import Adapter, spec_like
from registry.formats.findings import OTHER_BASE, misfit, unsupported
from registry.formats.litgpt import FLAGS, HYPERPARAMETERS_FILE, MODEL_CONFIG_FILE
from registry.manifest import BaseFormat, BaseModel, Finding
from registry.tensors import StoredTensor

_QKV_PARTS = ("query", "key", "value")
_COMPARED = (
    "n_embd", "n_layer", "n_head", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size",
    "mlp_class_name", "norm_class_name", "bias", "lm_head_bias", "parallel_residual", "rotary_percentage",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a model: `groups` key-value heads, `per_group` query heads for each, `size` rows a head."""

    groups: int
    per_group: int
    size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads:
        """Read `model_config.yaml`.

        Raises:
            CorruptFile: the numbers are missing or do not divide.
        """
        names = ("n_head", "n_embd", "n_query_groups", "head_size")
        numbers = [config.get(name) if isinstance(config.get(name), int) else None for name in names]
        heads, width, groups, size = numbers
        groups = groups or heads
        if not heads or not width or not groups or heads % groups:
            raise CorruptFile(MODEL_CONFIG_FILE, "n_head, n_embd and n_query_groups do not describe attention heads")
        return cls(groups, heads // groups, size or width // heads)

    @property
    def part_rows(self) -> dict[str, int]:
        """Rows of the query, key and value parts."""
        key = self.groups * self.size
        return {"query": key * self.per_group, "key": key, "value": key}

    @property
    def rows(self) -> int:
        """Rows of the fused matrix."""
        return sum(self.part_rows.values())

    def concatenated(self, part: str) -> Iterator[tuple[int, int, int]]:
        """Where a part's rows stand in the current order, as (first row in the part, first row in the matrix, count)."""
        sizes = self.part_rows
        before = {"query": 0, "key": sizes["query"], "value": sizes["query"] + sizes["key"]}
        yield 0, before[part], sizes[part]

    def interleaved(self, part: str) -> Iterator[tuple[int, int, int]]:
        """The same for the order of litgpt <= 0.5.4."""
        heads = self.per_group if part == "query" else 1
        inside = {"query": 0, "key": self.per_group, "value": self.per_group + 1}[part]
        for group in range(self.groups):
            at = (group * (self.per_group + 2) + inside) * self.size
            yield group * heads * self.size, at, heads * self.size


def resolve_litgpt(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers and YAML alone.

    Returns:
        Changes (complete only when no finding is refused) and every finding.
    """
    if base.format is not BaseFormat.LITGPT:
        finding = misfit("layout_differs", base.name, expected="a litgpt base model (lit_model.pth)", found=f"{base.format} layout",
                         advice="merge it into the litgpt base it was trained on")  # fmt: skip
        return Resolution(changes=(), findings=(finding,))
    findings = list(_compare_configs(adapter, base))
    if adapter.method == "lora":
        resolver = _LoraResolver(adapter, base)
        return Resolution(changes=tuple(resolver.changes()), findings=(*findings, *resolver.findings))
    findings += [_not_mergeable(adapter), *_check_shapes(adapter, base)]
    return Resolution(changes=(), findings=tuple(findings))


def _compare_configs(adapter: Adapter, base: BaseModel) -> Iterator[Finding]:
    for key in _COMPARED:
        own, other = adapter.base_config.get(key), base.config.get(key)
        if own is not None and other is not None and own != other:
            yield misfit("config_differs", MODEL_CONFIG_FILE, expected=f"{key}={own!r}, as when it was trained", found=f"{other!r}",
                         advice=OTHER_BASE)  # fmt: skip


def _not_mergeable(adapter: Adapter) -> Finding:
    advice = {
        "adapter": "its gated prefix is not a change of weights: run it unmerged with `litgpt generate_adapter`",
        "adapter_v2": "recorded as it is; this version merges lora: run it unmerged with `litgpt generate_adapter_v2`",
    }
    return unsupported(
        "method_not_mergeable", adapter.weights_file, found=adapter.method, advice=advice[adapter.method]
    )


def _check_shapes(adapter: Adapter, base: BaseModel) -> Iterator[Finding]:
    """Whether the tensors of an Adapter v1 or v2 belong to this base at all."""
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in base.tensors}
    heads, width = Heads.from_config(base.config), base.config["n_embd"]
    for tensor in adapter.tensors:
        name, shape = tensor.spec.name, tensor.spec.shape
        module, _, kind = name.rpartition(".")
        if kind in ("adapter_scale", "adapter_bias"):
            expected = shapes.get(f"{module}.weight", ())[:1]
        elif kind == "gating_factor":
            expected = (1, 1, heads.groups * heads.per_group, 1)
        elif name.endswith("adapter_wte.weight"):
            expected = (*shape[:1], width)
        else:
            expected = shapes.get(name, ())
        if kind == "gating_factor" and f"{module}.proj.weight" not in shapes:
            expected = ()
        if shape != expected:
            code, wanted = ("shape_mismatch", f"{list(expected)}") if expected else ("no_base_tensor", "such a module")
            yield misfit(code, name, expected=wanted, found=f"{list(shape)}", advice=OTHER_BASE)


class _LoraResolver:
    """LoRA of either row order onto a base of the same one."""

    def __init__(self, adapter: Adapter, base: BaseModel) -> None:
        self._adapter, self._hyper = adapter, adapter.config
        self._base = {tensor.spec.name: tensor for tensor in base.tensors}
        self._heads = Heads.from_config(base.config)
        self._tensors = {tensor.spec.name: tensor for tensor in adapter.tensors}
        self.findings: list[Finding] = []

    def changes(self) -> Iterator[Change]:
        self._check_hyperparameters()
        modules: dict[str, list[str]] = {}
        for name in self._tensors:
            module, _, kind = name.rpartition(".")
            if kind in ("lora_A", "lora_B"):
                modules.setdefault(module, []).append(kind)
            else:
                self._misfit("unused_tensor", name, "names ending in lora_A or lora_B", kind)
        for module, kinds in modules.items():
            if len(kinds) != 2:
                self._misfit("missing_factor", module, "both lora_A and lora_B", kinds[0])
                continue
            change = self._change(module)
            if change is not None:
                yield change
        self._check_targets(set(modules))

    def _check_hyperparameters(self) -> None:
        wanted = ("lora_r", "lora_alpha", *(f"lora_{flag}" for flag in FLAGS))
        missing = [key for key in wanted if key not in self._hyper]
        if missing:
            self.findings.append(
                unsupported("hyperparameters_missing", HYPERPARAMETERS_FILE, found=f"no {', '.join(missing)}",
                            advice="put the run's hyperparameters.yaml beside the weights: rank alone does not tell the scale")
            )  # fmt: skip

    def _change(self, module: str) -> Change | None:
        source = self._base.get(f"{module}.weight")
        a, b = self._tensors[f"{module}.lora_A"], self._tensors[f"{module}.lora_B"]
        if source is None:
            other = {"attn.attn": "attn.qkv", "attn.qkv": "attn.attn"}
            era = next((new for old, new in other.items() if f"{module.replace(old, new)}.weight" in self._base), None)
            self._misfit("no_base_tensor", f"{module}.lora_A", f"{module}.weight", f"only {era}: another row order" if era else "none",
                         "use a base converted by the litgpt version it was trained with" if era else OTHER_BASE)  # fmt: skip
            return None
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
            self._misfit("shape_mismatch", module, "two matrices", f"{list(a.spec.shape)} and {list(b.spec.shape)}")
            return None
        fused = module.endswith((".attn.qkv", ".attn.attn"))
        deltas = self._fused_deltas(module, a, b) if fused else self._plain_delta(module, a, b, source)
        if not deltas:
            return None
        if a.spec.shape[1] != source.spec.shape[1]:
            wanted = f"{source.spec.shape[1]} columns, as the base"
            self._misfit("shape_mismatch", f"{module}.lora_A", wanted, f"{a.spec.shape[1]}")
            return None
        return Change(target=spec_like(source.spec, name=source.spec.name), source=source, deltas=tuple(deltas))

    def _plain_delta(self, module: str, a: StoredTensor, b: StoredTensor, source: StoredTensor) -> list[LowRank]:
        if a.spec.shape[0] != b.spec.shape[1] or b.spec.shape[0] != source.spec.shape[0]:
            self._misfit("shape_mismatch", module, f"B [{source.spec.shape[0]}, r] and A [r, {source.spec.shape[1]}]",
                         f"{list(b.spec.shape)} and {list(a.spec.shape)}")  # fmt: skip
            return []
        if not self._rank_agrees(module, a.spec.shape[0]):
            return []
        return [LowRank(a=Rows.all_of(a), b=Rows.all_of(b), scale=self._scale(b.spec.shape[1]))]

    def _fused_deltas(self, module: str, a: StoredTensor, b: StoredTensor) -> list[LowRank]:
        """The parts of a fused matrix: each enabled one has its own rows of A and of B.

        Up to litgpt 0.5.4 the parts were spread over the interleaved rows only when some were disabled; with all three enabled the stacked
        delta was added as it stood. That is what such a model was trained with, so that is what is merged.
        """
        parts = [part for part in _QKV_PARTS if self._hyper.get(f"lora_{part}") is True]
        sizes, rank = self._heads.part_rows, b.spec.shape[1]
        rows = sum(sizes[part] for part in parts)
        if not parts or a.spec.shape[0] != len(parts) * rank or b.spec.shape[0] != rows:
            wanted = f"A [{len(parts)} r, {a.spec.shape[1]}], B [{rows}, r] for {', '.join(parts) or 'no part'}"
            found = f"{list(a.spec.shape)} and {list(b.spec.shape)}"
            self._misfit(
                "shape_mismatch", module, wanted, found, "hyperparameters.yaml is not this run's, or another base"
            )
            return []
        if not self._rank_agrees(module, rank):
            return []
        spread = (
            self._heads.interleaved if module.endswith(".attn.attn") and len(parts) < 3 else self._heads.concatenated
        )
        deltas, b_row = [], 0
        for index, part in enumerate(parts):
            for start, at, count in spread(part):
                deltas.append(
                    LowRank(a=Rows(tensor=a, start=index * rank, count=rank), b=Rows(tensor=b, start=b_row + start, count=count),
                            scale=self._scale(rank), row=at)
                )  # fmt: skip
            b_row += sizes[part]
        return deltas

    def _rank_agrees(self, module: str, rank: int) -> bool:
        if self._adapter.rank is None or self._adapter.rank == rank:
            return True
        self._misfit("rank_mismatch", module, f"rank {self._adapter.rank}, says hyperparameters.yaml", f"rank {rank}",
                     "a run started from Python records defaults there: write the true lora_r and lora_alpha into it")  # fmt: skip
        return False

    def _scale(self, rank: int) -> float:
        return (self._adapter.alpha or 0.0) / rank

    def _check_targets(self, have: set[str]) -> None:
        """Flags are global in litgpt: what one layer has, every layer has."""
        for name in self._base:
            module = name.removesuffix(".weight")
            flag = _flag_of(module)
            if name.endswith(".weight") and flag and self._is_on(flag) and module not in have:
                self._misfit(
                    "target_missed",
                    module,
                    f"factors, as {flag} is enabled",
                    "none in the file",
                    "the adapter is incomplete",
                )
        for module in have:
            flag = _flag_of(module)
            if not self._is_on(flag) and f"{module}.weight" in self._base:
                self._misfit("unused_tensor", module, f"no factors, as {flag or 'this kind of module'} is not enabled", "factors",
                             "hyperparameters.yaml is not this run's")  # fmt: skip
        if not self._tensors:
            self._misfit("nothing_matched", "adapter", "low-rank factors", "none")

    def _is_on(self, flag: str) -> bool:
        return any(self._hyper.get(f"lora_{name}") is True for name in (_QKV_PARTS if flag == "qkv" else (flag,)))

    def _misfit(self, code: str, where: str, expected: str, found: str, advice: str = "") -> None:
        self.findings.append(misfit(code, where, expected=expected, found=found, advice=advice))


def _flag_of(module: str) -> str:
    if module == "lm_head":
        return "head"
    if module.endswith((".attn.qkv", ".attn.attn")):
        return "qkv"
    if module.endswith(".attn.proj"):
        return "projection"
    return "mlp" if ".mlp." in module else ""
