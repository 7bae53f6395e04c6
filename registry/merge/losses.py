"""How much is lost where merging leaves something out, measured on the weights themselves: no text is run through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from registry.locations import Location
from registry.merge.reading import read_elements, read_tensor
from registry.merge.rounding import Array
from registry.omissions import GatedPrefix, Omission, RouterBias

_LISTED = 4


def describe_loss(omission: Omission, base: Location, adapter: Location) -> str:
    """What leaving something out loses, in numbers and words; empty where that is not measured.

    Raises:
        CorruptFile, DamagedBlob: a file ends early or cannot be read.
    """
    prefixes = [_Prefix.measure(part, base, adapter) for part in omission.parts if isinstance(part, GatedPrefix)]
    routers = [(part.layer, _router_shift(part, adapter)) for part in omission.parts if isinstance(part, RouterBias)]
    if prefixes:
        gate = max(each.gate for each in prefixes)
        worst = _worst([(each.layer, each.share) for each in prefixes], "{:.2%}")
        return f"gates of up to {gate:.3g}; of the values that a head attends to by itself, its prefix adds at most {worst}"
    if routers:
        return f"router logits of experts shift against each other by {_worst(routers, '{:.3g}')}"
    return ""


def _worst(by_layer: Sequence[tuple[int, float]], form: str) -> str:
    """The largest numbers, and the layers they are from."""
    largest = sorted(by_layer, key=lambda pair: -pair[1])[:_LISTED]
    others = len(by_layer) - len(largest)
    shown = [f"{form.format(number)} in layer {layer}" for layer, number in largest]
    return ", ".join(shown) + (f", less in {others} others" if others else "")


def _router_shift(part: RouterBias, adapter: Location) -> float:
    """The largest difference between two experts' biases: what all have in common changes no choice and no weight."""
    with np.errstate(all="ignore"):
        bias = read_tensor(adapter, part.scale) * read_tensor(adapter, part.shift)
        return float(bias.max() - bias.min())


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The loss of a gated prefix. `share` is the largest, over heads, of `|gate| * max ‖v‖ / ‖own v‖`.

    The numerator bounds what the prefix adds to a head's output, whatever the text: attention gives an average of its values. `‖own v‖` is
    the root mean square of the values that the head averages otherwise, if what the norm gives has independent entries of mean 0 and
    variance 1 before its weight and bias.
    """

    layer: int
    gate: float
    share: float

    @classmethod
    def measure(cls, part: GatedPrefix, base: Location, adapter: Location) -> _Prefix:
        with np.errstate(all="ignore"):  # what is not finite is found and named elsewhere
            gates = np.abs(read_tensor(adapter, part.gate)).reshape(len(part.rows), -1).max(axis=1)
            tokens, shares = read_tensor(adapter, part.tokens), []
            for gate, row, own_row in zip(gates, part.rows, part.own_rows, strict=True):
                values = _Rows.read(part, row, base, adapter).of(tokens)
                own = _Rows.read(part, own_row, base, adapter).size_of_own(part, adapter)
                shares.append(gate * np.linalg.norm(values, axis=1).max() / own)
        return cls(part.layer, float(gates.max()), float(max(shares)))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of an adapted linear layer that make one head: `[size, width]`, `[size]`, `[size]`."""

    weight: Array
    bias: Array
    scale: Array

    @classmethod
    def read(cls, part: GatedPrefix, row: int, base: Location, adapter: Location) -> _Rows:
        width = part.weight.spec.shape[1]
        weight = read_elements(base, part.weight, row * width, part.size * width).reshape(part.size, width)
        bias = read_elements(adapter, part.shift, row, part.size)
        if part.bias is not None:
            bias = bias + read_elements(base, part.bias, row, part.size)
        return cls(weight, bias, read_elements(adapter, part.scale, row, part.size))

    def of(self, inputs: Array) -> Array:
        """`[n, width]` to `[n, size]`."""
        result: Array = self.scale * (inputs @ self.weight.T + self.bias)
        return result

    def size_of_own(self, part: GatedPrefix, adapter: Location) -> float:
        """Root mean square of the norm of what the rows make of normalised inputs."""
        spread = 1.0 if part.norm is None else read_tensor(adapter, part.norm) + part.norm_offset
        mean = np.zeros(self.weight.shape[1]) if part.norm_bias is None else read_tensor(adapter, part.norm_bias)
        deviation = np.linalg.norm(self.scale[:, None] * self.weight * spread)
        return float(np.hypot(deviation, np.linalg.norm(self.of(mean[None]))))
