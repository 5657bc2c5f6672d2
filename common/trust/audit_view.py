"""Audit logs and kept heads for people: the newest entries, whether a log is whole, where the logs of others stand."""

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from common import storage
from common.trust import audit_log
from common.trust import heads as audit_heads

MAX_SHOWN = 24  # characters of a fact


def newest(log: Path, public_key: str, *, limit: int) -> list[dict[str, Any]]:
    """The last entries; the whole log is checked on the way.

    Raises:
        AuditError: The log is not whole.
    """
    entries = deque(audit_log.read(log, public_key), maxlen=limit)
    return [{"sequence": e.sequence, "time": e.time, "kind": e.kind, **e.facts} for e in entries]


def verify(log: Path, public_key: str, *, heads: Path | None, owner: str) -> dict[str, Any]:
    """Check a log, against heads that others keep if a file of them is given.

    Args:
        heads: What another party keeps; None: a cut tail cannot be seen.
        owner: Whose log it is, as that party calls it.

    Raises:
        AuditError: The log is not whole, the message says where; or the file has no head of it that its key signed.
    """
    known = audit_heads.of(heads, owner, signer=public_key) if heads else []
    head = audit_log.verify(log, public_key, heads=known)
    return {"num_entries": head.sequence + 1, "sha256": head.sha256, "num_heads_checked": len(known)}


def kept(heads: Path, *, out: Path | None) -> dict[str, Any]:
    """The newest head of every log that a file of heads knows, and how many it has of each.

    Args:
        heads: The file; none is there before the first round.
        out: Where to copy all heads, for another party's `audit verify --heads`; None: nowhere.

    Raises:
        AuditError: It is no file of heads, or holds one that its signer did not sign.
        StorageError: The copy cannot be written.
    """
    found = audit_heads.read(heads) if heads.exists() else {}
    if out:
        storage.write_atomic(out, heads.read_bytes() if heads.exists() else b"")
    return {
        "heads": [
            {
                "owner": owner,
                "num_kept": len(of_owner),
                "federation": last.federation,
                "signer": last.signer,
                "sequence": last.head.sequence,
                "time": last.head.time,
                "sha256": last.head.sha256,
            }
            for owner, of_owner in sorted(found.items())
            for last in of_owner[-1:]
        ]
    }


def render(entries: Iterable[dict[str, Any]]) -> Table:
    """Entries for a terminal."""
    table = Table("entry", "time (UTC)", "kind", "facts")
    for entry in entries:
        facts = {name: value for name, value in entry.items() if name not in ("sequence", "time", "kind")}
        shown = "  ".join(f"{name}={str(value)[:MAX_SHOWN]}" for name, value in facts.items())
        table.add_row(str(entry["sequence"]), _moment(entry["time"]), entry["kind"], Text(shown))
    return table


def render_heads(heads: Iterable[dict[str, Any]]) -> Table:
    """Kept heads for a terminal; hashes and keys are shortened."""
    table = Table("log of", "kept", "newest", "time (UTC)", "sha256")
    for head in heads:
        owner, sha256 = (head[name][:MAX_SHOWN] for name in ("owner", "sha256"))
        table.add_row(Text(owner), str(head["num_kept"]), str(head["sequence"]), _moment(head["time"]), sha256)
    return table


def _moment(seconds: float) -> str:
    """Unix seconds for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
