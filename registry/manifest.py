"""The frozen values of the registry: what a checkpoint, a base model, a recipe, a merged model and a shipment are.

Nothing here reads or writes. Every time is aware and in UTC; every size is in bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import Any, Literal

from blake3 import blake3

from registry.errors import CorruptFile
from registry.refs import AdapterName, Digest
from registry.tensors import DType, StoredTensor

Direction = Literal["lower", "higher"]


class Format(StrEnum):
    """Who wrote an adapter."""

    PEFT = "peft"
    LITGPT = "litgpt"


class BaseFormat(StrEnum):
    """How the weights of a base model lie on disk: safetensors beside `config.json`, or a torch zip beside `model_config.yaml`."""

    SAFETENSORS = "safetensors"
    LITGPT = "litgpt"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file: `path` is relative, with `/` between its parts. `sha256` is 64 hex digits, or empty where it was not computed.

    Raises:
        CorruptFile: the path leads out of its folder, or is not a plain one.
    """

    path: str
    size_bytes: int
    digest: Digest
    sha256: str = ""

    def __post_init__(self) -> None:
        if "\\" in self.path or "\0" in self.path or {"", ".", ".."}.intersection(self.path.split("/")):
            raise CorruptFile(self.path, "not a plain path below its folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is inside a checkpoint. The table of tensors is not copied here: it is the header of `weights_file`.

    `method` is the tuner's name in lower case (`lora`, `dora`, `ia3`, `adapter`, `adapter_v2`…). `rank` is the global one, `alpha` likewise;
    `scaling` is how they combine: `alpha/r`, `alpha/sqrt(r)`, or empty for methods without it. `targets` are module names or one pattern.
    `base_name` is what the files call their base model. `tokenizer` tells whether tokenizer files came with it.
    """

    format: Format
    method: str
    rank: int | None
    alpha: float | None
    scaling: str
    targets: tuple[str, ...]
    dtype: str
    parameters: int
    tensors: int
    weights_file: str
    base_name: str
    files: tuple[FileEntry, ...]
    tokenizer: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def digest(self) -> Digest:
        """Names the content: the same files give the same digest wherever and whenever they are registered."""
        return content_digest(self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number measured on a checkpoint. `split` is train, eval, val or test where that is known; `step` the step it was measured at.

    `direction` is what whoever recorded it declared to be better; None leaves it to the metric's name. `data` names what it was measured on
    (of a file the BLAKE3 as 64 hex digits), empty where that is not known: only values of the same data are compared.
    """

    name: str
    value: float
    step: int | None = None
    split: str = ""
    direction: Direction | None = None
    data: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Free text with author and time."""

    text: str
    author: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a checkpoint was made of others, instead of by training.

    `action` is the verb that made it (combine, convert, extract). `parents` are checkpoints as references, in order. `detail` is what else
    it follows from and what was measured on the way, as plain JSON.
    """

    action: str
    parents: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One immutable saved state of an adapter.

    `base` is the weights fingerprint of the base model it was trained on, `architecture` the architecture fingerprint.
    `arch_version` is the caller's own label for the architecture, empty when none was given. `source` is where it was registered from.
    Of metrics with one name the last recorded counts; notes are oldest first. `origin` is None for what was trained.
    """

    adapter: AdapterName
    version: int
    digest: Digest
    manifest: Manifest
    base: Digest
    base_name: str
    architecture: Digest
    arch_version: str
    run: str
    step: int | None
    source: str
    created_at: datetime
    author: str
    metrics: tuple[Metric, ...] = ()
    notes: tuple[Note, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    environments: tuple[str, ...] = ()
    origin: Origin | None = None

    @property
    def ref(self) -> str:
        """How to ask for it: `support-bot@v12`."""
        return f"{self.adapter}@v{self.version}"

    def metric(self, name: str) -> float | None:
        """Value of a metric, or None."""
        return next((metric.value for metric in reversed(self.metrics) if metric.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Identity of a base model.

    `architecture`: config facts, tensor names, shapes and dtypes, from headers alone. `weights`: the root over each tensor's digest in
    the order of names, so that sharding and file names do not matter. `tensors`: that digest for each tensor (over dtype, shape, bytes).
    """

    architecture: Digest
    weights: Digest
    tensors: Mapping[str, Digest]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """A file of a base model. `identity` changes whenever the file does (device clock and size locally, the ETag on object stores)."""

    path: str
    size_bytes: int
    identity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model, identified by `fingerprint.weights`. `url` is the folder it is read from; `in_store` tells that the registry owns a copy.

    `config` holds `config.json` (safetensors) or `model_config.yaml` (litgpt) as read. `files` are all files of the folder that belong
    to the model; `tensors` where every tensor lies in them.
    """

    name: str
    url: str
    in_store: bool
    format: BaseFormat
    fingerprint: Fingerprint
    arch_version: str
    config: Mapping[str, Any]
    files: tuple[BaseFile, ...]
    tensors: tuple[StoredTensor, ...]
    created_at: datetime
    author: str

    @property
    def digest(self) -> Digest:
        """Its identity."""
        return self.fingerprint.weights

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.size_bytes for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.spec.elements for tensor in self.tensors)


class Level(StrEnum):
    """How bad a finding is."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result of a check. `code` is stable; `where` names a tensor, module or file; `advice` says what to do next.

    `fits` tells whether the adapter could still belong to the base: what is merely not mergeable may be recorded.
    """

    code: str
    level: Level
    where: str
    expected: str = ""
    found: str = ""
    advice: str = ""
    fits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a check found about a checkpoint and a base model."""

    checkpoint: str
    base: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Level:
        """The worst level among the findings."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in (Level.REFUSED, Level.WARNING) if level in levels), Level.PASS)

    @property
    def misfits(self) -> tuple[Finding, ...]:
        """The findings that say that adapter and base do not belong together."""
        return tuple(finding for finding in self.findings if finding.level is Level.REFUSED and not finding.fits)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeInput:
    """A checkpoint that goes into a merge: by content, with a weight."""

    checkpoint: Digest
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to merge and how. Its digest names the result: the same recipe gives the same bytes.

    `method` and `options` are those of `registry.methods`, with every option that the method has. `dtype` is None to keep each base
    tensor's own. `formula` counts changes of the arithmetic, so that a result of an older one is never taken for a newer one's.
    """

    base: Digest
    inputs: tuple[RecipeInput, ...]
    method: str = "linear"
    options: Mapping[str, str | int | float | bool | tuple[int, ...]] = field(default_factory=dict)
    dtype: DType | None = None
    formula: int = 2

    @property
    def digest(self) -> Digest:
        """BLAKE3 over the canonical JSON of all fields; without `options` where there are none, as recipes were before they had any."""
        fields_ = to_json(self)
        return digest_of(fields_ if self.options else {key: fields_[key] for key in fields_ if key != "options"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """What merging did to one tensor of the result.

    `action` is `merged` (delta added), `replaced`, `added` (the base has no such tensor) or `converted` (dtype alone); copied tensors have
    no record. `base_norm`, `delta_norm`: Frobenius norms. `changed`: share of elements that differ from the base's. `lost`: share of the
    elements that a delta reaches, but that rounding left unchanged. `coefficients`: of each input's delta in the sum, where a method that
    combines several works them out for each tensor; else none.
    """

    name: str
    action: Literal["merged", "replaced", "added", "converted"]
    base_norm: float = 0.0
    delta_norm: float = 0.0
    changed: float = 0.0
    lost: float = 0.0
    coefficients: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The immutable result of a recipe. `locations` are folders that hold it; empty text is the store.

    `checkpoints` are the inputs as references, in the recipe's order.
    """

    digest: Digest
    recipe: Recipe
    base_name: str
    checkpoints: tuple[str, ...]
    files: tuple[FileEntry, ...]
    locations: tuple[str, ...]
    note: str
    created_at: datetime
    author: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size_bytes for entry in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """A checkpoint (or the merged model made of it) went live in an environment.

    `restores` is the number of the earlier shipment that a rollback brought back. `until` is when the next one of the same adapter took
    over; None while it is live.
    """

    number: int
    environment: str
    checkpoint: str
    checkpoint_digest: Digest
    merged: Digest | None
    base: Digest
    base_name: str
    note: str
    author: str
    shipped_at: datetime
    restores: int | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the history: who did what to what. Events form a chain: each carries the hash of the one before."""

    number: int
    at: datetime
    author: str
    action: str
    subject: str
    detail: Mapping[str, Any]
    hash: str


def utc_now() -> datetime:
    """The present, aware, in UTC."""
    return datetime.now(UTC)


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, no blanks and no NaN, in UTF-8: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: object) -> Digest:
    """BLAKE3 over the canonical JSON of a value."""
    return Digest(blake3(canonical_json(value)).hexdigest())


def content_digest(files: Iterable[FileEntry]) -> Digest:
    """Names a set of files: BLAKE3 over the canonical JSON of `[path, digest]` in the order of paths."""
    return digest_of(sorted([entry.path, entry.digest.hex] for entry in files))


def to_json(value: object) -> Any:
    """A domain value as plain JSON: dataclasses become objects, digests and names text, times ISO 8601 in UTC."""
    if is_dataclass(value) and not isinstance(value, (type, Digest, AdapterName)):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [to_json(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(value)
