"""LoRA on parameters instead of modules (`target_parameters`), which is how mixtures of experts are trained, and on experts one by one.

The adapter may have been trained on the experts of a layer as one tensor or as numbered modules, and the base's files may have them either
way. All four cases come down to one low-rank sum for each expert, at its rows. For a parameter `[E, d_1, d_2]` PEFT stores `A [E * r, n]`,
expert after expert, and `B [m, r * E]`, whose columns are all experts' first component, then their second, …
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from registry.changes import LowRank, Matrix
from registry.errors import CorruptFile
from registry.formats.experts import Parameter, Slot
from registry.formats.findings import ANOTHER_SAVE, unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import LoraOptions, Scope, names_of
from registry.formats.peft_keys import plain_path
from registry.formats.peft_matching import Matching
from registry.tensors import StoredTensor

Factors = Mapping[str, StoredTensor]
# Models whose experts are stored as [E, d_in, d_out] and say so, and those whose files may have them either way.
_TRANSPOSED = ("gpt_oss",)
_EITHER_WAY = ("qwen3_vl_moe",)
# Up to this version PEFT took every parameter with experts for [E, d_in, d_out].
_LAST_TRANSPOSING = (0, 19, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A parameter that training changed, by its path in the model that was trained."""

    path: str
    parameter: Parameter


@final
class Experts:
    """Makes steps of the factors of parameters, and of those of numbered experts that the base has as one tensor."""

    def __init__(self, matching: Matching, options: LoraOptions, scope: Scope, config: Mapping[str, Any]) -> None:
        self._matching, self._options, self._scope = matching, options, scope
        self._wanted = _names(config.get("target_parameters"))
        self._square_is_flipped = _is_square_flipped(str(config.get("peft_version") or ""), matching.model_type)
        self.parameters: list[str] = []
        self.modules: list[str] = []

    def take(self, parts: Mapping[str, Factors]) -> dict[str, Factors]:
        """Make changes of what belongs here, and give back the rest.

        `parameters` and `modules` then have the paths, in the model that was trained, of what was taken.
        """
        wrapped, rest = dict[str, dict[str, Factors]](), dict[str, Factors]()
        for module, factors in parts.items():
            plain = plain_path(module)
            if self._targets(plain):
                wrapped.setdefault(plain, {})[module] = factors
            elif slot := self._matching.layout.slot(self._matching.names.to_base(plain)):
                self._add_module(module, factors, slot)
            else:
                rest[module] = factors
        for plain, levels in wrapped.items():
            self._add_levels(plain, levels)
        self._check_parameters(wrapped)
        self._check_modules()
        return rest

    # -- parameters

    def _targets(self, plain: str) -> list[_Target]:
        """A module's parameters that training changed, the one that was wrapped first first."""
        layout, place = self._matching.layout, self._matching.names.to_base(plain)
        names = [name for name in layout.names(place) if self._selects(f"{plain}.{name}")] if self._wanted else []
        found = ((name, layout.parameter(place, name)) for name in names)
        return [_Target(path=f"{plain}.{name}", parameter=each) for name, each in found if each]

    def _selects(self, path: str) -> bool:
        return not self._wanted.isdisjoint(names_of(path))

    def _add_levels(self, plain: str, levels: Mapping[str, Factors]) -> None:
        """PEFT wraps a module once for each parameter, in the order of its class, so that the first parameter's factors are innermost."""
        targets = self._targets(plain)
        innermost_first = sorted(levels, key=lambda module: -module.count(".base_layer"))
        if len(targets) != len(levels):
            expected = f"factors for {', '.join(target.path for target in targets)}"
            found = f"{len(levels)} pairs of factors"
            self._matching.refuse("parameters_unclear", plain, expected=expected, found=found, advice=ANOTHER_SAVE)
            return
        for target, module in zip(targets, innermost_first, strict=True):
            self.parameters.append(target.path)
            if self._is_pair(target.path, levels[module]):
                self._add_parameter(target, levels[module]["a"], levels[module]["b"])

    def _is_pair(self, path: str, factors: Factors) -> bool:
        if set(factors) == {"a", "b"} and all(len(tensor.spec.shape) == 2 for tensor in factors.values()):
            return True
        found = ", ".join(f"{kind} {list(tensor.spec.shape)}" for kind, tensor in sorted(factors.items()))
        self._matching.refuse("missing_factor", path, expected="A and B, matrices", found=found)
        return False

    def _add_parameter(self, target: _Target, a: StoredTensor, b: StoredTensor) -> None:
        parameter, count = target.parameter, len(target.parameter.experts)
        rank = self._rank(target.path, a, b, count)
        is_flipped = self._is_flipped(target, a, b) if rank else None
        if rank is None or is_flipped is None:
            return
        scale = self._options.scale(target.path, rank)
        for expert, pieces in enumerate(parameter.experts):
            left = Matrix(
                tensor=b, rows=b.spec.shape[0], columns=rank, row_step=b.spec.shape[1], column_step=count, offset=expert
            )
            right = Matrix.of(a, start=expert * rank, count=rank)
            if is_flipped:
                left, right = right.T, left.T
            for piece in pieces:
                rows = replace(left, rows=piece.rows, offset=left.offset + piece.start * left.row_step)
                self._add(piece.name, a, LowRank(left=rows, right=right, scale=scale, row=piece.at))

    def _add(self, name: str, told: StoredTensor, step: LowRank) -> None:
        change = self._matching.change_of(name, told)
        if change is not None:
            columns = change.target.shape[2] if len(change.target.shape) == 3 else None
            self._matching.add(replace(change, columns=columns), step)

    def _rank(self, path: str, a: StoredTensor, b: StoredTensor, count: int) -> int | None:
        """The rank of one expert's factors; None, with a finding, when the configuration does not say so."""
        told = self._options.ranks.matching(path) or [self._options.rank]
        rank, left_over = divmod(a.spec.shape[0], count)
        if a.spec.shape[0] == b.spec.shape[1] and not left_over and rank in told:
            return rank
        self._matching.refuse("rank_mismatch", path, expected=f"rank {told[0]}, for {count} experts",
                              found=f"A {list(a.spec.shape)} and B {list(b.spec.shape)}", advice=ANOTHER_SAVE)  # fmt: skip
        return None

    def _is_flipped(self, target: _Target, a: StoredTensor, b: StoredTensor) -> bool | None:
        """Whether `(B A)ᵀ` is added instead of `B A`; None, with a finding, when neither fits or nothing tells which."""
        made, shape = (b.spec.shape[0], a.spec.shape[1]), target.parameter.shape
        fits, fits_flipped = made == shape, made[::-1] == shape and target.parameter.has_experts
        if fits != fits_flipped:
            return fits_flipped
        if not fits:
            self._matching.wrong_shape(a, shape, found=f"A and B make {list(made)}")
        elif self._square_is_flipped is None:
            self._unclear(target.path)
        return self._square_is_flipped if fits else None

    def _unclear(self, path: str) -> None:
        advice = f"write the peft_version it was trained with into {CONFIG_FILE}"
        found = "square matrices, and nothing tells which side is which"
        self._matching.findings.append(unsupported("orientation_unknown", path, found=found, advice=advice))

    def _check_parameters(self, wrapped: Mapping[str, object]) -> None:
        """Every parameter of the base that is targeted has factors."""
        for plain in self._modules_of_base():
            if plain not in wrapped:
                for target in self._targets(plain):
                    self._matching.missed(target.path, "factors for every targeted parameter")

    def _modules_of_base(self) -> Iterator[str]:
        if self._wanted:
            weights = (name.removesuffix(".weight") for name in self._matching.base if name.endswith(".weight"))
            for place in dict.fromkeys([*self._matching.layout.places, *weights]):
                plain = self._matching.names.to_training(place)
                if plain is not None:
                    yield plain

    # -- numbered experts

    def _add_module(self, module: str, factors: Factors, slot: Slot) -> None:
        self.modules.append(module)
        if self._matching.model_type in _TRANSPOSED:
            self._matching.findings.append(
                unsupported("layout_unknown", module, found="an expert of its own, while the base interleaves the rows of gates and ups",
                            advice="merge into a base with numbered experts")
            )  # fmt: skip
        elif self._is_pair(module, factors):
            rank = self._rank(module, factors["a"], factors["b"], 1)
            step = self._step(module, factors["a"], factors["b"], slot) if rank else None
            if step is not None:
                self._add(slot.name, factors["a"], step)

    def _step(self, module: str, a: StoredTensor, b: StoredTensor, slot: Slot) -> LowRank | None:
        experts, *shape = self._matching.base[slot.name].spec.shape
        d_out, d_in = b.spec.shape[0], a.spec.shape[1]
        whole = [d_out * slot.parts, d_in]
        fits, fits_flipped = whole == shape, whole[::-1] == shape and self._matching.model_type in _EITHER_WAY
        if slot.expert >= experts or not (fits or fits_flipped):
            self._matching.wrong_shape(
                a, [experts, *shape], found=f"A and B of expert {slot.expert} make {[d_out, d_in]}"
            )
            return None
        if fits and fits_flipped:
            self._unclear(module)
            return None
        scale, row, at = self._options.scale(module, a.spec.shape[0]), slot.expert * shape[0], slot.part * d_out
        if fits:
            return LowRank(left=Matrix.of(b), right=Matrix.of(a), scale=scale, row=row + at)
        return LowRank(left=Matrix.of(a).T, right=Matrix.of(b).T, scale=scale, row=row, column=at)

    def _check_modules(self) -> None:
        """What one expert has factors for, every expert of every layer has, if it is targeted."""
        have, names = set(self.modules), self._matching.names
        for path in self._matching.layout.slots_like(self.modules):
            module = names.to_training(path)
            if module is not None and module not in have and self._scope.targets_module(module):
                self._matching.missed(module, "factors for every targeted expert")


def _names(value: object) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CorruptFile(CONFIG_FILE, f"target_parameters is {value!r}, expected a list of names"[:200])
    return frozenset(value)


def _is_square_flipped(version: str, model_type: str) -> bool | None:
    """Whether factors of square experts are for their transposes; None when that cannot be told."""
    if model_type in _TRANSPOSED:
        return True
    release = re.match(r"(\d+)\.(\d+)\.(\d+)(?!\S*dev)", version)
    if release is None or model_type in _EITHER_WAY:
        return None
    major, minor, patch = map(int, release.groups())
    return (major, minor, patch) <= _LAST_TRANSPOSING
