"""Signatures of checkpoints and merged models, and the digests that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, final

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db.tables import BlobRow, JobRow, SignatureRow
from registry.manifest import FileEntry
from registry.refs import Digest
from registry.teamwork import Signature

_AT_ONCE = 500  # values in one question


@final
class Signatures:
    """The signatures, by the digest of what is signed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def of(self, subject: Digest) -> list[Signature]:
        """Every signature of some content, the oldest first."""
        rows = self._session.scalars(
            select(SignatureRow).where(SignatureRow.subject_digest == subject.hex).order_by(SignatureRow.id)
        )
        return [_value(row) for row in rows]

    def add(
        self, subject: Digest, kind: str, key: str, bundle: Mapping[str, Any], *, author: str, at: datetime
    ) -> Signature:
        """Keep a signature, in place of an earlier one with the same key.

        Args:
            subject: the digest of the checkpoint or merged model.
            kind: `content` or `provenance`.
            key: SHA-256 of the public key, as hex digits.
            bundle: the Sigstore bundle.
            author: who brings it.
            at: when; aware.
        """
        row = self._session.scalar(
            select(SignatureRow).where(
                SignatureRow.subject_digest == subject.hex, SignatureRow.kind == kind, SignatureRow.key_sha256 == key
            )
        )
        if row is None:
            row = SignatureRow(subject_digest=subject.hex, kind=kind, key_sha256=key)
            self._session.add(row)
        row.bundle, row.author, row.created_at = dict(bundle), author, at
        self._session.flush()
        return _value(row)

    # -- what they are about

    def sha256_of(self, digests: Iterable[Digest]) -> dict[Digest, str]:
        """The SHA-256 of blobs, as hex digits, as far as they are known."""
        wanted, found = sorted({digest.hex for digest in digests}), {}
        for start in range(0, len(wanted), _AT_ONCE):
            rows = self._session.execute(
                select(BlobRow.digest, BlobRow.sha256).where(BlobRow.digest.in_(wanted[start : start + _AT_ONCE]))
            )
            found.update({Digest(digest): sha256 for digest, sha256 in rows if sha256})
        return found

    def keep_sha256(self, entries: Iterable[FileEntry]) -> None:
        """Fill in the SHA-256 of blobs that are recorded; others have no place for it."""
        known = {entry.digest.hex: entry.sha256 for entry in entries if entry.sha256}
        for row in self._session.scalars(select(BlobRow).where(BlobRow.digest.in_(known))):
            row.sha256 = known[row.digest]
        self._session.flush()

    def merge_began(self, recipe: Digest) -> datetime | None:
        """When workers began the merge that gave a recipe's result; None when it was not theirs."""
        made = select(JobRow.started_at).where(
            JobRow.kind == "merge",
            JobRow.state == "succeeded",
            JobRow.arguments["recipe"].as_string().in_((recipe.hex, str(recipe))),
        )
        return self._session.scalar(made.order_by(JobRow.id).limit(1))


def _value(row: SignatureRow) -> Signature:
    return Signature(
        subject=Digest(row.subject_digest),
        kind=row.kind,
        key=row.key_sha256,
        bundle=row.bundle,
        created_at=row.created_at,
        author=row.author,
    )
