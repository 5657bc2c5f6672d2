"""Heads of others' audit logs, kept and handed on so that no log is cut or written anew unnoticed.

A file of heads is JSON lines, append-only. A log's *owner* is its site's name, or `operator:KEY` for the log that a
coordinator signs with that key. A head may come late, by way of another run, so an older one alone says nothing; two
heads contradict each other if they are of one place and differ, or if the log is shorter and not earlier.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from common import wire
from common.audit import MAX_LINKS, Head
from common.config_types import SLUG
from common.errors import AuditError, WireError
from common.records import MAX_NUMBER
from common.storage import storage_error

FIELDS: Final = ("owner", "sequence", "sha256", "time")
MAX_OWNERS: Final = 4096  # in one message; with the longest names still under `wire.MAX_HEAD_BYTES`
MAX_FILE_BYTES: Final = 64 << 20
OPERATOR: Final = "operator:"
_OWNER: Final = re.compile(rf"(?:{SLUG[1:-1]}|{OPERATOR}[0-9a-f]{{64}})")
_SHA256: Final = re.compile("[0-9a-f]{64}")


def operator(public_key: str) -> str:
    """The owner of the log that a coordinator signs with this key."""
    return OPERATOR + public_key


def to_list(heads: Mapping[str, Head]) -> list[list[Any]]:
    """Heads by owner as a frame carries them."""
    return [[owner, head.sequence, head.sha256, head.time] for owner, head in sorted(heads.items())]


def from_list(items: object) -> dict[str, Head]:
    """Heads by owner from a frame.

    Raises:
        WireError: Not a list of heads, too long, or an owner twice.
    """
    if not isinstance(items, list) or len(items) > MAX_OWNERS:
        raise WireError(f"heads of audit logs are not a list of at most {MAX_OWNERS}")
    try:
        heads = dict(_checked(*item) for item in items)
    except (TypeError, ValueError) as error:
        raise WireError("a head of an audit log is not an owner's name, a place, a hash and a time") from error
    if len(heads) != len(items):
        raise WireError("heads of audit logs name an owner twice")
    return heads


def links_from(items: object, *, sequence: int) -> list[str]:
    """Hashes of lines from a frame: of all lines up to a head, or of the last `audit.MAX_LINKS`; never of fewer.

    Args:
        items: What came.
        sequence: The head's.

    Raises:
        WireError: Another number of them, or no hashes.
    """
    wanted = min(sequence + 1, MAX_LINKS)
    if not isinstance(items, list) or len(items) != wanted:
        raise WireError(f"a head at entry {sequence} comes with the hashes of the last {wanted} lines")
    if not all(isinstance(item, str) and _SHA256.fullmatch(item) for item in items):
        raise WireError("a hash of a line is not 64 hexadecimal digits")
    return items


@dataclass
class Heads:
    """A file of heads; several processes of one user may add to it.

    Attributes:
        path: The file; made with the first head.
    """

    path: Path
    _known: dict[str, dict[int, Head]] = field(default_factory=dict)
    _size: int = 0

    def keep(self, told: Mapping[str, Head]) -> None:
        """Add what is news; all of it is on the disk when this returns, or none.

        Raises:
            AuditError: What is told is no head, or contradicts one that is kept; or the file is no file of heads, or
                full.
            StorageError: It cannot be written.
        """
        _check(told)
        with self._locked() as file:
            self._catch_up(file)
            fresh = {owner: head for owner, head in told.items() if self._is_news(owner, head)}
            lines = b"".join(_line(owner, head) for owner, head in fresh.items())
            if self._size + len(lines) > MAX_FILE_BYTES:
                raise AuditError(f"{self.path} has {self._size} bytes and takes no more heads; move it to your archive")
            if lines:
                _append(file, lines)
                self._take(lines)

    def newest(self) -> dict[str, Head]:
        """The head that reaches furthest, of every owner.

        Raises:
            AuditError: The file is no file of heads.
        """
        with self._locked() as file:
            self._catch_up(file)
        return {owner: known[max(known)] for owner, known in self._known.items()}

    def of(self, owner: str) -> list[Head]:
        """All that is kept of one log, by sequence."""
        known = self._known.get(owner, {})
        return [known[sequence] for sequence in sorted(known)]

    def _is_news(self, owner: str, head: Head) -> bool:
        """Whether a head says something that is not kept yet.

        Raises:
            AuditError: It contradicts what is kept.
        """
        known = self._known.get(owner, {})
        if head.sequence in known and known[head.sequence] != head:
            raise AuditError(_contradiction(owner, head, known[head.sequence]))
        later = [other for other in known.values() if other.sequence > head.sequence and other.time <= head.time]
        if later:
            raise AuditError(_contradiction(owner, head, later[-1]))
        return head.sequence >= 0 and head.sequence not in known

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what others have added; a last line that a crash cut is removed."""
        size = os.fstat(file.fileno()).st_size
        if not self._size <= size <= MAX_FILE_BYTES:
            raise AuditError(f"{self.path} has {size} bytes: heads were removed, or it is no file of heads")
        file.seek(self._size)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._take(whole)
        file.truncate(self._size)

    def _take(self, lines: bytes) -> None:
        """Lines that are in the file."""
        for owner, head in _parse(lines, name=str(self.path)):
            self._known.setdefault(owner, {})[head.sequence] = head
        self._size += len(lines)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, for this process alone."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise storage_error(self.path, error) from error


def read(path: Path) -> dict[str, list[Head]]:
    """All heads of a file, by owner and sequence. The file is not touched: it may be another party's.

    Raises:
        AuditError: The file cannot be read, is not a file of heads, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AuditError(f"{path} cannot be read as heads of audit logs ({error.strerror})") from error
    if len(data) > MAX_FILE_BYTES:
        raise AuditError(f"{path} is too large for a file of heads; the limit is {MAX_FILE_BYTES} bytes")
    found: dict[str, list[Head]] = {}
    for owner, head in _parse(data, name=str(path)):
        found.setdefault(owner, []).append(head)
    return {owner: sorted(heads, key=lambda head: head.sequence) for owner, heads in found.items()}


def of(path: Path, owner: str) -> list[Head]:
    """The heads of one log in a file, of which there must be some.

    Raises:
        AuditError: There are none; or see `read`.
    """
    found = read(path)
    if owner not in found:
        others = ", ".join(sorted(found)[:8]) or "nobody"
        raise AuditError(f"{path} holds no head of the log of {wire.shown(owner, limit=80)!r}, only of {others}")
    return found[owner]


def _parse(lines: bytes, *, name: str) -> list[tuple[str, Head]]:
    """Lines as owners and heads."""
    try:
        found = [json.loads(line, object_pairs_hook=wire.unique_pairs) for line in lines.splitlines()]
        if any(fields.keys() != set(FIELDS) for fields in found):
            raise ValueError("not a head")
        return [_checked(*(fields[key] for key in FIELDS)) for fields in found]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"{name} cannot be read as heads of audit logs ({type(error).__name__})") from error


def _checked(owner: object, sequence: object, sha256: object, time: object) -> tuple[str, Head]:
    """An owner and a head of the right types and ranges; ValueError if they are not."""
    if not isinstance(owner, str) or not _OWNER.fullmatch(owner):
        raise ValueError("no owner of an audit log")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("no hash")
    if type(sequence) is not int or not 0 <= sequence <= MAX_NUMBER:
        raise ValueError("no place")
    if not isinstance(time, int | float) or isinstance(time, bool) or not 0 <= time <= MAX_NUMBER:
        raise ValueError("no time")
    return owner, Head(sequence, sha256, float(time))


def _check(told: Mapping[str, Head]) -> None:
    """Refuse what could not be read back."""
    for owner, head in told.items():
        try:
            _checked(owner, head.sequence, head.sha256, head.time)
        except ValueError as error:
            raise AuditError(f"{wire.shown(owner)} tells no place, hash and time of an audit log ({error})") from error


def _line(owner: str, head: Head) -> bytes:
    """A head as it is kept."""
    return wire.canonical_json(dict(zip(FIELDS, (owner, head.sequence, head.sha256, head.time), strict=True))) + b"\n"


def _append(file: BinaryIO, lines: bytes) -> None:
    """Add and fsync; what could not be written whole is taken back."""
    start = file.seek(0, os.SEEK_END)
    try:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), start)
        raise


def _contradiction(owner: str, told: Head, kept: Head) -> str:
    """Both heads in full: whoever asks for the log later must be able to say which one it lacks."""
    return (
        f"the audit log of {owner} is told to stand at entry {told.sequence} ({told.sha256}, time {told.time:.3f}), "
        f"and entry {kept.sequence} ({kept.sha256}, time {kept.time:.3f}) is kept: it was cut or written anew"
    )
