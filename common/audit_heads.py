"""Heads of others' audit logs, kept so that no log is cut or replaced unnoticed. JSON lines, append-only."""

import json
import os
import re
from pathlib import Path
from typing import Final

from common import wire
from common.audit import GENESIS, Head
from common.errors import AuditError
from common.storage import storage_error

FIELDS: Final = {"owner", "sequence", "sha256"}


def keep(path: Path, owner: str, head: Head) -> None:
    """Keep what somebody told about their log.

    Args:
        path: The file of heads.
        owner: Whose log; the site's name.
        head: Its newest line.

    Raises:
        AuditError: It is no head, or contradicts one of the same log that is kept already: the log was cut or written
            anew.
        StorageError: It cannot be written.
    """
    if not re.fullmatch("[0-9a-f]{64}", head.sha256):
        raise AuditError(f"{wire.shown(owner)} tells no hash of the newest entry of its audit log")
    known = of(path, owner) if path.exists() else []
    if head in known or head == Head():
        return
    newest = max(known, key=lambda other: other.sequence, default=Head())
    if head.sequence <= newest.sequence:
        raise AuditError(
            f"{wire.shown(owner)} tells entry {head.sequence} as the newest of its audit log, "
            f"after it told entry {newest.sequence}: the log was cut or written anew"
        )
    line = wire.canonical_json({"owner": owner, "sequence": head.sequence, "sha256": head.sha256})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def of(path: Path, owner: str) -> list[Head]:
    """The heads of one log that are kept.

    Raises:
        AuditError: The file cannot be read, or is not a file of heads.
    """
    try:
        lines = path.read_bytes().splitlines()
        found = [json.loads(line, object_pairs_hook=wire.unique_pairs) for line in lines]
        return [_head(fields) for fields in found if _owner(fields) == owner]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AuditError(f"{path} cannot be read as heads of audit logs ({type(error).__name__})") from error


def _owner(fields: object) -> str:
    """Whose head a line is."""
    if not isinstance(fields, dict) or fields.keys() != FIELDS:
        raise ValueError("not a head")
    return str(fields["owner"])


def _head(fields: dict[str, object]) -> Head:
    """A line's head, checked."""
    sequence, sha256 = fields["sequence"], fields["sha256"]
    if type(sequence) is not int or not isinstance(sha256, str) or len(sha256) != len(GENESIS):
        raise ValueError("not a head")
    return Head(sequence, sha256)
