"""Register, check and merge from files, as tests need it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file
from torch import Tensor

import registry
from registry.errors import Refused
from registry.manifest import Checkpoint, Finding, Level
from registry.merging import MergeResult, Planned
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.tensors import DType


@final
class Bench:
    """A registry of its own in a folder."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.registry: Registry = registry.connect(Settings.from_environment({"CKPT_HOME": str(home / "registry")}))

    def register(self, adapter: Path, base: Path) -> Checkpoint:
        """The only checkpoint of a folder."""
        (found,) = self.registry.register(str(adapter), Registration(base=str(base), adapter="tried")).registered
        return found.checkpoint

    def plan(self, adapter: Path, base: Path, dtype: DType | None = None) -> Planned:
        """What merging would do."""
        return self.registry.plan(self.register(adapter, base), dtype=dtype)

    def merge(self, adapter: Path, base: Path, out: Path, dtype: DType | None = None) -> MergeResult:
        """Merge into a folder."""
        return self.registry.merge(self.plan(adapter, base, dtype), out=str(out))

    def findings(self, adapter: Path, base: Path) -> dict[str, Finding]:
        """What a check has against it, by code, whether it is refused when registering or when merging."""
        try:
            report = self.registry.check(self.register(adapter, base))
        except Refused as refusal:
            report = refusal.report
        return {finding.code: finding for finding in report.findings if finding.level is not Level.PASS}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory's safetensors files; none may be in two of them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


_MANTISSA_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def steps(values: Tensor) -> Tensor:
    """The distance between neighbouring numbers of the values' dtype at each of them, float64."""
    exponent = torch.frexp(values.double().abs()).exponent
    smallest = torch.finfo(values.dtype).smallest_normal
    steps = torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - _MANTISSA_BITS[values.dtype])
    return steps.clamp(min=smallest * 2.0 ** (1 - _MANTISSA_BITS[values.dtype]))


def assert_rounded_once(found: Tensor, exact: Tensor, error: Tensor) -> None:
    """Every element is the float64 value rounded to nearest, once.

    `error` bounds what summing in float32 may be off by, `[same shape]`: within it of the middle between two neighbours, either is right.
    """
    distance = (found.double() - exact).abs()
    assert bool((distance <= steps(found) / 2 + error).all())


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same to the bit, or only on one side."""
    names = found.keys() | expected.keys()
    return sorted(n for n in names if n not in found or n not in expected or not torch.equal(found[n], expected[n]))
