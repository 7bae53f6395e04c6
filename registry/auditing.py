"""The history outside of the registry: written down as JSON lines, closed by a checkpoint that may be signed, and compared with what is there.

A chain of hashes alone does not stop somebody who has the database from writing all of it anew, or from dropping its end. A checkpoint says how
far the chain went, and with which hash; one that is kept elsewhere shows both. Nothing here opens the registry.

Format of an export: an event a line, as `registry.manifest.to_json` writes it; at last `{"checkpoint": {…}, "key": …, "signature": …}`. The
signature is ECDSA with P-256 and SHA-256 over the canonical JSON of `checkpoint`, in DER and base64; `key` is the SHA-256 of the public key's
DER form. Both are empty where it is not signed.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from registry.chain import FIRST, AuditState, follow
from registry.codec import from_json, plain
from registry.disk import Translating, sync, sync_folder
from registry.errors import Changed, Conflict, CorruptFile, InvalidInput, MissingPackage, PathNotFound
from registry.manifest import Event, canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditCheckpoint:
    """How far a registry's chain went at a time: `size` events, the last of which has the hash `root`. `origin` names the registry."""

    origin: str
    size: int
    root: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCheckpoint:
    """A checkpoint with the signature on it and the SHA-256 of the public key that checks it; both empty when it is not signed."""

    checkpoint: AuditCheckpoint
    key: str = ""
    signature: str = ""


# -- write


def export(
    events: Iterable[Event], target: Path, *, origin: str, at: datetime, key: Path | None = None
) -> SignedCheckpoint:
    """Write events down and close them with a checkpoint. The chain is checked on the way; the file appears complete or not at all.

    Args:
        events: all of them, oldest first.
        target: a new file.
        origin: what the registry is called.
        at: the time to write into the checkpoint.
        key: a private P-256 key in PEM to sign it with; None leaves it unsigned.

    Raises:
        Changed: the chain is not sound; nothing is written.
        Conflict: the file is there already.
        InvalidInput, MissingPackage: the key is none, or `cryptography` is not installed.
        StorageFailed: the disk does not take it.
    """
    signer = _read_private(key) if key else None
    partial = target.with_name(f".{target.name}.partial")
    try:
        with Translating(str(target)):
            if target.exists():
                raise Conflict(str(target), "something is there already")
            with partial.open("wb") as file:
                state = _write_events(events, file)
                signed = _close(AuditCheckpoint(origin=origin, size=state.count, root=state.hash, at=at), signer)
                file.write(_line(signed))
                sync(file)
            partial.replace(target)
            sync_folder(target.absolute().parent)
    finally:
        partial.unlink(missing_ok=True)
    return signed


def _write_events(events: Iterable[Event], file: IO[bytes]) -> AuditState:
    state = AuditState(count=0, hash=FIRST)
    for event in events:
        state = follow(state, event)
        file.write(_line(event))
    return state


def _line(value: object) -> bytes:
    return json.dumps(plain(value), ensure_ascii=False).encode() + b"\n"


def _close(checkpoint: AuditCheckpoint, signer: EllipticCurvePrivateKey | None) -> SignedCheckpoint:
    if signer is None:
        return SignedCheckpoint(checkpoint=checkpoint)
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA  # noqa: PLC0415 - only who signs needs it
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    signature = signer.sign(canonical_json(plain(checkpoint)), ECDSA(SHA256()))
    return SignedCheckpoint(
        checkpoint=checkpoint,
        key=_name_of(signer.public_key()),
        signature=base64.b64encode(signature).decode(),
    )


# -- read and compare


def read_checkpoint(path: Path, key: Path | None = None) -> SignedCheckpoint:
    """The checkpoint at the end of an export, or alone in a file. The export's own events are checked against it.

    Args:
        path: what `export` wrote, or its last line.
        key: the public P-256 key in PEM that must have signed it; None takes any, signed or not.

    Raises:
        CorruptFile: it is no export, or was cut off.
        Changed: its events are not what was exported, or the signature is not this key's.
        InvalidInput, MissingPackage: the key is none, or `cryptography` is not installed.
    """
    state, signed = AuditState(count=0, hash=FIRST), None
    for number, document in _lines(path):
        if signed is not None:
            raise CorruptFile(str(path), f"line {number} follows the checkpoint")
        if "checkpoint" in document:
            signed = from_json(SignedCheckpoint, document)
        else:
            state = follow(state, from_json(Event, document))
    if signed is None:
        raise CorruptFile(str(path), "it ends without a checkpoint")
    if state.count:
        _compare(signed.checkpoint, state.count, state.hash)
    if key is not None:
        _check_signature(signed, _read_public(key), str(path))
    return signed


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with Translating(str(path), PathNotFound(str(path))), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                document = json.loads(line)
            except ValueError as error:
                raise CorruptFile(str(path), f"line {number}: {error}") from error
            if not isinstance(document, dict):
                raise CorruptFile(str(path), f"line {number}: expected an object")
            yield number, document


def check(events: Iterable[Event], checkpoints: Sequence[AuditCheckpoint]) -> AuditState:
    """Walk a registry's chain and compare it with what was written down earlier.

    Args:
        events: all of them, oldest first.
        checkpoints: of this registry, kept elsewhere.

    Raises:
        Changed: names the first event that is not as it was written; or the chain is another one than a checkpoint's, or shorter.
    """
    state, wanted = AuditState(count=0, hash=FIRST), {each.size: each for each in checkpoints}
    _compare_all(checkpoints, 0, FIRST)
    for event in events:
        state = follow(state, event)
        if state.count in wanted:
            _compare_all(checkpoints, state.count, state.hash)
    for each in checkpoints:
        if each.size > state.count:
            raise Changed("the history", f"at least {each.size} events, as on {each.at:%Y-%m-%d}", f"{state.count}")
    return state


def _compare_all(checkpoints: Iterable[AuditCheckpoint], count: int, found: str) -> None:
    for each in checkpoints:
        if each.size == count:
            _compare(each, count, found)


def _compare(checkpoint: AuditCheckpoint, count: int, found: str) -> None:
    if checkpoint.size != count:
        raise Changed("the history", f"{checkpoint.size} events", str(count))
    if checkpoint.root != found:
        raise Changed(f"the history up to event {count}", checkpoint.root, found)


# -- keys


def _check_signature(signed: SignedCheckpoint, key: EllipticCurvePublicKey, path: str) -> None:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - only who checks needs it
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA  # noqa: PLC0415
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    if not signed.signature:
        raise Changed(path, "a signature", "none")
    try:
        signature = base64.b64decode(signed.signature, validate=True)
        key.verify(signature, canonical_json(plain(signed.checkpoint)), ECDSA(SHA256()))
    except (InvalidSignature, binascii.Error) as error:
        raise Changed(
            path, f"a signature by the key {_name_of(key)[:12]}", f"one by {signed.key[:12]}, or another text"
        ) from error


def _name_of(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415

    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _read_private(path: Path) -> EllipticCurvePrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage("cryptography", "sign") from error
    try:
        found = load_pem_private_key(_read_pem(path), None)
    except (ValueError, TypeError) as error:
        raise InvalidInput("key", os.fspath(path), "not a private key in PEM, without a password") from error
    if not isinstance(found, EllipticCurvePrivateKey) or not isinstance(found.curve, SECP256R1):
        raise InvalidInput("key", os.fspath(path), "expected a P-256 key")
    return found


def _read_public(path: Path) -> EllipticCurvePublicKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage("cryptography", "sign") from error
    try:
        found = load_pem_public_key(_read_pem(path))
    except ValueError as error:
        raise InvalidInput("key", os.fspath(path), "not a public key in PEM") from error
    if not isinstance(found, EllipticCurvePublicKey) or not isinstance(found.curve, SECP256R1):
        raise InvalidInput("key", os.fspath(path), "expected a P-256 key")
    return found


def _read_pem(path: Path) -> bytes:
    with Translating(str(path), PathNotFound(str(path))):
        return path.read_bytes()
