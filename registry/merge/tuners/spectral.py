"""Tuners that train a few coefficients of a transform of the change: FourierFT and WaveFT.

Where the coefficients lie is drawn with a seed and not saved; torch's CPU generator draws the same places again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from registry.changes import Option
from registry.merge.tuners.options import number
from registry.merge.tuners.sums import add_entries
from registry.merge.tuners.wavelets import LOW_PASS
from registry.merge.weight import RowWise, Weight


def fourierft(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scaling * Re(ifft2(S))`, S `[d_out, d_in]` with the n trained numbers at drawn places and zeros elsewhere.

    Tensors: fourierft_spectrum `[n]`. Options: seed, scaling. Needs the whole matrix, complex.
    Source: `peft.tuners.fourierft.layer.FourierFTLayer`.
    """
    spectrum = tensors["fourierft_spectrum"]
    dense = torch.zeros(before.shape, dtype=torch.float64)
    dense.view(-1)[_drawn_places(before.shape, spectrum.numel(), int(number(options, "seed")))] = spectrum
    delta = torch.fft.ifft2(dense).real * number(options, "scaling")
    return RowWise(before, lambda rows, first: rows.add_(delta[first : first + rows.shape[0]]))


def waveft(tensors: Mapping[str, Tensor], options: Mapping[str, Option], before: Weight) -> Weight:
    """`W + scaling * idwt2(S)`, one step of an inverse wavelet transform, or `W + scaling * S` where `wavelet` is empty text.

    S is as in FourierFT, inside a matrix that is larger by what the filter's ends need and has even sides; its quarters are the four bands.
    Every coefficient adds one small rectangle, the product of two filters, so nothing dense is made.
    Tensors: waveft_spectrum `[n]`. Options: seed, scaling, wavelet. Source: `peft.tuners.waveft.layer.WaveFTLayer` and its `waverec2d`.
    """
    height, width = before.shape
    values = tensors["waveft_spectrum"] * number(options, "scaling")
    places = _drawn_places(before.shape, values.numel(), int(number(options, "seed")))
    if not options["wavelet"]:
        return add_entries(before, places, values)
    low = torch.tensor(LOW_PASS[str(options["wavelet"])], dtype=torch.float64)
    high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(low.numel() // 2)
    row_band, first_row = _band(places // width, height, low.numel())
    column_band, first_column = _band(places % width, width, low.numel())
    # As in training, the right half has the high-pass filter from row to row, and the lower half from column to column.
    filters = torch.stack([low, high])
    down, along = filters[column_band], filters[row_band]
    taps = torch.arange(low.numel())
    rows, columns = first_row[:, None, None] + taps[:, None], first_column[:, None, None] + taps
    patches = values[:, None, None] * down[:, :, None] * along[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return add_entries(before, (rows * width + columns)[inside], patches[inside])


def _band(places: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Along one side of the matrix: which half a coefficient lies in, and where its filter begins in the result."""
    padded = size + taps - 2
    padded += padded % 2
    shifted = places + (padded - size) // 2
    band = (shifted >= padded // 2).long()
    return band, 2 * (shifted - band * (padded // 2)) - (taps - 2)


def _drawn_places(shape: tuple[int, int], count: int, seed: int) -> Tensor:
    """The first places of a random order of all elements, int64 `[count]`."""
    return torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count].clone()
