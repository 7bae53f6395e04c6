"""The verbs of a server's registry that keep it right: who may come in, who is told, what is signed, whether all is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from registry.client_wire import LONG_SECONDS, Wire, files_of, name_of
from registry.manifest import Checkpoint, Event, FileEntry, Merged
from registry.progress import Progress, silent
from registry.teamwork import Delivery, NewToken, NewWebhook, Principal, Role, Signature, Token, Webhook

if TYPE_CHECKING:
    from registry.caring import StoreCheck
    from registry.chain import AuditState
    from registry.diagnosing import Diagnosis
    from registry.sweeping import Swept


class Keeping:
    """One half of `registry.client.RemoteRegistry`, where they are told."""

    _wire: Wire

    def verify_chain(self) -> AuditState:
        """Walk the chain of events to its end."""
        from registry.chain import AuditState

        return self._wire.get(AuditState, "/audit/verify", patience_seconds=LONG_SECONDS)

    def export_audit(self) -> Iterator[Event]:
        """Every event, oldest first."""
        return self._wire.each(Event, "/audit/export", patience_seconds=LONG_SECONDS)

    def verify(self, *, read_data: bool = False, subset: str = "", progress: Progress = silent) -> StoreCheck:
        """See that everything the registry needs is there. Changes nothing."""
        from registry.caring import StoreCheck

        asked = {"read_data": read_data, "subset": subset}
        return self._wire.get(StoreCheck, "/verify", asked, patience_seconds=LONG_SECONDS)

    def diagnose(self) -> list[Diagnosis]:
        """How the server's registry is, and what to do about it."""
        from registry.diagnosing import Diagnosis

        return self._wire.get(list[Diagnosis], "/doctor")

    def sweep(self, *, grace: timedelta = timedelta(hours=24), dry_run: bool = False) -> Swept:
        """Remove from the store what nothing has needed for a while."""
        from registry.sweeping import Swept

        asked = {"grace_seconds": grace.total_seconds(), "dry_run": dry_run}
        return self._wire.write(Swept, "POST", "/sweep", asked, patience_seconds=LONG_SECONDS)

    # -- who may come in

    def create_token(
        self, name: str, role: Role, namespaces: Sequence[str] = (), expires_in: timedelta | None = None
    ) -> NewToken:
        """Make a token for the server's callers. Its text is given here and nowhere else."""
        seconds = None if expires_in is None else expires_in.total_seconds()
        asked = {"name": name, "role": role, "namespaces": list(namespaces), "expires_seconds": seconds}
        return self._wire.write(NewToken, "POST", "/tokens", asked)

    def tokens(self) -> list[Token]:
        """Every token, revoked ones too, the oldest first; never their texts."""
        return self._wire.get(list[Token], "/tokens")

    def revoke_token(self, name_or_id: str) -> Token:
        """End a token, at once."""
        return self._wire.write(Token, "DELETE", f"/tokens/{quote(name_or_id, safe='')}")

    def authenticate(self, secret: str) -> Principal:
        """Whose token this is."""
        asker = Wire(self._wire.url, secret)
        try:
            return asker.get(Principal, "/me")
        finally:
            asker.close()

    # -- tell others

    def add_webhook(self, url: str, actions: Sequence[str]) -> NewWebhook:
        """Have the server tell an address of events from now on."""
        return self._wire.write(NewWebhook, "POST", "/webhooks", {"url": url, "actions": list(actions)})

    def webhooks(self) -> list[Webhook]:
        """Every webhook, the oldest first."""
        return self._wire.get(list[Webhook], "/webhooks")

    def remove_webhook(self, number: int) -> Webhook:
        """Forget a webhook."""
        return self._wire.write(Webhook, "DELETE", f"/webhooks/{number}")

    def test_webhook(self, number: int) -> Delivery:
        """Have a message sent now, to see whether it arrives."""
        return self._wire.write(Delivery, "POST", f"/webhooks/{number}/test")

    def deliveries(self, number: int, limit: int = 50) -> list[Delivery]:
        """The last messages to a webhook, the newest first."""
        return self._wire.get(list[Delivery], f"/webhooks/{number}/deliveries", {"limit": limit})

    # -- sign

    def sign(self, subject: Checkpoint | Merged, key: Path, progress: Progress = silent) -> Signature:
        """Sign the content of a checkpoint or merged model, with a key that stays here."""
        from registry import bundles
        from registry.signing import CONTENT, listed

        bundles.key_name(key)  # before anything long
        name = name_of(subject).replace("/", "_")
        bundle = bundles.make_bundle(name, listed(self.signable_files(subject, progress)), key)
        return self._keep_signature(subject, CONTENT, bundle)

    def sign_provenance(self, merged: Merged, key: Path, progress: Progress = silent) -> Signature:
        """Sign the statement of what a merged model was made of, with a key that stays here."""
        from registry import bundles
        from registry.signing import PROVENANCE

        bundles.key_name(key)
        return self._keep_signature(merged, PROVENANCE, bundles.seal_statement(self.provenance(merged, progress), key))

    def add_signature(
        self,
        subject: Checkpoint | Merged,
        bundle: Mapping[str, Any],
        *,
        key: Path | None = None,
        progress: Progress = silent,
    ) -> Signature:
        """Keep a signature that was made elsewhere."""
        from registry import bundles

        opened = bundles.open_bundle(bundle)
        if key is not None:
            bundles.check_seal(bundle, key)
        return self._keep_signature(subject, opened.kind, bundle)

    def _keep_signature(self, subject: Checkpoint | Merged, kind: str, bundle: Mapping[str, Any]) -> Signature:
        asked = {"subject": name_of(subject), "kind": kind, "bundle": bundle}
        return self._wire.write(Signature, "POST", "/signatures", asked, patience_seconds=LONG_SECONDS)

    def verify_signature(self, subject: Checkpoint | Merged, key: Path, progress: Progress = silent) -> Signature:
        """Fetch a checkpoint or merged model whole and compare it with its signature."""
        from registry import bundles
        from registry.client_files import hashed
        from registry.signing import find_signature, listed

        signature = find_signature(self.signatures(subject), subject, key)
        bundles.check_seal(signature.bundle, key)  # before anything long
        files = hashed(self._wire, name_of(subject), files_of(subject), progress)
        bundles.check_bundle(signature.bundle, listed(files), key)
        return signature

    def signatures(self, subject: Checkpoint | Merged) -> list[Signature]:
        """Every signature of a checkpoint or merged model, the oldest first."""
        return self._wire.get(list[Signature], "/signatures", {"subject": name_of(subject)})

    def signable_files(self, subject: Checkpoint | Merged, progress: Progress = silent) -> tuple[FileEntry, ...]:
        """The files of a checkpoint or merged model, each with its SHA-256."""
        return tuple(
            self._wire.get(list[FileEntry], "/signable", {"subject": name_of(subject)}, patience_seconds=LONG_SECONDS)
        )

    def provenance(self, merged: Merged, progress: Progress = silent) -> dict[str, Any]:
        """What a merged model was made of, and how: an in-toto statement with a SLSA provenance."""
        return self._wire.get(
            dict[str, Any], "/provenance", {"merged": merged.digest.hex}, patience_seconds=LONG_SECONDS
        )
