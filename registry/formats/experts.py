"""How a base's files have the experts of a mixture: as modules with numbers, or all experts of a layer as one tensor for each parameter.

Training sees the one or the other, whatever the files have: numbered modules up to transformers 4, since then one parameter
`gate_up_proj [E, 2 * d_inner, d_model]`, whose first rows are the gates', and one `down_proj [E, d_model, d_inner]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

from registry.tensors import StoredTensor, TensorSpec

_NUMBERED = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
# What a numbered expert's modules are called, and their part in the parameters.
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_PARAMETERS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}
# A module's parameters in the order that its class makes them.
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows `start … start + rows` of one expert's matrix, which are the rows from `at` on of the base tensor `name`."""

    name: str
    start: int
    rows: int
    at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter as training has it: for each expert the pieces of its matrix `[rows, columns]`.

    `has_experts`: it is a tensor `[E, rows, columns]`, even for one expert; otherwise it is the matrix itself.
    """

    experts: tuple[tuple[Piece, ...], ...]
    rows: int
    columns: int
    has_experts: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of one expert's matrix."""
        return self.rows, self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of a numbered expert's module in the base tensor `name` `[E, d_1, d_2]`.

    It is the `part`th of `parts` equal ones of the `expert`th matrix, counted from 0.
    """

    name: str
    expert: int
    part: int
    parts: int


@final
class Layout:
    """The parameters with names of their own (not `weight` or `bias`) of a base's modules, numbered experts among them."""

    def __init__(self, base: Mapping[str, StoredTensor]) -> None:
        self._base = base
        self._numbered = _numbered(base)
        self._named = _named(base)

    @property
    def places(self) -> list[str]:
        """The modules that have such parameters."""
        return [*self._numbered, *self._named]

    def names(self, place: str) -> list[str]:
        """The names of a module's parameters, in the order of its class; empty when its order is not known."""
        if place in self._numbered:
            found = [name for name, roles in _PARAMETERS.items() if set(roles) <= self._numbered[place].keys()]
            return [name for name in found if name != "up_proj" or "gate_up_proj" not in found]
        found = [*self._named.get(place, ()), *(["weight"] if f"{place}.weight" in self._base else ())]
        return sorted(found, key=_ORDER.index) if set(found) <= set(_ORDER) else found if len(found) == 1 else []

    def parameter(self, place: str, name: str) -> Parameter | None:
        """One of these parameters; None when it is no matrix, or not all numbered experts have it."""
        if place in self._numbered:
            return self._of_modules(self._numbered[place], name)
        shape = self._base[f"{place}.{name}"].spec.shape
        if len(shape) not in (2, 3):
            return None
        rows, columns = shape[-2:]
        count = shape[0] if len(shape) == 3 else 1
        experts = tuple(
            (Piece(name=f"{place}.{name}", start=0, rows=rows, at=expert * rows),) for expert in range(count)
        )
        return Parameter(experts=experts, rows=rows, columns=columns, has_experts=len(shape) == 3)

    def _of_modules(self, modules: Mapping[str, Mapping[int, str]], name: str) -> Parameter | None:
        roles = _PARAMETERS[name]
        numbers = range(len(modules[roles[0]]))
        shapes = [
            {self._base[modules[role].get(number, "")].spec.shape if number in modules[role] else () for number in numbers}
            for role in roles
        ]  # fmt: skip
        sizes = [each.pop() for each in shapes if len(each) == 1]
        if len(sizes) != len(roles) or any(len(size) != 2 or size[1] != sizes[0][1] for size in sizes):
            return None
        starts = [sum(size[0] for size in sizes[:index]) for index in range(len(sizes) + 1)]
        experts = tuple(
            tuple(
                Piece(name=modules[role][number], start=start, rows=size[0])
                for role, start, size in zip(roles, starts, sizes, strict=False)
            )
            for number in numbers
        )
        return Parameter(experts=experts, rows=starts[-1], columns=sizes[0][1], has_experts=True)

    def slot(self, path: str) -> Slot | None:
        """Where a numbered expert's module is, by its path in the base, when the base has all of them as one tensor."""
        match = _NUMBERED.fullmatch(path)
        if match is None or match[3] not in _ROLES:
            return None
        role = _ROLES[match[3]]
        for name in self._named.get(match[1], ()):
            if role in _PARAMETERS.get(name, ()):
                roles = _PARAMETERS[name]
                return Slot(name=f"{match[1]}.{name}", expert=int(match[2]), part=roles.index(role), parts=len(roles))
        return None

    def slots_like(self, paths: Iterable[str]) -> Iterator[str]:
        """The paths of the same modules in every expert of every layer."""
        leaves = {path.rpartition(".")[2] for path in paths}
        for place in self._named:
            for leaf in sorted(leaves):
                if slot := self.slot(f"{place}.0.{leaf}"):
                    for expert in range(self._base[slot.name].spec.shape[0]):
                        yield f"{place}.{expert}.{leaf}"

    def split(self, name: str, tensor: StoredTensor) -> list[tuple[str, StoredTensor]]:
        """A tensor that has the values of a parameter `name`, as tensors of the base: itself, or its rows for each numbered expert."""
        place, _, leaf = name.rpartition(".")
        parameter = self.parameter(place, leaf) if place in self._numbered and leaf in _PARAMETERS else None
        if parameter is None or tensor.spec.shape != (len(parameter.experts), *parameter.shape):
            return [(name, tensor)]
        found, offset = [], tensor.offset_bytes
        for piece in (piece for expert in parameter.experts for piece in expert):
            spec = TensorSpec(tensor.spec.name, tensor.spec.dtype, (piece.rows, parameter.columns))
            found.append((piece.name, StoredTensor(spec, tensor.file, offset)))
            offset += spec.size_bytes
        return found


def _numbered(names: Iterable[str]) -> dict[str, dict[str, dict[int, str]]]:
    """Of every container of numbered experts, by role and number, the base's tensors."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if match and match[3] in _ROLES:
            found.setdefault(match[1], {}).setdefault(_ROLES[match[3]], {})[int(match[2])] = name
    return found


def _named(base: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """Of every module whose matrices are parameters with names of their own, these names."""
    found: dict[str, list[str]] = {}
    for name, tensor in base.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") and len(tensor.spec.shape) in (2, 3):
            found.setdefault(module, []).append(leaf)
    return found
