"""Reading a tuner's options and indices."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from registry.changes import Option
from registry.errors import CorruptFile


def number(options: Mapping[str, Option], name: str) -> float:
    """An option that is a number; the format has made sure that it is there and is one."""
    value = options[name]
    assert isinstance(value, (int, float))  # noqa: S101 - for the type checker
    return value


def indices(tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """A tensor of places in something of a size, int64.

    Raises:
        CorruptFile: one of them is outside.
    """
    found = tensors[name].long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < size:
        raise CorruptFile(name, f"an index outside 0 … {size - 1}")
    return found
