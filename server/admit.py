"""Changes of a federation's members: a site is admitted, gets a new certificate, or is revoked; each the next epoch."""

import dataclasses
import datetime
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from common import certs, governance, identity, request, roster, storage
from common.errors import AuthError, ConfigError
from common.request import Checked
from common.roster import Roster, SiteEntry
from server import ca, kits, registry
from server.ca import Span
from server.registry import Issued, Registry


@dataclass(frozen=True)
class Change:
    """What a command changed.

    Attributes:
        name: The site's.
        epoch: Of the roster that holds from now on.
        kit: The kit's tar file; None after a revocation.
        expires_at: End of the new certificate; None after a revocation.
    """

    name: str
    epoch: int
    kit: Path | None = None
    expires_at: datetime.datetime | None = None


def admit(
    folder: Path, *, request_file: Path, words: str, governance_files: Sequence[Path], now: datetime.datetime
) -> Change:
    """Let a site in: check its request, issue its certificate, sign the next roster, write its kit.

    Args:
        folder: The federation's, as `provision` made it.
        request_file: What `silotune-client enroll` wrote.
        words: The six words that the site's admin read out.
        governance_files: Key files of at least the quorum.
        now: The time, with its zone.

    Returns:
        The new epoch and the kit.

    Raises:
        AuthError: The words or a proof are wrong, the request is for another federation, or its keys were revoked.
        ConfigError: The site is in the roster already, or governance keys are missing.
        StorageError: The disk is full and the like; the old roster still holds.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        keys = [identity.load(path) for path in governance_files]
        checked = _read_request(request_file, held)
        statement = checked.statement
        identity.check_words(statement.to_bytes(), words)
        if any(site.name == statement.name for site in held.roster.sites):
            raise ConfigError(
                f"{statement.name} is in the roster already; renew its certificate with silotune-server rotate, or "
                f"for new keys first: silotune-server revoke {statement.name}"
            )
        if statement.replaces:
            raise AuthError(f"{request_file} renews a certificate; use silotune-server rotate")
        entry = SiteEntry(
            statement.name, statement.identity_key, statement.node_key, certs.fingerprint(checked.tls_key)
        )
        return _put(held, entry, checked, keys=keys, now=now)


def rotate(folder: Path, *, request_file: Path, governance_files: Sequence[Path], now: datetime.datetime) -> Change:
    """Give a site a certificate for its next TLS key; the old one is good for the overlap.

    Args:
        folder: The federation's.
        request_file: What `silotune-client renew` wrote; the site's identity key signed it, so no words are compared.
        governance_files: Key files of at least the quorum.
        now: The time, with its zone.

    Returns:
        The new epoch and the kit.

    Raises:
        AuthError: A proof is wrong, another identity key signed, or the request does not follow the present TLS key.
        ConfigError: Governance keys are missing.
        StorageError: The disk is full and the like; the old roster still holds.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        keys = [identity.load(path) for path in governance_files]
        checked = _read_request(request_file, held)
        statement = checked.statement
        old = held.roster.site(statement.name)
        if statement.identity_key != old.identity_key:
            raise AuthError(
                f"{request_file} is signed by another identity key than {old.name}'s; a site that lost its key is "
                f"revoked and admitted anew"
            )
        if statement.replaces != old.tls_fingerprint:
            raise AuthError(f"{request_file} does not follow {old.name}'s present certificate; it is an old request")
        overlap = datetime.timedelta(days=held.config.validity.overlap_days)
        entry = dataclasses.replace(
            old,
            node_key=statement.node_key,
            tls_fingerprint=certs.fingerprint(checked.tls_key),
            retiring_tls_fingerprint=old.tls_fingerprint,
            retires_at=int((now + overlap).timestamp()),
        )
        return _put(held, entry, checked, keys=keys, now=now)


def revoke(folder: Path, name: str, *, governance_files: Sequence[Path], now: datetime.datetime) -> Change:
    """Take a site out for good: its certificates, its identity key, and its place in the roster.

    Args:
        folder: The federation's.
        name: The site's.
        governance_files: Key files of at least the quorum.
        now: The time, with its zone.

    Returns:
        The new epoch.

    Raises:
        AuthError: The roster has no such site.
        ConfigError: Governance keys are missing.
        StorageError: The disk is full and the like; run again.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        keys = [identity.load(path) for path in governance_files]
        held.roster.site(name)
        following = _next(held.roster, tuple(site for site in held.roster.sites if site.name != name))
        signed = roster.signed_bytes(following, keys, pinned=held.pinned)
        issued = [dataclasses.replace(e, is_revoked=True) if e.name == name else e for e in held.issued]
        serials = [int(entry.serial, 16) for entry in issued if entry.is_revoked]
        crl = ca.revocation_list(serials, issuer=held.issuer(certs.SITES), now=now)
        registry.write_issued(folder, issued)
        storage.write_atomic(held.crl_path, crl)
        storage.write_atomic(held.roster_path, signed)
    return Change(name, following.epoch)


def _read_request(path: Path, held: Registry) -> Checked:
    """A request for this federation whose proofs are right and whose keys were never revoked."""
    checked = request.parse(governance.read(path), name=str(path))
    statement = checked.statement
    if statement.federation_id != held.pinned.federation_id:
        raise AuthError(f"{path} is a request to join {statement.federation_id}, not {held.pinned.federation_id}")
    revoked = [entry for entry in held.issued if entry.is_revoked]
    is_revoked = statement.identity_key in {entry.identity_key for entry in revoked} or certs.fingerprint(
        checked.tls_key
    ) in {entry.tls_fingerprint for entry in revoked}
    if is_revoked:
        raise AuthError(f"{path} holds a key that was revoked; the site must enrol with new keys, in a new folder")
    return checked


def _put(
    held: Registry, entry: SiteEntry, checked: Checked, *, keys: Sequence[Ed25519PrivateKey], now: datetime.datetime
) -> Change:
    """Issue the certificate, write the kit, and last of all the roster, with which the change holds."""
    certificate = _issue(held, checked, now=now)
    others = (site for site in held.roster.sites if site.name != entry.name)
    following = _next(held.roster, tuple(sorted((*others, entry), key=lambda site: site.name)))
    signed = roster.signed_bytes(following, keys, pinned=held.pinned)
    chain = certificate.public_bytes(Encoding.PEM) + held.issuer(certs.SITES).pem
    files = kits.make(held, name=entry.name, chain=chain, roster_bytes=signed, keys=keys)
    issued = Issued(
        name=entry.name,
        serial=f"{certificate.serial_number:x}",
        tls_fingerprint=entry.tls_fingerprint,
        identity_key=entry.identity_key,
        expires_at=int(certificate.not_valid_after_utc.timestamp()),
    )
    registry.write_issued(held.folder, (*held.issued, issued))
    tar = _write_kit(held.folder / registry.KITS, entry.name, files)
    storage.write_atomic(held.folder / registry.NODES / f"{entry.name}.pub", entry.node_key.encode("ascii"))
    storage.write_atomic(held.roster_path, signed)
    return Change(entry.name, following.epoch, tar, certificate.not_valid_after_utc)


def _issue(held: Registry, checked: Checked, *, now: datetime.datetime) -> x509.Certificate:
    """A certificate for the site's name and nothing else."""
    name, federation_id = checked.statement.name, held.pinned.federation_id
    return ca.issue(
        name,
        role=certs.SITES,
        federation_id=federation_id,
        key=checked.tls_key,
        issuer=held.issuer(certs.SITES),
        span=Span.of_days(now, held.config.validity.certificate_days),
        names=[certs.host_of(name, role=certs.SITES, federation_id=federation_id)],
    )


def _next(current: Roster, sites: tuple[SiteEntry, ...]) -> Roster:
    """The roster of the next epoch."""
    return dataclasses.replace(current, epoch=current.epoch + 1, sites=sites)


def _write_kit(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Write a kit as a folder, which replaces an older one, and as a tar file; returns the latter."""
    try:
        folder.mkdir(exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
        made.chmod(0o755)
        for file, data in files.items():
            (made / file).write_bytes(data)
        shutil.rmtree(folder / name, ignore_errors=True)
        made.rename(folder / name)
    except OSError as error:
        raise storage.storage_error(folder / name, error) from error
    storage.write_atomic(folder / f"{name}.tar", kits.tar(name, files))
    return folder / f"{name}.tar"
