"""A change of the roster on its way round the governance: each member reads it and signs it on a machine of his own.

A proposal holds all that members sign: the next roster, and the kit of a site that is admitted or renewed. It changes
nothing until a quorum's signatures are published. Each member's copy may come back by itself; they are put together.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ConfigDict, Field, TypeAdapter

from common import storage
from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import certs, governance, identity, kit, roster
from common.trust.governance import Governance, HexKey, Slug
from common.trust.roster import Roster

_CLOSED: Final = ConfigDict(strict=True, extra="forbid")
_SIGNATURE: Final = r"^[0-9a-f]{128}$"


@dataclass(frozen=True)
class Proposal:
    """What members are asked to sign.

    Attributes:
        kind: What happens to the site.
        follows: SHA-256 of the roster that the proposed one comes after.
        kit: The site's kit without roster and checksums, name to text; empty for a revocation.
    """

    __pydantic_config__ = _CLOSED

    version: Literal[1]
    kind: Literal["admit", "rotate", "revoke"]
    name: Slug
    follows: HexKey
    roster: Roster
    kit: Annotated[dict[str, str], Field(max_length=kit.MAX_FILES)]

    @property
    def files(self) -> dict[str, bytes]:
        """The kit's files."""
        return {name: text.encode() for name, text in self.kit.items()}


@dataclass(frozen=True)
class Pair:
    """A member's signatures: of the roster, and of the kit's checksums."""

    __pydantic_config__ = _CLOSED

    roster: Annotated[str, Field(pattern=_SIGNATURE)]
    kit: Annotated[str, Field(pattern=_SIGNATURE)]


@dataclass(frozen=True)
class Signed:
    """A proposal and the signatures under it so far, by public key."""

    __pydantic_config__ = _CLOSED

    proposal: Proposal
    signatures: Annotated[dict[HexKey, Pair], Field(max_length=governance.MAX_KEYS)] = field(default_factory=dict)

    @property
    def of_roster(self) -> dict[str, str]:
        """Signatures of the roster."""
        return {key: pair.roster for key, pair in self.signatures.items()}

    @property
    def of_kit(self) -> dict[str, str]:
        """Signatures of the kit's checksums."""
        return {key: pair.kit for key, pair in self.signatures.items()}


def read(path: Path) -> Signed:
    """Read a proposal; nothing of it is believed yet.

    Raises:
        ConfigError: The file cannot be read.
        AuthError: It is not a proposal, or was edited.
    """
    return governance.parse(governance.read(path), TypeAdapter(Signed), name=str(path))


def write(path: Path, signed: Signed) -> None:
    """Write a proposal.

    Raises:
        StorageError: The disk is full and the like.
    """
    storage.write_atomic(path, wire.canonical_json(dataclasses.asdict(signed)))


def check(signed: Signed, *, current: Roster, pinned: Governance) -> None:
    """A proposal does what it says and nothing else, to the roster that holds now; its signatures, if any, are right.

    Args:
        current: The newest roster that this machine knows, verified.
        pinned: The governance, as this machine knows it.

    Raises:
        AuthError: Another federation or epoch; more or something else changes; the kit is not the site's; or a
            signature is a stranger's, or of something else, as when the proposal was changed after signing.
    """
    made = signed.proposal
    roster.check(made.roster, pinned)
    if (made.roster.epoch, made.follows) != (current.epoch + 1, current.sha256):
        raise AuthError(
            f"the proposal makes epoch {made.roster.epoch} and follows roster {made.follows[:16]}; the roster here is "
            f"of epoch {current.epoch} ({current.sha256[:16]}); get the newest roster, or have the change proposed anew"
        )
    # The one site of the proposal changes as its kind says, and nothing else does.
    rest = [site for site in current.sites if site.name != made.name]
    others = [site for site in made.roster.sites if site.name != made.name]
    unchanged = dataclasses.replace(made.roster, epoch=current.epoch, sites=current.sites) == current
    was, is_there = (any(site.name == made.name for site in held.sites) for held in (current, made.roster))
    wanted = {"admit": (False, True), "rotate": (True, True), "revoke": (True, False)}[made.kind]
    if rest != others or not unchanged or (was, is_there) != wanted:
        raise AuthError(f"the proposal says '{made.kind} {made.name}' and changes something else; do not sign it")
    if made.kind == "rotate" and made.roster.site(made.name).identity_key != current.site(made.name).identity_key:
        raise AuthError(f"the proposal gives {made.name} another identity key; a new key is for a new admission")
    _check_kit(made, pinned)
    for key, pair in signed.signatures.items():
        if key not in pinned.keys:
            raise AuthError(f"the proposal is signed by key {key[:16]}, which does not govern {pinned.federation_id}")
        identity.verify(key, pair.roster, made.roster.to_bytes(), purpose=roster.PURPOSE)
        identity.verify(key, pair.kit, kit.sums(made.files), purpose=kit.PURPOSE)


def sign(signed: Signed, keys: Sequence[Ed25519PrivateKey]) -> Signed:
    """Add members' signatures; `check` comes first.

    Raises:
        ConfigError: A key has signed already.
    """
    made, signatures = signed.proposal, dict(signed.signatures)
    for key in keys:
        public = identity.public_hex(key)
        if public in signatures:
            raise ConfigError(f"governance key {public[:16]} has signed already; another member must sign")
        signatures[public] = Pair(
            identity.sign(key, made.roster.to_bytes(), purpose=roster.PURPOSE),
            identity.sign(key, kit.sums(made.files), purpose=kit.PURPOSE),
        )
    return Signed(made, signatures)


def merge(copies: Sequence[Signed]) -> Signed:
    """Copies that members signed, as one.

    Raises:
        AuthError: They are not copies of one proposal.
    """
    if any(copy.proposal != copies[0].proposal for copy in copies):
        raise AuthError("the files are not copies of one proposal: one was changed, or the change was proposed twice")
    return Signed(copies[0].proposal, {key: pair for copy in copies for key, pair in copy.signatures.items()})


def in_words(made: Proposal, *, current: Roster) -> list[str]:
    """What changes, a line each: what a member must know before signing."""
    old = {site.name: site for site in current.sites}
    new = {site.name: site for site in made.roster.sites}
    lines = [f"{made.kind} {made.name}: epoch {current.epoch} to {made.roster.epoch} of {made.roster.federation_id}"]
    lines += [f"- {name} leaves, and its keys are never accepted again" for name in sorted(old.keys() - new.keys())]
    for name in sorted(new.keys() - old.keys()):
        keys = f"identity {_short(new[name].identity_key)}, TLS {_short(new[name].tls_fingerprint)}"
        lines.append(f"+ {name} joins: {keys}")
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        for key in ("identity_key", "tls_fingerprint"):
            if getattr(before, key) != getattr(after, key):
                lines.append(f"~ {name}: {key} {_short(getattr(before, key))} to {_short(getattr(after, key))}")
        if before.node_key != after.node_key:
            lines.append(f"~ {name}: node_key changes")
        if before.retires_at != after.retires_at:
            end = datetime.fromtimestamp(after.retires_at, UTC)
            lines.append(f"~ {name}: old certificate is good until {end:%Y-%m-%d %H:%M} UTC")
    lines += [f"{len(new)} sites then: {', '.join(sorted(new)) or 'none'}"]
    digest = hashlib.sha256(kit.sums(made.files)).hexdigest()
    return [*lines, f"kit of {len(made.kit)} files, SHA-256 of its checksums {digest}"] if made.kit else lines


def _check_kit(made: Proposal, pinned: Governance) -> None:
    """The kit pins this very federation, and its certificate is for the key in the roster."""
    if made.kind == "revoke":
        if made.kit:
            raise AuthError("the proposal revokes a site and has a kit; do not sign it")
        return
    files = made.files
    if missing := sorted(kit.REQUIRED - {kit.ROSTER} - files.keys()):
        raise AuthError(f"the proposal's kit lacks {missing[0]}; have the change proposed anew")
    if kit.ROSTER in files or files[kit.PINNED] != pinned.to_bytes():
        raise AuthError("the proposal's kit is of another federation or governance, or has a roster; do not sign it")
    root = certs.parse_chain(files[kit.CA], name=kit.CA)
    leaf = certs.parse_chain(files[kit.CERTIFICATE], name=kit.CERTIFICATE)[0]
    is_own = certs.fingerprint(leaf.public_key()) == made.roster.site(made.name).tls_fingerprint
    if len(root) != 1 or certs.sha256(root[0]) != pinned.root_sha256 or not is_own:
        raise AuthError("the proposal's kit has another root or another key's certificate; do not sign it")


def _short(key: str) -> str:
    """Enough digits of a key that nobody finds another with the same."""
    return key[:32]
