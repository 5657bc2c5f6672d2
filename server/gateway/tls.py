"""TLS of the gateway: 1.3 only, client certificates required, one CA for each listener; who a client is."""

import datetime
import functools
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from common import keyfile
from common.errors import ConfigError

_MAX_NAME: Final = 64


@dataclass(frozen=True)
class Peer:
    """Who is at the other end.

    Attributes:
        name: Common name of its certificate, for the log only.
        fingerprint: SHA-256 of its key's SubjectPublicKeyInfo in DER, hexadecimal.
        expires_at: End of the certificate's life, in seconds since 1970.
    """

    name: str
    fingerprint: str
    expires_at: float


def server_context(
    *, certificate_file: Path, key_file: Path, ca_file: Path, on_failure: Callable[[str], None]
) -> ssl.SSLContext:
    """Make a listener's context.

    Sessions cannot be resumed: each connection shows its certificate.

    Args:
        certificate_file: The gateway's certificate and its chain, PEM.
        key_file: Its private key, PEM, mode 0600.
        ca_file: The CA that must have signed the clients' certificates. It is trusted as it stands, so that an
            intermediate can be given, and another one of the same root is not accepted.
        on_failure: Told OpenSSL's reason when a handshake fails.

    Raises:
        ConfigError: A file cannot be read, or the key is open to others.
    """

    class Reporting(ssl.SSLObject):  # asyncio drops a connection whose handshake failed without a word
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                on_failure(str(error.reason or "UNKNOWN"))
                raise

    keyfile.read(key_file)  # refuses one that is open to others
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    context.num_tickets = 0
    context.sslobject_class = Reporting
    load_files(context, certificate_file=certificate_file, key_file=key_file, ca_file=ca_file)
    return context


def upstream_context(ca_file: Path) -> ssl.SSLContext:
    """Make the context for the connection to the SuperLink; its certificate must lead to `ca_file`.

    Raises:
        ConfigError: The file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_files(context, ca_file=ca_file)
    return context


def load_files(
    context: ssl.SSLContext, *, ca_file: Path, certificate_file: Path | None = None, key_file: Path | None = None
) -> None:
    """Load what a context trusts, and what it shows.

    Raises:
        ConfigError: A file is missing or not what it should be.
    """
    try:
        context.load_verify_locations(cafile=ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ca_file}: cannot read CA certificates from this file") from error
    if certificate_file is None:
        return
    try:
        context.load_cert_chain(certificate_file, key_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate_file}, {key_file}: no certificate and the key that belongs to it") from error


def check_apart(first: Path, second: Path) -> None:
    """Raise ConfigError if two CA files share a key, or one holds the signer of the other."""
    for ours, theirs in product(_certificates(first), _certificates(second)):
        if _fingerprint(ours) == _fingerprint(theirs) or _has_signed(ours, theirs) or _has_signed(theirs, ours):
            raise ConfigError(
                f"{first} and {second}: a certificate of one CA would pass for the other's; separate them"
            )


@functools.lru_cache(maxsize=1024)
def peer_of(certificate: bytes) -> Peer:
    """Read a certificate, in DER, that OpenSSL has verified."""
    parsed = x509.load_der_x509_certificate(certificate)
    names = [str(item.value) for item in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    expires = parsed.not_valid_after_utc.replace(tzinfo=datetime.UTC)
    return Peer((names or [""])[0][:_MAX_NAME], _fingerprint(parsed), expires.timestamp())


def _certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read CA certificates from this file") from error


def _fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's public key."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def _has_signed(signer: x509.Certificate, signed: x509.Certificate) -> bool:
    """Whether one certificate is the issuer of another."""
    try:
        signed.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
