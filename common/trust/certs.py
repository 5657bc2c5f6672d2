"""Keys and names that certificates and nodes share: P-384 throughout, which TLS 1.3, Flower and HSMs all do well."""

import datetime
import hashlib
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat

from common import keyfile
from common.errors import AuthError, ConfigError
from common.trust import identity

SUFFIX: Final = "silotune.internal"
SITES: Final = "sites"
OPERATORS: Final = "operators"
_ECDSA: Final = ec.ECDSA(hashes.SHA384())


def create_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key and write it as PEM (PKCS 8), mode 0600, as OpenSSL reads it.

    Raises:
        ConfigError: The file is there already, or others may write in its folder.
        StorageError: It cannot be written.
    """
    return _create(path, PrivateFormat.PKCS8)


def create_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key and write it in OpenSSH form, mode 0600, as SuperNodes read it; see `create_tls_key`."""
    return _create(path, PrivateFormat.OpenSSH)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key of a node or for TLS.

    Raises:
        ConfigError: The file is missing, its mode is not 0600, its owner is somebody else, or it holds no P-384 key.
    """
    data = keyfile.read(path)
    is_ssh = data.startswith(b"-----BEGIN OPENSSH")
    try:
        load = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
        key = load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # not chained: the text could hold parts of the key
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path} holds no unencrypted P-384 private key; give the file that enroll made")
    return key


def public_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half as PEM: of a node's key these are the bytes that the node sends, in base64."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def parse_public(pem: str, *, what: str) -> ec.EllipticCurvePublicKey:
    """Read a P-384 public key in the one PEM form that `public_pem` writes.

    Raises:
        AuthError: Anything else.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AuthError(f"the {what} is not a public key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise AuthError(f"the {what} is not a P-384 key")
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != pem.encode():
        raise AuthError(f"the {what} is not in canonical PEM form")
    return key


def fingerprint(key: object) -> str:
    """SHA-256 of a public key (SPKI, DER), in hex: what a roster knows a certificate by.

    Raises:
        AuthError: A key of another kind.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise AuthError("the certificate's key is not an elliptic-curve key")
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sha256(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def parse_chain(pem: bytes, *, name: str) -> list[x509.Certificate]:
    """Read certificates in PEM form; at least one.

    Raises:
        AuthError: There is none, or one is malformed.
    """
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise AuthError(f"{name} holds no certificate in PEM form") from error


def check_chain(chain: list[x509.Certificate], root: x509.Certificate, *, name: str, now: datetime.datetime) -> None:
    """Each certificate is signed by the next, the last by the root, and all are good now; returns only if so.

    Args:
        chain: A certificate and its issuers, the root left out; at least one.

    Raises:
        AuthError: It is otherwise.
    """
    try:
        for certificate, issuer in zip(chain, [*chain[1:], root], strict=True):
            certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise AuthError(f"{name} does not lead to the root; have it issued anew") from error
    for certificate in (*chain, root):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise AuthError(
                f"{name}: {certificate.subject.rfc4514_string()} is not valid at {now:%Y-%m-%d %H:%M} UTC; "
                "check the clock, or have it issued anew"
            )


def first_name(certificate: x509.Certificate) -> str:
    """The first host name or address that a certificate is for; empty if it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    return next((str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)), "")


def host_of(name: str, *, role: str, federation_id: str) -> str:
    """The name that a certificate is for; a domain that is never in public DNS.

    Example:
        >>> host_of("alder", role=SITES, federation_id="onco-eu")
        'alder.sites.onco-eu.silotune.internal'
    """
    return f"{name}.{role}.{federation_id}.{SUFFIX}"


def sign(key: ec.EllipticCurvePrivateKey, data: bytes, *, purpose: str) -> str:
    """ECDSA with SHA-384 over bytes for one purpose, in hex; see `identity.sign`."""
    return key.sign(identity.bound(data, purpose), _ECDSA).hex()


def verify(key: ec.EllipticCurvePublicKey, signature: str, data: bytes, *, purpose: str) -> None:
    """Check a signature that `sign` made; returns only if it is right.

    Raises:
        AuthError: It is not.
    """
    try:
        key.verify(bytes.fromhex(signature), identity.bound(data, purpose), _ECDSA)
    except (ValueError, InvalidSignature) as error:
        raise AuthError(f"the {purpose} signature of key {fingerprint(key)[:16]} is not valid") from error


def _create(path: Path, form: PrivateFormat) -> ec.EllipticCurvePrivateKey:
    """Make and write a key."""
    key = ec.generate_private_key(ec.SECP384R1())
    keyfile.write(path, key.private_bytes(Encoding.PEM, form, serialization.NoEncryption()))
    return key
