"""X.509: a root that stays offline, one issuer a role below it, and the certificates that these issue.

A role's issuer can vouch for that role only: its extended key usage and its name constraints are critical and are
enforced by TLS itself. Every listener trusts exactly one issuer, not the root.
"""

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.trust import certs, governance

SERVERS: Final = "servers"
BACKDATED: Final = datetime.timedelta(minutes=5)  # clocks differ
_USAGE: Final = {
    SERVERS: ExtendedKeyUsageOID.SERVER_AUTH,
    certs.SITES: ExtendedKeyUsageOID.CLIENT_AUTH,
    certs.OPERATORS: ExtendedKeyUsageOID.CLIENT_AUTH,
}


@dataclass(frozen=True)
class Issuer:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class Span:
    """From when until when a certificate is good."""

    start: datetime.datetime
    end: datetime.datetime

    @classmethod
    def of_days(cls, now: datetime.datetime, days: int) -> "Span":
        """From a little before now."""
        return cls(now - BACKDATED, now + datetime.timedelta(days=days))


def make_root(federation_id: str, *, key: ec.EllipticCurvePrivateKey, span: Span) -> Issuer:
    """Make the self-signed root; only issuers may hang below it.

    Source: RFC 5280, sections 4.2.1.1 to 4.2.1.12, for all certificates here.
    """
    name = _named(f"{federation_id} root", federation_id)
    builder = _builder(name, issuer=name, key=key.public_key(), signer=key.public_key(), span=span)
    return Issuer(_as_authority(builder, path_length=1).sign(key, hashes.SHA384()), key)


def make_issuer(
    federation_id: str, *, role: str, key: ec.EllipticCurvePrivateKey, root: Issuer, span: Span, names: Sequence[str]
) -> Issuer:
    """Make a role's issuer.

    Args:
        names: Host names (all below them included) and addresses; it can issue for no others.
    """
    builder = _builder(
        _named(f"{federation_id} {role}", federation_id),
        issuer=root.certificate.subject,
        key=key.public_key(),
        signer=root.key.public_key(),
        span=span,
    )
    permitted = [_general_name(name, ipaddress.ip_network) for name in names]
    builder = (
        _as_authority(builder, path_length=0)
        .add_extension(x509.ExtendedKeyUsage([_USAGE[role]]), critical=True)
        .add_extension(x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None), critical=True)
    )
    return Issuer(builder.sign(root.key, hashes.SHA384()), key)


def issue(
    common_name: str,
    *,
    role: str,
    federation_id: str,
    key: ec.EllipticCurvePublicKey,
    issuer: Issuer,
    span: Span,
    names: Sequence[str],
) -> x509.Certificate:
    """Issue a certificate for TLS.

    Args:
        role: Decides whether it is for servers or clients.
        key: Whom it speaks for; the holder has proved to have the private half.
        span: When it is good; cut where the issuer ends.
        names: Host names and addresses that it is for.
    """
    end = min(span.end, issuer.certificate.not_valid_after_utc)
    builder = _builder(
        _named(common_name, federation_id),
        issuer=issuer.certificate.subject,
        key=key,
        signer=issuer.key.public_key(),
        span=Span(span.start, end),
    )
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGE[role]]), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name, ipaddress.ip_address) for name in names]), critical=False
        )
        .sign(issuer.key, hashes.SHA384())
    )


def revocation_list(serials: Sequence[int], *, issuer: Issuer, now: datetime.datetime) -> bytes:
    """Write an issuer's revocation list, PEM; it is good as long as the issuer, as the gateway reads it from disk."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - BACKDATED)
        .next_update(issuer.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA384()).public_bytes(Encoding.PEM)


def load(folder: Path, role: str) -> Issuer:
    """Read a role's issuer from `ROLE.pem` and `ROLE.key`.

    Raises:
        ConfigError: A file is missing, the key's mode is not 0600, or key and certificate do not belong together.
        AuthError: The certificate is malformed.
    """
    path = folder / f"{role}.pem"
    certificate = certs.parse_chain(governance.read(path), name=str(path))[0]
    key = certs.load_key(folder / f"{role}.key")
    if certs.fingerprint(certificate.public_key()) != certs.fingerprint(key.public_key()):
        raise ConfigError(f"{path} and {role}.key do not belong together; restore both from one backup")
    return Issuer(certificate, key)


def _builder(
    subject: x509.Name,
    *,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    span: Span,
) -> x509.CertificateBuilder:
    """What all certificates have."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(span.start)
        .not_valid_after(span.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder, *, path_length: int) -> x509.CertificateBuilder:
    """Let a certificate sign others."""
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return builder.add_extension(constraints, critical=True).add_extension(
        _usage(signs_certificates=True), critical=True
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Signing certificates and revocation lists, or signing handshakes; never both."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(common_name: str, federation_id: str) -> x509.Name:
    """A distinguished name: the federation and whom in it."""
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation_id)
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str, parse: Callable[[str], Any]) -> x509.GeneralName:
    """A host name (as a constraint, with all below it), or what `parse` makes of an address."""
    try:
        return x509.IPAddress(parse(name))
    except ValueError:
        return x509.DNSName(name)
