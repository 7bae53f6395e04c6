"""Tuners that multiply what goes into a layer or comes out of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from registry.changes import Option
from registry.merge.weight import RowWise, Weight


def ia3(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`diag(l) W`, or `W diag(l)` where inputs are scaled; a bias, seen as `[rows, 1]`, is scaled as outputs are.

    Tensors: ia3_l, with one element for each output, or for each input channel. Options: side (`outputs` or `inputs`).
    Source: `peft.tuners.ia3.layer.Linear.merge`, `_ConvNd.merge`.
    """
    scale = tensors["ia3_l"].flatten()
    if options["side"] == "outputs":
        return RowWise(before, lambda rows, first: rows.mul_(scale[first : first + rows.shape[0], None]))
    scale = scale.repeat_interleave(before.shape[1] // scale.shape[0])
    return RowWise(before, lambda rows, _: rows.mul_(scale))
