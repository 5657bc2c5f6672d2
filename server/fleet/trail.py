"""The operator of a run: the signature under its manifest, the audit log that the same key signs, the sites' keys.

The audit log and the heads of the sites' logs are kept wherever an operator's key signs a run.

Both lie in one folder a key, over all its runs: the log is this key's, and sites hold its head under the key's name.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from common.errors import AuditError, AuthError, ConfigError, RemoteError, SilotuneError
from common.frame import wire
from common.frame.records import HEADS, LINKS, UpdateHead
from common.frame.wire import Frame
from common.run import manifest
from common.run.manifest import Offer, RunManifest
from common.trust import governance, identity, kit, roster, signed_frame
from common.trust import heads as audit_heads
from common.trust.audit_log import AuditLog, Head
from common.trust.heads import Heads, SignedHead

AUDIT_FILE: Final = "audit.jsonl"
HEADS_FILE: Final = "audit-heads.jsonl"
DAY_S: Final = 86_400


class SiteKeys:
    """Keys by site name; the roster is read again when its file changes, and never goes back.

    Args:
        folder: Where `federation.json` and `roster.json` lie.
        federation: Id of the federation that it must be of.

    Raises:
        ConfigError: A file is missing or cannot be read.
        AuthError: The roster is of another federation, or too few of its governance signed it.
    """

    def __init__(self, folder: Path, federation: str) -> None:
        self._pinned = governance.load(folder / kit.PINNED)
        if self._pinned.federation_id != federation:
            raise AuthError(f"{folder} is of federation {self._pinned.federation_id}, the run is for {federation}")
        self._path = folder / kit.ROSTER
        self._epoch, self._data, self._keys = 1, b"", dict[str, str]()
        self.now()

    def epoch(self) -> int:
        """The roster's epoch now; see `now`."""
        self.now()
        return self._epoch

    def now(self) -> Mapping[str, str]:
        """Public keys, hex, by site name.

        Raises:
            ConfigError: The roster cannot be read.
            AuthError: It was replaced by one that is older or not signed.
        """
        data = governance.read(self._path)
        if data != self._data:
            found = roster.parse(data, governance=self._pinned, epoch_min=self._epoch)
            self._epoch, self._data = found.epoch, data
            self._keys = {site.name: site.identity_key for site in found.sites}
        return self._keys


@dataclass(frozen=True)
class Trail:
    """What the coordinator writes down, and what it knows of the sites' logs.

    Attributes:
        owner: What heads of this log are kept under.
        log: The coordinator's own.
        heads: Of the sites' logs.
        vouch: Signs a head of this log for the federation.
        site_keys: The sites' keys by the roster; None: a name keeps the key of its first answer.
        signers: Keys of sites that have answered, by name, where no roster tells them.
        asked: Where this log stood in each site's last request.
        heard: Where it stood in the last one that the site answered.
    """

    owner: str
    log: AuditLog
    heads: Heads
    vouch: Callable[[Head], SignedHead]
    site_keys: SiteKeys | None = None
    signers: dict[str, str] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)

    def told(self, sites: Collection[str] = ()) -> dict[str, Any]:
        """Where all logs stand, for the head of a request, and the hashes by which this one continues what it was.

        Of more than `audit_heads.MAX_OWNERS` logs those are told that were heard of last.

        Args:
            sites: Who is asked. The hashes go back to what each of them is known to have; of one that has not answered
                since this process began, as far as `audit.MAX_LINKS`.
        """
        own = self.vouch(self.log.refresh())
        now = own.head.sequence
        num_new = now - min((self.heard.get(site, -1) for site in sites), default=-1)
        self.asked.update(dict.fromkeys(sites, now))
        kept, keys = self.heads.newest(), self._keys()
        members = [(owner, one) for owner, one in kept.items() if keys is None or owner in keys]
        known = sorted(members, key=lambda item: item[1].head.time)[1 - audit_heads.MAX_OWNERS :]
        return {
            HEADS: audit_heads.to_list({**dict(known), self.owner: own}),
            LINKS: self.log.links[-num_new:] if num_new else [],
        }

    def answered(self, site: str) -> None:
        """A site has what its last request told of this log: it keeps that before it answers."""
        self.heard[site] = self.asked[site]

    def keep(self, head: UpdateHead) -> None:
        """Remember where a site's log stands.

        Raises:
            AuditError: The site's key did not sign it for this federation, or the roster does not name the site; the
                log went back; or the site told of its log before and does not now.
            AuthError: The roster cannot be believed.
            StorageError: It cannot be written.
        """
        keys = self._keys()
        if head.num_audit_entries:
            now = Head(head.num_audit_entries - 1, head.audit_sha256, head.audit_time)
            told = SignedHead(now, head.audit_signer, head.audit_signature, self.heads.federation)
            self.heads.keep({head.site: told}, keys=keys)
        elif keys is not None or head.site in self.heads.newest():
            raise AuditError(f"{head.site} tells of no audit log, as every site of the roster or with a policy does")

    def check(self, frame: Frame, *, site: str) -> None:
        """An answer counts only under the key of the site that it names.

        Without a roster, a name belongs to the key that its log was signed by, or else to the key of its first answer.

        Raises:
            AuthError: It is not signed or by another key; the roster does not name the site, or cannot be believed.
        """
        keys = self._keys()
        if keys is not None:
            if site not in keys:
                raise AuthError(f"the roster names no site '{site}'")
            known = keys[site]
        else:
            told = self.heads.newest().get(site)
            known = told.signer if told else self.signers.get(site, "")
            signer = frame.head.get(signed_frame.SIGNER)
            if not known and not signer:
                return  # a site without a policy, which has no identity
            known = known or str(signer)
        signed_frame.check(frame, key=known, federation=self.heads.federation)
        self.signers[site] = known

    def roster_epoch(self) -> int:
        """Of the roster by which sites are known now; 0 without one."""
        return self.site_keys.epoch() if self.site_keys else 0

    def _keys(self) -> Mapping[str, str] | None:
        """The sites' keys now."""
        return self.site_keys.now() if self.site_keys else None


def folder_of(key_file: Path) -> Path:
    """Where a key's log lies unless another folder is named: `op-audit` beside `op.pem`."""
    return key_file.with_name(f"{key_file.stem}-audit")


def open_trail(
    key_file: Path, *, federation: str, folder: Path | None = None, roster_folder: Path | None = None
) -> Trail:
    """The log of one operator's key.

    Args:
        key_file: The private key, which signs every entry.
        federation: Id of the federation that is told of this log.
        folder: Where the log lies; None: `folder_of(key_file)`.
        roster_folder: Where `federation.json` and `roster.json` lie; None: sites are known by the keys that they tell.

    Raises:
        ConfigError: The key or the roster cannot be used.
        AuthError: The roster is not the federation's.
        AuditError: What is there is not whole, or is another key's.
        StorageError: It cannot be written.
    """
    key, place = identity.load(key_file), folder or folder_of(key_file)
    site_keys = SiteKeys(roster_folder, federation) if roster_folder else None
    owner = audit_heads.operator(identity.public_hex(key))
    log = AuditLog(place / AUDIT_FILE, key=key)
    vouch = partial(audit_heads.sign, owner=owner, federation=federation, key=key)
    return Trail(owner, log, Heads(place / HEADS_FILE, federation), vouch, site_keys)


@dataclass(frozen=True)
class Operator:
    """Who signs a run; nobody signs one without keeping a log of it.

    Attributes:
        make_offer: Signs a manifest.
        trail: The audit log, and the heads of the sites' logs.
    """

    make_offer: Callable[[RunManifest], Offer]
    trail: Trail


def operator(
    key_file: str, *, federation: str, days: float, audit_folder: str = "", roster_folder: str = ""
) -> Operator | None:
    """What signs a run's manifest and keeps its log.

    Args:
        key_file: The operator's private key; empty: the run is not signed, only sites without a policy take it, and no
            log is kept.
        federation: Id of the federation whose sites are asked.
        days: How long sites may open the run, from now.
        audit_folder: Of the log; empty: see `folder_of`.
        roster_folder: Of the federation's signed roster; empty: sites are known by the keys that they tell first.

    Raises:
        ConfigError: The key or the roster cannot be used, there is a key and no federation, or a roster and no key.
        AuthError: The roster is not the federation's.
        AuditError: The log is not whole, or is another key's.
        StorageError: The log cannot be written.
    """
    if not key_file:
        if roster_folder:
            raise ConfigError("--roster is for a signed run, whose sites sign where their logs stand; give a key")
        return None
    if not federation:
        raise ConfigError("a signed run is for one federation; give its id with --federation")
    if not 0 < days * DAY_S <= manifest.MAX_OFFER_S:
        raise ConfigError(f"--offer-days {days:g}: must be above 0 and at most {manifest.MAX_OFFER_S // DAY_S}")
    key = identity.load(Path(key_file))
    not_after = int(time.time() + days * DAY_S)
    folders = [Path(folder) if folder else None for folder in (audit_folder, roster_folder)]
    return Operator(
        lambda run_manifest: manifest.sign(run_manifest, key, federation=federation, not_after=not_after),
        open_trail(Path(key_file), federation=federation, folder=folders[0], roster_folder=folders[1]),
    )


def of_frame(frame: bytes) -> dict[str, Any]:
    """Size and digest of a whole frame that went or came; a site's own log has the same digest."""
    return {"num_bytes": len(frame), "sha256": wire.digest_of(frame)}


def of_error(error: BaseException) -> dict[str, str]:
    """Why something does not count: code and reference, which is all that a peer tells."""
    code = type(error).__name__ if isinstance(error, SilotuneError) else "InternalError"
    return {"code": error.code, "reference": error.reference} if isinstance(error, RemoteError) else {"code": code}
