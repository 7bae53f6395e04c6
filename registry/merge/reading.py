"""Read tensors, and views of them, out of the files they lie in."""

from __future__ import annotations

from typing import cast, final

import numpy as np

from registry.changes import Matrix
from registry.locations import Location
from registry.merge.rounding import WORDS, Array, values_of
from registry.tensors import StoredTensor


@final
class Scratch:
    """Reused buffers by the role they play: fresh memory for each block costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, role: str, size_bytes: int) -> memoryview:
        """So many bytes on a reused buffer, with arbitrary values."""
        buffer = self._buffers.get(role)
        if buffer is None or buffer.size < size_bytes:
            buffer = self._buffers[role] = np.empty(size_bytes, np.uint8)
        return memoryview(cast("bytes", buffer))[:size_bytes]


def read_bytes(location: Location, tensor: StoredTensor, first: int, count: int) -> bytearray:
    """So many elements of a tensor from one on, as they are stored."""
    size = tensor.spec.dtype.itemsize_bytes
    data = bytearray(count * size)
    location.read_into(tensor.file, tensor.offset_bytes + first * size, memoryview(data))
    return data


def read_elements(location: Location, tensor: StoredTensor, first: int, count: int) -> Array:
    """So many elements of a tensor from one on, one-dimensional: floats as float64, everything else in its own type."""
    return values_of(read_bytes(location, tensor, first, count), tensor.spec.dtype)


def read_tensor(location: Location, tensor: StoredTensor) -> Array:
    """A whole tensor in its own shape: floats as float64, everything else in its own type."""
    return read_elements(location, tensor, 0, tensor.spec.elements).reshape(tensor.spec.shape)


def read_matrix(location: Location, matrix: Matrix) -> Array:
    """A view of a tensor, float64 `[rows, columns]`."""
    return _strided(read_bytes(location, matrix.tensor, matrix.offset, matrix.span), 0, matrix)


def view(data: bytearray, matrix: Matrix) -> Array:
    """The same from the bytes of the whole tensor."""
    return _strided(data, matrix.offset, matrix)


def _strided(data: bytearray, offset: int, matrix: Matrix) -> Array:
    """Only what the view holds is kept. A transposed matrix stays transposed in memory, as products are made of it."""
    dtype = matrix.tensor.spec.dtype
    words = np.frombuffer(data, WORDS[dtype])[offset:]
    shape, steps = (
        (matrix.rows, matrix.columns),
        (matrix.row_step * words.itemsize, matrix.column_step * words.itemsize),
    )
    if not matrix.span:
        return np.zeros(shape)
    found = np.lib.stride_tricks.as_strided(words, shape, steps)
    if matrix.row_step < matrix.column_step:
        return values_of(np.ascontiguousarray(found.T), dtype).reshape(shape[::-1]).T
    return values_of(np.ascontiguousarray(found), dtype).reshape(shape)
