"""Rosters of a small federation, right ones and any others."""

import dataclasses
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.frame import wire
from common.trust import identity, kit, roster
from common.trust.governance import Governance
from common.trust.roster import OperatorEntry, Roster, SiteEntry
from tests.samples import vault

MEMBERS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (11, 12, 13)]
SOUTH_KEY = Ed25519PrivateKey.from_private_bytes(bytes([14]) * 32)
PINNED = Governance("onco-eu", 2, tuple(map(identity.public_hex, MEMBERS)), "ee" * 32)


def site(name: str, number: int, **changes) -> SiteEntry:
    key = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    entry = SiteEntry(name, f"{number:064x}", pem, f"{100 + number:064x}")
    return dataclasses.replace(entry, **changes)


NORTH = site("north", 5, identity_key=identity.public_hex(vault.SITE))
SOUTH = site("south", 6, identity_key=identity.public_hex(SOUTH_KEY))
GOOD = roster.make(
    PINNED,
    epoch=4,
    sites=(NORTH, SOUTH),
    operators=(OperatorEntry("olga", "bb" * 32, identity.public_hex(vault.OPERATOR)),),
)


def changed(**changes) -> Roster:
    return dataclasses.replace(GOOD, **{"epoch": 5, **changes})


def signed(found: Roster, keys=tuple(MEMBERS[:2])) -> bytes:
    """A roster file as anybody could make it, without the checks of those who sign."""
    signatures = {identity.public_hex(key): identity.sign(key, found.to_bytes(), purpose="roster") for key in keys}
    return wire.canonical_json({"roster": dataclasses.asdict(found), "signatures": signatures})


def write(folder: Path, data: bytes = b"") -> Path:
    """A folder as a kit leaves it, with this roster or the right one."""
    folder.mkdir(exist_ok=True)
    (folder / kit.PINNED).write_bytes(PINNED.to_bytes())
    (folder / kit.ROSTER).write_bytes(data or signed(GOOD))
    return folder


def put(member: vault.Vault, data: bytes) -> None:
    (member.roster_folder / kit.ROSTER).write_bytes(data)
