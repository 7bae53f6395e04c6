"""`ckpt sign`, `signatures`, `verify-signature`, `provenance` and `ckpt webhook`, as people type them."""

from __future__ import annotations

import base64
import json
import sqlite3
from pathlib import Path

import pytest
from commands import Ckpt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key, and `key.pub.pem` beside it."""
    private, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    path = tmp_path / "key.pem"
    path.write_bytes(
        private.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    )
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub.pem").write_bytes(public)
    return path


def test_sign_list_verify_and_attach(ckpt: Ckpt, key: Path, tmp_path: Path) -> None:
    public = str(key.with_suffix(".pub.pem"))
    assert ckpt("verify-signature", "support-bot@v1", "--key", public).code == 3
    signed = ckpt("sign", "support-bot@v1", "--key", str(key), "--out", "model.sig")
    assert (signed.code, signed.err) == (0, "written to model.sig\n")
    assert signed.out.startswith("signed support-bot@v1 with key ")
    verified = ckpt("verify-signature", "support-bot@v1", "--key", public, "--out", "again.sig")
    assert verified.out.startswith("support-bot@v1 is what was signed with key ")
    assert (tmp_path / "again.sig").read_bytes() == (tmp_path / "model.sig").read_bytes()
    (found,) = ckpt("signatures", "support-bot@v1", "--json").json
    assert found == ckpt("verify-signature", "support-bot@v1", "--cert", public, "--json").json
    assert found["kind"] == "content"
    assert found["key"][:12] in ckpt("signatures", "support-bot@v1").out
    assert ckpt("sign", "support-bot@v1", "--attach", "model.sig", "--key", public).code == 0
    assert ckpt("sign", "support-bot@v2", "--attach", "model.sig", "--key", public).code == 7
    assert ckpt("sign", "support-bot@v2", "--attach", "none.sig", "--key", public).code == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_what_is_no_signature(ckpt: Ckpt, key: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.sig").write_text(text)
    result = ckpt("sign", "support-bot@v1", "--attach", "bad.sig", "--key", str(key.with_suffix(".pub.pem")))
    assert result.code == 2
    assert "signature" in result.err


def test_provenance(ckpt: Ckpt, key: Path, tmp_path: Path) -> None:
    digest = ckpt("merge", "support-bot@v1", "--json").json["digest"]
    statement = ckpt("provenance", digest).json
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert ckpt("provenance", digest, "--key", str(key), "--out", "p.json").out == ""
    envelope = json.loads((tmp_path / "p.json").read_text())["dsseEnvelope"]
    assert json.loads(base64.b64decode(envelope["payload"])) == statement
    assert [each["kind"] for each in ckpt("signatures", digest, "--json").json] == ["provenance"]
    assert ckpt("provenance", "support-bot@v1").code == 3


def test_webhooks(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ckpt("webhook", "add", "http://127.0.0.1:9/hook", "--on", "shipped")
    assert refused.code == 2
    assert "CKPT_WEBHOOK_ALLOW" in refused.err
    monkeypatch.setenv("CKPT_WEBHOOK_ALLOW", "127.0.0.1")
    added = ckpt("webhook", "add", "http://127.0.0.1:9/hook", "--on", "shipped, alias")
    assert added.out.startswith("whsec_")
    assert "webhook 1" in added.err
    assert ckpt("webhook", "add", "http://127.0.0.1:9/", "--on", "lunch").code == 2
    assert added.out.strip() not in ckpt("webhook", "list").out
    (listed,) = ckpt("webhook", "list", "--json").json
    assert listed["actions"] == ["shipped", "alias"]
    tested = ckpt("webhook", "test", "1")
    assert tested.code == 1
    assert tested.out.startswith("failed: ")
    ckpt("ship", "support-bot@v1", "--to", "production")
    shipped, test = ckpt("webhook", "log", "1", "--json").json
    assert (shipped["action"], shipped["state"], test["action"], test["state"]) == (
        "shipped",
        "queued",
        "test",
        "failed",
    )
    assert "queued" in ckpt("webhook", "log", "1").out
    assert ckpt("webhook", "rm", "1").out == "removed webhook 1, http://127.0.0.1:9/hook\n"
    assert ckpt("webhook", "log", "1").code == 3


def test_gc_tells_how_many_messages_it_forgot(ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_WEBHOOK_ALLOW", "127.0.0.1")
    assert ckpt("webhook", "add", "http://127.0.0.1:9/hook").code == 0
    for _ in range(2):
        assert ckpt("webhook", "test", "1").code == 1
    assert "webhooks" not in ckpt("gc").out
    with sqlite3.connect(tmp_path / "home/ckpt.db") as connection:
        connection.execute("UPDATE deliveries SET finished_at = '2020-01-01 00:00:00.000000'")
    assert "would remove 2 messages to webhooks from their log\n" in ckpt("gc", "--dry-run").out
    assert len(ckpt("webhook", "log", "1", "--json").json) == 2
    assert "removed 2 messages to webhooks from their log\n" in ckpt("gc").out
    assert ckpt("webhook", "log", "1", "--json").json == []
