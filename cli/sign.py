"""`ckpt sign`, `signatures`, `verify-signature`, `provenance`: who vouches for which bytes, and what they were made of."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import output
from cli.options import Json, Subject
from registry import connect
from registry.codec import plain
from registry.disk import Translating
from registry.errors import InvalidInput, PathNotFound, UnknownMerged
from registry.manifest import Checkpoint, Merged

_Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it to this file, too.")]
_INLINE_BYTES = 64 << 20


def sign(
    ref: Subject,
    key: Annotated[
        Path, typer.Option("--key", metavar="PEM", help="The private key (P-256); with --attach the public one.")
    ],
    attach: Annotated[
        Path | None, typer.Option("--attach", metavar="FILE", help="Check and keep this signature instead.")
    ] = None,
    out: _Out = None,
    json: Json = False,
) -> None:
    """Sign all files of a checkpoint or merged model, as OpenSSF's model-signing does."""
    with connect() as registry, output.progress() as progress:
        subject = registry.subject(ref)
        if attach is None:
            signature = registry.sign(subject, key, progress)
        else:
            signature = registry.add_signature(subject, _read_bundle(attach), key=key, progress=progress)
    _write(out, signature.bundle)
    if json:
        output.print_json(plain(signature))
    else:
        output.print_line(f"signed {_name(subject)} with key {signature.key[:12]}")


def verify_signature(
    ref: Subject,
    key: Annotated[
        Path, typer.Option("--key", "--cert", metavar="PEM", help="The public key, or the certificate that is trusted.")
    ],
    out: _Out = None,
    json: Json = False,
) -> None:
    """Read a checkpoint or merged model whole, and see that it is what was signed."""
    with connect() as registry, output.progress() as progress:
        subject = registry.subject(ref)
        signature = registry.verify_signature(subject, key, progress)
    _write(out, signature.bundle)
    if json:
        output.print_json(plain(signature))
    else:
        when = output.when(signature.created_at)
        output.print_line(f"{_name(subject)} is what was signed with key {signature.key[:12]} ({when})")


def signatures(ref: Subject, json: Json = False) -> None:
    """List the signatures of a checkpoint or merged model."""
    with connect() as registry:
        found = registry.signatures(registry.subject(ref))
    if json:
        output.print_json(plain(found))
        return
    rows = [[each.key[:12], each.kind, each.author, output.when(each.created_at)] for each in found]
    output.print_table(["key", "of", "by", "signed"], rows)


def provenance(
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="A merged model, by its digest.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", help="Sign it with this private key, and keep the signature.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it here, not to stdout.")] = None,
) -> None:
    """Say what a merged model was made of, and how: SLSA provenance as an in-toto statement."""
    with connect() as registry, output.progress() as progress:
        subject = registry.subject(merged)
        if not isinstance(subject, Merged):
            raise UnknownMerged(merged)
        document: Any = (
            registry.sign_provenance(subject, key, progress).bundle if key else registry.provenance(subject, progress)
        )
    if out is None:
        output.print_json(document)
    else:
        _write(out, document)


def _name(subject: Checkpoint | Merged) -> str:
    return subject.ref if isinstance(subject, Checkpoint) else f"merged model {subject.digest.short}"


def _read_bundle(path: Path) -> dict[str, Any]:
    with Translating(str(path), missing=PathNotFound(str(path))):
        size_bytes = path.stat().st_size
        data = path.read_bytes() if size_bytes <= _INLINE_BYTES else b""
    try:
        found = json_.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("signature", str(path), "not JSON") from error
    if not isinstance(found, dict):
        raise InvalidInput("signature", str(path), "not a Sigstore bundle")
    return found


def _write(path: Path | None, document: Any) -> None:
    if path is not None:
        with Translating(str(path)):
            path.write_text(json_.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        output.say(f"written to {output.plain(str(path))}")
