"""A federation's first day: root, issuers, governance keys, gateway, SuperLink, operators, a roster without sites."""

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from common import keyfile, storage
from common.errors import ConfigError
from common.run import reading
from common.trust import certs, identity, kit, roster
from common.trust.governance import Governance
from common.trust.roster import OperatorEntry, PeerEntry
from server.members import ca, founding_config
from server.members import folder as registry
from server.members.ca import Issuer, Span
from server.members.founding_config import FoundingConfig

GATEWAY: Final = "gateway"
SUPERLINK: Final = "superlink"
LOOPBACK: Final = "127.0.0.1"  # the only address of a SuperLink: the gateway is before it
SIGNING_SUFFIX: Final = ".signing.key"
UNITS: Final = Path(__file__).with_name("units")


def provision(config_path: Path, *, folder: Path, now: datetime.datetime) -> Governance:
    """Make a federation's folder, whole or not at all.

    Args:
        folder: For the result; must not be there, or be empty.
        now: The time, with its zone.

    Returns:
        What every site pins; its words are what their admins compare.

    Raises:
        ConfigError: The file has problems, or the folder holds something: an authority is never overwritten.
        StorageError: The disk is full and the like.

    Privacy: private keys of sites are never made here; see `client.join.enroll`.
    """
    text = reading.read(config_path)
    config = founding_config.parse(text, name=str(config_path))
    with _fresh(folder) as made:
        storage.write_atomic(made / registry.CONFIG, text.encode())
        issuers, root_sha256 = _make_authorities(config, made / registry.ISSUERS, now=now)
        keys = [identity.create(made / "governance" / f"{n}.key") for n in range(1, config.governance.num_keys + 1)]
        public = tuple(identity.public_hex(key) for key in keys)
        pinned = Governance(config.federation.id, config.governance.quorum, public, root_sha256)
        storage.write_atomic(made / kit.PINNED, pinned.to_bytes())
        entries: dict[str, list[PeerEntry]] = {ca.SERVERS: [], certs.OPERATORS: []}
        for name, role, names in _peers(config):
            certs.create_tls_key(made / role / f"{name}.key")
            entry, _ = _certify(config, made, name=name, role=role, names=names, issuer=issuers[role], now=now)
            if name != SUPERLINK:  # which nobody meets but the gateway
                entries[role].append(entry)
        operators = []
        for peer in entries[certs.OPERATORS]:  # each has a key that signs runs, beside the one for TLS
            key = identity.create(made / certs.OPERATORS / f"{peer.name}{SIGNING_SUFFIX}")
            operators.append(OperatorEntry(peer.name, peer.tls_fingerprint, identity.public_hex(key)))
        first = roster.make(pinned, epoch=1, servers=tuple(entries[ca.SERVERS]), operators=tuple(operators))
        storage.write_atomic(made / kit.ROSTER, roster.signed_bytes(first, keys, pinned=pinned))
        registry.write_issued(made, ())
        crl = ca.revocation_list((), issuer=issuers[certs.SITES], now=now)
        storage.write_atomic(made / registry.ISSUERS / "sites.crl", crl)
        for unit in sorted(UNITS.iterdir()):
            storage.write_atomic(made / UNITS.name / unit.name, unit.read_bytes())
    return pinned


def reissue(folder: Path, *, now: datetime.datetime) -> dict[str, datetime.datetime]:
    """Issue new certificates for the present keys of gateway, SuperLink and operators; the roster stays as it is.

    Args:
        now: The time, with its zone.

    Returns:
        Name to the new certificate's end.

    Raises:
        ConfigError: A key is missing, or not mode 0600.
        StorageError: The disk is full and the like; run again.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        issuers = {role: held.issuer(role) for role in (ca.SERVERS, certs.OPERATORS)}
        return {
            name: _certify(held.config, folder, name=name, role=role, names=names, issuer=issuers[role], now=now)[1]
            for name, role, names in _peers(held.config)
        }


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place when all is done."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ConfigError(f"{folder} is there already; an authority is never overwritten: name another folder")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise storage.storage_error(folder, error) from error
    try:
        yield made
        os.replace(made, folder)
    except OSError as error:
        raise storage.storage_error(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _make_authorities(config: FoundingConfig, folder: Path, *, now: datetime.datetime) -> tuple[dict[str, Issuer], str]:
    """Make root and issuers; the root's key lies apart, to be carried away."""
    name, validity = config.federation.id, config.validity
    root_key = certs.create_tls_key(folder.parent / "offline" / "root.key")
    root = ca.make_root(name, key=root_key, span=Span.of_days(now, validity.root_days))
    keyfile.folder(folder)
    storage.write_atomic(folder / "root.pem", root.pem)
    names = {
        ca.SERVERS: tuple(dict.fromkeys((*config.federation.host_names, LOOPBACK))),
        **{role: (f"{role}.{name}.{certs.SUFFIX}",) for role in (certs.SITES, certs.OPERATORS)},
    }
    span = Span.of_days(now, validity.intermediate_days)
    issuers = {}
    for role, allowed in names.items():
        key = certs.create_tls_key(folder / f"{role}.key")
        issuers[role] = ca.make_issuer(name, role=role, key=key, root=root, span=span, names=allowed)
        storage.write_atomic(folder / f"{role}.pem", issuers[role].pem)
    return issuers, certs.sha256(root.certificate)


def _peers(config: FoundingConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """The coordinator's own: name, role, and names in the certificate."""
    federation = config.federation
    hosts = {
        name: certs.host_of(name, role=certs.OPERATORS, federation_id=federation.id)
        for name in federation.operator_names
    }
    return [
        (GATEWAY, ca.SERVERS, federation.host_names),
        (SUPERLINK, ca.SERVERS, (LOOPBACK,)),
        *((name, certs.OPERATORS, (host,)) for name, host in hosts.items()),
    ]


def _certify(
    config: FoundingConfig,
    folder: Path,
    *,
    name: str,
    role: str,
    names: Sequence[str],
    issuer: Issuer,
    now: datetime.datetime,
) -> tuple[PeerEntry, datetime.datetime]:
    """Issue a certificate for a key that is there; returns the roster's entry and the certificate's end."""
    key = certs.load_key(folder / role / f"{name}.key").public_key()
    certificate = ca.issue(
        name,
        role=role,
        federation_id=config.federation.id,
        key=key,
        issuer=issuer,
        span=Span.of_days(now, config.validity.certificate_days),
        names=names,
    )
    storage.write_atomic(folder / role / f"{name}.pem", certificate.public_bytes(Encoding.PEM) + issuer.pem)
    return PeerEntry(name, certs.fingerprint(key)), certificate.not_valid_after_utc
