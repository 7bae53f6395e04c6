"""The form of a merge: what was chosen, as the address says it, and what each way to combine asks for, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import final
from urllib.parse import urlencode

from registry.errors import InvalidRecipe
from registry.merge.methods import METHODS
from registry.mixing import Mixture
from registry.server.pages.visits import Values
from registry.tensors import DType

METHOD_WORDS: Mapping[str, str] = {
    "linear": "The weighted sum of what the inputs add to the base; by default their mean.",
    "task_arithmetic": "The weighted sum, times lambda.",
    "average": "The weighted sum, divided by the sum of the weights.",
    "interpolate": "A point on the line from the first input to the second.",
    "ema": "The moving average over the inputs in order, the oldest first.",
    "slerp": "A point on the arc from the first input to the second.",
    "nuslerp": "A point on the arc between two inputs, where their weights say.",
    "multislerp": "The mean direction of the inputs, with their mean length.",
    "karcher": "The point of the sphere that is nearest to all inputs.",
    "model_stock": "The mean, drawn to the base by how little the inputs agree.",
    "magnitude": "Of each input the largest elements, summed.",
    "ties": "Of each input the largest elements; of those the mean of the ones that agree in sign.",
    "dare_linear": "Of each input elements at random, scaled up to make good for the others, summed.",
    "dare_ties": "Of each input elements at random, scaled up; of those the mean of the ones that agree in sign.",
    "della_linear": "As dare_linear, but large elements are likelier to be kept.",
    "della": "As dare_ties, but large elements are likelier to be kept.",
    "breadcrumbs": "Of each input the elements in the middle, neither outliers nor noise, summed.",
    "breadcrumbs_ties": "Of each input the elements in the middle; of those the mean of the ones that agree in sign.",
    "sce": "The elements in which the inputs differ most, weighted by their energy.",
}
OPTION_WORDS: Mapping[str, str] = {
    "t": "Between the two",
    "decay": "Share that stays at each step",
    "lambda": "Scale of all that is added",
    "density": "Share of the elements that are kept",
    "seed": "Seed of the random numbers",
    "epsilon": "How far the chance to be kept goes up and down",
    "gamma": "Share of the largest that are dropped",
}
DTYPES = ("float32", "bfloat16", "float16")
_WEIGHT, _OPTION = "weight.", "option."


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What somebody chose, as text: references in order, the method, what was typed for weights (by reference) and options (by name)."""

    refs: tuple[str, ...] = ()
    method: str = "linear"
    weights: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""
    allow_lossy: bool = False
    note: str = ""

    @classmethod
    def of(cls, values: Values) -> Wanted:
        """What a query or a form says; what the method does not take is left out."""
        method = values.one("method") or "linear"
        known = METHODS.get(method)
        refs = tuple(values.all("ref"))
        weights = {ref: values.one(_WEIGHT + ref) for ref in refs} if known is None or known.is_weighted else {}
        options = {name: values.one(_OPTION + name) for name in (known.options if known else ())}
        return cls(
            refs=refs,
            method=method,
            weights={ref: text for ref, text in weights.items() if text},
            options={name: text for name, text in options.items() if text},
            dtype=values.one("dtype"),
            allow_lossy=values.has("allow_lossy"),
            note=values.one("note"),
        )

    def with_refs(self, refs: Iterable[str]) -> Wanted:
        """The same with other inputs, each once."""
        return replace(self, refs=tuple(dict.fromkeys(refs)))

    def url(self, *, is_looked: bool = False) -> str:
        """The address that says all of this; `is_looked` shows the plan at once."""
        pairs = [("ref", ref) for ref in self.refs]
        pairs += [("method", self.method)] if self.method != "linear" else []
        pairs += [(_WEIGHT + ref, self.weights[ref]) for ref in self.refs if ref in self.weights]
        pairs += [(_OPTION + name, text) for name, text in self.options.items()]
        pairs += [("dtype", self.dtype)] if self.dtype else []
        pairs += [("allow_lossy", "yes")] if self.allow_lossy else []
        pairs += [("note", self.note)] if self.note else []
        pairs += [("look", "yes")] if is_looked else []
        return f"/merge?{urlencode(pairs)}" if pairs else "/merge"

    @property
    def usual_weight(self) -> float:
        """What an input weighs when nothing is said: equal shares of one for `linear`, else 1."""
        return 1 / max(1, len(self.refs)) if self.method == "linear" else 1.0

    def mixture(self) -> Mixture:
        """How the inputs are weighed together.

        Raises:
            InvalidRecipe: no numbers, or no such method.
        """
        if self.method not in METHODS:
            raise InvalidRecipe("method", self.method[:80], f"one of {', '.join(METHODS)}")
        weights: tuple[float, ...] = ()
        if self.weights:
            said = (self.weights.get(ref) for ref in self.refs)
            weights = tuple(float(number(text, "weights")) if text else self.usual_weight for text in said)
        options = {name: number(text, name) for name, text in self.options.items()}
        return Mixture(method=self.method, weights=weights, options=options)

    def wanted_dtype(self) -> DType | None:
        """The dtype of the result; None to keep each tensor's own.

        Raises:
            InvalidRecipe: weights cannot have it.
        """
        if not self.dtype:
            return None
        found = DType.from_long_name(self.dtype)
        if found is None or not found.is_mergeable:
            raise InvalidRecipe("dtype", self.dtype[:80], f"one of {', '.join(DTYPES)}")
        return found


def number(text: str, what: str) -> int | float:
    """A finite number; whole ones are kept whole.

    Raises:
        InvalidRecipe: something else.
    """
    try:
        found = float(text[:100])
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InvalidRecipe(what, text[:80], "expected a number")
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,80}", text) else found
