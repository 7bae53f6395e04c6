"""Write the files of a LoRA, as PEFT or litgpt would have saved it, from blocks of factors that lie elsewhere: a module at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, final

from registry.disk import Translating
from registry.formats.litgpt import FLAGS, HYPERPARAMETERS_FILE
from registry.formats.litgpt_heads import QKV_PARTS, Heads, flag_of
from registry.formats.lora_blocks import Block, Module, blocks_of, column_view, common_scale, row_view
from registry.formats.peft import CONFIG_FILE, WEIGHTS_FILES
from registry.locations import Location
from registry.merge.reading import read_matrix
from registry.merge.rounding import WORDS, Array, round_once, values_of
from registry.tensors import DType, TensorSpec
from registry.torchzip import layout_torch_zip
from registry.weights_files import write_safetensors, write_torch_zip

LITGPT_LORA = "lit_model.pth.lora"
_PRECISIONS = {DType.BF16: "bf16-true", DType.F16: "16-true"}
_WIDTHS = (DType.BF16, DType.F16, DType.F32, DType.F64)


@final
class Factors:
    """The A and B of modules, made when they are asked for. `exact` turns false when a value had to be rounded.

    The factors keep their dtype; where they have several, or scales have to go into B that are no powers of two, it is float32 at least.
    """

    def __init__(self, modules: Mapping[str, Module], location: Location, scales: Mapping[str, float]) -> None:
        self._location, self._scales = location, scales
        self.dtype = _dtype(modules, scales)
        self.exact = True

    def make(self, module: Module, rank: int) -> tuple[bytes, bytes]:
        """A `[rank, columns]` and B `[rows, rank]`, zero where the module has less rank."""
        word = WORDS[self.dtype]
        a = _zeros((rank, module.columns), word)
        b = _zeros((module.rows, rank), word)
        at = 0
        for block in module.blocks:
            end = at + block.right.rows
            a[at:end] = self._rounded(read_matrix(self._location, block.right))
            for left, row in block.strips:
                values = read_matrix(self._location, left) * (block.scale / self._scales[module.name])
                b[row : row + left.rows, at:end] = self._rounded(values)
            at = end
        return a.tobytes(), b.tobytes()

    def _rounded(self, values: Array) -> Array:
        bits = round_once(values, self.dtype)
        if self.exact:
            self.exact = bool((values_of(bits.tobytes(), self.dtype) == values.ravel()).all())
        return bits


def _zeros(shape: tuple[int, int], word: Any) -> Array:
    import numpy as np  # noqa: PLC0415 - as everywhere, loaded when there is something to compute

    return np.zeros(shape, word)


def _dtype(modules: Mapping[str, Module], scales: Mapping[str, float]) -> DType:
    found = {
        left.tensor.spec.dtype
        for block in blocks_of(modules)
        for left in (block.right, *(left for left, _ in block.strips))
    }
    ratios = {block.scale / scales[name] for name, module in modules.items() for block in module.blocks}
    widest = max(found, key=_WIDTHS.index)
    is_kept = len(found) == 1 and all(abs(math.frexp(ratio)[0]) == 0.5 for ratio in ratios)
    return widest if is_kept or widest is DType.F64 else DType.F32


def alpha_for(scale: float, rank: int) -> float:
    """The alpha with `alpha / rank == scale`, a whole number where there is one; the nearest where no float is."""
    near = scale * rank
    candidates = (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    found = next((alpha for alpha in candidates if alpha / rank == scale), near)
    return int(found) if found.is_integer() and abs(found) < 1 << 53 else found


# -- PEFT


def write_peft(
    folder: Path,
    modules: Mapping[str, Module],
    location: Location,
    *,
    base_name: str | None,
    base_modules: Iterable[str],
    dropout: float,
) -> bool:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: where to.
        modules: those with a delta, by their names in the base model.
        location: where the factors lie that their blocks are views of.
        base_name: what the configuration calls the base model.
        base_modules: every module of the base model, so that targets can be named briefly.
        dropout: of the training.

    Returns:
        Whether every value is the one that it was.
    """
    scales = {name: common_scale({name: module}) for name, module in modules.items()}
    factors = Factors(modules, location, scales)
    specs = []
    for name, module in modules.items():
        specs.append(TensorSpec(f"base_model.model.{name}.lora_A.weight", factors.dtype, (module.rank, module.columns)))
        specs.append(TensorSpec(f"base_model.model.{name}.lora_B.weight", factors.dtype, (module.rows, module.rank)))
    data = (piece for module in modules.values() for piece in factors.make(module, module.rank))
    write_safetensors(folder / WEIGHTS_FILES[0], specs, data)
    config = peft_config(
        {name: module.rank for name, module in modules.items()}, scales, base_name=base_name, base_modules=base_modules, dropout=dropout
    )  # fmt: skip
    write_json(folder / CONFIG_FILE, config)
    return factors.exact


def peft_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    base_name: str | None,
    base_modules: Iterable[str],
    dropout: float = 0.0,
) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA, by rank and scale of every module.

    Args:
        ranks: rank of the factors, by module.
        scales: what the product of the factors is multiplied by, by module.
        base_name: what it calls the base model.
        base_modules: every module of the base model, so that targets can be named briefly.
        dropout: of the training.
    """
    everywhere = list(base_modules)
    alphas = {name: alpha_for(scales[name], ranks[name]) for name in ranks}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(brief_names(list(ranks), everywhere)),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "modules_to_save": None,
    }


def brief_names(wanted: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """Last parts of names where all modules that end so are wanted, else whole names: PEFT compares with the ends of modules' names."""
    chosen = set(wanted)
    brief = {}
    for name in wanted:
        leaf = name.rpartition(".")[2]
        if leaf not in brief:
            brief[leaf] = all(other in chosen for other in everywhere if other == leaf or other.endswith(f".{leaf}"))
    return list(dict.fromkeys(name.rpartition(".")[2] if brief[name.rpartition(".")[2]] else name for name in wanted))


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The values that are not the usual one, by the last part of the name where it tells them."""
    by_leaf: dict[str, set[float]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    return {
        (leaf if len(by_leaf[leaf := name.rpartition(".")[2]]) == 1 else name): value
        for name, value in values.items()
        if value != usual
    }


def write_json(path: Path, value: object) -> None:
    """A JSON file for people to read as well."""
    with Translating(str(path)):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- litgpt


@dataclass(frozen=True, slots=True, kw_only=True)
class LitgptLora:
    """A LoRA as litgpt has it: one rank and one scale for all, and flags that hold for every layer.

    `modules` are whole linear layers, and query, key and value as `MODULE:part`; `plan` tells which of them make up a tensor of the file.
    """

    rank: int
    scale: float
    flags: Mapping[str, bool]
    modules: Mapping[str, Module]
    plan: Mapping[str, tuple[str, ...]]


def plan_litgpt(
    modules: Mapping[str, Module], base: Sequence[TensorSpec], heads: Heads, location: Location
) -> LitgptLora:
    """Fill up a LoRA to what litgpt can say: every linear layer of a kind that is enabled, all of the same rank.

    Args:
        modules: those with a delta.
        base: the weights of the litgpt model.
        heads: its attention heads.
        location: where the factors lie that the modules' blocks are views of.
    """
    shapes = {spec.name.removesuffix(".weight"): spec.shape for spec in base if spec.name.endswith(".weight")}
    parts: dict[str, Module] = {}
    for name in shapes:
        if name in modules:
            parts |= _parts(modules[name], heads, location) if flag_of(name) == "qkv" else {name: modules[name]}
    on = {_flag(name) for name, module in parts.items() if module.blocks}
    plan = {}
    for name, shape in shapes.items():
        flag = flag_of(name)
        needed = (
            [f"{name}:{part}" for part in QKV_PARTS if part in on] if flag == "qkv" else [name] if flag in on else []
        )
        for each in needed:
            rows = heads.part_rows[each.partition(":")[2]] if flag == "qkv" else shape[0]
            parts.setdefault(each, Module(name=each, rows=rows, columns=shape[1]))
        if needed:
            plan[name] = tuple(needed)
    used = {each: parts[each] for needed in plan.values() for each in needed}
    return LitgptLora(
        rank=max((module.rank for module in used.values()), default=0),
        scale=common_scale(used),
        flags={flag: flag in on for flag in FLAGS},
        modules=used,
        plan=plan,
    )


def _parts(module: Module, heads: Heads, location: Location) -> dict[str, Module]:
    """Query, key and value of a fused layer. Where they share a block, each gets those columns of its B that are not zero in its rows."""
    found, at = dict[str, Module](), 0
    for part in QKV_PARTS:
        name, end = f"{module.name}:{part}", at + heads.part_rows[part]
        found[name] = replace(module.cut(at, end), name=name)
        at = end
    times = Counter(block.right for own in found.values() for block in own.blocks)
    for name, own in found.items():
        kept = ([block] if times[block.right] == 1 else _used(block, location) for block in own.blocks)
        found[name] = replace(own, blocks=tuple(chain.from_iterable(kept)))
    return found


def _used(block: Block, location: Location) -> Iterator[Block]:
    """A block without the columns of `left` that are zero, in runs of neighbours."""
    used = [False] * block.right.rows
    for left, _ in block.strips:
        columns = read_matrix(location, left).T
        used = [had or bool(values.any()) for had, values in zip(used, columns, strict=True)]
    at = 0
    for is_used, run in groupby(used):
        first, at = at, at + len(list(run))
        if is_used:
            strips = tuple((column_view(left, first, at), row) for left, row in block.strips)
            yield replace(block, right=row_view(block.right, first, at), strips=strips)


def _flag(name: str) -> str:
    module, _, part = name.partition(":")
    return part or flag_of(module)


def write_litgpt(folder: Path, lora: LitgptLora, location: Location, *, base_place: str, dropout: float) -> bool:
    """Write `lit_model.pth.lora` and `hyperparameters.yaml`.

    Args:
        folder: where to.
        lora: what to write.
        location: where the factors lie that its blocks are views of.
        base_place: the litgpt base model's folder.
        dropout: of the training.

    Returns:
        Whether every value is the one that it was.
    """
    factors = Factors(lora.modules, location, dict.fromkeys(lora.modules, lora.scale))
    specs = []
    for name, needed in lora.plan.items():
        rows, columns = sum(lora.modules[each].rows for each in needed), lora.modules[needed[0]].columns
        specs.append(TensorSpec(f"{name}.lora_A", factors.dtype, (lora.rank * len(needed), columns)))
        specs.append(TensorSpec(f"{name}.lora_B", factors.dtype, (rows, lora.rank)))
    data = _litgpt_data(lora, factors)
    write_torch_zip(folder / LITGPT_LORA, layout_torch_zip(specs, {}, LITGPT_LORA), lambda name: [next(data)])
    fields = {
        "checkpoint_dir": base_place,
        "precision": _PRECISIONS.get(factors.dtype, "32-true"),
        "lora_r": lora.rank,
        "lora_alpha": alpha_for(lora.scale, lora.rank),
        "lora_dropout": dropout,
        **{f"lora_{flag}": on for flag, on in lora.flags.items()},
    }
    write_yaml(folder / HYPERPARAMETERS_FILE, fields)
    return factors.exact


def _litgpt_data(lora: LitgptLora, factors: Factors) -> Iterator[bytes]:
    """A and B of every tensor of the file, those of query, key and value one below the other."""
    for needed in lora.plan.values():
        pairs = [factors.make(lora.modules[each], lora.rank) for each in needed]
        for stacked in zip(*pairs, strict=True):
            yield b"".join(stacked)


def write_yaml(path: Path, fields: Mapping[str, Any]) -> None:
    """A YAML file, in the order given."""
    import yaml  # noqa: PLC0415 - only litgpt has such files

    with Translating(str(path)):
        path.write_text(yaml.safe_dump(dict(fields), sort_keys=False), encoding="utf-8")
