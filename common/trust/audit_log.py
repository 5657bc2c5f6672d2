"""Hash-chained, signed, append-only log: JSON lines that cannot be changed, moved or removed unnoticed.

A line is canonical JSON with `sequence` (from 0), `time` (Unix seconds), `kind`, `facts`, `previous` (the head's hash
before it, 64 zeros for the first) and `signature` (Ed25519 over the canonical JSON of all the others). The hash of a
*head* is the SHA-256 of the hash before and of the line's own SHA-256, signature included; so the hashes of the lines
between two heads (`links`) show that the later one continues the earlier one, and nothing of what the lines say. A cut
tail leaves a shorter log that is right in itself, so whoever has seen a head keeps it, and `verify` takes all heads
that are known elsewhere.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuditError, AuthError
from common.frame import wire
from common.journal import Journal
from common.trust import identity

GENESIS: Final = "0" * 64
MAX_LINE_BYTES: Final = 1 << 16
MAX_LINKS: Final = 16_384
FIELDS: Final = ("sequence", "time", "kind", "facts", "previous", "signature")

PURPOSE: Final = "audit"


@dataclass(frozen=True)
class Head:
    """A line's place and hash: all that others need to keep to notice a cut tail. -1 is the empty log.

    Attributes:
        sequence: The line's.
        sha256: Of the head before and of the line; see `follow`.
        time: The line's, Unix seconds. Of two heads it tells which one is news.
    """

    sequence: int = -1
    sha256: str = GENESIS
    time: float = 0.0


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        sequence: Its place, from 0.
        time: Unix seconds.
        kind: What happened.
        facts: Names, sizes, hashes and limits; never data.
        head: Its place and hash.
        link: SHA-256 of the line.
    """

    sequence: int
    time: float
    kind: str
    facts: dict[str, Any]
    head: Head
    link: str


class AuditLog:
    """A log that is appended to; several processes of one user may, one after the other.

    Args:
        path: The file; made with mode 0600 if it is not there.
        key: Signs every entry.
        on_entry: Told every entry in order, those that are there already first.

    Raises:
        AuditError: What is there already is not whole.
        StorageError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: Ed25519PrivateKey,
        on_entry: Callable[[Entry], None] = lambda entry: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._key = key
        self._public_key = identity.public_hex(key)
        self._on_entry = on_entry
        self._clock = clock
        self._head = Head()
        self._links: deque[str] = deque(maxlen=MAX_LINKS)
        self._size = 0
        self.refresh()

    @property
    def head(self) -> Head:
        """Of the last line that this object has read or written."""
        return self._head

    @property
    def links(self) -> list[str]:
        """SHA-256 of each line up to `head`, of the last `MAX_LINKS` lines."""
        return list(self._links)

    def refresh(self) -> Head:
        """Read what another process has appended.

        Raises:
            AuditError: It does not continue what was there.
        """
        with self._opened():
            return self._head

    def append(self, kind: str, **facts: Any) -> Head:
        """Write one entry; it is on the disk when this returns.

        Raises:
            AuditError: The log was changed meanwhile.
            StorageError: It cannot be written; whatever was to be logged must then not happen.
            ValueError: The entry is too long.
        """
        with self._opened() as file:
            return self._add(file, kind, facts)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Journal]:
        """The file, for this process alone, with all that others appended read."""
        with contextlib.closing(Journal(self.path)) as file:
            if file.size_bytes < self._size:
                raise AuditError(
                    f"{self.path}: has become shorter; entries were removed after sequence {self._head.sequence}"
                )
            for line in file.lines(self._size):
                self._take(line)
            if file.size_bytes - self._size > MAX_LINE_BYTES:
                raise AuditError(f"{self.path}: no line of a log follows sequence {self._head.sequence}")
            if num_torn := file.cut():  # a crash: what the line was to tell had not happened
                self._add(file, "recovered", {"num_bytes_dropped": num_torn})
            yield file

    def _add(self, file: Journal, kind: str, facts: dict[str, Any]) -> Head:
        """Sign and write the next line."""
        entry: dict[str, Any] = {
            "sequence": self._head.sequence + 1,
            "time": round(self._clock(), 3),
            "kind": kind,
            "facts": facts,
            "previous": self._head.sha256,
        }
        signature = identity.sign(self._key, wire.canonical_json(entry), purpose=PURPOSE)
        line = wire.canonical_json({**entry, "signature": signature})
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"an audit entry of {len(line)} bytes; the limit is {MAX_LINE_BYTES}")
        file.append(line + b"\n")
        self._take(line)
        return self._head

    def _take(self, line: bytes) -> None:
        """One more line that was found right, or was just written."""
        entry = _read_line(line, self._head, self._public_key)
        self._head = entry.head
        self._links.append(entry.link)
        self._size += len(line) + 1
        self._on_entry(entry)


def verify(path: Path, public_key: str, *, heads: Iterable[Head] = ()) -> Head:
    """Check a whole log.

    Args:
        heads: Heads of this log that are known elsewhere; each must still be in it.

    Raises:
        AuditError: A changed, removed, added or moved line, or a cut tail; the message says where.
    """
    found = {entry.sequence: entry.head for entry in read(path, public_key)}
    for head in sorted(heads, key=lambda head: head.sequence):
        if head.sequence >= 0 and found.get(head.sequence) != head:
            last = len(found) - 1
            what = "is not in it" if head.sequence > last else "is another one in it"
            raise AuditError(
                f"{path}: entry {head.sequence}, which is known elsewhere, {what} (its last is {last}): "
                "the tail was cut or an older copy was restored"
            )
    return found[len(found) - 1] if found else Head()


def read(path: Path, public_key: str) -> Iterator[Entry]:
    """The entries of a log, each checked before it is given.

    Raises:
        AuditError: Names the first line that is not what was written there.
    """
    head = Head()
    try:
        with path.open("rb") as file:
            for line in _whole_lines(file):
                entry = _read_line(line, head, public_key)
                head = entry.head
                yield entry
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from error


def follow(sha256: str, links: Sequence[str]) -> str:
    """The hash of the head that stands so many lines after another one.

    Args:
        sha256: The earlier head's hash, 64 hexadecimal digits.
        links: SHA-256 of each line after it, in order.

    Example:
        >>> follow(GENESIS, []) == GENESIS, follow(GENESIS, ["ab" * 32, "cd" * 32])[:8]
        (True, '5362cccc')
    """
    for link in links:
        sha256 = hashlib.sha256(bytes.fromhex(sha256) + bytes.fromhex(link)).hexdigest()
    return sha256


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines without their end, which the last one must have, too."""
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if not line.endswith(b"\n"):
            raise AuditError(f"line {number} has no end: cut, or not an audit log")
        yield line[:-1]


def _read_line(line: bytes, previous: Head, public_key: str) -> Entry:
    """One line, which must be the one after `previous`."""
    sequence = previous.sequence + 1
    try:
        fields = json.loads(line, object_pairs_hook=wire.unique_pairs)
        is_canonical = isinstance(fields, dict) and wire.canonical_json(fields) == line
    except (ValueError, RecursionError) as error:
        raise AuditError(f"entry {sequence} was changed: it is not strict JSON") from error
    if not is_canonical or sorted(fields) != sorted(FIELDS) or type(fields["signature"]) is not str:
        raise AuditError(f"entry {sequence} was changed: it is not in canonical form")
    if fields["sequence"] != sequence or fields["previous"] != previous.sha256:
        raise AuditError(
            f"entry {sequence} does not follow entry {previous.sequence}: a line was changed, removed, added or moved"
        )
    signature = fields.pop("signature")
    try:
        identity.verify(public_key, signature, wire.canonical_json(fields), purpose=PURPOSE)
    except AuthError as error:
        raise AuditError(f"entry {sequence} was changed: its signature does not fit") from error
    link = hashlib.sha256(line).hexdigest()
    head = Head(sequence, follow(previous.sha256, [link]), fields["time"])
    return Entry(sequence, fields["time"], fields["kind"], fields["facts"], head, link)
