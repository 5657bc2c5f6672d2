"""A startup kit at the site: check all of it against what the site knows by itself, then take it into use.

What a site knows by itself are its keys and the six words that somebody read out. Words that are given are checked
whatever is pinned: a pin can have come from where the kit came from.
"""

import datetime
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.join import enroll
from common import keyfile, storage
from common.errors import AuthError, ConfigError
from common.trust import certs, governance, identity, kit, roster
from common.trust.governance import Governance
from common.trust.roster import Roster

WATERMARK: Final = "epoch.json"
_REPLACED: Final = frozenset((kit.PINNED, kit.CA, kit.ROSTER, kit.CERTIFICATE))


@dataclass(frozen=True)
class Kit:
    """A kit that was checked.

    Attributes:
        tls_key_file: This site's private key that the certificate is for.
    """

    name: str
    pinned: Governance
    epoch: int
    expires_at: datetime.datetime
    files: Mapping[str, bytes]
    tls_key_file: Path


def verify_kit(folder: Path, *, keys: Path, words: str, now: datetime.datetime) -> Kit:
    """Check a kit: governance, checksums, roster, certificate, and that they are for this site's own keys.

    Args:
        words: The federation's six words, heard from the coordinator; checked whenever they are given, and needed
            until a kit was installed.

    Raises:
        AuthError: Anything in the kit is not what it must be.
        ConfigError: A file is missing, a key file's mode is not 0600, or the words are needed.
    """
    pinned = _pinned(folder, keys=keys, words=words)
    files = kit.verify(folder, pinned=pinned)
    name = enroll.own_statement(keys).name
    is_first = not ((keys / WATERMARK).exists() or (keys / kit.PINNED).exists())
    epoch_min = 1 if is_first else roster.seen_epoch(keys / WATERMARK)
    newest = roster.parse(files[kit.ROSTER], governance=pinned, epoch_min=epoch_min)
    chain = certs.parse_chain(files[kit.CERTIFICATE], name=kit.CERTIFICATE)
    root = certs.parse_chain(files[kit.CA], name=kit.CA)
    if len(root) != 1 or certs.sha256(root[0]) != pinned.root_sha256:
        raise AuthError(f"{folder / kit.CA} is not the root that this site pinned")
    certs.check_chain(chain, root[0], name=kit.CERTIFICATE, now=now)
    # The roster and the certificate hold this site's own public keys.
    entry, fingerprint = newest.site(name), certs.fingerprint(chain[0].public_key())
    is_own = (
        entry.identity_key == identity.public_hex(identity.load(keys / enroll.IDENTITY_KEY))
        and entry.node_key == certs.public_pem(certs.load_key(keys / enroll.NODE_KEY))
        and entry.tls_fingerprint == fingerprint
    )
    for file in (keys / enroll.NEXT_TLS_KEY, keys / enroll.TLS_KEY):
        if is_own and file.exists() and certs.fingerprint(certs.load_key(file).public_key()) == fingerprint:
            return Kit(name, pinned, newest.epoch, chain[0].not_valid_after_utc, files, file)
    raise AuthError(f"the kit is for other keys than those in {keys}; check which request was sent")


def install(path: Path, *, keys: Path, words: str, now: datetime.datetime) -> Kit:
    """Check a kit and put its files beside the keys; run again after an interruption.

    A tar file is unpacked into a folder of its own, which is gone afterwards.

    What the site's admin may have edited (the policy, its own file, units) is written only if it is not there.

    Args:
        path: The kit, a tar file or a folder.

    Raises:
        AuthError: As `verify_kit`; nothing was changed.
        ConfigError: As `verify_kit`; nothing was changed.
        StorageError: The disk is full and the like; run again.
    """
    with tempfile.TemporaryDirectory(prefix="silotune-kit-") as unpacked:
        folder = path
        if not path.is_dir():
            folder = Path(unpacked)
            kit.unpack(path, folder)
        checked = verify_kit(folder, keys=keys, words=words, now=now)
    storage.write_atomic(keys / kit.ROSTER, checked.files[kit.ROSTER])
    # The roster is noted before the pin: a pin without this note is an error for ever after.
    watermark = keys / WATERMARK
    if watermark.exists():
        roster.accept(keys / kit.ROSTER, governance=checked.pinned, watermark=watermark)
    else:
        first = roster.load(keys / kit.ROSTER, governance=checked.pinned, epoch_min=1)
        roster.start_watermark(watermark, first)
    for name in checked.files.keys() - _REPLACED:
        if not (keys / name).exists():
            storage.write_atomic(keys / name, checked.files[name])
    storage.write_atomic(keys / kit.CA, checked.files[kit.CA])
    storage.write_atomic(keys / kit.PINNED, checked.pinned.to_bytes())
    storage.write_atomic(keys / kit.CERTIFICATE, checked.files[kit.CERTIFICATE])
    if checked.tls_key_file != keys / enroll.TLS_KEY:
        os.replace(checked.tls_key_file, keys / enroll.TLS_KEY)
    return checked


def update_roster(path: Path, *, keys: Path) -> Roster:
    """Take a newer roster into use between two kits, as after another site was revoked.

    Raises:
        AuthError: Not signed by the pinned governance, older than one seen before, or without this site.
        ConfigError: A file is missing, or no kit was installed yet.
        StorageError: The disk is full and the like; the old roster still holds.
    """
    pinned = governance.load(keys / kit.PINNED)
    data = governance.read(path)
    newest = roster.parse(data, governance=pinned, epoch_min=roster.seen_epoch(keys / WATERMARK))
    entry = newest.site(enroll.own_statement(keys).name)
    if entry.identity_key != identity.public_hex(identity.load(keys / enroll.IDENTITY_KEY)):
        raise AuthError(f"{path} has another identity key for {entry.name} than this site's own; ask the coordinator")
    accepted = roster.accept(path, governance=pinned, watermark=keys / WATERMARK)
    storage.write_atomic(keys / kit.ROSTER, data)
    return accepted


def _pinned(folder: Path, *, keys: Path, words: str) -> Governance:
    """The governance: the one pinned before, or the kit's if its words are those that were heard."""
    keyfile.folder(keys)
    offered = kit.read_pinned(governance.read(folder / kit.PINNED))
    if words:
        identity.check_words(offered.to_bytes(), words)
    if (keys / kit.PINNED).exists() and (keys / WATERMARK).exists():
        pinned = governance.load(keys / kit.PINNED)
        if pinned.to_bytes() != offered.to_bytes():
            raise AuthError(f"{folder} is of another federation or governance than this site pinned; ask why")
        return pinned
    if not words:
        raise ConfigError("--words: ask the coordinator by telephone for the federation's six words, and give them")
    if (keys / kit.PINNED).exists() and (keys / kit.PINNED).read_bytes() != offered.to_bytes():
        raise AuthError(f"{keys / kit.PINNED} is of another federation than the words; ask how it came there")
    return offered
