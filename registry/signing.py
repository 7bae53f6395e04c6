"""Sign what is in the registry, check signatures against the bytes themselves, and state what a merged model was made of.

A signature is about the SHA-256 of every file. Those of adapters' files are recorded when they are registered; those of merged models are
computed when they are first asked for, and kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from registry.disk import Translating
from registry.errors import Changed, InvalidInput, UnknownSignature
from registry.locations import Location
from registry.manifest import Checkpoint, FileEntry, Merged
from registry.merge.plan import PROVENANCE_FILE
from registry.merging import merged_folder
from registry.provenance import PREDICATE_TYPE, Making, make_statement
from registry.refs import CheckpointRef
from registry.teamwork import Signature
from registry.workspace import Progress, Workspace, silent

CONTENT, PROVENANCE = "content", "provenance"
_BLOCK_BYTES = 4 << 20
_Subject = Checkpoint | Merged


def sign(workspace: Workspace, subject: _Subject, key: Path, progress: Progress = silent) -> Signature:
    """Sign all files of a checkpoint or merged model, and keep the signature.

    Args:
        key: a private key in PEM, of P-256, P-384 or P-521.

    Raises:
        MissingPackage: model-signing is not installed.
        PathNotFound, InvalidInput: no key is there, or none that can sign.
        Changed: a file is not what was recorded.
    """
    from registry import bundles  # noqa: PLC0415 - half a second, and not always installed

    key_name = bundles.key_name(key)  # before anything long
    files = signable_files(workspace, subject, progress)
    return _keep(workspace, subject, CONTENT, key_name, bundles.make_bundle(_name(subject), listed(files), key))


def sign_provenance(workspace: Workspace, merged: Merged, key: Path, progress: Progress = silent) -> Signature:
    """Sign the statement of what a merged model was made of, and keep it.

    Raises:
        MissingPackage, PathNotFound, InvalidInput, Changed: as `sign` and `provenance`.
    """
    from registry import bundles  # noqa: PLC0415 - as above

    key_name = bundles.key_name(key)
    bundle = bundles.seal_statement(provenance(workspace, merged, progress), key)
    return _keep(workspace, merged, PROVENANCE, key_name, bundle)


def add_signature(
    workspace: Workspace,
    subject: _Subject,
    bundle: Mapping[str, Any],
    *,
    key: Path | bytes | None = None,
    progress: Progress = silent,
) -> Signature:
    """Keep a signature that was made elsewhere, such as by model-signing's own command on the files that `ckpt pull` wrote.

    One that is not checked does not take the place of another with the same key: anybody can write such a thing.

    Args:
        bundle: the Sigstore bundle.
        key: the public key or the certificates to check it with, in PEM; None to leave that to whoever verifies.

    Raises:
        Changed: it is about other files, or was made with another key.
        MissingPackage, PathNotFound, InvalidInput: as `sign`, or the bundle is none.
    """
    from registry import bundles  # noqa: PLC0415 - as above

    opened = bundles.open_bundle(bundle)
    files = listed(signable_files(workspace, subject, progress))
    if opened.kind == CONTENT:
        bundles.compare_files(bundles.signed_files(opened), files)
    else:
        _check_subject(opened.statement, subject, files)
    if opened.has_certificate:
        bundles.check_certificate_seal(bundle)
    if key is not None:
        bundles.check_seal(bundle, key)
    is_checked = opened.has_certificate or key is not None
    return _keep(workspace, subject, opened.kind, opened.key, bundle, is_checked=is_checked)


def _check_subject(statement: Mapping[str, Any], subject: _Subject, files: Sequence[tuple[str, str]]) -> None:
    """See that a statement is the provenance of a merged model."""
    from registry import bundles  # noqa: PLC0415 - as above

    if statement.get("predicateType") != PREDICATE_TYPE or not isinstance(subject, Merged):
        raise InvalidInput("signature", "", "neither a signature of files nor the provenance of a merged model")
    try:
        signed = {str(each["name"]): str(each["digest"]["sha256"]) for each in statement["subject"]}
    except (KeyError, TypeError) as error:
        raise InvalidInput("signature", "", "a statement about nothing") from error
    bundles.compare_files(signed, files)


def _keep(
    workspace: Workspace,
    subject: _Subject,
    kind: str,
    key_name: str,
    bundle: Mapping[str, Any],
    *,
    is_checked: bool = True,
) -> Signature:
    with workspace.writing() as change:
        known = change.catalog.signatures.of(subject.digest)
        same = next((each for each in known if (each.kind, each.key) == (kind, key_name)), None)
        if same is not None and not is_checked:
            return same
        signature = change.catalog.signatures.add(
            subject.digest, kind, key_name, bundle, author=change.author, at=change.at
        )
        merged = {"merged": subject.digest.hex} if isinstance(subject, Merged) else {}
        change.record("sign", _ref(subject), kind=kind, key=key_name, **merged)
        return signature


def verify_signature(workspace: Workspace, subject: _Subject, key: Path, progress: Progress = silent) -> Signature:
    """Read a checkpoint or merged model whole, and see that it is what was signed with a key.

    Args:
        key: the public key, or the certificates that are trusted, in PEM.

    Returns:
        The signature that holds.

    Raises:
        UnknownSignature: nobody has signed it.
        Changed: not with this key; or a file is not what was signed, or not what was recorded.
        MissingPackage, PathNotFound, InvalidInput: as `sign`.
    """
    from registry import bundles  # noqa: PLC0415 - as above

    with workspace.reading() as catalog:
        signature = find_signature(catalog.signatures.of(subject.digest), subject, key)
    bundles.check_seal(signature.bundle, key)  # before anything long
    bundles.check_bundle(signature.bundle, listed(_read(workspace, subject, _files(subject), progress)), key)
    return signature


def find_signature(known: Sequence[Signature], subject: _Subject, key: Path) -> Signature:
    """The content signature, of those that are known of a subject, that a key or certificate is to be tried on.

    Raises:
        UnknownSignature: there is none at all.
        Changed: there are others' only.
    """
    from registry import bundles  # noqa: PLC0415 - as above

    content = [each for each in known if each.kind == CONTENT]
    if not content:
        raise UnknownSignature(_ref(subject))
    if bundles.is_certificate(key):
        fitting = [each for each in content if bundles.open_bundle(each.bundle).has_certificate]
        name = "a certificate"
    else:
        name = bundles.key_name(key)
        fitting = [each for each in content if each.key == name]
    if not fitting:
        raise Changed(f"the key of the signature of {_ref(subject)}", ", ".join(each.key for each in content), name)
    return fitting[-1]


# -- what is signed


def signable_files(workspace: Workspace, subject: _Subject, progress: Progress = silent) -> tuple[FileEntry, ...]:
    """The files of a checkpoint or merged model, each with its SHA-256. Files whose SHA-256 is not known are read, and it is kept.

    Raises:
        Changed: a file that is read is not what was recorded.
        PathNotFound: a merged model is in none of its places any more.
    """
    files = _files(subject)
    with workspace.reading() as catalog:
        known = catalog.signatures.sha256_of(entry.digest for entry in files if not entry.sha256)
    files = tuple(replace(entry, sha256=entry.sha256 or known.get(entry.digest, "")) for entry in files)
    missing = [entry for entry in files if not entry.sha256]
    if not missing:
        return files
    read = {entry.path: entry for entry in _read(workspace, subject, missing, progress)}
    with workspace.writing() as change:
        change.catalog.signatures.keep_sha256(read.values())
    return tuple(read.get(entry.path, entry) for entry in files)


def listed(files: Sequence[FileEntry]) -> list[tuple[str, str]]:
    """Paths and SHA-256, as `registry.bundles` takes them."""
    return [(entry.path, entry.sha256) for entry in files]


def _read(
    workspace: Workspace, subject: _Subject, files: Sequence[FileEntry], progress: Progress
) -> tuple[FileEntry, ...]:
    """Files with the SHA-256 of the bytes that there are now.

    Raises:
        Changed: one is not what was recorded.
    """
    total = sum(entry.size_bytes for entry in files)
    folder = merged_folder(workspace, subject) if isinstance(subject, Merged) else workspace.folder_of(subject)
    with closing(folder):
        return tuple(_hash(folder, entry, progress, total) for entry in files)


def _hash(folder: Location, entry: FileEntry, progress: Progress, total_bytes: int) -> FileEntry:
    name, sha256 = blake3(), hashlib.sha256()
    with Translating(f"{folder.url}/{entry.path}"), folder.open(entry.path) as source:
        while block := source.read(_BLOCK_BYTES):
            name.update(block)
            sha256.update(block)
            progress("reading", len(block), total_bytes)
    if name.hexdigest() != entry.digest.hex:
        raise Changed(f"{folder.url}/{entry.path}", str(entry.digest), f"blake3:{name.hexdigest()}")
    return replace(entry, sha256=sha256.hexdigest())


def _files(subject: _Subject) -> tuple[FileEntry, ...]:
    return subject.files if isinstance(subject, Merged) else subject.manifest.files


def _ref(subject: _Subject) -> str:
    return subject.checkpoints[0] if isinstance(subject, Merged) else subject.ref


def _name(subject: _Subject) -> str:
    """What the statement calls the files, in one part of a path as model-signing has it."""
    return subject.digest.hex if isinstance(subject, Merged) else subject.ref.replace("/", "_")


# -- what it was made of


def provenance(workspace: Workspace, merged: Merged, progress: Progress = silent) -> dict[str, Any]:
    """What a merged model was made of, and how; see `registry.provenance`.

    Raises:
        Changed, PathNotFound: as `signable_files`.
    """
    files = signable_files(workspace, merged, progress)
    with workspace.reading() as catalog:
        making = Making(
            merged=merged,
            files=files,
            base=catalog.bases.find(merged.recipe.base.hex),
            inputs=[catalog.checkpoints.resolve(CheckpointRef.parse(each)) for each in merged.checkpoints],
            tools=_tools(workspace, merged),
            began_at=catalog.signatures.merge_began(merged.recipe.digest),
        )
    return make_statement(making)


def _tools(workspace: Workspace, merged: Merged) -> dict[str, str]:
    """The versions of what merged it, from its `merge.json`, which the store keeps wherever the model is."""
    entry = next(entry for entry in merged.files if entry.path == PROVENANCE_FILE)
    with workspace.store.open(entry.digest) as stream:
        tools: dict[str, str] = json.load(stream)["tool"]
    return tools
