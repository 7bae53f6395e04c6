"""What `adapter_config.json` says about the arithmetic of a LoRA, by PEFT's rules, and what it asks for that cannot be merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from registry.errors import CorruptFile
from registry.formats.adapter import Adapter, finite_number, positive_rank
from registry.formats.findings import unsupported, warning
from registry.formats.patterns import Pattern
from registry.formats.peft import CONFIG_FILE
from registry.manifest import Finding

_PLAIN_NAME = re.compile(r"[\w.]+", re.ASCII)
# Initialisers that leave the base as it is; others move weight from the base into the factors, or are not known.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_HOW_TO_CONVERT = (
    "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it; or save the base as it was trained on, say "
    "init_lora_weights: true here, and register it with that base"
)
_CHANGES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")
# Fields that change the arithmetic, and those that are known not to. Anything else that is set is refused, not guessed.
_NOT_MERGEABLE = {
    "alora_invocation_tokens": "an activated LoRA only works behind its invocation tokens: serve it unmerged",
    "arrow_config": "Arrow chooses adapters token by token: serve it unmerged",
    "use_qalora": "QALoRA is trained on a GPTQ base and meant for its zero points, not for a 16-bit weight: serve it unmerged",
    "megatron_config": "Megatron's layers may be shards of the base's: save it again as an adapter of the whole model",
}
# Every method's fields that have nothing to do with its arithmetic, or that `Scope` reads.
COMMON_FIELDS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out",
})  # fmt: skip
_LORA_FIELDS = COMMON_FIELDS | {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "target_parameters", "layer_replication", "lora_bias", "trainable_token_indices",
    "use_bdlora", "kasa_config", "velora_config", "monteclora_config", *_NOT_MERGEABLE,
}  # fmt: skip


@final
class Rule:
    """Selects modules: a list selects those of a name or ending in `.name`; text is a regular expression over the whole path."""

    def __init__(self, value: object, field: str) -> None:
        if value is not None and not isinstance(value, str) and not _is_names(value):
            raise CorruptFile(CONFIG_FILE, f"{field} is {value!r}, expected text or a list of names")
        self.names: tuple[str, ...] = tuple(value) if isinstance(value, list) else ()
        self._names = frozenset(self.names)
        self.text = value if isinstance(value, str) else ""
        self.pattern = Pattern.compile(self.text) if self.text else None

    @property
    def is_known(self) -> bool:
        """Whether it can be evaluated: `all-linear` depends on classes, and some patterns are not run."""
        return bool(self.names) or (self.pattern is not None and self.text.lower() != "all-linear")

    def selects(self, module: str) -> bool:
        """Whether a module is selected; False when that cannot be told."""
        if self.names:
            return not self._names.isdisjoint(names_of(module))
        return self.pattern is not None and self.pattern.matches(module)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def names_of(module: str) -> set[str]:
    """What a module may be called in a list: its path, and every end of it that begins behind a dot."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


@final
class PatternTable:
    """PEFT's `rank_pattern` and `alpha_pattern`: values by a regular expression that matches the end of a module's path."""

    def __init__(self, value: object, field: str) -> None:
        if value is not None and not isinstance(value, dict):
            raise CorruptFile(CONFIG_FILE, f"{field} is {value!r}, expected a mapping")
        read = positive_rank if field == "rank_pattern" else finite_number
        self.field = field
        self.values: dict[str, float] = {
            key: read(item, CONFIG_FILE, f"{field}[{key!r}]") for key, item in (value or {}).items()
        }
        self._matchers = {key: _end_matcher(key) for key in self.values}
        self._found: dict[str, list[str]] = {}

    @property
    def not_run(self) -> list[str]:
        """Keys that are no pattern, or not one that is run."""
        return [key for key, matches in self._matchers.items() if matches is None]

    def keys_of(self, module: str) -> list[str]:
        """Every key that matches, in the order of the file."""
        if module not in self._found:
            self._found[module] = [key for key, matches in self._matchers.items() if matches and matches(module)]
        return self._found[module]

    def matching(self, module: str) -> list[float]:
        """The values of these keys. In training the first one counts."""
        return [self.values[key] for key in self.keys_of(module)]

    @property
    def is_sorted(self) -> bool:
        """PEFT sorts the keys when it saves, so then their order in training is not known."""
        return list(self.values) == sorted(self.values)


def _end_matcher(key: str) -> Callable[[str], object] | None:
    source = rf"(?:.*\.)?(?:{key})"
    if _PLAIN_NAME.fullmatch(key):  # there may be one for each module, and `re` is quicker where it cannot go astray
        return re.compile(source).fullmatch
    pattern = Pattern.compile(source)
    return pattern.matches if pattern else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What training was allowed to change, by the fields that all of PEFT's methods have.

    `layers` restricts a list of targets to these layers; None for all. `is_transposed` is what the configuration says of all layers.
    """

    targets: Rule
    excluded: Rule
    layers: frozenset[int] | None
    layer_lists: tuple[str, ...]
    saved_modules: tuple[str, ...]
    bias: str
    is_transposed: bool
    ties_weights: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Scope:
        """Read `adapter_config.json`.

        Raises:
            CorruptFile: a field is not what it should be.
        """
        saved = Rule(config.get("modules_to_save") or [], "modules_to_save")
        layers, lists = config.get("layers_to_transform"), config.get("layers_pattern") or []
        numbers = [layers] if isinstance(layers, int) else layers or []
        if not all(isinstance(number, int) for number in numbers):
            raise CorruptFile(CONFIG_FILE, f"layers_to_transform is {layers!r}, expected layer numbers")
        return cls(
            targets=Rule(config.get("target_modules"), "target_modules"),
            excluded=Rule(config.get("exclude_modules"), "exclude_modules"),
            layers=frozenset(numbers) if numbers else None,
            layer_lists=(lists,) if isinstance(lists, str) else tuple(map(str, lists)),
            saved_modules=saved.names or ((saved.text,) if saved.text else ()),
            bias=str(config.get("bias") or "none"),
            is_transposed=bool(config.get("fan_in_fan_out")),
            ties_weights=bool(config.get("ensure_weight_tying")),
        )

    def saves(self, module: str) -> bool:
        """Whether a module, or one around it, is trained whole. As in PEFT, a name may be the end of a name: `norm` of `final_norm`."""
        return any(f"{name}." in f"{module}." for name in self.saved_modules)

    def targets_module(self, module: str) -> bool | None:
        """Whether training must have given this module parameters of its own; None when the files alone cannot tell."""
        if self.saves(module):
            return False
        if not self.targets.is_known or (self.excluded.text and not self.excluded.is_known):
            return None
        return self.targets.selects(module) and not self.excluded.selects(module) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None or not self.targets.names:
            return True
        parts = module.split(".")
        for at, part in enumerate(parts[:-1]):
            in_list = parts[at - 1] in self.layer_lists if self.layer_lists else at > 1
            if at and in_list and part.isdecimal():
                return int(part) in self.layers
        return False

    def findings(self) -> Iterator[Finding]:
        """Patterns that are not run, and so what is not checked."""
        for field, rule in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            if rule.text and rule.pattern is None:
                yield warning("pattern_invalid", CONFIG_FILE, found=f"{field}: {rule.text[:100]!r}",
                              advice="not evaluated: whether every targeted module is there was not checked")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """The arithmetic of a LoRA.

    `truncates`: the base is made smaller first (KaSA). `blocks` is how many a block-diagonal factor has (BD-LoRA), and `block_names` says
    where `a` and where `b` is one.
    """

    rank: int
    alpha: float
    uses_rslora: bool
    uses_dora: bool
    ranks: PatternTable
    alphas: PatternTable
    has_bias: bool
    truncates: bool
    blocks: int
    block_names: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LoraOptions:
        """Read `adapter_config.json`.

        Raises:
            CorruptFile: a field that the arithmetic depends on is missing or not what it should be.
        """
        blocks = config.get("use_bdlora") or {}
        if not isinstance(blocks, dict):
            raise CorruptFile(CONFIG_FILE, f"use_bdlora is {blocks!r}, expected a mapping")
        names = {kind: blocks.get(f"target_modules_bd_{kind}") or [] for kind in "ab"}
        return cls(
            rank=positive_rank(config.get("r"), CONFIG_FILE, "r"),
            alpha=finite_number(config.get("lora_alpha"), CONFIG_FILE, "lora_alpha"),
            uses_rslora=bool(config.get("use_rslora")),
            uses_dora=bool(config.get("use_dora")),
            ranks=PatternTable(config.get("rank_pattern"), "rank_pattern"),
            alphas=PatternTable(config.get("alpha_pattern"), "alpha_pattern"),
            has_bias=bool(config.get("lora_bias")),
            truncates=bool(config.get("kasa_config")),
            blocks=positive_rank(blocks.get("nblocks", 1), CONFIG_FILE, "use_bdlora.nblocks"),
            block_names={kind: Rule(each, f"target_modules_bd_{kind}").names for kind, each in names.items()},
        )

    @property
    def extra(self) -> dict[str, str]:
        """What a module has besides its factors: the name that steps know it under, and its name in keys."""
        return {
            **({"m": "lora_magnitude_vector"} if self.uses_dora else {}),
            **({"diag": "lora_diag"} if self.truncates else {}),
        }

    def block_factor(self, module: str) -> str:
        """Which factor of a module is block-diagonal: `a`, `b` or empty text. As in PEFT, a name may be any part of the path."""
        is_in = (kind for kind, names in self.block_names.items() if any(name in module for name in names))
        return next(is_in, "")

    def scale(self, module: str, rank: int) -> float:
        """What the product of the factors is multiplied by."""
        alpha = next(iter(self.alphas.matching(module)), self.alpha)
        return alpha / (rank**0.5 if self.uses_rslora else rank)


def config_findings(adapter: Adapter, options: LoraOptions, modules: Sequence[str]) -> Iterator[Finding]:
    """What the configuration asks for that cannot be merged, or that nobody here knows.

    Args:
        adapter: whose configuration it is.
        options: the same, parsed.
        modules: that have factors.
    """
    yield from option_findings(adapter.config)
    for table in (options.ranks, options.alphas):
        yield from table_findings(table, modules)


def option_findings(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What a LoRA's configuration by itself says against merging it."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and re.match("|".join(_CHANGES_THE_BASE), start.lower()):
        yield unsupported("initialiser_changes_base", CONFIG_FILE, found=f"init_lora_weights={start!r}",
                          advice=_HOW_TO_CONVERT)  # fmt: skip
    elif start not in _PLAIN_STARTS:
        yield _unknown("init_lora_weights", start)
    for key, advice in _NOT_MERGEABLE.items():
        if config.get(key):
            yield unsupported("method_not_mergeable", CONFIG_FILE, found=key, advice=advice)
    yield from unknown_fields(config, _LORA_FIELDS)


def unknown_fields(config: Mapping[str, Any], known: frozenset[str]) -> Iterator[Finding]:
    """Fields that are set and that nobody here knows: they may change the arithmetic, so they are refused."""
    for key in sorted(set(config) - known):
        if config[key] not in (None, False, "", [], {}):
            yield _unknown(key, config[key])


def _unknown(key: str, value: object) -> Finding:
    found = f"{key}={value!r}"[:120]
    return unsupported("option_unknown", CONFIG_FILE, found=found, advice="a newer PEFT? upgrade ckpt-registry")


def table_findings(table: PatternTable, modules: Sequence[str]) -> Iterator[Finding]:
    """Keys of a pattern table that were not run or match none of the trained modules, and those whose order would have to be known."""
    used = {key for module in modules for key in table.keys_of(module)}
    for key in table.values:
        found = f"{table.field}: {key!r}"[:120]
        if key in table.not_run:
            yield unsupported("pattern_invalid", CONFIG_FILE, found=found, advice="write plain module names")
        elif key not in used:
            yield warning("pattern_unused", CONFIG_FILE, expected="a module that it matches", found=found,
                          advice="training used the global value, and so does merging")  # fmt: skip
    unclear = [module for module in modules if len(set(table.matching(module))) > 1]
    if unclear and table.field == "alpha_pattern" and table.is_sorted:
        yield unsupported("pattern_ambiguous", CONFIG_FILE, found=f"alpha_pattern has several values for {unclear[0]}",
                          advice="PEFT sorted the keys when saving, and with it the order that counted: leave one for each module")  # fmt: skip
