"""Who may come in, who is told, what is signed, and keeping the registry right."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sites import Maker, Site

from registry.errors import (
    Changed,
    InvalidInput,
    InvalidReference,
    NameTaken,
    Unauthenticated,
    UnknownSignature,
    UnknownToken,
    UnknownWebhook,
)
from registry.manifest import BaseModel
from registry.service import Registry
from registry.teamwork import Role


def test_tokens_are_made_used_and_ended(ckpt: Registry) -> None:
    made = ckpt.create_token("eve", Role.WRITER, ["team"], timedelta(days=1))
    assert (made.token.name, made.token.role, made.token.namespaces) == ("eve", Role.WRITER, ("team",))
    assert made.token.expires_at == made.token.created_at + timedelta(days=1)
    assert made.secret.endswith(made.token.ending)
    principal = ckpt.authenticate(made.secret)
    assert (principal.name, principal.role, principal.namespaces) == ("eve", Role.WRITER, ("team",))
    assert made.token.id in [each.id for each in ckpt.tokens()]
    with pytest.raises(NameTaken):
        ckpt.create_token("eve", Role.READER)
    with pytest.raises(InvalidReference):
        ckpt.create_token("no name!", Role.READER)
    ended = ckpt.revoke_token("eve")
    assert (ended.id, ended.revoked_at is not None) == (made.token.id, True)
    with pytest.raises(UnknownToken):
        ckpt.revoke_token("nobody")
    with pytest.raises(Unauthenticated):
        ckpt.authenticate("ckpt_w_odd")


def test_webhooks_are_kept(ckpt: Registry) -> None:
    made = ckpt.add_webhook("https://1.1.1.1/hook", ["shipped", "merged"])
    assert (made.webhook.url, set(made.webhook.actions)) == ("https://1.1.1.1/hook", {"shipped", "merged"})
    assert made.secret
    assert ckpt.webhooks() == [made.webhook]
    assert ckpt.deliveries(made.webhook.id) == []
    assert ckpt.remove_webhook(made.webhook.id) == made.webhook
    assert ckpt.webhooks() == []
    for act in (ckpt.remove_webhook, ckpt.test_webhook, ckpt.deliveries):
        with pytest.raises(UnknownWebhook):
            act(made.webhook.id)
    with pytest.raises(InvalidInput):
        ckpt.add_webhook("ftp://example.org", ["shipped"])


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private key and its public one."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_content_is_signed_and_verified(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make("team/bot")
    (private, public), (_, other) = keys(tmp_path, "mine"), keys(tmp_path, "other")
    with pytest.raises(UnknownSignature):
        ckpt.verify_signature(one, public)
    made = ckpt.sign(one, private)
    assert (made.subject, made.kind, made.author) == (one.digest, "content", "ada")
    assert ckpt.signatures(one) == [made]
    assert ckpt.verify_signature(one, public) == made
    with pytest.raises(Changed):
        ckpt.verify_signature(one, other)
    again = ckpt.add_signature(one, made.bundle, key=public)
    assert (again.kind, again.key) == (made.kind, made.key)
    assert [entry.path for entry in ckpt.signable_files(one)] == [entry.path for entry in one.manifest.files]
    with pytest.raises(Changed):
        ckpt.add_signature(make(), made.bundle)


@pytest.mark.usefixtures("working")
def test_a_merge_has_a_provenance(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    merged = ckpt.merge(ckpt.plan(make())).merged
    statement = ckpt.provenance(merged)
    assert {each["name"] for each in statement["subject"]} == {entry.path for entry in merged.files}
    assert all(entry.sha256 for entry in ckpt.signable_files(merged))
    private, public = keys(tmp_path, "mine")
    assert ckpt.sign_provenance(merged, private).kind == "provenance"
    assert ckpt.sign(merged, private) == ckpt.verify_signature(merged, public)


def test_the_history_is_a_sound_chain(ckpt: Registry, make: Maker) -> None:
    ckpt.note(make(), "x")
    state, events = ckpt.verify_chain(), list(ckpt.export_audit())
    assert (state.count, state.hash) == (len(events), events[-1].hash)
    assert events == ckpt.history()
    assert [event.action for event in ckpt.history(author="ada", since=events[-1].at)] == ["note"]


def test_what_nothing_needs_is_swept(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    ckpt.remove(two)
    now = timedelta(0)
    would = ckpt.sweep(grace=now, dry_run=True)
    assert ckpt.sweep().blobs == 0
    swept = ckpt.sweep(grace=now)
    assert swept.blobs == would.blobs
    found = ckpt.verify(read_data=True)
    assert (found.is_sound, found.objects > 0) == (True, True)
    assert ckpt.verify(subset="1/2").objects <= found.objects
    assert ckpt.check(one).verdict == "pass"
    with pytest.raises(InvalidInput):
        ckpt.verify(subset="odd")


def test_how_it_is(ckpt: Registry, base: BaseModel) -> None:
    found = ckpt.diagnose()
    assert {each.name for each in found} >= {"database", "store"}
    assert [each for each in found if each.verdict == "problem"] == []


def test_the_settings_are_those_of_the_place(ckpt: Registry, site: Site) -> None:
    assert (ckpt.settings.server, ckpt.settings.is_shared) == (site.url, site.name == "team")
    if not site.is_remote:
        ckpt.upgrade_database()
        assert ckpt.signed_by("eve").settings.author == "eve"
        assert ckpt.workspace.settings == ckpt.settings
