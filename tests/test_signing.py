"""Signatures and provenance: made and checked here, and by model-signing's own command, on the files that are pulled."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from registry import bundles
from registry.errors import Changed, DamagedBlob, InvalidInput, PathNotFound, RegistryError, UnknownSignature
from registry.manifest import Checkpoint, Merged
from registry.registering import Registration
from registry.service import Registry

Keys = Callable[..., Path]
SCHEMA = Path(__file__).parent / "data" / "slsa-provenance-v1.json"


@pytest.fixture
def make_key(tmp_path: Path) -> Keys:
    """Writes a pair of keys: `NAME.pem` and `NAME.pub.pem`. Gives the private one."""

    def make(name: str = "key", private: Any = None) -> Path:
        return write_key(tmp_path, name, private or ec.generate_private_key(ec.SECP256R1()))

    return make


def write_key(folder: Path, name: str, private: Any, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path = folder / f"{name}.pem"
    path.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub.pem").write_bytes(public)
    return path


def public(key: Path) -> Path:
    return key.with_suffix(".pub.pem")


@pytest.fixture
def bot(ckpt: Registry, adapter: Path) -> Checkpoint:
    return ckpt.register(str(adapter), Registration(adapter="team/bot", step=5)).registered[0].checkpoint


@pytest.fixture
def merged(ckpt: Registry, bot: Checkpoint) -> Merged:
    return ckpt.merge(ckpt.plan(bot)).merged


@pytest.fixture(params=["checkpoint", "merged", "elsewhere"])
def subject(request: pytest.FixtureRequest, ckpt: Registry, bot: Checkpoint, tmp_path: Path) -> Checkpoint | Merged:
    """Something to sign: a checkpoint, a merged model in the store, and one outside of it."""
    if request.param == "checkpoint":
        return bot
    return ckpt.merge(ckpt.plan(bot), out=str(tmp_path / "out") if request.param == "elsewhere" else None).merged


def stock(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """model-signing's own command."""
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# -- with model-signing's own command


def test_the_stock_command_verifies_what_is_signed_here(
    ckpt: Registry, subject: Checkpoint | Merged, make_key: Keys, tmp_path: Path
) -> None:
    key = make_key()
    signature = ckpt.sign(subject, key)
    ckpt.pull(subject, tmp_path / "pulled")
    written = tmp_path / "model.sig"
    written.write_text(json.dumps(signature.bundle))
    verify = ("verify", "key", tmp_path / "pulled", "--signature", written, "--public_key")
    good = stock(*verify, public(key))
    assert good.returncode == 0, good.stderr
    assert stock(*verify, public(make_key("other"))).returncode != 0
    (tmp_path / "pulled" / "more.txt").write_text("more")
    assert stock(*verify, public(key)).returncode != 0


def test_what_the_stock_command_signs_can_be_attached(
    ckpt: Registry, subject: Checkpoint | Merged, make_key: Keys, tmp_path: Path
) -> None:
    key = make_key()
    ckpt.pull(subject, tmp_path / "pulled")
    written = tmp_path / "pulled" / "model.sig"
    done = stock("sign", "key", tmp_path / "pulled", "--signature", written, "--private_key", key)
    assert done.returncode == 0, done.stderr
    bundle = json.loads(written.read_text())
    with pytest.raises(Changed):
        ckpt.add_signature(subject, bundle, key=public(make_key("other")))
    assert ckpt.signatures(subject) == []
    signature = ckpt.add_signature(subject, bundle, key=public(key))
    assert (signature.kind, signature.key) == ("content", bundles.key_name(key))
    assert ckpt.verify_signature(subject, public(key)) == signature


def test_a_signature_with_a_certificate(ckpt: Registry, bot: Checkpoint, make_key: Keys, tmp_path: Path) -> None:
    root, root_path = ec.generate_private_key(ec.SECP256R1()), tmp_path / "root.pem"
    leaf, leaf_path = ec.generate_private_key(ec.SECP256R1()), tmp_path / "leaf.pem"
    write_certificate(root_path, "root", root, "root", root)
    write_certificate(leaf_path, "ada", leaf, "root", root)
    ckpt.pull(bot, tmp_path / "pulled")
    written = tmp_path / "model.sig"
    command = (
        "sign",
        "certificate",
        tmp_path / "pulled",
        "--signature",
        written,
        "--private_key",
        make_key("leaf-key", leaf),
    )
    done = stock(*command, "--signing_certificate", leaf_path, "--certificate_chain", root_path)
    assert done.returncode == 0, done.stderr
    bundle = json.loads(written.read_text())
    signature = ckpt.add_signature(bot, bundle, key=root_path)
    assert ckpt.verify_signature(bot, root_path) == signature
    stranger = ec.generate_private_key(ec.SECP256R1())
    write_certificate(tmp_path / "stranger.pem", "stranger", stranger, "stranger", stranger)
    with pytest.raises(Changed):
        ckpt.verify_signature(bot, tmp_path / "stranger.pem")
    with pytest.raises(InvalidInput):
        bundles.check_seal(bundle, public(make_key()))
    renamed = with_payload(bundle, lambda payload: payload["subject"][0].update(name="other"))
    with pytest.raises(Changed):
        ckpt.add_signature(bot, renamed)


def write_certificate(path: Path, name: str, key: Any, issuer: str, issuer_key: Any) -> None:
    called = {each: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)}
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only", "decipher_only"), False
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(called[name])
        .issuer_name(called[issuer])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1 if name != issuer else 2))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=name == issuer, **usage), critical=True)
    )
    path.write_bytes(builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


# -- sign and verify


def test_signing_is_recorded(ckpt: Registry, subject: Checkpoint | Merged, make_key: Keys) -> None:
    key = make_key()
    told: list[int] = []
    signature = ckpt.sign(subject, key)
    assert ckpt.verify_signature(subject, public(key), lambda what, done, total: told.append(done)) == signature
    assert ckpt.verify_signature(subject, key) == signature  # the private key has the public one in it
    assert sum(told) == sum(entry.size_bytes for entry in ckpt.signable_files(subject))
    assert ckpt.signatures(subject) == [signature]
    assert (signature.subject, signature.kind, signature.author) == (subject.digest, "content", "ada")
    event = ckpt.history()[-1]
    assert (event.action, event.subject) == ("sign", "team/bot@v1")
    assert event.detail["key"] == signature.key
    assert event.detail.get("merged") == (subject.digest.hex if isinstance(subject, Merged) else None)


def test_the_same_key_again_replaces_another_is_added(ckpt: Registry, bot: Checkpoint, make_key: Keys) -> None:
    one, two = make_key("one"), make_key("two")
    ckpt.sign(bot, one)
    again, other = ckpt.sign(bot, one), ckpt.sign(bot, two)
    assert ckpt.signatures(bot) == [again, other]
    assert ckpt.verify_signature(bot, public(one)) == again
    assert ckpt.verify_signature(bot, public(two)) == other


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_longer_curves(ckpt: Registry, merged: Merged, make_key: Keys, curve: ec.EllipticCurve) -> None:
    key = make_key("long", ec.generate_private_key(curve))
    ckpt.sign(merged, key)
    ckpt.verify_signature(merged, public(key))
    bundles.check_seal(ckpt.sign_provenance(merged, key).bundle, public(key))


def test_an_unchecked_signature_does_not_replace_another(ckpt: Registry, bot: Checkpoint, make_key: Keys) -> None:
    """Else whoever may write could put nonsense in its place."""
    key = make_key()
    good = ckpt.sign(bot, key)
    forged = copy.deepcopy(dict(good.bundle))
    forged["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(b"nonsense").decode()
    assert ckpt.add_signature(bot, forged) == good
    with pytest.raises(Changed):
        ckpt.add_signature(bot, forged, key=public(key).read_bytes())
    assert ckpt.signatures(bot) == [good]
    assert ckpt.add_signature(bot, good.bundle, key=public(key).read_bytes()).bundle == good.bundle


def test_nobody_signed_or_somebody_else_did(ckpt: Registry, bot: Checkpoint, merged: Merged, make_key: Keys) -> None:
    key, other = make_key(), make_key("other")
    with pytest.raises(UnknownSignature):
        ckpt.verify_signature(bot, public(key))
    ckpt.sign_provenance(merged, key)
    with pytest.raises(UnknownSignature):  # that is about what it was made of
        ckpt.verify_signature(merged, public(key))
    ckpt.sign(bot, other)
    with pytest.raises(Changed) as caught:
        ckpt.verify_signature(bot, public(key))
    assert (caught.value.expected, caught.value.found) == (bundles.key_name(other), bundles.key_name(key))


def test_a_changed_blob_is_found(ckpt: Registry, subject: Checkpoint | Merged, make_key: Keys, tmp_path: Path) -> None:
    key = make_key()
    ckpt.sign(subject, key)
    entry = next(each for each in ckpt.signable_files(subject) if each.path.endswith(".safetensors"))
    place = tmp_path / "out" / entry.path
    if not place.exists():
        place = tmp_path / "home/store/blobs" / entry.digest.hex[:2] / entry.digest.hex
    place.chmod(0o600)
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    with pytest.raises(Changed) as caught:
        ckpt.verify_signature(subject, public(key))
    assert caught.value.expected == str(entry.digest)
    place.unlink()
    with pytest.raises((DamagedBlob, PathNotFound)):
        ckpt.verify_signature(subject, public(key))


def test_records_that_were_changed_with_the_bytes_are_found(ckpt: Registry, bot: Checkpoint, make_key: Keys) -> None:
    """Who can write to the database and the store cannot make a signature."""
    key = make_key()
    signature = ckpt.sign(bot, key)
    files = [(path, "0" * 64 if path == "adapter_config.json" else sha) for path, sha in listed(ckpt, bot)]
    with pytest.raises(Changed) as caught:
        bundles.check_bundle(signature.bundle, files, public(key))
    assert caught.value.subject == "adapter_config.json"
    assert caught.value.found == f"sha256:{'0' * 64}"
    for changed in (files[1:], [*files, ("extra.py", "1" * 64)]):
        with pytest.raises(Changed):
            bundles.check_bundle(signature.bundle, changed, public(key))


def listed(ckpt: Registry, subject: Checkpoint | Merged) -> list[tuple[str, str]]:
    return [(entry.path, entry.sha256) for entry in ckpt.signable_files(subject)]


def payload_of(bundle: Any) -> Any:
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def with_payload(bundle: Any, change: Callable[[Any], None]) -> Any:
    changed, payload = copy.deepcopy(bundle), payload_of(bundle)
    change(payload)
    changed["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return changed


@pytest.mark.parametrize("kind", ["content", "provenance"])
def test_a_bundle_that_was_changed(ckpt: Registry, merged: Merged, make_key: Keys, kind: str) -> None:
    key, other = make_key(), make_key("other")
    make = ckpt.sign if kind == "content" else ckpt.sign_provenance
    bundle = make(merged, key).bundle
    bundles.check_seal(bundle, public(key))
    with pytest.raises(Changed):
        bundles.check_seal(bundle, public(other))
    forged = copy.deepcopy(dict(make(merged, other).bundle))
    forged["verificationMaterial"]["publicKey"]["hint"] = bundles.key_name(key)
    renamed = with_payload(bundle, lambda payload: payload["subject"][0].update(name="other"))
    for bad in (forged, renamed):
        with pytest.raises(Changed):
            bundles.check_seal(bad, public(key))
    if kind == "content":
        swapped = with_payload(bundle, lambda payload: payload["predicate"]["resources"][0].update(digest="0" * 64))
        with pytest.raises(Changed):
            bundles.check_seal(swapped, public(key))


BREAKS: dict[str, Callable[[Any], object]] = {
    "no envelope": lambda bundle: bundle.pop("dsseEnvelope"),
    "no material": lambda bundle: bundle.pop("verificationMaterial"),
    "another media type": lambda bundle: bundle.update(mediaType="text/html"),
    "no key": lambda bundle: bundle.update(verificationMaterial={"tlogEntries": []}),
    "an unnamed key": lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=""),
    "a strange key": lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=7),
    "no signature": lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
    "not base64": lambda bundle: bundle["dsseEnvelope"].update(payload="§"),
    "not JSON": lambda bundle: bundle["dsseEnvelope"].update(payload="bm8="),
    "another payload": lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
    "an empty chain": lambda bundle: bundle.update(verificationMaterial={"x509CertificateChain": {"certificates": []}}),
    "a strange chain": lambda bundle: bundle.update(
        verificationMaterial={"x509CertificateChain": {"certificates": [{"rawBytes": "bm8="}]}}
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_what_is_no_bundle(ckpt: Registry, bot: Checkpoint, make_key: Keys, how: str) -> None:
    bundle = copy.deepcopy(dict(ckpt.sign(bot, make_key()).bundle))
    BREAKS[how](bundle)
    with pytest.raises(InvalidInput) as caught:
        ckpt.add_signature(bot, bundle)
    assert caught.value.field == "signature"
    assert len(ckpt.signatures(bot)) == 1


@pytest.mark.parametrize("sig", ["", "bm8=", "§", 7])
@pytest.mark.parametrize("kind", ["content", "provenance"])
def test_a_seal_that_is_none(ckpt: Registry, merged: Merged, make_key: Keys, kind: str, sig: Any) -> None:
    key = make_key()
    bundle = copy.deepcopy(dict((ckpt.sign if kind == "content" else ckpt.sign_provenance)(merged, key).bundle))
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = sig
    with pytest.raises((Changed, InvalidInput)):
        bundles.check_seal(bundle, public(key))


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: payload["predicate"]["serialization"].update(method="shards"),
        lambda payload: payload["predicate"]["resources"][0].update(algorithm="blake2b"),
        lambda payload: payload["predicate"]["resources"].append(payload["predicate"]["resources"][0]),
        lambda payload: payload.update(predicate=[]),
        lambda payload: payload.update(predicateType="https://example.com/"),
        lambda payload: payload["predicate"]["resources"].pop(),
    ],
)
def test_a_signature_about_something_else(
    ckpt: Registry, bot: Checkpoint, make_key: Keys, change: Callable[[Any], None]
) -> None:
    bundle = ckpt.sign(bot, make_key()).bundle
    with pytest.raises((InvalidInput, Changed)):
        ckpt.add_signature(bot, with_payload(bundle, change))


def test_keys_that_cannot_sign(ckpt: Registry, bot: Checkpoint, make_key: Keys, tmp_path: Path) -> None:
    good = make_key()
    secret = write_key(tmp_path, "secret", ec.generate_private_key(ec.SECP256R1()), password=b"hush")
    edwards = make_key("edwards", ed25519.Ed25519PrivateKey.generate())
    bitcoin = make_key("bitcoin", ec.generate_private_key(ec.SECP256K1()))
    nothing = tiny.write_json(tmp_path / "nothing.pem", {})
    bad: dict[Path, type[RegistryError]] = {
        secret: InvalidInput,
        edwards: InvalidInput,
        bitcoin: InvalidInput,
        nothing: InvalidInput,
        public(good): InvalidInput,
        tmp_path: InvalidInput,
        tmp_path / "none.pem": PathNotFound,
    }
    for key, error in bad.items():
        with pytest.raises(error):
            ckpt.sign(bot, key)
    assert ckpt.signatures(bot) == []
    ckpt.sign(bot, good)
    for key in (public(edwards), public(bitcoin), nothing):
        with pytest.raises(InvalidInput):
            ckpt.verify_signature(bot, key)


def test_the_sha256_of_merged_files_is_computed_once(ckpt: Registry, merged: Merged) -> None:
    assert not any(entry.sha256 for entry in merged.files)
    told: list[int] = []
    files = ckpt.signable_files(merged, lambda what, done, total: told.append(done))
    assert sum(told) == merged.size_bytes
    for entry in files:
        with ckpt._workspace.store.open(entry.digest) as stream:
            assert hashlib.sha256(stream.read()).hexdigest() == entry.sha256
    told.clear()
    assert ckpt.signable_files(merged, lambda what, done, total: told.append(done)) == files
    assert told == []


# -- provenance


def test_provenance_says_what_a_model_was_made_of(
    ckpt: Registry, bot: Checkpoint, merged: Merged, tmp_path: Path
) -> None:
    statement = ckpt.provenance(merged)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(statement)
    ckpt.pull(merged, tmp_path / "pulled")
    assert {each["name"]: each["digest"] for each in statement["subject"]} == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "blake3": blake3(data).hexdigest()}
        for name, data in tiny.contents(tmp_path / "pulled").items()
    }
    build = statement["predicate"]["buildDefinition"]
    assert build["externalParameters"]["inputs"] == [
        {"checkpoint": "team/bot@v1", "content": str(bot.digest), "weight": 1.0}
    ]
    base, whole, *files = build["resolvedDependencies"]
    assert base["digest"] == {"ckptWeights": bot.base.hex}
    assert whole == {"name": "team/bot@v1", "digest": {"ckptContent": bot.digest.hex}}
    assert {each["name"]: each["digest"]["sha256"] for each in files} == {
        f"team/bot@v1/{entry.path}": entry.sha256 for entry in bot.manifest.files
    }
    run = statement["predicate"]["runDetails"]
    assert set(run["builder"]["version"]) == {"ckpt-registry", "torch"}
    assert run["metadata"]["invocationId"] == str(merged.recipe.digest)
    assert datetime.fromisoformat(run["metadata"]["finishedOn"]) == merged.created_at
    assert ckpt.provenance(merged) == statement


def test_provenance_of_several(ckpt: Registry, bot: Checkpoint, base: Path, tmp_path: Path) -> None:
    twin = tiny.write_adapter(tmp_path / "twin", base=base, seed=2)
    other = ckpt.register(str(twin), Registration(adapter="twin")).registered[0].checkpoint
    from registry.mixing import Mixture

    merged = ckpt.merge(ckpt.plan(bot, other, mixture=Mixture(method="linear"))).merged
    statement = ckpt.provenance(merged)
    jsonschema.validate(statement, json.loads(SCHEMA.read_text()))
    inputs = statement["predicate"]["buildDefinition"]["externalParameters"]["inputs"]
    assert [(each["checkpoint"], each["weight"]) for each in inputs] == [("team/bot@v1", 0.5), ("twin@v1", 0.5)]


def test_a_signed_provenance(ckpt: Registry, bot: Checkpoint, merged: Merged, make_key: Keys) -> None:
    key = make_key()
    signature = ckpt.sign_provenance(merged, key)
    assert (signature.kind, signature.key) == ("provenance", bundles.key_name(public(key)))
    bundles.check_seal(signature.bundle, public(key))
    assert payload_of(signature.bundle) == ckpt.provenance(merged)
    assert ckpt.signatures(merged) == [signature]
    # as somebody else's client sends it
    assert ckpt.add_signature(merged, signature.bundle).key == signature.key
    with pytest.raises(InvalidInput):
        ckpt.add_signature(bot, signature.bundle)
    other = with_payload(signature.bundle, lambda payload: payload["subject"][0]["digest"].update(sha256="0" * 64))
    with pytest.raises(Changed):
        ckpt.add_signature(merged, other)
    for subject in ([], [7], None):
        nothing = with_payload(signature.bundle, lambda payload, subject=subject: payload.update(subject=subject))
        with pytest.raises((InvalidInput, Changed)):
            ckpt.add_signature(merged, nothing)


def test_a_merge_by_workers_tells_when_it_began(ckpt: Registry, merged: Merged) -> None:
    assert "startedOn" not in ckpt.provenance(merged)["predicate"]["runDetails"]["metadata"]
    with ckpt._workspace.writing() as change:
        arguments = {"recipe": merged.recipe.digest.hex}
        job = change.catalog.jobs.add_finished("merge", "bot", arguments, {}, author="ada", total_bytes=1)
    metadata = ckpt.provenance(merged)["predicate"]["runDetails"]["metadata"]
    assert job.started_at == datetime.fromisoformat(metadata["startedOn"])


# -- on PostgreSQL


def test_on_postgresql(postgres_url: str, base: Path, adapter: Path, make_key: Keys, tmp_path: Path) -> None:
    from registry import connect
    from registry.settings import Settings

    key = make_key()
    environment = {"CKPT_HOME": str(tmp_path / "team"), "CKPT_DATABASE_URL": postgres_url}
    with connect(Settings.from_environment(environment)) as team:
        bot = team.register(str(adapter), Registration(adapter="bot", base=str(base))).registered[0].checkpoint
        merged = team.merge(team.plan(bot), out=str(tmp_path / "out")).merged
        for subject in (bot, merged):
            signature = team.sign(subject, key)
            assert team.verify_signature(subject, public(key)) == signature
        assert "startedOn" not in team.provenance(merged)["predicate"]["runDetails"]["metadata"]
        assert [each.kind for each in team.signatures(merged)] == ["content"]
