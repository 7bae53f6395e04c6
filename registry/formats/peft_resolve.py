"""Match a PEFT adapter's tensors with a base model: every tensor used, every target hit, every shape right, or a finding that says why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from registry.changes import Change, LowRank, Resolution, Rows
from registry.formats.adapter import Adapter, spec_like
from registry.formats.base_model import Embeddings, find_embeddings
from registry.formats.peft_keys import Factors, Keys, ModuleRules, look_up, misfit, safe_pattern, sort_keys, unsupported
from registry.manifest import BaseModel, Finding, Level
from registry.tensors import StoredTensor, TensorSpec

_OTHER_BASE = "is this the base model it was trained on?"
# Architectures of transformers whose linear layers are Conv1D, which stores its weight as [d_in, d_out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_LOW_RANK_METHODS = ("lora", "dora")
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
# Fields that change the arithmetic, and those that are known not to. Anything else that is set is refused, not guessed.
_NOT_MERGEABLE = {
    "alora_invocation_tokens": "an activated LoRA only works behind its invocation tokens: serve it unmerged",
    "arrow_config": "Arrow chooses adapters token by token: serve it unmerged",
    "use_qalora": "QALoRA has no merged form: serve it unmerged",
}
_NOT_YET = (
    "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "kasa_config", "lora_bias",
    "megatron_config", "velora_config", "monteclora_config",
)  # fmt: skip
_KNOWN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
})  # fmt: skip


def resolve_peft(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers alone.

    Returns:
        The changes to the base's tensors, the configuration fields that change with them, and every finding. Changes are complete only
        when no finding is refused.
    """
    if adapter.method not in _LOW_RANK_METHODS:
        return Resolution(changes=(), findings=(_method_finding(adapter.method),))
    return _Resolver(adapter, base).run()


def _method_finding(method: str) -> Finding:
    return unsupported(
        "method_not_mergeable",
        "adapter_config.json",
        found=method,
        advice="recorded and served as it is; this version merges lora",
    )


@dataclass(slots=True)
class _Draft:
    """A change being put together."""

    target: TensorSpec
    source: StoredTensor | None
    replacement: StoredTensor | None = None
    deltas: list[LowRank] = field(default_factory=list)

    def finish(self) -> Change:
        return Change(target=self.target, source=self.source, replacement=self.replacement, deltas=tuple(self.deltas))


class _Resolver:
    """One matching. Module paths are the training-time ones until `_base_name` turns them into names of base tensors."""

    def __init__(self, adapter: Adapter, base: BaseModel) -> None:
        self._adapter, self._config = adapter, adapter.config
        self._base = {tensor.spec.name: tensor for tensor in base.tensors}
        self._model_type = str(base.config.get("model_type", ""))
        self._embeddings = find_embeddings(base.config, [tensor.spec for tensor in base.tensors])
        self._keys: Keys = sort_keys(adapter.tensors)
        self._rules = ModuleRules(adapter.config)
        self._findings: list[Finding] = [*self._keys.findings, *config_findings(adapter)]
        self._drafts: dict[str, _Draft] = {}
        self._prefix = ("", "")

    def run(self) -> Resolution:
        self._prefix = match_prefix(self._keys.modules, list(self._base), self._extra_names())
        for (module, kind), tensor in self._keys.whole.items():
            self._replace(module, kind, tensor)
        for module, factors in self._keys.factors.items():
            self._add_factors(module, factors)
        for tensor in self._keys.other:
            self._unused(tensor)
        self._check_targets()
        config = self._settle_embeddings()
        return Resolution(
            changes=tuple(draft.finish() for draft in self._drafts.values()),
            findings=tuple(self._findings),
            config=config,
        )

    def _extra_names(self) -> list[str]:
        """Tensors that the model has though the files do not: a tied head."""
        return [self._embeddings.head_name] if self._embeddings and self._embeddings.tied else []

    def _base_name(self, module: str, kind: str = "weight") -> str:
        name = f"{module}.{kind}"
        if name in self._base or name in self._extra_names():
            return name
        old, new = self._prefix
        return new + name.removeprefix(old)

    def _draft(self, module: str, kind: str, tensor: StoredTensor) -> _Draft | None:
        """The change of the base tensor that a module's parameter is; None, with a finding, when the base has no such tensor."""
        name = self._base_name(module, kind)
        if name in self._drafts:
            return self._drafts[name]
        source = self._base.get(name)
        tied = self._embeddings if self._embeddings and self._embeddings.tied else None
        if tied and name == tied.head_name:
            source = self._base[tied.input_name]
        if source is None:
            near = difflib.get_close_matches(name, self._base, n=1, cutoff=0.6)
            self._findings.append(
                misfit("no_base_tensor", tensor.spec.name, expected=name, found=f"nearest is {near[0]}" if near else "nothing near",
                       advice=_OTHER_BASE)
            )  # fmt: skip
            return None
        draft = self._drafts[name] = _Draft(spec_like(source.spec, name=name), source)
        return draft

    def _replace(self, module: str, kind: str, tensor: StoredTensor) -> None:
        if not self._is_expected_whole(module, kind):
            self._unused(tensor)
        elif draft := self._draft(module, kind, tensor):
            shape, resized = draft.target.shape, self._may_resize(draft.target.name)
            if tensor.spec.shape != shape and not (resized and _grows(shape, tensor.spec.shape)):
                self._wrong_shape(tensor, shape)
                return
            draft.replacement = tensor
            draft.target = TensorSpec(draft.target.name, draft.target.dtype, tensor.spec.shape)

    def _is_expected_whole(self, module: str, kind: str) -> bool:
        saved = self._config.get("modules_to_save") or []
        if any(module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in saved):
            return True
        if kind == "bias":
            return self._config.get("bias") in ("all", "lora_only")
        return self._may_resize(self._base_name(module))

    def _may_resize(self, name: str) -> bool:
        return self._embeddings is not None and name in (self._embeddings.input_name, self._embeddings.head_name)

    def _add_factors(self, module: str, factors: Factors) -> None:
        known = factors.a or factors.b or factors.magnitude
        if known is None or factors.a is None or factors.b is None:
            where = known.spec.name if known else module
            self._findings.append(misfit("missing_factor", where, expected="both A and B", found="one of them"))
            return
        draft = self._draft(module, "weight", factors.a)
        if draft is None or not self._check_factors(module, factors.a, factors.b):
            return
        transposed = self._is_transposed(module, factors, draft.target)
        d_out, d_in = factors.b.spec.shape[0], factors.a.spec.shape[1]
        shape = (d_in, d_out) if transposed else (d_out, d_in)
        if draft.target.shape != shape:
            self._wrong_shape(factors.a, draft.target.shape, found=f"A and B make {list(shape)}")
            return
        rank = factors.a.spec.shape[0]
        draft.deltas.append(
            LowRank(
                a=Rows.all_of(factors.a),
                b=Rows.all_of(factors.b),
                scale=self._scale(module, rank),
                transposed=transposed,
            )
        )

    def _check_factors(self, module: str, a: StoredTensor, b: StoredTensor) -> bool:
        if len(a.spec.shape) != 2 or len(b.spec.shape) != 2:
            self._findings.append(
                unsupported("layer_not_mergeable", a.spec.name, found=f"shape {list(a.spec.shape)}",
                            advice="convolutions are recorded and served as they are; this version merges linear layers and embeddings")
            )  # fmt: skip
            return False
        if a.spec.shape[0] != b.spec.shape[1]:
            self._findings.append(
                misfit(
                    "rank_mismatch",
                    module,
                    expected=f"A with {b.spec.shape[1]} rows, as B has columns",
                    found=f"{a.spec.shape[0]}",
                )
            )
            return False
        expected = look_up(self._config.get("rank_pattern") or {}, module) or self._adapter.rank
        if expected != a.spec.shape[0]:
            self._findings.append(
                misfit("rank_mismatch", module, expected=f"rank {expected}, says adapter_config.json", found=f"rank {a.spec.shape[0]}",
                       advice="configuration and weights are not from the same save")
            )  # fmt: skip
            return False
        return True

    def _scale(self, module: str, rank: int) -> float:
        alpha = look_up(self._config.get("alpha_pattern") or {}, module) or self._adapter.alpha or 0.0
        return float(alpha) / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _is_transposed(self, module: str, factors: Factors, target: TensorSpec) -> bool:
        """By layer type, as PEFT does; the flag only speaks for architectures nobody knows."""
        if factors.embedding:
            return True
        if self._model_type:
            return self._model_type in _CONV1D_MODELS and module.rsplit(".", 1)[-1] in _CONV1D_LAYERS
        return bool(self._config.get("fan_in_fan_out")) and len(target.shape) == 2

    def _check_targets(self) -> None:
        """Every targeted module of the base must have factors, and every target must hit one: half an adapter is no adapter."""
        have = set(self._keys.factors) | {module for module, kind in self._keys.whole if kind == "weight"}
        for module in self._base_modules():
            if self._rules.expects(module) and module not in have:
                self._findings.append(
                    misfit("target_missed", module, expected="factors for every targeted module", found="none in the file",
                           advice="the adapter is incomplete, or was trained on another model")
                )  # fmt: skip
        for name in self._rules.names:
            if not any(module == name or module.endswith(f".{name}") for module in have):
                self._findings.append(
                    misfit("target_missed", name, expected="a module of this name", found="none in the file")
                )
        for name in self._config.get("modules_to_save") or []:
            if not any(
                module == name or module.endswith(f".{name}") or f".{name}." in module for module, _ in self._keys.whole
            ):
                self._findings.append(
                    misfit("target_missed", str(name), expected="a saved copy of this module", found="none")
                )
        if not self._keys.factors and not self._keys.whole:
            self._findings.append(
                misfit("nothing_matched", "adapter", expected="low-rank factors", found="none in the file")
            )

    def _base_modules(self) -> Iterator[str]:
        """The base's modules with a matrix, by their training-time paths."""
        old, new = self._prefix
        for name, tensor in self._base.items():
            if name.endswith(".weight") and len(tensor.spec.shape) == 2:
                yield old + name.removesuffix(".weight").removeprefix(new)

    def _settle_embeddings(self) -> dict[str, object]:
        """Decide whether tied embeddings stay tied, and keep both matrices at one number of rows.

        A delta or a saved copy on one side of a tied pair unties it: both are written, each with its own value. What stays tied is
        written once. Copies that PEFT saved only because a layer was targeted or resized are the base's own shared matrix.
        """
        found = self._embeddings
        if found is None:
            return {}
        config: dict[str, object] = {}
        if found.tied:
            config.update(self._settle_tied(found))
        rows = {
            name: draft.target.shape[0]
            for name in (found.input_name, found.head_name)
            if (draft := self._drafts.get(name))
        }
        before = self._base[found.input_name].spec.shape[0]
        if any(count != before for count in rows.values()):
            config["vocab_size"] = max(rows.values())
            self._check_rows(found, rows)
        return config

    def _check_rows(self, found: Embeddings, rows: Mapping[str, int]) -> None:
        names = (
            [found.input_name]
            if found.tied and found.head_name not in self._drafts
            else [found.input_name, found.head_name]
        )
        for name in names:
            count = rows.get(name) or self._base[name].spec.shape[0]
            if count != max(rows.values()):
                self._findings.append(
                    misfit("vocabulary", name, expected=f"{max(rows.values())} rows, as the other embedding has", found=f"{count} rows",
                           advice="save the adapter with save_embedding_layers=True")
                )  # fmt: skip

    def _settle_tied(self, found: Embeddings) -> dict[str, object]:
        saved = [str(name) for name in self._config.get("modules_to_save") or []]
        ensured = bool(self._config.get("ensure_weight_tying"))
        inner, head = self._drafts.get(found.input_name), self._drafts.get(found.head_name)
        own = {
            name: any(name.removesuffix(".weight").endswith(part) for part in saved)
            for name in (found.input_name, found.head_name)
        }
        for draft, other in ((head, inner), (inner, head)):
            if draft and other and draft.replacement and not other.replacement and not own[draft.target.name]:
                other.replacement, other.target = draft.replacement, spec_like(draft.target, name=other.target.name)
        touched = [draft for draft in (inner, head) if draft and (draft.deltas or own[draft.target.name])]
        if not touched or (ensured and not (head and head.deltas and not (inner and inner.deltas))):
            self._keep_tied(found, inner, head)
            return {}
        source = self._base[found.input_name]
        if head is None:
            target = spec_like(
                inner.target if inner and not own[found.input_name] else source.spec, name=found.head_name
            )
            replacement = inner.replacement if inner and not own[found.input_name] else None
            self._drafts[found.head_name] = _Draft(target, source, replacement)
        return {"tie_word_embeddings": False}

    def _keep_tied(self, found: Embeddings, inner: _Draft | None, head: _Draft | None) -> None:
        """One shared matrix: what is known of the head goes to the input embedding, and the head is not written."""
        if head and not inner:
            self._drafts[found.input_name] = _Draft(
                spec_like(head.target, name=found.input_name),
                self._base[found.input_name],
                head.replacement,
                head.deltas,
            )
        self._drafts.pop(found.head_name, None)
        shared = self._drafts.get(found.input_name)
        if shared and found.head_name in self._base:  # a redundant copy in the files, which must not tell another story
            target = spec_like(shared.target, name=found.head_name)
            self._drafts[found.head_name] = _Draft(target, shared.source, shared.replacement, shared.deltas)

    def _unused(self, tensor: StoredTensor) -> None:
        self._findings.append(
            misfit("unused_tensor", tensor.spec.name, expected="nothing that the configuration does not call for",
                   found=f"shape {list(tensor.spec.shape)}", advice="configuration and weights are not from the same save, or PEFT is newer")
        )  # fmt: skip

    def _wrong_shape(self, tensor: StoredTensor, expected: Sequence[int], found: str = "") -> None:
        self._findings.append(
            misfit("shape_mismatch", tensor.spec.name, expected=f"{list(expected)} as in the base",
                   found=found or f"{list(tensor.spec.shape)}", advice=_OTHER_BASE)
        )  # fmt: skip


def _grows(base: Sequence[int], saved: Sequence[int]) -> bool:
    return len(base) == 2 == len(saved) and saved[1] == base[1] and saved[0] > base[0]


def match_prefix(modules: Sequence[str], base_names: Sequence[str], extra: Sequence[str]) -> tuple[str, str]:
    """The one substitution of a prefix, training-time to base, that turns every module's path into a base tensor's name.

    `("", "")` when the names match as they are, or when no single substitution makes all of them match (each miss is then reported).
    """
    names = {*base_names, *extra}
    own = [module for module in modules if f"{module}.weight" not in names and f"{module}.bias" not in names]
    if not own:
        return "", ""
    heads = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in extra}
    parts = next((module for module in own if module.rsplit(".", 1)[-1] not in heads), own[0]).split(".")
    fitting = set()
    for cut in range(len(parts)):
        old, rest = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        for name in base_names:
            stem = name.rpartition(".")[0]
            if stem == rest or stem.endswith(f".{rest}"):
                new = stem.removesuffix(rest)
                if all(_fits(module, old, new, names) for module in own):
                    fitting.add((old, new))
    outcomes = {tuple(new + module.removeprefix(old) for module in own): (old, new) for old, new in sorted(fitting)}
    return next(iter(outcomes.values())) if len(outcomes) == 1 else ("", "")


def _fits(module: str, old: str, new: str, names: set[str]) -> bool:
    if not module.startswith(old):
        return False
    mapped = new + module.removeprefix(old)
    return f"{mapped}.weight" in names or f"{mapped}.bias" in names


def config_findings(adapter: Adapter) -> list[Finding]:
    """What the configuration asks for that cannot be merged, or that nobody here knows."""
    config, where = adapter.config, "adapter_config.json"
    found = []
    if adapter.method != "lora":
        found.append(_method_finding(adapter.method))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_THE_BASE):
        found.append(
            unsupported("initialiser_changes_base", where, found=f"init_lora_weights={init!r}",
                        advice="save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it")
        )  # fmt: skip
    for key, advice in _NOT_MERGEABLE.items():
        if config.get(key):
            found.append(unsupported("method_not_mergeable", where, found=key, advice=advice))
    advice = "recorded and served as it is"
    found += [
        unsupported("option_not_mergeable", where, found=key, advice=advice) for key in _NOT_YET if config.get(key)
    ]
    unknown = sorted(set(config) - _KNOWN - set(_NOT_MERGEABLE) - set(_NOT_YET))
    advice = "a newer PEFT? upgrade ckpt-registry"
    found += [
        unsupported("option_unknown", where, found=f"{key}={config[key]!r}"[:120], advice=advice)
        for key in unknown
        if config[key] not in (None, False, "", [], {})
    ]
    return [*found, *_pattern_findings(adapter)]


def _pattern_findings(adapter: Adapter) -> list[Finding]:
    found, where = [], "adapter_config.json"
    modules = list(sort_keys(adapter.tensors).factors)
    for field_name in ("rank_pattern", "alpha_pattern"):
        pattern: Mapping[str, Any] = adapter.config.get(field_name) or {}
        for key in pattern:
            if safe_pattern(rf"(?:.*\.)?(?:{key})") is None:
                found.append(
                    unsupported("pattern_unsafe", where, found=f"{field_name}: {key!r}", advice="a plain module name")
                )
            elif not any(look_up({key: True}, module) for module in modules):
                found.append(
                    Finding(code="pattern_unused", level=Level.WARNING, where=where, expected="a module that it matches",
                            found=f"{field_name}: {key!r}", advice="training used the global value, and so does merging")
                )  # fmt: skip
    for field_name in ("target_modules", "exclude_modules"):
        rule = adapter.config.get(field_name)
        if isinstance(rule, str) and rule != "all-linear" and safe_pattern(rule) is None:
            found.append(
                Finding(code="pattern_unsafe", level=Level.WARNING, where=where, found=f"{field_name}: {rule!r}"[:120],
                        advice="not evaluated: whether every targeted module is there was not checked")
            )  # fmt: skip
    return found
