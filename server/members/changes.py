"""Changes of a federation's members: a site is admitted, gets a new certificate, or is revoked; each the next epoch.

Each change is first a proposal (`server.members.proposal`), then signed by a quorum of the governance, at once or one
by one, and then published. Only with publication anything holds.
"""

import dataclasses
import datetime
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding

from common import storage
from common.errors import AuthError, ConfigError
from common.trust import certs, governance, identity, kit, request, roster
from common.trust.request import CheckedRequest
from common.trust.roster import SiteEntry
from server.members import ca, kits, proposal
from server.members import folder as registry
from server.members.ca import Span
from server.members.folder import Issued, Registry
from server.members.proposal import Proposal, Signed

Make = Callable[[Registry], Proposal]


@dataclass(frozen=True)
class Change:
    """What a command changed.

    Attributes:
        epoch: Of the roster that holds from now on.
        kit: The kit's tar file; None after a revocation.
        expires_at: End of the new certificate; None after a revocation.
        others: Names of the sites that have an older roster.
        is_admitted: Whether the site is new here, and has yet to hear the federation's words.
    """

    name: str
    epoch: int
    kit: Path | None = None
    expires_at: datetime.datetime | None = None
    others: tuple[str, ...] = ()
    is_admitted: bool = False


def admit(
    folder: Path, *, request_file: Path, words: str, governance_files: Sequence[Path], now: datetime.datetime
) -> Change:
    """Let a site in, with a quorum's keys at hand; see `admission` and `at_once`."""
    make = functools.partial(admission, request_file=request_file, words=words, now=now)
    return at_once(folder, make, governance_files=governance_files, now=now)


def rotate(folder: Path, *, request_file: Path, governance_files: Sequence[Path], now: datetime.datetime) -> Change:
    """Give a site its next certificate, with a quorum's keys at hand; see `renewal` and `at_once`."""
    make = functools.partial(renewal, request_file=request_file, now=now)
    return at_once(folder, make, governance_files=governance_files, now=now)


def revoke(folder: Path, name: str, *, governance_files: Sequence[Path], now: datetime.datetime) -> Change:
    """Take a site out for good, with a quorum's keys at hand; see `revocation` and `at_once`."""
    make = functools.partial(revocation, name=name)
    return at_once(folder, make, governance_files=governance_files, now=now)


def at_once(folder: Path, make: Make, *, governance_files: Sequence[Path], now: datetime.datetime) -> Change:
    """Propose, sign and publish a change in one go.

    Args:
        folder: The federation's, as `provision` made it.
        make: `admission`, `renewal` or `revocation`, with its request.
        governance_files: Key files of at least the quorum.
        now: The time, with its zone.

    Returns:
        The new epoch, and the kit if there is one.

    Raises:
        AuthError: See `make`.
        ConfigError: Governance keys are missing; or see `make`.
        StorageError: The disk is full and the like; the old roster still holds.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        keys = [identity.load(path) for path in governance_files]
        made = make(held)
        members = held.pinned.members(keys)
        return _publish(held, proposal.sign(Signed(made), members), now=now)


def propose(folder: Path, make: Make, *, path: Path) -> Proposal:
    """Write a change that members sign one by one; nothing else is changed.

    Args:
        path: Of the proposal; must not be there.

    Raises:
        AuthError: See `make`.
        ConfigError: The file is there already; or see `make`.
        StorageError: The disk is full and the like.
    """
    with registry.locked(folder):
        if path.exists():
            raise ConfigError(f"{path} is there already; name another file for the proposal")
        made = make(registry.load(folder))
        proposal.write(path, Signed(made))
    return made


def publish(folder: Path, files: Sequence[Path], *, now: datetime.datetime) -> Change:
    """Let a proposal hold that a quorum signed.

    Args:
        files: The signed proposal; or copies, each signed by other members.
        now: The time, with its zone.

    Returns:
        The new epoch, and the kit if there is one.

    Raises:
        AuthError: Too few signatures, other copies, something was changed after signing, or the roster has moved on.
        ConfigError: A file cannot be read.
        StorageError: The disk is full and the like; the old roster still holds.
    """
    with registry.locked(folder):
        held = registry.load(folder)
        copies = [proposal.read(path) for path in files]
        for copy in copies:
            proposal.check(copy, current=held.roster, pinned=held.pinned)
        return _publish(held, proposal.merge(copies), now=now)


def admission(held: Registry, *, request_file: Path, words: str, now: datetime.datetime) -> Proposal:
    """A site's admission: check its request, issue its certificate, which counts only with the roster.

    Args:
        words: The six words that the site's admin read out.
        now: The time, with its zone.

    Raises:
        AuthError: The words or a proof are wrong, the request is for another federation, or its keys were revoked.
        ConfigError: The site is in the roster already.
    """
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
    entry = SiteEntry(statement.name, statement.identity_key, statement.node_key, certs.fingerprint(checked.tls_key))
    return _with_kit(held, entry, checked, kind="admit", now=now)


def renewal(held: Registry, *, request_file: Path, now: datetime.datetime) -> Proposal:
    """A certificate for a site's next TLS key; the old one is good for the overlap.

    Args:
        request_file: What `silotune-client renew` wrote; the site's identity key signed it, so no words are compared.
        now: The time, with its zone.

    Raises:
        AuthError: A proof is wrong, another identity key signed, or the request does not follow the present TLS key.
    """
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
    return _with_kit(held, entry, checked, kind="rotate", now=now)


def revocation(held: Registry, *, name: str) -> Proposal:
    """A site's end: its certificates, its identity key, and its place in the roster.

    Raises:
        AuthError: The roster has no such site.
    """
    held.roster.site(name)
    return _proposal(held, "revoke", name, tuple(site for site in held.roster.sites if site.name != name), {})


def _read_request(path: Path, held: Registry) -> CheckedRequest:
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


def _with_kit(
    held: Registry,
    entry: SiteEntry,
    checked: CheckedRequest,
    *,
    kind: Literal["admit", "rotate"],
    now: datetime.datetime,
) -> Proposal:
    """Issue the certificate and fill in the kit."""
    federation_id = held.pinned.federation_id
    certificate = ca.issue(  # for the site's name and nothing else
        entry.name,
        role=certs.SITES,
        federation_id=federation_id,
        key=checked.tls_key,
        issuer=held.issuer(certs.SITES),
        span=Span.of_days(now, held.config.validity.certificate_days),
        names=[certs.host_of(entry.name, role=certs.SITES, federation_id=federation_id)],
    )
    chain = certificate.public_bytes(Encoding.PEM) + held.issuer(certs.SITES).pem
    others = (site for site in held.roster.sites if site.name != entry.name)
    sites = tuple(sorted((*others, entry), key=lambda site: site.name))
    return _proposal(held, kind, entry.name, sites, kits.make(held, name=entry.name, chain=chain))


def _proposal(
    held: Registry,
    kind: Literal["admit", "rotate", "revoke"],
    name: str,
    sites: tuple[SiteEntry, ...],
    files: dict[str, bytes],
) -> Proposal:
    """The roster of the next epoch, and the kit."""
    following = dataclasses.replace(held.roster, epoch=held.roster.epoch + 1, sites=sites)
    roster.check(following, held.pinned)
    texts = {file: data.decode() for file, data in files.items()}
    return Proposal(1, kind, name, held.roster.sha256, following, texts)


def _publish(held: Registry, signed: Signed, *, now: datetime.datetime) -> Change:
    """Write the kit or the list of revoked keys, and last of all the roster, with which the change holds."""
    made = signed.proposal
    data = roster.with_signatures(made.roster, signed.of_roster, pinned=held.pinned)
    if made.kind == "revoke":
        issued = [dataclasses.replace(e, is_revoked=True) if e.name == made.name else e for e in held.issued]
        serials = [int(entry.serial, 16) for entry in issued if entry.is_revoked]
        crl = ca.revocation_list(serials, issuer=held.issuer(certs.SITES), now=now)
        registry.write_issued(held.folder, issued)
        storage.write_atomic(held.crl_path, crl)
        change = Change(made.name, made.roster.epoch)
    else:
        change = _hand_out(held, signed, data)
    storage.write_atomic(held.roster_path, data)
    others = tuple(site.name for site in made.roster.sites if site.name != made.name)
    return dataclasses.replace(change, others=others, is_admitted=made.kind == "admit")


def _hand_out(held: Registry, signed: Signed, roster_bytes: bytes) -> Change:
    """Note the certificate, write kit and node key."""
    made, entry = signed.proposal, signed.proposal.roster.site(signed.proposal.name)
    files = kit.close({**made.files, kit.ROSTER: roster_bytes}, signed.of_kit, pinned=held.pinned)
    certificate = certs.parse_chain(files[kit.CERTIFICATE], name=kit.CERTIFICATE)[0]
    issued = Issued(
        name=entry.name,
        serial=f"{certificate.serial_number:x}",
        tls_fingerprint=entry.tls_fingerprint,
        identity_key=entry.identity_key,
        expires_at=int(certificate.not_valid_after_utc.timestamp()),
    )
    registry.write_issued(held.folder, (*held.issued, issued))
    folder, name = held.folder / registry.KITS, entry.name
    try:  # a folder, which replaces an older one, and a tar file
        folder.mkdir(exist_ok=True)
        made_folder = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
        made_folder.chmod(0o755)
        for file, content in files.items():
            (made_folder / file).write_bytes(content)
        shutil.rmtree(folder / name, ignore_errors=True)
        made_folder.rename(folder / name)
    except OSError as error:
        raise storage.storage_error(folder / name, error) from error
    tar = folder / f"{name}.tar"
    storage.write_atomic(tar, kits.tar(name, files))
    storage.write_atomic(held.folder / registry.NODES / f"{entry.name}.pub", entry.node_key.encode("ascii"))
    return Change(entry.name, made.roster.epoch, tar, certificate.not_valid_after_utc)
