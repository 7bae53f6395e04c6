"""Combinations that are `Σ c_i D_i`: the coefficients of those that depend on how the task vectors lie to each other.

All of it follows from the Gram matrix `G_ij = <D_i, D_j>`, `[inputs, inputs]`, since none of these methods leaves the span of its inputs. Below,
`n_i = ‖D_i‖`, `u_i = D_i / n_i`, `C_ij = <u_i, u_j>`, all over a whole tensor. A zero task vector has no direction: its `u_i` counts as zero.

They work on task vectors, where mergekit's slerp takes the models themselves: those of fine-tunes of one base are all but parallel, so that
it would interpolate linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from registry.changes import Option
from registry.merge.methods import number

# Vectors whose cosine is further from 0 than this are interpolated linearly by slerp (mergekit's limit), by nuslerp closer to 1 in size.
_SLERP_LIMIT = 0.9995
_NUSLERP_LIMIT = math.sqrt(1 - 1e-8)
_TINY = 1e-12
# How far from each other two angles must be to be told apart from their cosines, where those are close to 1 or -1; with a margin.
_DISTINCT_ANGLE = 1e-6
_KARCHER_ROUNDS = 100


def coefficients_from_gram(
    method: str, gram: Tensor, weights: Sequence[float], options: Mapping[str, Option]
) -> tuple[float, ...]:
    """The `c_i` of a method, rounded to float32: far enough that the order in which G was summed up does not show.

    Args:
        method: one of slerp, nuslerp, multislerp, karcher, model_stock.
        gram: `[inputs, inputs]`, float64.
        weights: one per input.
        options: as `registry.merge.methods.checked` returns them.
    """
    found = _FROM_GRAM[method](gram, torch.tensor(weights, dtype=torch.float64), options)
    return tuple(found.float().tolist())


def _directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`n` and `C`."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    sizes = torch.where(norms > 0, norms, 1.0)
    return norms, (gram / sizes / sizes.unsqueeze(1)).clamp(-1, 1)


def _sphere(gram: Tensor, t: float, limit: float) -> Tensor:
    norms, cosines = _directions(gram)
    cosine = float(cosines[0, 1])
    if abs(cosine) > limit or not norms.all():
        return torch.tensor([1 - t, t], dtype=torch.float64)
    angle = math.acos(cosine)
    return torch.tensor([math.sin((1 - t) * angle), math.sin(t * angle)], dtype=torch.float64) / math.sin(angle)


def _slerp(gram: Tensor, weights: Tensor, options: Mapping[str, Option]) -> Tensor:
    """`(sin((1 - t) θ) D_1 + sin(t θ) D_2) / sin θ`, where `cos θ = C_12` (Shoemake, 1985).

    As in mergekit, the vectors keep their lengths, and those of `|cos θ| > 0.9995` are interpolated linearly. So are, other than there, those
    of which one is zero: an adapter that does not touch a tensor has no direction to turn to.
    """
    del weights
    return _sphere(gram, number(options, "t"), _SLERP_LIMIT)


def _nuslerp(gram: Tensor, weights: Tensor, options: Mapping[str, Option]) -> Tensor:
    """As slerp with `t = w_2 / (w_1 + w_2)`, linear only where the vectors are parallel to four digits (mergekit's `nuslerp_flatten`)."""
    del options
    return _sphere(gram, float(weights[1] / weights.sum()), _NUSLERP_LIMIT)


def _multislerp(gram: Tensor, weights: Tensor, options: Mapping[str, Option]) -> Tensor:
    """The direction of the mean of directions, at the mean length: `N m / ‖m‖`, `m = Σ w_i u_i`, `N = Σ w_i n_i`, `Σ w = 1`.

    mergekit then takes a step along the mean of the tangents at m; that mean is zero, whatever the vectors. Where the directions cancel out,
    the weighted mean is left (mergekit: for two; an error for more).
    """
    del options
    weights = weights / weights.sum()
    norms, cosines = _directions(gram)
    length = math.sqrt(max(0.0, float(weights @ cosines @ weights)))
    if length < _TINY:
        return weights
    return _by_norm(weights / length * (weights @ norms), norms)


def _karcher(gram: Tensor, weights: Tensor, options: Mapping[str, Option]) -> Tensor:
    """The point of the unit sphere from which the squared angles to all `u_i` are least, weighted `α = w / Σ w`, times `Σ α_i n_i`.

    Found as mergekit does (Grove and Karcher, 1973): from the mean, a step along the mean of the logarithms of the `u_i`, until the step is
    nothing; mergekit weighs all alike and stops at 1e-5 or after 10 steps. Where the mean is zero, it starts from the input of most weight.
    Vectors opposite to the point reached have no logarithm and do not pull.
    """
    del options
    alphas = weights / weights.sum()
    norms, cosines = _directions(gram)
    scale, alphas = alphas @ norms, torch.where(norms > 0, alphas, 0.0)
    if not scale:
        return torch.zeros_like(alphas)
    alphas = alphas / alphas.sum()
    length = _length(alphas, cosines)
    point = alphas / length if length > _TINY else torch.eye(len(alphas), dtype=torch.float64)[int(alphas.argmax())]
    for _ in range(_KARCHER_ROUNDS):
        dots = (cosines @ point).clamp(-1, 1)
        angles = torch.acos(dots)
        pulls = torch.where(
            (angles > _TINY) & (math.pi - angles > _DISTINCT_ANGLE), alphas * angles / torch.sin(angles), 0.0
        )
        tangent = pulls - (pulls @ dots) * point
        step = _length(tangent, cosines)
        if step < _TINY:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        point = point / _length(point, cosines)
    return _by_norm(point * scale, norms)


def _model_stock(gram: Tensor, weights: Tensor, options: Mapping[str, Option]) -> Tensor:
    """`t * mean(D_i)` with `t = N c / (1 + (N - 1) c)`, c the mean cosine of all pairs of N inputs (Jang et al., Model Stock, 2024,
    arXiv:2403.19522).

    The paper's point is the foot of a perpendicular, which acute angles between the inputs put between base and mean. Where c is not positive,
    t is 0 and the base stays; mergekit goes to the other side of the base, the farther the closer `1 + (N - 1) c` is to zero.
    """
    del weights, options
    count = gram.shape[0]
    _, cosines = _directions(gram)
    mean = float(cosines.triu(diagonal=1).sum()) / (count * (count - 1) / 2)
    share = 0.0 if mean <= 0 else count * mean / (1 + (count - 1) * mean)
    return torch.full((count,), share / count, dtype=torch.float64)


def _length(point: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(0.0, float(point @ cosines @ point)))


def _by_norm(directions: Tensor, norms: Tensor) -> Tensor:
    """Coefficients of the `D_i` from those of the `u_i`."""
    return torch.where(norms > 0, directions / torch.where(norms > 0, norms, 1.0), 0.0)


_FROM_GRAM: dict[str, Callable[[Tensor, Tensor, Mapping[str, Option]], Tensor]] = {
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}
