"""Every error the registry raises on purpose.

Errors carry fields, not prose: `code` is stable, the instance attributes say what, where, expected and found. The sentence, the hint
and the exit code or HTTP status are decided at the edge (see `cli/errors.py`).

    RegistryError
    ├── InvalidInput            the caller's words are wrong
    │   ├── InvalidReference    not a name, version, alias, step, metric or digest
    │   ├── InvalidFilter       a --where expression that does not parse
    │   ├── InvalidRecipe       a merge option that makes no sense
    │   ├── InvalidSetting      an environment variable or settings file
    │   ├── TooLarge            more bytes than are taken at once
    │   ├── DirectionUnknown    is lower or higher better for this metric?
    │   └── MixedData           values of a metric that were measured on different data
    ├── MissingPackage          something optional is not installed
    ├── NotFound                nothing has this name
    │   ├── PathNotFound
    │   ├── UnknownAdapter, UnknownCheckpoint, UnknownBase, UnknownMerged, UnknownEnvironment
    │   ├── UnknownRepository, UnknownRevision
    │   ├── UnknownJob, UnknownToken, UnknownWebhook, UnknownSignature, UnknownPolicy, UnknownRecipe
    │   ├── NoTokenizer, NoChatTemplate, NoTrainerState
    │   └── UnknownMetric
    ├── Ambiguous               several things have this name
    ├── Conflict                the registry's state forbids it
    │   ├── NameTaken
    │   ├── InUse               aliased, shipped or an input of a merge
    │   ├── MergeRunning        another process is at it
    │   ├── KeyReused           an idempotency key that stands for another request
    │   ├── Outdated            not what whoever asked has seen
    │   ├── Unreachable         a base model where not every worker can read it
    │   └── DatabaseVersion     the database is older or newer than this package
    ├── UnreadableFile          the bytes are not what they should be
    │   ├── NotACheckpoint      no known format in this directory
    │   ├── CorruptFile         truncated, malformed or against the format's rules
    │   └── UnsafePickle        a pickle that names code
    ├── Refused                 an incompatible checkpoint; carries the whole report
    ├── BelowPolicy             a checkpoint that is not good enough for an environment
    ├── Changed                 bytes differ from what was recorded
    │   ├── BaseChanged
    │   └── DamagedBlob
    │       └── BlobSwept   between storing and recording it; again is fine
    ├── NotServable             an engine does not take a checkpoint in this way
    ├── NotConvertible          something has no place in the other layout, or did not come back the same
    ├── NothingMerged           the result would be the base itself
    ├── NotFinite               a result overflows, or the base has such a value
    ├── ProgramFailed           a program of the caller's that was to measure something
    ├── OutOfMemory             a model that does not fit, or not what is asked of it
    ├── StorageFailed           the store or disk does not take the bytes
    ├── AccessDenied            not for the one who asks
    │   ├── Unauthenticated     no token, or none that is good
    │   ├── Forbidden           a role that may not do this, or another namespace
    │   └── TooManyTries        wait before trying again
    ├── Cancelled               somebody stopped it
    └── ServerFailed            the registry's server does not answer, or not as it should
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from registry.manifest import Report


class RegistryError(Exception):
    """Root of the tree; never raised itself."""

    code: ClassVar[str] = "error"

    def __init__(self, **fields: object) -> None:
        super().__init__(*fields.values())
        self.fields = fields

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{self.code}({shown})"


class InvalidInput(RegistryError):
    """A value the caller gave is not acceptable. Fields: `field`, `value`, `reason`."""

    code = "invalid_input"

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(field=field, value=value, reason=reason)
        self.field, self.value, self.reason = field, value, reason


class MissingPackage(RegistryError):
    """Something optional that this needs is not installed. Fields: `package`, and `extra`, which brings it along."""

    code = "missing_package"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package=package, extra=extra)
        self.package, self.extra = package, extra


class InvalidReference(InvalidInput):
    """A reference that is none of the accepted forms."""

    code = "invalid_reference"

    def __init__(self, value: str, reason: str) -> None:
        super().__init__("reference", value, reason)


class InvalidFilter(InvalidInput):
    """A filter expression that does not parse. `position` is a 0-based offset into the text, in characters."""

    code = "invalid_filter"

    def __init__(self, value: str, position: int, reason: str) -> None:
        super().__init__("where", value, reason)
        self.fields["position"] = self.position = position


class InvalidRecipe(InvalidInput):
    """A recipe option that makes no sense."""

    code = "invalid_recipe"


class InvalidSetting(InvalidInput):
    """A setting that cannot be used."""

    code = "invalid_setting"


class TooLarge(InvalidInput):
    """More bytes than are taken at once."""

    code = "too_large"


class DirectionUnknown(InvalidInput):
    """Nobody has said whether lower or higher is better for this metric."""

    code = "direction_unknown"

    def __init__(self, metric: str) -> None:
        super().__init__("metric", metric, "is lower or higher better?")
        self.fields["metric"] = self.metric = metric


class MixedData(InvalidInput):
    """Values of a metric that were measured on different data cannot be compared. Fields: `metric`, `data` (empty text where not known)."""

    code = "mixed_data"

    def __init__(self, metric: str, data: Sequence[str]) -> None:
        super().__init__("metric", metric, "measured on different data")
        self.fields["metric"], self.fields["data"] = metric, tuple(data)
        self.metric, self.data = metric, tuple(data)


class NotFound(RegistryError):
    """Nothing goes by this name. Fields: `kind`, `name`, `near` (similar names that do exist)."""

    code = "not_found"
    kind: ClassVar[str] = "thing"

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        super().__init__(kind=self.kind, name=name, near=tuple(near))
        self.name, self.near = name, tuple(near)


class PathNotFound(NotFound):
    """No such file or directory."""

    code = "path_not_found"
    kind = "path"


class UnknownAdapter(NotFound):
    """No adapter of this name."""

    code = "unknown_adapter"
    kind = "adapter"


class UnknownCheckpoint(NotFound):
    """No checkpoint answers to this reference."""

    code = "unknown_checkpoint"
    kind = "checkpoint"


class UnknownBase(NotFound):
    """No base model answers to this name, digest or path."""

    code = "unknown_base"
    kind = "base model"


class UnknownMerged(NotFound):
    """No merged model answers to this reference."""

    code = "unknown_merged"
    kind = "merged model"


class UnknownEnvironment(NotFound):
    """Nothing was ever shipped to this environment (or nothing to roll back to)."""

    code = "unknown_environment"
    kind = "environment"


class UnknownMetric(NotFound):
    """No candidate has this metric."""

    code = "unknown_metric"
    kind = "metric"


class UnknownPolicy(NotFound):
    """The adapter has no policy."""

    code = "unknown_policy"
    kind = "policy of"


class UnknownRecipe(NotFound):
    """No recipe of this id is kept."""

    code = "unknown_recipe"
    kind = "kept recipe"


class UnknownRepository(NotFound):
    """No repository of this id, as clients of the Hugging Face Hub name them. Fields: as `NotFound`, and `reason`, where it can be told."""

    code = "unknown_repository"
    kind = "repository"

    def __init__(self, name: str, near: Sequence[str] = (), reason: str = "") -> None:
        super().__init__(name, near)
        self.fields["reason"] = self.reason = reason


class UnknownRevision(NotFound):
    """The repository has no such revision."""

    code = "unknown_revision"
    kind = "revision"


class UnknownJob(NotFound):
    """No job has this number."""

    code = "unknown_job"
    kind = "job"


class UnknownToken(NotFound):
    """No token has this name or number."""

    code = "unknown_token"
    kind = "token"


class UnknownWebhook(NotFound):
    """No webhook has this number."""

    code = "unknown_webhook"
    kind = "webhook"


class UnknownSignature(NotFound):
    """Nobody has signed this."""

    code = "unknown_signature"
    kind = "signature"


class Ambiguous(RegistryError):
    """A digest prefix or a name that fits several things. Fields: `value`, `matches`."""

    code = "ambiguous"

    def __init__(self, value: str, matches: Sequence[str]) -> None:
        super().__init__(value=value, matches=tuple(matches))
        self.value, self.matches = value, tuple(matches)


class Conflict(RegistryError):
    """The state of the registry forbids this. Fields: `subject`, `reason`."""

    code = "conflict"

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject=subject, reason=reason)
        self.subject, self.reason = subject, reason


class NameTaken(Conflict):
    """The name belongs to something else already."""

    code = "name_taken"


class InUse(Conflict):
    """Something still points at it."""

    code = "in_use"


class MergeRunning(Conflict):
    """Another process is writing this very merge."""

    code = "merge_running"


class KeyReused(Conflict):
    """An idempotency key that was used for another request."""

    code = "key_reused"


class Outdated(Conflict):
    """What was to be changed is not what whoever asked has seen. `subject` is what, `reason` how so."""

    code = "outdated"


class Unreachable(Conflict):
    """A base model that lies where other machines cannot read it. `subject` is its name, `reason` the place."""

    code = "unreachable"


class DatabaseVersion(Conflict):
    """The database schema and this package do not belong together."""

    code = "database_version"


class UnreadableFile(RegistryError):
    """A file is not what it should be. Fields: `path`, `reason`."""

    code = "unreadable_file"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path=path, reason=reason)
        self.path, self.reason = path, reason


class NotACheckpoint(UnreadableFile):
    """No known format in this place."""

    code = "not_a_checkpoint"


class CorruptFile(UnreadableFile):
    """Truncated, malformed, or against the rules of its format."""

    code = "corrupt_file"


class UnsafePickle(UnreadableFile):
    """A pickle that asks for something besides tensors and plain containers."""

    code = "unsafe_pickle"


class Refused(RegistryError):
    """The checkpoint does not fit; `report` holds every finding."""

    code = "refused"

    def __init__(self, report: Report) -> None:
        super().__init__(report=report)
        self.report = report


class BelowPolicy(RegistryError):
    """Not good enough for an environment that its adapter's policy guards. Fields: `checkpoint`, `environment`, `failures` (conditions, and
    what there is instead)."""

    code = "below_policy"

    def __init__(self, checkpoint: str, environment: str, failures: Sequence[str]) -> None:
        super().__init__(checkpoint=checkpoint, environment=environment, failures=tuple(failures))
        self.checkpoint, self.environment, self.failures = checkpoint, environment, tuple(failures)


class NoChatTemplate(NotFound):
    """Neither the adapter nor its base model says how a conversation is written."""

    code = "no_chat_template"
    kind = "chat template of"


class NoTokenizer(NotFound):
    """Neither the adapter nor its base model has a tokenizer."""

    code = "no_tokenizer"
    kind = "tokenizer of"


class NoTrainerState(NotFound):
    """A checkpoint that was registered without what its trainer needs to go on. Fields beside the name: `missing`, in words."""

    code = "no_trainer_state"
    kind = "trainer's state of"

    def __init__(self, name: str, missing: Sequence[str]) -> None:
        super().__init__(name)
        self.fields["missing"] = self.missing = list(missing)


class NotServable(RegistryError):
    """A serving engine does not take a checkpoint in this way. Fields: `checkpoint`, `engine` (and in which way), `reason`, `advice`."""

    code = "not_servable"

    def __init__(self, checkpoint: str, engine: str, reason: str, advice: str) -> None:
        super().__init__(checkpoint=checkpoint, engine=engine, reason=reason, advice=advice)
        self.checkpoint, self.engine, self.reason, self.advice = checkpoint, engine, reason, advice


class NotConvertible(RegistryError):
    """What cannot be written in another layout, and every reason. Fields: `subject`, `target`, `reasons`."""

    code = "not_convertible"

    def __init__(self, subject: str, target: str, reasons: Sequence[str]) -> None:
        super().__init__(subject=subject, target=target, reasons=tuple(reasons))
        self.subject, self.target, self.reasons = subject, target, tuple(reasons)


class Changed(RegistryError):
    """Bytes are not those that were recorded. Fields: `subject`, `expected`, `found`."""

    code = "changed"

    def __init__(self, subject: str, expected: str, found: str) -> None:
        super().__init__(subject=subject, expected=expected, found=found)
        self.subject, self.expected, self.found = subject, expected, found


class BaseChanged(Changed):
    """A base model is no longer what its fingerprint says."""

    code = "base_changed"


class DamagedBlob(Changed):
    """An object in the store does not hash to its name."""

    code = "damaged_blob"


class BlobSwept(DamagedBlob):
    """Blobs that a sweep took between storing and recording them; `digests` are the hex digits of what was to be recorded."""

    code = "blob_swept"

    def __init__(self, subject: str, expected: str, found: str, digests: Sequence[str] = ()) -> None:
        super().__init__(subject, expected, found)
        self.fields["digests"] = self.digests = tuple(digests)


class NothingMerged(RegistryError):
    """Not one element of the base would change. Fields: `subject`, `largest_delta`."""

    code = "nothing_merged"

    def __init__(self, subject: str, largest_delta: float) -> None:
        super().__init__(subject=subject, largest_delta=largest_delta)
        self.subject, self.largest_delta = subject, largest_delta


class NotFinite(RegistryError):
    """A merged value is NaN or infinite: the dtype is too narrow for it, or the base itself has such a value. Fields: `tensor`, `dtype`."""

    code = "not_finite"

    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__(tensor=tensor, dtype=dtype)
        self.tensor, self.dtype = tensor, dtype


class ProgramFailed(RegistryError):
    """A program of the caller's failed. Fields: `program`, `subject` (what it was run on), `reason`."""

    code = "program_failed"

    def __init__(self, program: str, subject: str, reason: str) -> None:
        super().__init__(program=program, subject=subject, reason=reason)
        self.program, self.subject, self.reason = program, subject, reason


class OutOfMemory(RegistryError):
    """A device has not enough memory. Fields: `what` (it was needed for), `device`."""

    code = "out_of_memory"

    def __init__(self, what: str, device: str) -> None:
        super().__init__(what=what, device=device)
        self.what, self.device = what, device


class StorageFailed(RegistryError):
    """The store, disk or file system refused. Fields: `url`, `reason`."""

    code = "storage_failed"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url=url, reason=reason)
        self.url, self.reason = url, reason


class Cancelled(RegistryError):
    """Background work that somebody stopped. Fields: `subject`."""

    code = "cancelled"

    def __init__(self, subject: str) -> None:
        super().__init__(subject=subject)
        self.subject = subject


class ServerFailed(RegistryError):
    """The registry's server cannot be reached, or gives no answer of its own. Fields: `url`, `reason`."""

    code = "server_failed"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url=url, reason=reason)
        self.url, self.reason = url, reason


class AccessDenied(RegistryError):
    """Not for the one who asks. Fields: `reason`."""

    code = "access_denied"

    def __init__(self, reason: str) -> None:
        super().__init__(reason=reason)
        self.reason = reason


class Unauthenticated(AccessDenied):
    """No token, or one that is unknown, expired or revoked."""

    code = "unauthenticated"


class Forbidden(AccessDenied):
    """The token's role or namespaces do not allow it."""

    code = "forbidden"


class TooManyTries(AccessDenied):
    """Too many wrong tokens from one address. Fields: `reason`, `retry_seconds`."""

    code = "too_many_tries"

    def __init__(self, reason: str, retry_seconds: int) -> None:
        RegistryError.__init__(self, reason=reason, retry_seconds=retry_seconds)
        self.reason, self.retry_seconds = reason, retry_seconds
