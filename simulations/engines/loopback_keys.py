"""Throw-away keys for a federation on one machine: a certificate for loopback, and node keys. Never for production."""

import datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from common import storage
from common.trust import certs
from server.members import ca
from server.members.ca import Span
from server.members.founding import LOOPBACK

FEDERATION: Final = "loopback"
_DAYS: Final = 2


def write_certificates(folder: Path) -> None:
    """Write `ca.pem`, `server.pem` and `server.key`: a server certificate for 127.0.0.1, and the root that it leads to.

    Raises:
        ConfigError: A key is there already, or others may write in the folder.
        StorageError: They cannot be written.
    """
    span = Span.of_days(datetime.datetime.now(datetime.UTC), _DAYS)
    root = ca.make_root(FEDERATION, key=ec.generate_private_key(ec.SECP384R1()), span=span)
    key, names = ec.generate_private_key(ec.SECP384R1()), (LOOPBACK,)
    issuer = ca.make_issuer(FEDERATION, role=ca.SERVERS, key=key, root=root, span=span, names=names)
    public = certs.create_tls_key(folder / "server.key").public_key()
    server = ca.issue(
        LOOPBACK, role=ca.SERVERS, federation_id=FEDERATION, key=public, issuer=issuer, span=span, names=names
    )
    storage.write_atomic(folder / "ca.pem", root.pem)
    storage.write_atomic(folder / "server.pem", server.public_bytes(Encoding.PEM) + issuer.pem)


def write_node_key(path: Path) -> bytes:
    """Write a node's private key, P-384 in OpenSSH form as a SuperNode reads it; returns the public key, as PEM."""
    return certs.public_pem(certs.create_node_key(path)).encode("ascii")
