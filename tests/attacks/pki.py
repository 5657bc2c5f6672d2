"""A federation's keys for tests: one root, a CA for each role, sites with node keys, and a signed roster."""

import datetime
import hashlib
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from common.trust import identity, roster
from common.trust.governance import Governance
from common.trust.roster import OperatorEntry, SiteEntry

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def authority(name: str, *, issuer: Authority | None = None) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(key, sign(name, key, issuer=issuer, is_ca=True))


def sign(name, key, *, issuer: Authority | None, is_ca=False, host="", ended=False) -> x509.Certificate:
    """A certificate with all that strict checks ask for; without an issuer it is its own."""
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = issuer.key if issuer else key
    usage = {"digital_signature": not is_ca, "key_cert_sign": is_ca, "crl_sign": is_ca}
    rest = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    extensions = [
        (x509.BasicConstraints(ca=is_ca, path_length=None), True),
        (x509.KeyUsage(**usage, **dict.fromkeys((*rest, "decipher_only"), False)), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
    ]
    if host:
        extensions.append((x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), False))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * DAY)
        .not_valid_after(now - DAY if ended else now + DAY)
    )
    for extension, is_critical in extensions:
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(signer, hashes.SHA256())


def fingerprint(key) -> str:
    return hashlib.sha256(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def public_pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class Pki:
    """Writes `NAME.pem` (with its chain) and `NAME.key` into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = authority("root")
        self.sites, self.operators, self.servers = (
            authority(f"{role} CA", issuer=self.root) for role in ("sites", "operators", "servers")
        )
        self.stranger = authority("stranger CA")
        self.tls: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.nodes: dict[str, ec.EllipticCurvePrivateKey] = {}
        for name in ("root", "sites", "operators", "servers"):
            pem = getattr(self, name).certificate.public_bytes(Encoding.PEM)
            (folder / f"{name}-ca.pem").write_bytes(pem)

    def issue(self, name: str, by: Authority, *, host: str = "", ended: bool = False) -> str:
        """Make a key and a certificate; returns the fingerprint of the key."""
        key = self.tls.setdefault(name, ec.generate_private_key(ec.SECP256R1()))
        chain = [sign(name, key, issuer=by, host=host, ended=ended), by.certificate]
        (self.folder / f"{name}.pem").write_bytes(b"".join(item.public_bytes(Encoding.PEM) for item in chain))
        write_private(self.folder / f"{name}.key", key, PrivateFormat.PKCS8)
        return fingerprint(key)

    def node_key(self, name: str) -> bytes:
        """Make a node's key, in the form that a SuperNode reads; returns the public one."""
        key = self.nodes.setdefault(name, ec.generate_private_key(ec.SECP384R1()))
        write_private(self.folder / f"{name}.node", key, PrivateFormat.OpenSSH)
        return public_pem(key)

    def write_roster(self, *, sites: tuple[str, ...], operators: tuple[str, ...]) -> None:
        """Write `governance.json` and `roster.json`, signed by two of three."""
        governors = [Ed25519PrivateKey.generate() for _ in range(3)]
        pinned = Governance("test", 2, tuple(map(identity.public_hex, governors)), "ee" * 32)
        made = roster.make(
            pinned,
            epoch=1,
            sites=tuple(self._entry(name) for name in sites),
            operators=tuple(OperatorEntry(name, fingerprint(self.tls[name]), new_identity()) for name in operators),
        )
        (self.folder / "governance.json").write_bytes(pinned.to_bytes())
        (self.folder / "roster.json").write_bytes(roster.signed_bytes(made, governors[:2], pinned=pinned))

    def _entry(self, name: str) -> SiteEntry:
        return SiteEntry(name, new_identity(), self.node_key(name).decode(), fingerprint(self.tls[name]))


def new_identity() -> str:
    return identity.public_hex(Ed25519PrivateKey.generate())


def write_private(path: Path, key, form: PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
