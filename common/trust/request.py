"""A site's request to join or to renew: its public keys, and a proof of possession by each private one.

The statement is what people compare words of. A renewal names the TLS key that it replaces, so that an old request,
kept by somebody, cannot bring an old key back.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import ConfigDict, Field, TypeAdapter

from common.errors import AuthError
from common.frame import wire
from common.trust import certs, governance, identity
from common.trust.governance import HexKey, Slug

VERSION: Final = 1
PURPOSE: Final = "enrolment request"
_CLOSED: Final = ConfigDict(strict=True, extra="forbid")
_Pem = Annotated[str, Field(max_length=4096)]
_Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128,220}$")]


@dataclass(frozen=True)
class Statement:
    """What a site asks for.

    Attributes:
        version: Of this format.
        federation_id: The federation to join.
        name: The site's.
        identity_key: Ed25519 public key, hex.
        node_key: P-384 public key, PEM.
        csr: Certificate signing request of the TLS key, PEM.
        replaces: Fingerprint of the TLS key that this one follows; empty in a first request.
    """

    __pydantic_config__ = _CLOSED

    version: Literal[1]
    federation_id: Slug
    name: Slug
    identity_key: HexKey
    node_key: _Pem
    csr: _Pem
    replaces: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    def to_bytes(self) -> bytes:
        """Canonical bytes: what the three keys sign."""
        return wire.canonical_json(dataclasses.asdict(self))

    @property
    def words(self) -> str:
        """Six words by which the coordinator knows that this request is the site's."""
        return identity.words(self.to_bytes())


@dataclass(frozen=True)
class _Request:
    """A request file."""

    __pydantic_config__ = _CLOSED

    statement: Statement
    identity_proof: _Signature
    node_proof: _Signature
    tls_proof: _Signature


@dataclass(frozen=True)
class CheckedRequest:
    """A statement whose proofs are right, and the TLS key that it asks a certificate for."""

    statement: Statement
    tls_key: ec.EllipticCurvePublicKey


def make(
    federation_id: str,
    name: str,
    *,
    identity_key: Ed25519PrivateKey,
    node_key: ec.EllipticCurvePrivateKey,
    tls_key: ec.EllipticCurvePrivateKey,
    replaces: str = "",
) -> tuple[Statement, bytes]:
    """State what is asked for and prove it with all three keys.

    Args:
        replaces: Fingerprint of the TLS key before; empty in a first request.

    Returns:
        The statement, and the request file's bytes.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signed = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(tls_key, hashes.SHA384())
    csr = signed.public_bytes(Encoding.PEM).decode("ascii")
    public = identity.public_hex(identity_key)
    statement = Statement(VERSION, federation_id, name, public, certs.public_pem(node_key), csr, replaces)
    data = statement.to_bytes()
    proofs = {
        "identity_proof": identity.sign(identity_key, data, purpose=PURPOSE),
        "node_proof": certs.sign(node_key, data, purpose=PURPOSE),
        "tls_proof": certs.sign(tls_key, data, purpose=PURPOSE),
    }
    return statement, wire.canonical_json({"statement": dataclasses.asdict(statement), **proofs})


def parse(data: bytes, *, name: str) -> CheckedRequest:
    """Check a request's form and its three proofs; the words are the caller's to compare.

    Raises:
        AuthError: Another form, a proof that is not right, keys of another kind, or one key used twice.
    """
    found = governance.parse(data, TypeAdapter(_Request), name=name)
    statement = found.statement
    signed = statement.to_bytes()
    identity.verify(statement.identity_key, found.identity_proof, signed, purpose=PURPOSE)
    node_key = certs.parse_public(statement.node_key, what="node key")
    certs.verify(node_key, found.node_proof, signed, purpose=PURPOSE)
    tls_key = _tls_key(statement)
    certs.verify(tls_key, found.tls_proof, signed, purpose=PURPOSE)
    if certs.fingerprint(node_key) == certs.fingerprint(tls_key):
        raise AuthError(f"{name} uses one key for the node and for TLS; run silotune-client enroll again")
    return CheckedRequest(statement, tls_key)


def _tls_key(statement: Statement) -> ec.EllipticCurvePublicKey:
    """The key of the certificate signing request, after its own signature was checked; all else in it is ignored."""
    try:
        csr = x509.load_pem_x509_csr(statement.csr.encode())
        is_valid, key = csr.is_signature_valid, csr.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthError("the certificate signing request is malformed; run silotune-client enroll again") from error
    if not is_valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise AuthError("the certificate signing request is not signed by a P-384 key of its own")
    return key
