"""The signed roster: which sites, servers and operators a federation has, and by which keys they are known.

A roster is accepted only with enough signatures of the pinned governance and never with an epoch below the highest one
seen, so neither a coordinator nor a restored backup can bring a revoked site back.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, TypeAdapter

from common import storage
from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import governance
from common.trust.governance import Governance, HexKey, Slug

VERSION: Final = 1
PURPOSE: Final = "roster"
KIND: Final = "roster"  # of the frame that brings one to an agent
PATH: Final = "/v1/roster"  # at the gateway's listener for sites
STANDING_PATH: Final = "/v1/standing"  # there: whether the SuperLink knows the node of the site that asks
KNOWN: Final = "silotune-known"  # header with the SHA-256 of the roster file that the caller has
_NODE_KEY: Final = r"^-----BEGIN PUBLIC KEY-----\n[A-Za-z0-9+/=\n]{100,400}\n-----END PUBLIC KEY-----\n$"
_CLOSED: Final = ConfigDict(strict=True, extra="forbid")
Epoch = Annotated[int, Field(ge=1, le=1 << 53)]


@dataclass(frozen=True)
class SiteEntry:
    """One site.

    Attributes:
        name: The site's, as in its certificate.
        identity_key: Ed25519 public key, hex.
        node_key: P-384 public key of its SuperNode: PEM, exactly the bytes that the node sends in base64.
        tls_fingerprint: SHA-256 of its certificate's public key (SPKI, DER), hex.
        retiring_tls_fingerprint: The one before, which is good until `retires_at`; empty if there is none.
        retires_at: Seconds since 1970, UTC; 0 if nothing retires.
    """

    __pydantic_config__ = _CLOSED

    name: Slug
    identity_key: HexKey
    node_key: Annotated[str, Field(pattern=_NODE_KEY)]
    tls_fingerprint: HexKey
    retiring_tls_fingerprint: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    retires_at: Annotated[int, Field(ge=0, le=1 << 53)] = 0


@dataclass(frozen=True)
class PeerEntry:
    """A server: name, and SHA-256 of its certificate's public key (SPKI, DER), hex."""

    __pydantic_config__ = _CLOSED

    name: Slug
    tls_fingerprint: HexKey


@dataclass(frozen=True)
class OperatorEntry:
    """Who may control and sign runs.

    Attributes:
        name: The operator's, as in its certificate.
        tls_fingerprint: SHA-256 of its certificate's public key (SPKI, DER), hex: the gateway knows it by this.
        identity_key: Ed25519 public key, hex, with which it signs manifests: sites know it by this.
    """

    __pydantic_config__ = _CLOSED

    name: Slug
    tls_fingerprint: HexKey
    identity_key: HexKey


@dataclass(frozen=True)
class Roster:
    """Everybody in a federation at one epoch; every change is the next epoch."""

    __pydantic_config__ = _CLOSED

    version: Literal[1]
    federation_id: Slug
    epoch: Epoch
    quorum: int
    governance: tuple[HexKey, ...]
    sites: tuple[SiteEntry, ...] = ()
    servers: tuple[PeerEntry, ...] = ()
    operators: tuple[OperatorEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical bytes: what is signed, and whose hash stands for the roster."""
        return wire.canonical_json(dataclasses.asdict(self))

    @property
    def sha256(self) -> str:
        """The hash of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def site(self, name: str) -> SiteEntry:
        """Find a site by its name.

        Raises:
            AuthError: It is not in this roster.
        """
        found = next((site for site in self.sites if site.name == name), None)
        if found is None:
            raise AuthError(f"site {wire.shown(name)} is not in epoch {self.epoch} of {self.federation_id}'s roster")
        return found

    def site_of_tls(self, fingerprint: str, *, now_s: float) -> SiteEntry:
        """Find the site that a TLS key belongs to; a replaced key counts until its end.

        Raises:
            AuthError: No site of this roster has that key now.
        """
        for site in self.sites:
            is_retiring = fingerprint == site.retiring_tls_fingerprint and now_s < site.retires_at
            if fingerprint == site.tls_fingerprint or is_retiring:
                return site
        raise AuthError(f"no site in epoch {self.epoch} of {self.federation_id}'s roster has this certificate's key")


@dataclass(frozen=True)
class _Signed:
    """A roster file."""

    __pydantic_config__ = _CLOSED

    roster: Roster
    signatures: Annotated[dict[str, str], Field(max_length=governance.MAX_KEYS)]


@dataclass(frozen=True)
class _Watermark:
    """The newest roster that a site has seen."""

    __pydantic_config__ = _CLOSED

    epoch: Epoch
    sha256: HexKey


def make(
    pinned: Governance,
    *,
    epoch: int,
    sites: tuple[SiteEntry, ...] = (),
    servers: tuple[PeerEntry, ...] = (),
    operators: tuple[OperatorEntry, ...] = (),
) -> Roster:
    """A roster of the federation whose governance is pinned, with its id, quorum and keys; nothing is checked."""
    return Roster(VERSION, pinned.federation_id, epoch, pinned.quorum, pinned.keys, sites, servers, operators)


def signed_bytes(roster: Roster, keys: Sequence[Ed25519PrivateKey], *, pinned: Governance) -> bytes:
    """A roster file: the roster and the signatures of the governance keys that are at hand.

    Raises:
        AuthError: The roster contradicts itself or the pinned governance.
        ConfigError: Too few governance keys, or a key that is none.
    """
    check(roster, pinned)
    return with_signatures(roster, pinned.sign(roster.to_bytes(), keys, purpose=PURPOSE), pinned=pinned)


def with_signatures(roster: Roster, signatures: Mapping[str, str], *, pinned: Governance) -> bytes:
    """A roster file of signatures that were collected.

    Raises:
        AuthError: They are not a quorum's; or the roster contradicts itself or the pinned governance.
    """
    check(roster, pinned)
    pinned.verify(roster.to_bytes(), signatures, purpose=PURPOSE)
    return wire.canonical_json({"roster": dataclasses.asdict(roster), "signatures": dict(signatures)})


def load(path: Path, *, governance: Governance, epoch_min: int) -> Roster:
    """Read a roster file and believe it only if the pinned governance signed it.

    Args:
        governance: What this reader pinned; the roster cannot change it.
        epoch_min: The lowest epoch that is accepted: the highest one seen so far.

    Raises:
        ConfigError: The file cannot be read.
        AuthError: Unknown fields, duplicate names or keys, another federation, governance or quorum, too few valid
            signatures of different governance keys, or an older epoch.
    """
    return parse(_read(path), governance=governance, epoch_min=epoch_min, name=str(path))


def parse(data: bytes, *, governance: Governance, epoch_min: int, name: str = "roster") -> Roster:
    """Check a roster that came as bytes: its form, the signatures, then the rest; see `load`."""
    signed = _parse(data, name)
    roster = signed.roster
    governance.verify(roster.to_bytes(), signed.signatures, purpose=PURPOSE)
    check(roster, governance)
    if roster.epoch < epoch_min:
        raise AuthError(f"{name} is of epoch {roster.epoch}, {epoch_min} was seen before; fetch the newest roster")
    return roster


def accept(path: Path, *, governance: Governance, watermark: Path) -> Roster:
    """Load a roster that is no older than any accepted before, and remember it.

    Args:
        watermark: This reader's note of the newest roster; `start_watermark` makes it.

    Raises:
        AuthError: As `load`; or another roster of the same epoch was accepted before.
        ConfigError: A file cannot be read.
        StorageError: The note cannot be written.
    """
    seen = _read_watermark(watermark)
    roster = load(path, governance=governance, epoch_min=seen.epoch)
    if roster.epoch == seen.epoch and roster.sha256 != seen.sha256:
        raise AuthError(f"{path} differs from the roster of epoch {seen.epoch} seen before; tell the other sites")
    if roster.epoch > seen.epoch:
        _write_watermark(watermark, roster)
    return roster


def start_watermark(watermark: Path, roster: Roster) -> None:
    """Make the note of the newest roster seen, at installation.

    Raises:
        ConfigError: There is one already: deleting it would allow a rollback.
    """
    if watermark.exists():
        raise ConfigError(f"{watermark} is there already; this site has accepted a roster before")
    _write_watermark(watermark, roster)


def seen_epoch(watermark: Path) -> int:
    """The highest epoch accepted so far.

    Raises:
        ConfigError: The note is missing: without it a rollback would go unseen.
    """
    return _read_watermark(watermark).epoch


def check(roster: Roster, pinned: Governance) -> None:
    """Refuse a roster that contradicts itself or what is pinned; signatures are not looked at.

    Raises:
        AuthError: It does.
    """
    governance.check(pinned)
    if (roster.federation_id, roster.quorum) != (pinned.federation_id, pinned.quorum):
        raise AuthError(f"the roster is of {roster.federation_id}, quorum {roster.quorum}: not what this site pinned")
    if len(roster.governance) != len(pinned.keys) or set(roster.governance) != set(pinned.keys):
        raise AuthError(f"the roster of {roster.federation_id} names other governance keys than this site pinned")
    _refuse_repeats("site name", (site.name for site in roster.sites))
    identities = (*(site.identity_key for site in roster.sites), *(peer.identity_key for peer in roster.operators))
    _refuse_repeats("identity key", (*identities, *roster.governance))
    _refuse_repeats("node key", (site.node_key for site in roster.sites))
    peers: tuple[PeerEntry | OperatorEntry, ...] = (*roster.servers, *roster.operators)
    _refuse_repeats("server or operator name", (peer.name for peer in peers))
    retiring = (site.retiring_tls_fingerprint for site in roster.sites if site.retiring_tls_fingerprint)
    tls = (*(site.tls_fingerprint for site in roster.sites), *(peer.tls_fingerprint for peer in peers), *retiring)
    _refuse_repeats("TLS key", tls)


def _refuse_repeats(what: str, values: Iterable[str]) -> None:
    """Raise if a value comes twice."""
    listed = list(values)
    if len(set(listed)) != len(listed):
        raise AuthError(f"the roster holds the same {what} twice; each member needs its own")


def _parse(data: bytes, name: str) -> _Signed:
    """Bytes to a roster and its signatures, neither believed yet."""
    return governance.parse(data, TypeAdapter(_Signed), name=name)


def _read(path: Path) -> bytes:
    """A roster file's bytes."""
    return governance.read(path)


def _read_watermark(path: Path) -> _Watermark:
    """The note; a missing one is an error."""
    if not path.is_file():
        raise ConfigError(f"{path}: the note of the newest roster seen is missing; run silotune-client install again")
    return governance.parse(governance.read(path), TypeAdapter(_Watermark), name=str(path))


def _write_watermark(path: Path, roster: Roster) -> None:
    """Note the newest roster."""
    storage.write_atomic(path, wire.canonical_json({"epoch": roster.epoch, "sha256": roster.sha256}))
