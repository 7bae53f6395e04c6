"""Match a litgpt adapter's tensors with a litgpt base model."""

from __future__ import annotations

from collections.abc import Iterator

from registry.changes import Change, LowRank, Matrix, Resolution
from registry.formats.adapter import Adapter
from registry.formats.findings import OTHER_BASE, misfit, unsupported
from registry.formats.litgpt import FLAGS, HYPERPARAMETERS_FILE, LORA_FILE_BEFORE_2024_03, MODEL_CONFIG_FILE
from registry.formats.litgpt_adapters import resolve_adapter_v1, resolve_adapter_v2
from registry.formats.litgpt_heads import FUSED, QKV_PARTS, Heads, flag_of
from registry.manifest import BaseFormat, BaseModel, Finding
from registry.tensors import StoredTensor

# Fields that the mathematics follow from. The adapter's copy of the file is the base's own, so any that both know must agree.
_COMPARED = (
    "n_embd", "n_layer", "n_head", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size",
    "mlp_class_name", "norm_class_name", "bias", "attn_bias", "lm_head_bias", "parallel_residual", "shared_attention_norm",
    "rotary_percentage", "rope_base", "norm_eps", "norm_qk", "norm_1", "norm_2", "post_attention_norm", "post_mlp_norm",
    "scale_embeddings", "n_expert", "n_expert_per_token", "moe_intermediate_size",
)  # fmt: skip
# What litgpt's own adapter classes leave out, so that no adapter can have been trained with it.
_NO_ADAPTERS = ("latent_attention", "n_shared_expert", "n_expert_groups", "first_k_dense_replace")


def resolve_litgpt(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers and YAML alone.

    Returns:
        Changes (complete only when no finding is refused) and every finding.
    """
    if base.format is not BaseFormat.LITGPT:
        finding = misfit("layout_differs", base.name, expected="a litgpt base model (lit_model.pth)", found=f"{base.format} layout",
                         advice="merge it into the litgpt base it was trained on")  # fmt: skip
        return Resolution(changes=(), findings=(finding,))
    findings = tuple(_compare_configs(adapter, base))
    if any(base.config.get(key) for key in _NO_ADAPTERS):
        return Resolution(changes=(), findings=findings)
    resolve = {"lora": _resolve_lora, "adapter": resolve_adapter_v1, "adapter_v2": resolve_adapter_v2}[adapter.method]
    found = resolve(adapter, base)
    return Resolution(
        changes=found.changes, findings=(*findings, *found.findings), config=found.config, omitted=found.omitted
    )


def _compare_configs(adapter: Adapter, base: BaseModel) -> Iterator[Finding]:
    for key in _COMPARED:
        own, other = adapter.base_config.get(key), base.config.get(key)
        if own is not None and other is not None and own != other:
            yield misfit("config_differs", MODEL_CONFIG_FILE, expected=f"{key}={own!r}, as when it was trained", found=f"{other!r}",
                         advice=OTHER_BASE)  # fmt: skip
    for key in _NO_ADAPTERS:
        if base.config.get(key):
            yield misfit("model_not_supported", base.name, expected="a model that litgpt can train adapters for",
                         found=f"{key} in {MODEL_CONFIG_FILE}", advice=OTHER_BASE)  # fmt: skip


def _resolve_lora(adapter: Adapter, base: BaseModel) -> Resolution:
    resolver = _LoraResolver(adapter, base)
    return Resolution(changes=tuple(resolver.changes()), findings=tuple(resolver.findings))


class _LoraResolver:
    """LoRA of either row order onto a base of either one."""

    def __init__(self, adapter: Adapter, base: BaseModel) -> None:
        self._adapter, self._hyper = adapter, adapter.config
        self._base = {tensor.spec.name: tensor for tensor in base.tensors}
        self._heads = Heads.from_config(base.config)
        self._tensors = {tensor.spec.name: tensor for tensor in adapter.tensors}
        self.findings: list[Finding] = []

    def changes(self) -> Iterator[Change]:
        self._check_hyperparameters()
        modules = self._modules()
        for module, kinds in modules.items():
            if len(kinds) != 2:
                name = next(iter(kinds.values())).spec.name
                self._misfit("missing_factor", module, "both lora_A and lora_B", name)
                continue
            change = self._change(module, kinds["lora_A"], kinds["lora_B"])
            if change is not None:
                yield change
        self._check_targets(set(modules))

    def _modules(self) -> dict[str, dict[str, StoredTensor]]:
        """Factors by the base's name of their module; the fused matrix has another one in either row order."""
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self._tensors.items():
            trained, _, kind = name.rpartition(".")
            if kind not in ("lora_A", "lora_B"):
                self._misfit("unused_tensor", name, "names ending in lora_A or lora_B", kind)
                continue
            module = trained
            for old, new in (FUSED, FUSED[::-1]):
                other = f"{trained.removesuffix(old)}{new}"
                if trained.endswith(old) and f"{trained}.weight" not in self._base and f"{other}.weight" in self._base:
                    module = other
            if kind in modules.setdefault(module, {}):
                self._misfit("name_collision", name, "one row order", f"{modules[module][kind].spec.name} as well")
            modules[module][kind] = tensor
        return modules

    def _check_hyperparameters(self) -> None:
        wanted = ("lora_r", "lora_alpha", *(f"lora_{flag}" for flag in FLAGS))
        missing = [key for key in wanted if key not in self._hyper]
        if missing:
            self.findings.append(
                unsupported("hyperparameters_missing", HYPERPARAMETERS_FILE, found=f"no {', '.join(missing)}",
                            advice="put the run's hyperparameters.yaml beside the weights: rank alone does not tell the scale")
            )  # fmt: skip

    def _change(self, module: str, a: StoredTensor, b: StoredTensor) -> Change | None:
        source = self._base.get(f"{module}.weight")
        if source is None:
            self._misfit("no_base_tensor", a.spec.name, f"{module}.weight", "none", OTHER_BASE)
            return None
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
            self._misfit("shape_mismatch", module, "two matrices", f"{list(a.spec.shape)} and {list(b.spec.shape)}")
            return None
        deltas = self._fused_deltas(module, a, b) if module.endswith(FUSED) else self._plain_delta(module, a, b, source)
        if not deltas:
            return None
        if a.spec.shape[1] != source.spec.shape[1]:
            wanted = f"{source.spec.shape[1]} columns, as the base"
            self._misfit("shape_mismatch", f"{module}.lora_A", wanted, f"{a.spec.shape[1]}")
            return None
        return Change(target=source.spec, source=source, steps=tuple(deltas))

    def _plain_delta(self, module: str, a: StoredTensor, b: StoredTensor, source: StoredTensor) -> list[LowRank]:
        if a.spec.shape[0] != b.spec.shape[1] or b.spec.shape[0] != source.spec.shape[0]:
            self._misfit("shape_mismatch", module, f"B [{source.spec.shape[0]}, r] and A [r, {source.spec.shape[1]}]",
                         f"{list(b.spec.shape)} and {list(a.spec.shape)}")  # fmt: skip
            return []
        if not self._rank_agrees(module, a.spec.shape[0]):
            return []
        return [LowRank(left=Matrix.of(b), right=Matrix.of(a), scale=self._scale(b.spec.shape[1]))]

    def _fused_deltas(self, module: str, a: StoredTensor, b: StoredTensor) -> list[LowRank]:
        """The parts of a fused matrix: each enabled one has its own rows of A and of B."""
        parts = [part for part in QKV_PARTS if self._hyper.get(f"lora_{part}") is True]
        sizes, rank = self._heads.part_rows, b.spec.shape[1]
        rows = sum(sizes[part] for part in parts)
        if not parts or a.spec.shape[0] != len(parts) * rank or b.spec.shape[0] != rows:
            wanted = f"A [{len(parts)} r, {a.spec.shape[1]}], B [{rows}, r] for {', '.join(parts) or 'no part'}"
            found = f"{list(a.spec.shape)} and {list(b.spec.shape)}"
            advice = "hyperparameters.yaml is not this run's, or another base"
            self._misfit("shape_mismatch", module, wanted, found, advice)
            return []
        if not self._rank_agrees(module, rank) or not self._rows_are_known(parts):
            return []
        deltas, b_row = [], 0
        for index, part in enumerate(parts):
            for start, at, count in self._spread(module, a, part, stacked=len(parts) == len(QKV_PARTS)):
                deltas.append(
                    LowRank(left=Matrix.of(b, start=b_row + start, count=count), right=Matrix.of(a, start=index * rank, count=rank),
                            scale=self._scale(rank), row=at)
                )  # fmt: skip
            b_row += sizes[part]
        return deltas

    def _spread(self, module: str, a: StoredTensor, part: str, *, stacked: bool) -> Iterator[tuple[int, int, int]]:
        """Where a part's rows of B go, in the base's row order.

        Up to litgpt 0.5.4 the parts were spread over the interleaved rows only when some were disabled; with all three enabled the stacked
        delta was added as it stood. That is what such a model was trained with, so that is what is merged.
        """
        trained_before, base_before = (".attn.attn" in name for name in (a.spec.name, module))
        if trained_before and stacked:
            return self._heads.concatenated(part) if base_before else self._heads.regrouped(part)
        return self._heads.interleaved(part) if base_before else self._heads.concatenated(part)

    def _rows_are_known(self, parts: list[str]) -> bool:
        """Until 2024-02 some parts without the others were stacked as well, and nothing in the file tells when it was made."""
        if self._adapter.weights_file != LORA_FILE_BEFORE_2024_03 or len(parts) == len(QKV_PARTS):
            return True
        if not any(finding.code == "row_order_unknown" for finding in self.findings):
            self.findings.append(
                unsupported("row_order_unknown", LORA_FILE_BEFORE_2024_03, found="a file of the time when the row order changed",
                            advice="if lit-gpt of 2024-02-05 or newer trained it, name the file lit_model.pth.lora; else train it again")
            )  # fmt: skip
        return False

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
            flag = flag_of(module)
            if name.endswith(".weight") and flag and self._is_on(flag) and module not in have:
                wanted = f"factors, as {flag} is enabled"
                self._misfit("target_missed", module, wanted, "none in the file", "the adapter is incomplete")
        for module in have:
            flag = flag_of(module)
            if not self._is_on(flag) and f"{module}.weight" in self._base:
                self._misfit("unused_tensor", module, f"no factors, as {flag or 'this kind of module'} is not enabled", "factors",
                             "hyperparameters.yaml is not this run's")  # fmt: skip
        if not self._tensors:
            self._misfit("nothing_matched", "adapter", "low-rank factors", "none")

    def _is_on(self, flag: str) -> bool:
        return any(self._hyper.get(f"lora_{name}") is True for name in (QKV_PARTS if flag == "qkv" else (flag,)))

    def _misfit(self, code: str, where: str, expected: str, found: str, advice: str = "") -> None:
        self.findings.append(misfit(code, where, expected=expected, found=found, advice=advice))
