"""What litgpt's adapters do to a litgpt model in memory, as hooks on its layers.

Rows of the fused matrix are decided where merging decides them (`registry.formats`), so that adapters of either row order answer as in the
version of litgpt that trained them. In memory a model is always in today's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble

from registry.changes import LowRank, Matrix
from registry.errors import Refused
from registry.formats import Adapter, read_adapter, resolve
from registry.formats.litgpt_heads import Heads
from registry.locations import open_location
from registry.manifest import BaseModel, Checkpoint, Level

if TYPE_CHECKING:
    from registry.service import Registry

_BEFORE, _SINCE = ".attn.attn.", ".attn.qkv."  # the fused matrix until litgpt 0.5.4, and since
_TOKENS, _GATE = ".adapter_wte.weight", ".gating_factor"
_SCALE, _SHIFT = ".adapter_scale", ".adapter_bias"


@final
@dataclass(frozen=True, slots=True)
class _Delta:
    """`scale * left @ (right @ x)`, added to some rows of a layer's output."""

    left: Any
    right: Any
    scale: float
    rows: Any

    def add(self, x: Any, output: Any, weight: float) -> None:
        """Add it to an output, so many times."""
        part = F.linear(F.linear(x, self.right), self.left) * (self.scale * weight)
        output.index_add_(-1, self.rows, part)


@final
@dataclass(frozen=True, slots=True)
class _Prefix:
    """Attention over learned tokens, by a gate for each head. `keys` and `values` tell which rows of the fused matrix make them,
    `[groups, size]`."""

    tokens: Any
    gate: Any
    keys: Any
    values: Any


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An adapter in memory, by the layers' names: deltas of a LoRA; scales and shifts, norms and prefixes of an Adapter v1 or v2."""

    deltas: Mapping[str, Sequence[_Delta]] = field(default_factory=dict)
    scales: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    norms: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Mapping[str, _Prefix] = field(default_factory=dict)


def load_adapter(registry: Registry, checkpoint: Checkpoint, folder: Path, base: BaseModel, model: Any) -> Loaded:
    """Read an adapter, for a model on its device and in its dtype.

    Args:
        registry: where the checkpoint is.
        checkpoint: the adapter; that it fits has been seen.
        folder: its files.
        base: the model that it goes on.
        model: the same in memory.

    Raises:
        Refused: what it does cannot be told from its files.
    """
    adapter = read_adapter(open_location(str(folder)))
    whole = torch.load(folder / adapter.weights_file, map_location="cpu", weights_only=True)
    like = model.transformer.wte.weight
    tensors = {name: value.to(like) for name, value in whole.get("model", whole).items()}
    if adapter.method != "lora":
        return _of_vectors(adapter, base, tensors, model.config)
    found = resolve(adapter, _of_today(base))
    if refused := tuple(each for each in found.findings if each.level is Level.REFUSED):
        raise Refused(replace(registry.check(checkpoint), findings=refused))
    return Loaded(
        deltas={
            change.target.name.removesuffix(".weight"): tuple(_deltas(change.deltas, tensors))
            for change in found.changes
        }
    )


def _of_today(base: BaseModel) -> BaseModel:
    """A base model as it is in memory: the fused matrix has today's name, and so today's row order."""
    renamed = (replace(each.spec, name=each.spec.name.replace(_BEFORE, _SINCE)) for each in base.tensors)
    return replace(
        base, tensors=tuple(replace(each, spec=spec) for each, spec in zip(base.tensors, renamed, strict=True))
    )


def _deltas(steps: Sequence[LowRank], tensors: Mapping[str, Any]) -> Iterator[_Delta]:
    """The deltas of one layer; those with the same right factor in one."""
    for right, group in groupby(steps, key=lambda step: step.right):
        found = list(group)
        rows = [torch.arange(step.row, step.row + step.left.rows) for step in found]
        left = torch.cat([_matrix(step.left, tensors) for step in found])
        yield _Delta(left, _matrix(right, tensors), found[0].scale, torch.cat(rows).to(left.device))


def _matrix(view: Matrix, tensors: Mapping[str, Any]) -> Any:
    start = view.offset // view.columns
    return tensors[view.tensor.spec.name].reshape(-1, view.columns)[start : start + view.rows]


# -- Adapter v1 and v2


def _of_vectors(adapter: Adapter, base: BaseModel, tensors: dict[str, Any], config: Any) -> Loaded:
    is_old = _is_old(adapter, base)
    keys, values = (
        rows.to(next(iter(tensors.values())).device)
        for rows in _prefix_rows(Heads.from_config(base.config), is_old=is_old)
    )
    scales, norms, prefixes = {}, {}, {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0].replace(_BEFORE.rstrip("."), _SINCE.rstrip("."))
        if name.endswith(_SCALE):
            both = tensor, tensors[name.removesuffix(_SCALE) + _SHIFT]
            scales[module] = tuple(qkv_reassemble(each, config) for each in both) if _BEFORE in name else both
        elif name.endswith(_GATE):
            prefixes[module] = _Prefix(tensors[module + _TOKENS], tensor.reshape(1, 1, -1, 1), keys, values)
        elif not name.endswith((_SHIFT, _TOKENS)):
            norms[name] = tensor
    return Loaded(scales=scales, norms=norms, prefixes=prefixes)


def _is_old(adapter: Adapter, base: BaseModel) -> bool:
    """Whether litgpt <= 0.5.4 trained it: told by the fused matrix' name, else by what newer versions write into the files beside it.

    Until 0.5.7 nothing but a newer base model tells, so an Adapter v1 on an older one is taken for an old one.
    """
    names = [tensor.spec.name for tensor in adapter.tensors]
    if any(name.endswith(_SCALE) for name in names):
        return any(_BEFORE in name for name in names)
    return "norm_qk" not in (adapter.base_config or base.config) and "log" not in adapter.config


def _prefix_rows(heads: Heads, *, is_old: bool) -> tuple[Any, Any]:
    """The rows that make keys and values of learned tokens, each `[groups, size]`.

    Since litgpt 0.5.5 they are taken where they were before, though the matrix is in another order now; it trains so, and so they are.
    """
    if is_old:
        both = torch.arange(heads.part_rows["query"], heads.rows).view(2, heads.groups, heads.size)
        return both[0], both[1]
    rows = torch.arange(heads.rows).view(heads.groups, heads.per_group + 2, heads.size)
    return rows[:, heads.per_group], rows[:, heads.per_group + 1]


# -- on the model


def put_on(model: Any, weighed: Sequence[tuple[Loaded, float]]) -> ExitStack:
    """Have adapters on a model until the result is closed. Only deltas are weighed."""
    worn = ExitStack()
    for each, weight in weighed:
        for name, deltas in each.deltas.items():
            worn.callback(model.get_submodule(name).register_forward_hook(_adding(deltas, weight)).remove)
        for name, (scale, shift) in each.scales.items():
            worn.callback(model.get_submodule(name).register_forward_hook(_scaling(scale, shift)).remove)
        for name, value in each.norms.items():
            _replace_parameter(worn, model, name, value)
        for name, prefix in each.prefixes.items():
            _put_prefix_on(worn, model.get_submodule(name), prefix)
    return worn


_Hook = Callable[[Any, tuple[Any, ...], Any], Any]


def _adding(deltas: Sequence[_Delta], weight: float) -> _Hook:
    def hook(_: Any, given: tuple[Any, ...], output: Any) -> Any:
        for delta in deltas:
            delta.add(given[0], output, weight)
        return output

    return hook


def _scaling(scale: Any, shift: Any) -> _Hook:
    return lambda _, given, output: scale * (output + shift)


def _replace_parameter(worn: ExitStack, model: Any, name: str, value: Any) -> None:
    module, _, own = name.rpartition(".")
    place = model.get_submodule(module)
    worn.callback(setattr, place, own, getattr(place, own))
    setattr(place, own, torch.nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def _put_prefix_on(worn: ExitStack, attention: Any, prefix: _Prefix) -> None:
    made = attention.qkv(prefix.tokens)
    each = attention.config.n_head // attention.config.n_query_groups
    keys, values = (
        made[:, rows].transpose(0, 1).repeat_interleave(each, dim=0).unsqueeze(0)
        for rows in (prefix.keys, prefix.values)
    )
    attend = attention.scaled_dot_product_attention

    def attend_both(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        seen = torch.ones(q.size(2), keys.size(2), dtype=torch.bool, device=q.device)
        return attend(q, k, v, mask) + prefix.gate * attend(q, keys, values, seen)

    attention.scaled_dot_product_attention = attend_both
    worn.callback(delattr, attention, "scaled_dot_product_attention")
