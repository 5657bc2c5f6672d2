"""A site's audit log for the people of the site."""

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from client.history import AUDIT_FILE
from common import audit, audit_heads, config, identity
from common.errors import ConfigError


def newest(node: config.NodeConfig, limit: int) -> list[dict[str, Any]]:
    """The last entries; the whole log is checked on the way.

    Raises:
        AuditError: The log is not whole.
    """
    entries = deque(audit.read(*_log(node)), maxlen=limit)
    return [{"sequence": e.sequence, "time": e.time, "kind": e.kind, **e.facts} for e in entries]


def verify(node: config.NodeConfig, heads: Path | None) -> dict[str, Any]:
    """Check the log, against heads that others keep if a file of them is given.

    Raises:
        AuditError: The log is not whole; the message says where.
    """
    known = audit_heads.of(heads, node.site.name) if heads else []
    head = audit.verify(*_log(node), heads=known)
    return {"num_entries": head.sequence + 1, "sha256": head.sha256, "num_heads_checked": len(known)}


def render(entries: Iterable[dict[str, Any]]) -> Table:
    """Entries for a terminal."""
    table = Table("entry", "time (UTC)", "kind", "facts")
    for entry in entries:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry["time"]))
        facts = {name: value for name, value in entry.items() if name not in ("sequence", "time", "kind")}
        shown = "  ".join(f"{name}={str(value)[:24]}" for name, value in facts.items())
        table.add_row(str(entry["sequence"]), moment, entry["kind"], Text(shown))
    return table


def _log(node: config.NodeConfig) -> tuple[Path, str]:
    """The log's file and the public key of its signer."""
    if not node.agent.identity_key:
        raise ConfigError("this site has no identity key, so it keeps no audit log; set agent.identity_key in its file")
    key = identity.load(Path(node.agent.identity_key))
    return Path(node.agent.log_folder) / AUDIT_FILE, identity.public_hex(key)
