"""The coordinator's own audit log, and the heads of the sites' logs: kept wherever an operator's key signs a run.

Both lie in one folder a key, over all its runs: the log is this key's, and sites hold its head under the key's name.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from common.errors import AuditError, AuthError, RemoteError, SilotuneError
from common.frame import wire
from common.frame.records import HEADS, LINKS, UpdateHead
from common.frame.wire import Frame
from common.trust import heads as audit_heads
from common.trust import identity, signed_frame
from common.trust.audit_log import AuditLog, Head
from common.trust.heads import Heads, SignedHead
from server.fleet.site_keys import SiteKeys

AUDIT_FILE: Final = "audit.jsonl"
HEADS_FILE: Final = "audit-heads.jsonl"


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


def of_frame(frame: bytes) -> dict[str, Any]:
    """Size and digest of a whole frame that went or came; a site's own log has the same digest."""
    return {"num_bytes": len(frame), "sha256": wire.digest_of(frame)}


def of_error(error: BaseException) -> dict[str, str]:
    """Why something does not count: code and reference, which is all that a peer tells."""
    code = type(error).__name__ if isinstance(error, SilotuneError) else "InternalError"
    return {"code": error.code, "reference": error.reference} if isinstance(error, RemoteError) else {"code": code}
