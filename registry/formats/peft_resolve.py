"""Match a PEFT adapter's tensors with a base model: every tensor used, every target hit, every shape right, or a finding that says why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import final

from registry.changes import Change, LowRank, Resolution, Rows
from registry.formats.adapter import Adapter, spec_like
from registry.formats.base_model import find_embeddings
from registry.formats.findings import OTHER_BASE, misfit, unsupported, warning
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import LoraOptions, config_findings, method_finding, names_of
from registry.formats.peft_embeddings import settle
from registry.formats.peft_keys import Factors, sort_keys
from registry.manifest import BaseModel, Finding
from registry.tensors import StoredTensor

_NEAREST_SOUGHT = 4
_LOW_RANK_METHODS = ("lora", "dora")
# Architectures of transformers whose linear layers are Conv1D, which stores its weight as [d_in, d_out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


def resolve_peft(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers alone.

    Returns:
        The changes to the base's tensors, the configuration fields that change with them, and every finding. Changes are complete only
        when no finding is refused.

    Raises:
        CorruptFile: the configuration is not one.
    """
    if adapter.method not in _LOW_RANK_METHODS:
        return Resolution(changes=(), findings=(method_finding(adapter.method),))
    return _Resolver(adapter, base).run()


@final
class _Resolver:
    """One matching. Module paths are the training-time ones until `_base_name` turns them into names of base tensors."""

    def __init__(self, adapter: Adapter, base: BaseModel) -> None:
        self._options = LoraOptions.read(adapter.config)
        self._keys = sort_keys(adapter.tensors)
        self._base = {tensor.spec.name: tensor for tensor in base.tensors}
        self._model_type = str(base.config.get("model_type", ""))
        self._embeddings = find_embeddings(base)
        self._tied_head = self._embeddings.head_name if self._embeddings and self._embeddings.tied else ""
        self._prefix = match_prefix(self._keys.modules, list(self._base), self._tied_head)
        self._findings: list[Finding] = [
            *self._keys.findings,
            *config_findings(adapter, self._options, list(self._keys.factors)),
        ]
        self._changes: dict[str, Change] = {}

    def run(self) -> Resolution:
        for (module, kind), tensor in self._keys.whole.items():
            self._replace(module, kind, tensor)
        for module, factors in self._keys.factors.items():
            self._add_factors(module, factors)
        for tensor in self._keys.other:
            self._unused(tensor)
        self._check_targets()
        config = self._settle_embeddings()
        return Resolution(changes=tuple(self._changes.values()), findings=tuple(self._findings), config=config)

    def _base_name(self, module: str, kind: str = "weight") -> str:
        name = f"{module}.{kind}"
        if name in self._base or name == self._tied_head:
            return name
        old, new = self._prefix
        return new + name.removeprefix(old)

    def _change(self, module: str, kind: str, tensor: StoredTensor) -> Change | None:
        """The change so far of the base tensor that a parameter is; None, with a finding, when the base has no such tensor."""
        name = self._base_name(module, kind)
        if name in self._changes:
            return self._changes[name]
        source = self._base.get(name)
        if self._embeddings and name == self._tied_head:
            source = self._base[self._embeddings.input_name]
        if source is None:
            self._no_base_tensor(tensor, name)
            return None
        return Change(target=spec_like(source.spec, name=name), source=source)

    def _replace(self, module: str, kind: str, tensor: StoredTensor) -> None:
        name = self._base_name(module, kind)
        found = self._embeddings
        is_embedding = found is not None and name in (found.input_name, found.head_name)
        if not (self._options.saves(module) or (kind == "bias" and self._options.bias != "none") or is_embedding):
            self._unused(tensor)
        elif change := self._change(module, kind, tensor):
            if tensor.spec.shape != change.target.shape and not (
                is_embedding and _grows(change.target.shape, tensor.spec.shape)
            ):
                self._wrong_shape(tensor, change.target.shape)
                return
            target = replace(change.target, shape=tensor.spec.shape)
            self._changes[name] = replace(change, target=target, replacement=tensor)

    def _add_factors(self, module: str, factors: Factors) -> None:
        a, b = factors.a, factors.b
        if a is None or b is None:
            where = factors.tensors[0].spec.name
            self._findings.append(misfit("missing_factor", where, expected="both A and B", found="one of them"))
            return
        change = self._change(module, "weight", a)
        if change is None or not self._check_factors(module, a, b):
            return
        transposed = factors.embedding or self._is_transposed(module)
        d_out, d_in = b.spec.shape[0], a.spec.shape[1]
        if change.target.shape != ((d_in, d_out) if transposed else (d_out, d_in)):
            made = [d_in, d_out] if transposed else [d_out, d_in]
            self._wrong_shape(a, change.target.shape, found=f"A and B make {made}")
            return
        scale = self._options.scale(module, a.spec.shape[0])
        delta = LowRank(a=Rows.all_of(a), b=Rows.all_of(b), scale=scale, transposed=transposed)
        self._changes[change.target.name] = replace(change, deltas=(*change.deltas, delta))

    def _check_factors(self, module: str, a: StoredTensor, b: StoredTensor) -> bool:
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
            self._findings.append(
                unsupported("layer_not_mergeable", a.spec.name, found=f"shape {list(a.spec.shape)}",
                            advice="convolutions are recorded and served as they are; this version merges linear layers and embeddings")
            )  # fmt: skip
            return False
        rank, columns = a.spec.shape[0], b.spec.shape[1]
        told = self._options.ranks.matching(module) or [self._options.rank]
        if rank == columns and rank in told:
            return True
        expected = (
            f"A with {columns} rows, as B has columns" if rank != columns else f"rank {told[0]}, says {CONFIG_FILE}"
        )
        self._findings.append(
            misfit("rank_mismatch", module, expected=expected, found=f"rank {rank}",
                   advice="configuration and weights are not from the same save")
        )  # fmt: skip
        return False

    def _is_transposed(self, module: str) -> bool:
        """By layer type, as PEFT does; the flag only speaks for architectures nobody knows."""
        if self._model_type:
            return self._model_type in _CONV1D_MODELS and module.rsplit(".", 1)[-1] in _CONV1D_LAYERS
        return self._options.is_transposed

    def _check_targets(self) -> None:
        """Every targeted module of the base has factors, and no other has: half an adapter is no adapter."""
        have, options = self._keys.factors, self._options
        modules = list(self._base_modules())
        for module in modules:
            if module not in have and options.targets_module(module):
                self._missed(module, "factors for every targeted module")
        for module, factors in have.items():
            is_tied_head = options.ties_weights and self._base_name(module) == self._tied_head
            if options.targets_module(module) is False and not is_tied_head:
                self._unused(factors.tensors[0])
        self._check_names([*modules, *have, self._tied_head.removesuffix(".weight")])
        if not have and not self._keys.whole:
            self._findings.append(
                misfit("nothing_matched", "adapter", expected="low-rank factors", found="none in the file")
            )

    def _check_names(self, modules: Sequence[str]) -> None:
        for name in self._options.saved_modules:
            if not any(f"{name}." in f"{module}." for module, _ in self._keys.whole):
                self._missed(name, "a saved copy of this module")
        known = set[str]().union(*map(names_of, modules))
        for name in self._options.targets.names:
            if name not in known:
                self._findings.append(
                    warning("target_unused", CONFIG_FILE, expected="a module of this name", found=f"target_modules: {name!r}",
                            advice="neither base nor adapter has one, so training passed over it too")
                )  # fmt: skip

    def _base_modules(self) -> Iterator[str]:
        """The base's modules with a matrix, by their training-time paths."""
        old, new = self._prefix
        for name, tensor in self._base.items():
            if name.endswith(".weight") and len(tensor.spec.shape) == 2:
                yield old + name.removesuffix(".weight").removeprefix(new)

    def _settle_embeddings(self) -> dict[str, object]:
        found = self._embeddings
        if found is None:
            return {}
        settled = settle(self._changes, found, self._base, self._options)
        for name in (found.input_name, found.head_name):
            self._changes.pop(name, None)
        self._changes.update(settled.changes)
        self._findings += settled.findings
        return dict(settled.config)

    def _no_base_tensor(self, tensor: StoredTensor, name: str) -> None:
        """The nearest name is looked for a few times only: it takes long, and the first ones tell what is wrong."""
        is_early = sum(finding.code == "no_base_tensor" for finding in self._findings) < _NEAREST_SOUGHT
        near = difflib.get_close_matches(name, self._base, n=1, cutoff=0.6) if is_early else []
        found = f"nearest is {near[0]}" if near else "nothing near" if is_early else "none"
        self._findings.append(misfit("no_base_tensor", tensor.spec.name, expected=name, found=found, advice=OTHER_BASE))

    def _missed(self, where: str, expected: str) -> None:
        self._findings.append(
            misfit("target_missed", where, expected=expected, found="none in the file",
                   advice="the adapter is incomplete, or was trained on another model")
        )  # fmt: skip

    def _unused(self, tensor: StoredTensor) -> None:
        self._findings.append(
            misfit("unused_tensor", tensor.spec.name, expected="nothing that the configuration does not call for",
                   found=f"shape {list(tensor.spec.shape)}", advice="configuration and weights are not from the same save, or PEFT is newer")
        )  # fmt: skip

    def _wrong_shape(self, tensor: StoredTensor, expected: Sequence[int], found: str = "") -> None:
        self._findings.append(
            misfit("shape_mismatch", tensor.spec.name, expected=f"{list(expected)} as in the base",
                   found=found or f"{list(tensor.spec.shape)}", advice=OTHER_BASE)
        )  # fmt: skip


def _grows(base: Sequence[int], saved: Sequence[int]) -> bool:
    return len(base) == 2 == len(saved) and saved[1] == base[1] and saved[0] > base[0]


def match_prefix(modules: Sequence[str], base_names: Sequence[str], tied_head: str) -> tuple[str, str]:
    """The one substitution of a prefix, training-time to base, that turns every module's path into a base tensor's name.

    Args:
        modules: training-time paths.
        base_names: names of the base's tensors.
        tied_head: name of the head that the model has though the files may not; empty text for none.

    Returns:
        Old and new prefix. Both empty when the names match as they are, or when no single substitution makes all of them match (each
        miss is then reported).
    """
    names = {*base_names, tied_head}
    own = [module for module in modules if not _is_there(module, names)]
    head = tied_head.removesuffix(".weight")
    probe = next((module for module in own if module != head), None)
    if probe is None:
        return "", ""
    fitting = {
        (old, new)
        for old, new in _substitutions(probe, base_names)
        if all(module.startswith(old) and _is_there(new + module.removeprefix(old), names) for module in own)
    }
    outcomes = {tuple(new + module.removeprefix(old) for module in own): (old, new) for old, new in sorted(fitting)}
    return next(iter(outcomes.values())) if len(outcomes) == 1 else ("", "")


def _substitutions(probe: str, base_names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every change of prefix that turns one module's path into the path of some base tensor."""
    parts, stems = probe.split("."), {name.rpartition(".")[0] for name in base_names}
    for cut in range(len(parts)):
        old, rest = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        for stem in stems:
            if stem == rest or stem.endswith(f".{rest}"):
                yield old, stem.removesuffix(rest)


def _is_there(module: str, names: set[str]) -> bool:
    return f"{module}.weight" in names or f"{module}.bias" in names
