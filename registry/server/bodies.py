"""What routes take and answer where that is no domain value by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.manifest import BaseModel, Checkpoint, FileEntry, Merged, Metric, Report, Shipment
from registry.mixing import Mixture
from registry.policies import KeptPolicy
from registry.refs import Digest
from registry.registering import Received, Registration
from registry.teamwork import Role
from registry.tensors import DType
from registry.training_state import Beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    """Nothing more than that it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a reference means; `kind` says which of the two `value` is."""

    kind: Literal["checkpoint", "merged"]
    value: Checkpoint | Merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An error: its stable code, and what it is about."""

    code: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDetails:
    """A checkpoint with what it comes from and what came of it. `problem` says why there is no `report`."""

    checkpoint: Checkpoint
    base: BaseModel
    report: Report | None
    problem: Problem | None
    merged: tuple[Merged, ...]
    shipments: tuple[Shipment, ...]
    previous: str
    following: str
    children: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundAround:
    """What the place of a checkpoint's files told: the adapter's name, run, step and metrics; `left_out` are files not taken, and why; `began`
    is what its run went on from.
    """

    adapter: str = ""
    run: str = ""
    step: int | None = None
    metrics: tuple[Metric, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    began: Beginning | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SentCheckpoint:
    """A checkpoint whose files were sent before: what the user says of it, and what was found around it. `said.base` names a recorded base."""

    files: tuple[FileEntry, ...]
    said: Registration
    found: FoundAround = FoundAround()

    def received(self) -> Received:
        """The same, as it is registered."""
        found = self.found
        return Received(
            files=self.files,
            said=self.said,
            adapter=found.adapter,
            run=found.run,
            step=found.step,
            metrics=found.metrics,
            left_out=found.left_out,
            began=found.began,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewNote:
    """A note on a checkpoint."""

    checkpoint: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TagChange:
    """Tags to set on a checkpoint, and keys to take away."""

    checkpoint: str
    tags: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMetrics:
    """Numbers measured on a checkpoint."""

    checkpoint: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAlias:
    """An alias, and the checkpoint that it is to point to."""

    checkpoint: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasSet:
    """Where an alias pointed before."""

    before: Checkpoint | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SentBase:
    """A base model that was fingerprinted elsewhere. `copied` are its files, if they were sent; else it is read from its `url`."""

    base: BaseModel
    copied: tuple[FileEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAt:
    """A base model at a URL that the server reads itself."""

    url: str
    name: str = ""
    arch_version: str = ""
    copy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A merge to be looked at before it is done."""

    checkpoints: tuple[str, ...]
    mixture: Mixture | None = None
    dtype: DType | None = None
    allow_lossy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRecipe:
    """A merge to be kept without being carried out."""

    checkpoints: tuple[str, ...]
    mixture: Mixture | None = None
    dtype: DType | None = None
    allow_lossy: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """Work for the background: `kind` is the verb, `arguments` what it takes, `subject` what it is about, for people."""

    kind: str
    arguments: Mapping[str, Any]
    subject: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedBlob:
    """A blob that a client has."""

    digest: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedBlobs:
    """Blobs that a client has."""

    files: tuple[SizedBlob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingBlobs:
    """Those of the offered blobs that have to be sent; the others are kept for a day."""

    missing: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """A blob that was stored."""

    digest: Digest
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SentParts:
    """The parts of a file that have arrived, by number, with their sizes in bytes."""

    parts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """That all parts of a file were sent: its size, and how many there are."""

    size_bytes: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewShipment:
    """What went live where, and why; `override` says why although the adapter's policy is against it."""

    subject: str
    environment: str
    note: str = ""
    override: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPolicy:
    """What makes a checkpoint of an adapter good enough."""

    adapter: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySet:
    """The policy that an adapter had before."""

    before: KeptPolicy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepWanted:
    """What is worth keeping of an adapter; a dry run only says what would be removed."""

    adapter: str
    rule: str
    dry_run: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Where to bring back what was live before; `adapter` says of which one, where several are live."""

    environment: str
    adapter: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """What was live, and what is now."""

    before: Shipment
    now: Shipment


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWanted:
    """A token to be made. `namespaces` limit it; without `expires_seconds` it is good until it is revoked."""

    name: str
    role: Role
    namespaces: tuple[str, ...] = ()
    expires_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookWanted:
    """An address that is to be told of actions."""

    url: str
    actions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepWanted:
    """How long what nothing needs stays marked before it is deleted; a dry run only says what would be."""

    grace_seconds: float = 86_400
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SentSignature:
    """A signature that was made elsewhere: of what, and the bundle, which tells its kind."""

    subject: str
    kind: str = ""
    bundle: Mapping[str, Any]
