"""The ways to combine several adapters: their names, how many inputs and which options they take. The arithmetic is in `registry.merge.combine`.

Words: `w_i` the weight that an input is given, `D_i` what it adds to a tensor of the base, its task vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

from registry.changes import Option
from registry.errors import InvalidRecipe


@dataclass(frozen=True, slots=True)
class Allowed:
    """Which values an option may have: `default` where none is given, `fits` what it must be, `meaning` that in words."""

    default: int | float
    fits: Callable[[int | float], bool]
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method takes.

    `is_weighted`: its inputs may have weights of their own. `is_exact`: the result is `Σ c_i D_i` with one number `c_i` per input and tensor,
    so that low-rank inputs stay low-rank. `least`, `most`: how many inputs.
    """

    options: Mapping[str, Allowed] = field(default_factory=dict)
    is_weighted: bool = True
    is_exact: bool = True
    least: int = 1
    most: float = inf


_T = {"t": Allowed(0.5, isfinite, "a number; 0 is the first input, 1 the second")}
_DECAY = {"decay": Allowed(0.9, lambda value: 0 <= value < 1, "at least 0 and less than 1")}
_LAMBDA = {"lambda": Allowed(1.0, isfinite, "a number")}
_DENSE = {"density": Allowed(0.5, lambda value: 0 < value <= 1, "more than 0, at most 1"), **_LAMBDA}
_RANDOM = {
    "seed": Allowed(
        0, lambda value: isinstance(value, int) and 0 <= value < 1 << 64, "a whole number of 64 bits, not negative"
    )
}
_EPSILON = {"epsilon": Allowed(0.15, lambda value: 0 <= value < 0.5, "at least 0 and less than 0.5")}
_GAMMA = {"gamma": Allowed(0.01, lambda value: 0 <= value < 1, "at least 0 and less than 1")}

METHODS: Mapping[str, Method] = {
    "linear": Method(),
    "task_arithmetic": Method(options=_LAMBDA),
    "average": Method(),
    "interpolate": Method(options=_T, is_weighted=False, least=2, most=2),
    "ema": Method(options=_DECAY, is_weighted=False),
    "slerp": Method(options=_T, is_weighted=False, least=2, most=2),
    "nuslerp": Method(least=2, most=2),
    "multislerp": Method(),
    "karcher": Method(),
    "model_stock": Method(is_weighted=False, least=2),
    "magnitude": Method(options=_DENSE, is_exact=False),
    "ties": Method(options=_DENSE, is_exact=False),
    "dare_linear": Method(options=_DENSE | _RANDOM, is_exact=False),
    "dare_ties": Method(options=_DENSE | _RANDOM, is_exact=False),
    "della_linear": Method(options=_DENSE | _EPSILON | _RANDOM, is_exact=False),
    "della": Method(options=_DENSE | _EPSILON | _RANDOM, is_exact=False),
    "breadcrumbs": Method(options=_DENSE | _GAMMA, is_exact=False),
    "breadcrumbs_ties": Method(options=_DENSE | _GAMMA, is_exact=False),
    "sce": Method(options=_DENSE, is_weighted=False, is_exact=False, least=2),
}
# Divide by the sum of the weights.
_NORMALISED = {"average", "nuslerp", "multislerp", "karcher"}


def checked(method: str, weights: Sequence[float], options: Mapping[str, Option]) -> dict[str, Option]:
    """All options of a method, with the defaults of those that are not given.

    Args:
        method: its name.
        weights: one per input, all 1 where none were given.
        options: what was given.

    Raises:
        InvalidRecipe: the method does not exist, or cannot be used like this.
    """
    if method not in METHODS:
        raise InvalidRecipe("method", method, f"one of {', '.join(METHODS)}")
    _check_weights(method, weights)
    known = METHODS[method].options
    for name, value in options.items():
        if name not in known:
            raise InvalidRecipe(name, value, f"{method} takes {', '.join(known) or 'no options'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not known[name].fits(value):
            raise InvalidRecipe(name, value, known[name].meaning)
    result = {name: allowed.default for name, allowed in known.items()} | dict(options)
    density, epsilon = result.get("density"), result.get("epsilon")
    if (
        isinstance(density, float)
        and isinstance(epsilon, int | float)
        and density < 1
        and not epsilon < density < 1 - epsilon
    ):
        raise InvalidRecipe("epsilon", epsilon, f"density ± epsilon must lie between 0 and 1; density is {density}")
    return result


def _check_weights(method: str, weights: Sequence[float]) -> None:
    takes = METHODS[method]
    if not takes.least <= len(weights) <= takes.most:
        wanted = f"{takes.least}" if takes.least == takes.most else f"{takes.least} or more"
        raise InvalidRecipe("inputs", len(weights), f"{method} takes {wanted}")
    if not all(isfinite(weight) for weight in weights):
        raise InvalidRecipe("weights", tuple(weights), "finite numbers")
    if not takes.is_weighted and set(weights) != {1}:
        raise InvalidRecipe("weights", tuple(weights), f"{method} takes none")
    if method in _NORMALISED and not sum(weights):
        raise InvalidRecipe("weights", tuple(weights), f"{method} divides by their sum, which is 0")
    if method == "karcher" and min(weights) < 0:
        raise InvalidRecipe("weights", tuple(weights), "karcher takes no negative ones")


def fixed_coefficients(
    method: str, weights: Sequence[float], options: Mapping[str, Option]
) -> tuple[float, ...] | None:
    """The `c_i` of `Σ c_i D_i` for methods that need not look at the tensors; None for others.

    - linear: `w_i`. PEFT's "cat" and "svd", and what its "linear" is meant to be: PEFT adds up A's and B's apart, which yields `B_i A_j` too.
    - task_arithmetic: `λ w_i` (Ilharco et al., 2023, arXiv:2212.04089; mergekit without `normalize`).
    - average: `w_i / Σ w`; with weights of 1 the mean of the inputs. mergekit's "linear".
    - interpolate: `1 - t, t`; beyond 0 … 1 it extrapolates.
    - ema: the moving average `m ← decay * m + (1 - decay) * D_k` over the inputs in order, the oldest first, from `m = D_1`.

    Args:
        method: its name.
        weights: one per input.
        options: as `checked` returns them.
    """
    count = len(weights)
    if method == "linear":
        return tuple(map(float, weights))
    if method == "task_arithmetic":
        return tuple(number(options, "lambda") * weight for weight in weights)
    if method == "average":
        return tuple(weight / sum(weights) for weight in weights)
    if method == "interpolate":
        return 1 - number(options, "t"), number(options, "t")
    if method == "ema":
        decay = number(options, "decay")
        return tuple((1 - decay if index else 1.0) * decay ** (count - 1 - index) for index in range(count))
    return None


def number(options: Mapping[str, Option], name: str) -> float:
    """An option that is a number."""
    value = options[name]
    assert isinstance(value, int | float)  # noqa: S101 - checked
    return float(value)
