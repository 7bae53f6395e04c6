"""litgpt's Adapter v2: every output of a linear layer is shifted and scaled, `scale * (W x + b + shift)` (Gao et al. 2023, arXiv:2304.15010).

Source: litgpt 0.5.13, `litgpt/adapter_v2.py`, `AdapterV2Linear`, whose `adapter_bias` is `shift` here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from registry.changes import Option
from registry.merge.weight import RowWise, Weight


def scaled_rows(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W' = diag(scale) (W + shift)`, scale and shift `[rows]`.

    A weight has no shift; a bias, seen as `[rows, 1]`, has both.
    """
    del options
    scale, shift = tensors["scale"], tensors.get("shift")

    def change(rows: Tensor, first: int) -> Tensor:
        last = first + rows.shape[0]
        if shift is not None:
            rows += shift[first:last, None]
        return rows.mul_(scale[first:last, None])

    return RowWise(before, change)
