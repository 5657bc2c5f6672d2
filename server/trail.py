"""The coordinator's own audit log, and the heads of the sites' logs: kept wherever an operator's key signs a run.

Both lie in one folder a key, over all its runs: the log is this key's, and sites hold its head under the key's name.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common import audit_heads, identity
from common.audit import AuditLog, Head
from common.audit_heads import Heads
from common.errors import AuditError, RemoteError, SilotuneError
from common.records import HEADS, LINKS, UpdateHead

AUDIT_FILE: Final = "audit.jsonl"
HEADS_FILE: Final = "audit-heads.jsonl"


@dataclass(frozen=True)
class Trail:
    """What the coordinator writes down, and what it knows of the sites' logs.

    Attributes:
        owner: What heads of this log are kept under.
        log: The coordinator's own.
        heads: Of the sites' logs.
    """

    owner: str
    log: AuditLog
    heads: Heads

    def told(self) -> dict[str, Any]:
        """Where all logs stand, for the head of a request, and the hashes by which this one continues what it was.

        Of more than `audit_heads.MAX_OWNERS` logs those are told that were heard of last.
        """
        own = self.log.refresh()
        known = sorted(self.heads.newest().items(), key=lambda item: item[1].time)[1 - audit_heads.MAX_OWNERS :]
        return {HEADS: audit_heads.to_list({**dict(known), self.owner: own}), LINKS: self.log.links}

    def keep(self, head: UpdateHead) -> None:
        """Remember where a site's log stands.

        Raises:
            AuditError: It went back, or the site told of its log before and does not now.
            StorageError: It cannot be written.
        """
        if head.num_audit_entries:
            now = Head(head.num_audit_entries - 1, head.audit_sha256, head.audit_time)
            self.heads.keep({head.site: now})
        elif head.site in self.heads.newest():
            raise AuditError(f"{head.site} told of an audit log before, and tells of none now")


def folder_of(key_file: Path) -> Path:
    """Where a key's log lies unless another folder is named: `op-audit` beside `op.pem`."""
    return key_file.with_name(f"{key_file.stem}-audit")


def open_trail(key_file: Path, folder: Path | None = None) -> Trail:
    """The log of one operator's key.

    Args:
        key_file: The private key, which signs every entry.
        folder: Where the log lies; None: `folder_of(key_file)`.

    Raises:
        ConfigError: The key cannot be used.
        AuditError: What is there is not whole, or is another key's.
        StorageError: It cannot be written.
    """
    key, place = identity.load(key_file), folder or folder_of(key_file)
    log = AuditLog(place / AUDIT_FILE, key=key)
    return Trail(audit_heads.operator(identity.public_hex(key)), log, Heads(place / HEADS_FILE))


def of_frame(frame: bytes) -> dict[str, Any]:
    """Size and hash of what went or came; a site's own log has the same hash."""
    return {"num_bytes": len(frame), "sha256": hashlib.sha256(frame).hexdigest()}


def of_error(error: BaseException) -> dict[str, str]:
    """Why something does not count: code and reference, which is all that a peer tells."""
    code = type(error).__name__ if isinstance(error, SilotuneError) else "InternalError"
    return {"code": error.code, "reference": error.reference} if isinstance(error, RemoteError) else {"code": code}
