"""Signatures over files and statements, as Sigstore bundles: made and checked with keys on this machine. No registry is needed for that.

What signs files is OpenSSF's model-signing, so its command verifies what is made here, and the other way round. It is given digests instead of
a folder. Its way of sealing a statement (DSSE: ECDSA over the statement's type, length and bytes) seals provenance statements, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from registry.errors import Changed, InvalidInput, MissingPackage, PathNotFound
from registry.manifest import canonical_json

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing import manifest, signing, verifying
    from OpenSSL import crypto
except ImportError as error:
    raise MissingPackage("model-signing", "sign") from error

Key = Path | bytes
"""A key or certificates, in PEM: a file, or what is in it."""
Listed = Sequence[tuple[str, str]]
"""Files as pairs of path and SHA-256 in hex digits."""

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
CONTENT_TYPE = "https://model_signing/signature/v1.0"
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_HASHES: Mapping[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
# Duck-typed: they are given a stand-in for the folder, and the digest has no public name.
_SIGNING: Any = signing.Config
_VERIFYING: Any = verifying.Config
_DIGEST: Any = cast("Any", manifest).hashing.Digest
_MAKE_KEY = "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one"


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle taken apart. `key` is the SHA-256 of the public key it names (of the certificate's, where it has one), `statement` what was
    signed; neither is to be believed before `check_seal`."""

    key: str
    has_certificate: bool
    statement: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """`content` for a signature over files, else `provenance`."""
        return "content" if self.statement.get("predicateType") == CONTENT_TYPE else "provenance"


# -- make


def make_bundle(name: str, files: Listed, key: Path) -> dict[str, Any]:
    """Sign files by their digests, as `model_signing sign key` signs a folder that holds exactly them.

    Args:
        name: what they are together, for people; it proves nothing.
        files: paths and SHA-256.
        key: the private key, in PEM.

    Raises:
        PathNotFound, InvalidInput: no key is there, or none that can sign.
    """
    _private_key(key)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "bundle.json"
        config = _SIGNING().set_hashing_config(_Folder(_manifest(name, files)))
        config.use_elliptic_key_signer(private_key=key).sign(Path(name), written)
        return cast("dict[str, Any]", json.loads(written.read_bytes()))


def seal_statement(statement: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """Sign an in-toto statement.

    Raises:
        PathNotFound, InvalidInput: no key is there, or none that can sign.
    """
    private, payload = _private_key(key), canonical_json(statement)
    public = private.public_key()
    signature = private.sign(_sealed_bytes(payload), ec.ECDSA(_HASHES[public.curve.key_size]))
    return {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _name_of(public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


# -- check


def open_bundle(bundle: Mapping[str, Any]) -> Opened:
    """Take a bundle apart without believing it.

    Raises:
        InvalidInput: it is none, or not one of a key or certificate of one's own.
    """
    try:
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        is_statement = statement["_type"] == STATEMENT_TYPE and envelope["payloadType"] == _PAYLOAD_TYPE
        if bundle["mediaType"] != _MEDIA_TYPE or not is_statement or len(envelope["signatures"]) != 1:
            raise InvalidInput("signature", "", "not a Sigstore bundle of an in-toto statement")
        chain = material.get("x509CertificateChain")
        if chain:
            return Opened(_name_of(_leaf(chain)), True, statement)
        hint = str(material["publicKey"]["hint"])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InvalidInput("signature", "", "not a Sigstore bundle made with a key or certificate") from error
    if len(hint) != 64 or not set(hint) <= set("0123456789abcdef"):
        raise InvalidInput("signature", "", "it does not name its key, as model-signing does since version 1")
    return Opened(hint, False, statement)


def signed_files(opened: Opened) -> dict[str, str]:
    """The files that a content signature is about: their SHA-256, by path.

    Raises:
        InvalidInput: it is about something else than whole files.
    """
    try:
        predicate = opened.statement["predicate"]
        how, resources = predicate["serialization"], predicate["resources"]
        found = {str(each["name"]): str(each["digest"]) for each in resources if each["algorithm"] == "sha256"}
        is_whole = opened.kind == "content" and how["method"] == "files" and len(found) == len(resources)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput("signature", "", "it is not about files") from error
    if not is_whole:
        raise InvalidInput("signature", "", "it is not about the SHA-256 of whole files, each named once")
    return found


def check_bundle(bundle: Mapping[str, Any], files: Listed, key: Key) -> None:
    """See that a bundle was made with a key, for exactly these files.

    Args:
        bundle: the signature.
        files: paths and SHA-256, as they are.
        key: the public key, or the certificates that are trusted, in PEM.

    Raises:
        Changed: it was made with another key, or for other files; names the first file that differs.
        PathNotFound, InvalidInput: no key is there, or it is none, or the bundle is none.
    """
    check_seal(bundle, key)
    compare_files(signed_files(open_bundle(bundle)), files)


def compare_files(signed: Mapping[str, str], files: Listed) -> None:
    """See that what was signed is what there is.

    Raises:
        Changed: names the first file that differs.
    """
    found = dict(files)
    for path in sorted({*signed, *found}):
        expected, actual = signed.get(path, "no such file"), found.get(path, "no such file")
        if expected != actual:
            raise Changed(path, *(f"sha256:{each}" if len(each) == 64 else each for each in (expected, actual)))


def check_seal(bundle: Mapping[str, Any], key: Key) -> None:
    """See that the statement in a bundle was signed with a key, whatever it says.

    Args:
        bundle: the signature.
        key: the public key, or the certificates that are trusted, in PEM.

    Raises:
        Changed: it was made with another key, or changed since.
        PathNotFound, InvalidInput: no key is there, or it is none, or the bundle is none.
    """
    opened = open_bundle(bundle)
    if opened.has_certificate:
        _check_content_seal(bundle, opened, _certificates(key))
        return
    public = public_key(key)
    if opened.key != _name_of(public):
        raise Changed("the key of the signature", opened.key, _name_of(public))
    if opened.kind == "content":
        _check_content_seal(bundle, opened, public.public_bytes(*_PEM))
    else:
        _check_statement_seal(bundle, public)


def check_certificate_seal(bundle: Mapping[str, Any]) -> None:
    """See that the statement in a bundle was signed by whom its certificate says, whether that is to be trusted or not.

    Raises:
        Changed: it was not.
        InvalidInput: the bundle is none, or has no certificate.
    """
    if not open_bundle(bundle).has_certificate:
        raise InvalidInput("signature", "", "it has no certificate")
    _check_statement_seal(bundle, _leaf(bundle["verificationMaterial"]["x509CertificateChain"]))


def _leaf(chain: Mapping[str, Any]) -> ec.EllipticCurvePublicKey:
    der = base64.b64decode(chain["certificates"][0]["rawBytes"], validate=True)
    return _elliptic(x509.load_der_x509_certificate(der).public_key())


def _check_content_seal(bundle: Mapping[str, Any], opened: Opened, trusted: bytes) -> None:
    """Let model-signing check its own kind of signature; it is told that the files are those that were signed."""
    config = _VERIFYING().set_hashing_config(_Folder(_manifest("", list(signed_files(opened).items()))))
    with tempfile.TemporaryDirectory() as folder:
        written, key = Path(folder) / "bundle.json", Path(folder) / "key.pem"
        written.write_text(json.dumps(bundle), encoding="utf-8")
        key.write_bytes(trusted)
        try:
            if opened.has_certificate:
                config.use_certificate_verifier(certificate_chain=[key])
            else:
                config.use_elliptic_key_verifier(public_key=key)
            config.verify(Path("model"), written)
        except InvalidSignature as error:
            raise Changed("the signature", "made with this key", "another key's, or changed since") from error
        except (crypto.X509StoreContextError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Changed("the signature", "a good one", str(error) or type(error).__name__) from error


def _check_statement_seal(bundle: Mapping[str, Any], public: ec.EllipticCurvePublicKey) -> None:
    envelope = bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    try:
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        public.verify(signature, _sealed_bytes(payload), ec.ECDSA(_HASHES[public.curve.key_size]))
    except InvalidSignature as error:
        raise Changed("the signature", "made with this key", "another key's, or changed since") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput("signature", "", "not a Sigstore bundle of an in-toto statement") from error


def _sealed_bytes(payload: bytes) -> bytes:
    """What DSSE signs in place of the payload, so that it is never taken for one of another type."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


# -- keys

_PEM = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def key_name(key: Key) -> str:
    """What signatures call a key: the SHA-256 of its public half in PEM, as hex digits.

    Raises:
        PathNotFound, InvalidInput: no key is there, or it is none.
    """
    return _name_of(public_key(key))


def is_certificate(key: Key) -> bool:
    """Whether a file holds certificates instead of a key.

    Raises:
        PathNotFound: it is not there.
    """
    return b"-----BEGIN CERTIFICATE-----" in _read(key)


def public_key(key: Key) -> ec.EllipticCurvePublicKey:
    """The public key in a file, or the public half of a private one.

    Raises:
        PathNotFound, InvalidInput: no key is there, or it is none.
    """
    data = _read(key)
    if b"PRIVATE KEY-----" in data:
        return _private_key(key).public_key()
    if is_certificate(key):
        raise InvalidInput("key", _shown(key), "a certificate, but the signature was made with a key alone")
    try:
        return _elliptic(serialization.load_pem_public_key(data))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput("key", _shown(key), "not a key in PEM of an elliptic curve, such as P-256") from error


def _private_key(key: Key) -> ec.EllipticCurvePrivateKey:
    try:
        found = serialization.load_pem_private_key(_read(key), None)
        _elliptic(found.public_key())
    except TypeError as error:
        raise InvalidInput("key", _shown(key), "it is encrypted; `openssl pkey -in KEY` writes it without") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput("key", _shown(key), f"not a private key of P-256, P-384 or P-521; {_MAKE_KEY}") from error
    return cast("ec.EllipticCurvePrivateKey", found)


def _elliptic(found: object) -> ec.EllipticCurvePublicKey:
    if isinstance(found, ec.EllipticCurvePublicKey) and found.curve.name in ("secp256r1", "secp384r1", "secp521r1"):
        return found
    raise ValueError("another kind of key")


def _certificates(key: Key) -> bytes:
    data = _read(key)
    if not is_certificate(key):
        raise InvalidInput(
            "key", _shown(key), "the signature was made with a certificate: name the one it is trusted by"
        )
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise InvalidInput("key", _shown(key), "not certificates in PEM") from error
    return data


def _shown(key: Key) -> str:
    return str(key) if isinstance(key, Path) else ""


def _read(key: Key) -> bytes:
    if isinstance(key, bytes):
        return key
    try:
        return key.read_bytes()
    except FileNotFoundError:
        raise PathNotFound(str(key)) from None
    except OSError as error:
        raise InvalidInput("key", _shown(key), error.strerror or "cannot be read") from error


def _name_of(public: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(public.public_bytes(*_PEM)).hexdigest()


# -- model-signing's words


class _Folder:
    """Stands for a folder whose files have been hashed already, where model-signing would hash one."""

    def __init__(self, known: manifest.Manifest) -> None:
        self._known = known

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> manifest.Manifest:
        """What is in the folder."""
        del model_path, files_to_hash
        return self._known

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Nothing is ignored here: what was ignored when signing was not signed."""


def _manifest(name: str, files: Listed) -> manifest.Manifest:
    how = manifest.SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
    items = [how.new_item(path, _DIGEST("sha256", bytes.fromhex(sha256))) for path, sha256 in files]
    return manifest.Manifest(name, items, how)
