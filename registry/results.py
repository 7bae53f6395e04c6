"""What verbs give back where that is more than one value of the domain. It passes over wires as it is."""

from __future__ import annotations

from dataclasses import dataclass

from registry.errors import RegistryError
from registry.manifest import BaseModel, Checkpoint, Merged, Recipe, Report, Shipment, TensorRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """A checkpoint with what it comes from and what came of it. `report` is None when its files cannot be read; `problem` says why."""

    checkpoint: Checkpoint
    base: BaseModel
    report: Report | None
    problem: RegistryError | None
    merged: tuple[Merged, ...]
    shipments: tuple[Shipment, ...]
    previous: str
    following: str
    children: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinedFile:
    """A file that a merge writes: `origin` is `weights`, `made`, `adapter` or `base`. Only of weights is the size known before."""

    path: str
    origin: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A plan without what it takes to carry it out: what people want to know of it, and what passes over wires.

    `files` are the weights, `sidecars` the others. `computed` are the names of the tensors that are, of `tensors` in the base. Memory is
    about `memory_bytes`, and `thread_bytes` more for each thread.
    """

    report: Report
    recipe: Recipe
    base: str
    files: tuple[OutlinedFile, ...]
    sidecars: tuple[OutlinedFile, ...]
    computed: tuple[str, ...]
    tensors: int
    bytes_copied: int
    bytes_computed: int
    memory_bytes: int
    thread_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(file.size_bytes or 0 for file in self.files)

    def peak_bytes(self, threads: int) -> int:
        """About how much memory carrying it out takes."""
        return self.memory_bytes + threads * self.thread_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """A merged model; `created` is False when the recipe's result was there already. `records` tell what happened to each tensor."""

    merged: Merged
    location: str
    created: bool
    report: Report
    records: tuple[TensorRecord, ...] = ()
