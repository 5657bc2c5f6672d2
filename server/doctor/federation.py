"""The federation's folder: authorities, governance, certificates, and that all its lists say the same."""

import datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from common.doctor import checks
from common.doctor.doctor import Result, check, count, failed, ok, warning
from common.errors import SilotuneError
from common.trust import certs, governance
from server.gateway import members
from server.members import ca, founding
from server.members import folder as registry
from server.members.folder import Registry

ROLES: Final = (ca.SERVERS, certs.SITES, certs.OPERATORS)
_RESTORE: Final = "restore the federation's folder from one backup"
_REISSUE: Final = "run: silotune-server reissue --federation DIR; copy servers/ to gateway and SuperLink, restart both"
_ROTATE: Final = "ask the site to run silotune-client renew KEYS; then: silotune-server rotate renewal.json"
_AUTHORITIES: Final = "found the federation anew in time; issuers cannot be renewed under the same root"
_CARRY_AWAY: Final = "give each member one key, put the root's in a safe, and delete both folders here"


@check("federation", remedy=_RESTORE)
def folder(path: Path) -> Result:
    """Read the folder: governance, signed roster, and what was issued."""
    held = registry.load(path)
    sites = count(len(held.roster.sites), "site")
    return ok(f"{path}: {held.pinned.federation_id}, roster epoch {held.roster.epoch}, {sites}")


@check("governance", remedy=_RESTORE)
def quorum(held: Registry) -> Result:
    """Hold the pinned governance against the federation file, and look for secrets that should be elsewhere."""
    wanted, pinned = held.config.governance, held.pinned
    text = f"{pinned.quorum} of {len(pinned.keys)} keys must sign"
    if (wanted.quorum, wanted.num_keys) != (pinned.quorum, len(pinned.keys)):
        return failed(f"{text}; {registry.CONFIG} says {wanted.quorum} of {wanted.num_keys}")
    secret = [path for name in ("governance", "offline") for path in held.folder.glob(f"{name}/*")]
    left = [str(path.relative_to(held.folder)) for path in sorted(secret)]
    if left:
        return warning(f"{text}; still here: {', '.join(left)}", _CARRY_AWAY)
    return ok(f"{text}; none of them, and not the root's, lies here")


@check("authorities", remedy=_RESTORE)
def authorities(held: Registry, *, now: datetime.datetime) -> Result:
    """Check root and issuers: pinned, signed by the root, each with its own key, good now."""
    root = _root(held)
    if certs.sha256(root) != held.pinned.root_sha256:
        return failed("ca/root.pem is not the root that the sites pinned")
    for role in ROLES:
        certs.check_chain([held.issuer(role).certificate], root, name=f"ca/{role}.pem", now=now)
    return ok(f"root, and issuers of {', '.join(ROLES)}, with their keys (mode 0600)")


@check("own certificates", remedy=_REISSUE)
def own_certificates(held: Registry, *, now: datetime.datetime) -> Result:
    """Check the certificates of gateway, SuperLink and operators: for their keys, under the root, in the roster."""
    root, peers = _root(held), _peers(held)
    for (role, name), listed in peers.items():
        chain = _chain(held, role, name)
        certs.check_chain(chain, root, name=f"{role}/{name}.pem", now=now)
        key = certs.load_key(held.folder / role / f"{name}.key")
        fingerprint = certs.fingerprint(chain[0].public_key())
        if fingerprint != certs.fingerprint(key.public_key()):
            return failed(f"{role}/{name}.pem is not for {name}.key", _RESTORE)
        if fingerprint != listed and name != founding.SUPERLINK:
            return failed(f"{role}/{name}.pem has another key than the roster", _RESTORE)
    return ok(", ".join(name for _, name in peers))


@check("authorities' end", remedy=_AUTHORITIES)
def authorities_end(held: Registry, *, now: datetime.datetime) -> Result:
    """Check how long the issuers are valid."""
    ends = {f"issuer of {role}": held.issuer(role).certificate.not_valid_after_utc for role in ROLES}
    return checks.expiry(ends, now=now, remedy=_AUTHORITIES)


@check("own certificates' end", remedy=_REISSUE)
def own_end(held: Registry, *, now: datetime.datetime) -> Result:
    """Check how long the certificates of gateway, SuperLink and operators are valid."""
    ends = {name: _chain(held, role, name)[0].not_valid_after_utc for role, name in _peers(held)}
    return checks.expiry(ends, now=now, remedy=_REISSUE)


@check("sites' end", remedy=_ROTATE)
def sites_end(held: Registry, *, now: datetime.datetime) -> Result:
    """Check how long the sites' certificates are valid."""
    current = {site.tls_fingerprint: site.name for site in held.roster.sites}
    ends = {
        current[entry.tls_fingerprint]: datetime.datetime.fromtimestamp(entry.expires_at, datetime.UTC)
        for entry in held.issued
        if entry.tls_fingerprint in current
    }
    return checks.expiry(ends, now=now, remedy=_ROTATE)


@check("members", remedy=_RESTORE)
def consistency(held: Registry) -> Result:
    """Compare the roster with what was issued, the revoked list, the node keys, and the kits."""
    problems: list[str] = []
    good = {entry.tls_fingerprint: entry.name for entry in held.issued if not entry.is_revoked}
    revoked = {entry.tls_fingerprint for entry in held.issued if entry.is_revoked}
    for site in held.roster.sites:
        if good.get(site.tls_fingerprint) != site.name:
            problems.append(f"{site.name} is in the roster, and {registry.ISSUED} has no good certificate of it")
        node = held.folder / registry.NODES / f"{site.name}.pub"
        if not node.is_file() or node.read_text("ascii", errors="replace") != site.node_key:
            problems.append(f"{registry.NODES}/{node.name} is not the node key in the roster")
        if not (held.folder / registry.KITS / f"{site.name}.tar").is_file():
            problems.append(f"{registry.KITS}/{site.name}.tar is not there")
    if members.read_revoked(held.folder / registry.REVOKED) != revoked:
        problems.append(f"{registry.REVOKED} is not the list of revoked certificates in {registry.ISSUED}")
    names = ", ".join(site.name for site in held.roster.sites) or "none yet"
    return failed("\n".join(problems)) if problems else ok(f"{names}; {count(len(revoked), 'certificate')} revoked")


def load(path: Path) -> Registry | None:
    """The federation, if its folder can be read."""
    try:
        return registry.load(path)
    except SilotuneError:
        return None  # the check of the folder reports it


def operator(held: Registry) -> tuple[Path, Path] | None:
    """Certificate and key of the first operator whose key lies in the folder."""
    files = [held.folder / certs.OPERATORS / f"{entry.name}.pem" for entry in held.roster.operators]
    return next(((file, file.with_suffix(".key")) for file in files if file.with_suffix(".key").exists()), None)


def _root(held: Registry) -> x509.Certificate:
    """The root certificate."""
    path = held.folder / registry.ISSUERS / "root.pem"
    return certs.parse_chain(governance.read(path), name=str(path))[0]


def _peers(held: Registry) -> dict[tuple[str, str], str]:
    """Role and name of the coordinator's own to the key that the roster lists; it does not list the SuperLink."""
    servers = {(ca.SERVERS, entry.name): entry.tls_fingerprint for entry in held.roster.servers}
    operators = {(certs.OPERATORS, entry.name): entry.tls_fingerprint for entry in held.roster.operators}
    return {**servers, (ca.SERVERS, founding.SUPERLINK): "", **operators}


def _chain(held: Registry, role: str, name: str) -> list[x509.Certificate]:
    """A certificate of the coordinator's own, and its issuer's."""
    path = held.folder / role / f"{name}.pem"
    return certs.parse_chain(governance.read(path), name=str(path))
