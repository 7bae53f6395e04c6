"""How much a checkpoint changes each weight of its base: Frobenius norms, from its factors wherever they tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

from registry.base_models import open_base
from registry.changes import Change
from registry.comparing import OfWeight, changes_of, problem_of, resolution_of, unchanged_base
from registry.formats import read_adapter
from registry.locations import Location
from registry.manifest import Checkpoint
from registry.merge.compare import Side, angle
from registry.merge.sums import FactorReader
from registry.remembered import Remembered
from registry.workspace import Workspace

# Of weights whose change does not follow from the adapter alone (DoRA), the base is read up to so many bytes in all.
_READ_BYTES = 512 << 20
_KEPT_CHECKPOINTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateNorm(OfWeight):
    """What a checkpoint does to one weight: `norm` is ‖D‖, `rms` that over the root of the weight's elements, so that weights of different
    sizes can be compared, `rank` the effective rank, None where the change is not low-rank. `problem` tells why it was not measured; then
    the numbers are 0.
    """

    norm: float = 0.0
    rms: float = 0.0
    rank: float | None = None
    problem: str = ""


# Of content alone, which never changes: whoever asks, in whichever registry, gets the same.
_kept: Remembered[tuple[UpdateNorm, ...]] = Remembered(_KEPT_CHECKPOINTS)


def update_norms(workspace: Workspace, checkpoint: Checkpoint) -> tuple[UpdateNorm, ...]:
    """What a checkpoint does to each weight, in the order of the base; nothing where it is refused by its base. Measured once.

    The base is read only where a change is not low-rank, and only up to 512 MiB; what would take more has a problem instead.

    Raises:
        Changed: the base is to be read, and its files are others now.
        PathNotFound, DamagedBlob: the base or a file of the checkpoint is not there any more.
    """
    return _kept.get((checkpoint.digest, checkpoint.base), lambda: tuple(_measured(workspace, checkpoint)))


def _measured(workspace: Workspace, checkpoint: Checkpoint) -> Iterator[UpdateNorm]:
    with workspace.reading() as catalog:
        base = catalog.bases.find(checkpoint.base.hex)
    with ExitStack() as stack:
        folder = stack.enter_context(closing(workspace.folder_of(checkpoint)))
        adapter, place = read_adapter(folder), None
        changes = changes_of(resolution_of(adapter, base, folder))
        if 0 < _read_bytes(changes.values()) <= _READ_BYTES:
            base = unchanged_base(workspace, base)
            changes = changes_of(resolution_of(adapter, base, folder))
            place = stack.enter_context(closing(open_base(workspace, base)))
        order = {tensor.spec.name: number for number, tensor in enumerate(base.tensors)}
        factors = FactorReader(folder)
        for name in sorted(changes, key=lambda name: (order.get(name, len(order)), name)):
            yield _norm(Side(changes[name], folder, factors), place)


def _read_bytes(changes: Iterable[Change]) -> int:
    """How much of the base has to be read."""
    return sum(change.target.size_bytes for change in changes if not change.is_low_rank)


def _norm(side: Side, place: Location | None) -> UpdateNorm:
    change = side.change
    assert change is not None  # noqa: S101 - made above
    name = change.target.name
    if problem := problem_of([change]):
        return UpdateNorm(name=name, problem=problem)
    if not change.is_low_rank and place is None:
        return UpdateNorm(name=name, problem="takes reading the base model")
    found = angle(side, Side(None, side.folder, side.factors), place)
    if not math.isfinite(found.norms[0]):
        return UpdateNorm(name=name, problem="NaN or infinity")
    size = math.sqrt(change.target.elements)
    return UpdateNorm(name=name, norm=found.norms[0], rms=found.norms[0] / size if size else 0.0, rank=found.ranks[0])
