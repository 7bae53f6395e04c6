"""What verbs give back where that is more than one value of the domain. It passes over wires as it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from registry.errors import RegistryError
from registry.manifest import BaseModel, Checkpoint, Direction, Merged, Recipe, Report, Shipment, TensorRecord
from registry.refs import AdapterName, Digest


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


# -- repositories, as the Hugging Face Hub has them

RepositoryKind = Literal["adapter", "base", "merged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryFile:
    """A file of a repository. `etag` never changes for a commit and a path: the SHA-256 (64 hex digits) of weights whose bytes have one
    recorded, else 40 hex digits. `sha256` is empty where it is not known.
    """

    path: str
    size_bytes: int
    etag: str
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One state of a repository: an adapter's checkpoint, a base model, or what merging makes of them.

    `commit` are 40 hex digits that name this state for ever. `checkpoints` are references of what is in it, `base` the base model's name.
    `recipe` is what makes a merged one; `is_stored` is False where its weights are computed while they are sent.
    """

    id: str
    kind: RepositoryKind
    commit: str
    files: tuple[RepositoryFile, ...]
    checkpoints: tuple[str, ...]
    base: str
    created_at: datetime
    author: str
    recipe: Digest | None = None
    is_stored: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryRef:
    """A name for a state of a repository: `branch` for those that move (main, aliases, environments), `tag` for versions."""

    name: str
    kind: Literal["branch", "tag"]
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryLine:
    """A repository in a list."""

    id: str
    kind: RepositoryKind
    created_at: datetime
    author: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRecipe:
    """A recipe that is kept without being carried out: whoever asks for its model gets it computed. `checkpoints` are the inputs as
    references, in the recipe's order; `base` is the base model's name. `merged` is the model, where it was carried out all the same.
    """

    recipe: Recipe
    base: str
    checkpoints: tuple[str, ...]
    note: str
    created_at: datetime
    author: str
    merged: Digest | None = None

    @property
    def repository(self) -> str:
        """The id of its repository."""
        return f"merged-{self.recipe.digest.short}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentLine:
    """What went live in an environment last, the newest first, and how many others are live."""

    name: str
    newest: tuple[Shipment, ...]
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLine:
    """An adapter in a list: how many checkpoints it has, the newest, and the names of the metrics that were recorded on any."""

    name: AdapterName
    checkpoints: int
    newest: Checkpoint
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """The best checkpoint of an adapter by a metric, and the metric's values in that one's run."""

    best: Checkpoint
    metric: str
    direction: Direction
    curve: tuple[float, ...]
