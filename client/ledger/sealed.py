"""The file under a privacy ledger: encrypted, chained, counted lines that are either wholly on the disk or not at all.

A line is the hexadecimal form of nonce and AES-256-GCM ciphertext of canonical JSON with `counter` (from 0), `previous`
(SHA-256 of the line before, 64 zeros for the first), `time` (Unix seconds), `kind` and `facts`. The file's name, the
version and the counter are authenticated with it, so no line can be moved to another place or another ledger.

Every append writes the whole file anew, beside the old one, and renames it: a crash leaves the old file or the new one.
So nothing in it is ever half written, and whatever is not exactly right was tampered with.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import LedgerError
from common.frame import wire
from common.storage import storage_error

VERSION: Final = 1
GENESIS: Final = "0" * 64
KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
MODE: Final = 0o600
LOST: Final = "a lost ledger is a spent budget: restore the newest copy of it"
_PURPOSE: Final = b"silotune/v1/ledger"


class LedgerHead(NamedTuple):
    """The last line's place and hash. Whoever keeps it notices when the ledger is cut or an older copy is restored."""

    counter: int
    sha256: str


@dataclass(frozen=True)
class LedgerLine:
    """One line, read and found right."""

    head: LedgerHead
    time: float
    kind: str
    facts: dict[str, Any]


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time; beside the ledger, whose own file is replaced with every line."""
    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Disk:
    """The calls by which a ledger reaches the disk; a test passes ones that stop or forget."""

    open: Callable[[Path, int, int], int] = os.open
    write: Callable[[int, bytes], int] = os.write
    fsync: Callable[[int], None] = os.fsync
    close: Callable[[int], None] = os.close
    replace: Callable[[Path, Path], None] = os.replace
    remove: Callable[[Path], None] = os.unlink
    read: Callable[[Path], bytes] = Path.read_bytes
    lock: Callable[[Path], AbstractContextManager[None]] = lock


def derive_key(identity_key: Ed25519PrivateKey, *, purpose: bytes = _PURPOSE) -> bytes:
    """The key of a site's ledgers, or of another purpose; 32 bytes.

    Source: RFC 5869, HKDF with SHA-256.
    """
    made = HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose)
    return made.derive(identity_key.private_bytes_raw())


def read(path: Path, *, key: bytes, disk: Disk) -> list[LedgerLine]:
    """All lines of a ledger.

    Raises:
        LedgerError: The file is missing, empty, or not what was written; the message says where.
    """
    data = _content(path, disk)
    lines: list[LedgerLine] = []
    previous = LedgerHead(-1, GENESIS)
    for raw in data.split(b"\n")[:-1]:
        lines.append(_open_line(path, raw, previous, key))
        previous = lines[-1].head
    if not lines or not data.endswith(b"\n"):
        raise LedgerError(f"{path}: the ledger is empty or was cut; {LOST}")
    return lines


def create(path: Path, kind: str, facts: dict[str, Any], *, key: bytes, disk: Disk) -> LedgerHead:
    """Write a new file with one line; it is on the disk when this returns.

    Raises:
        LedgerError: There is a ledger already.
        StorageError: It cannot be written.
    """
    with disk.lock(path):
        if _is_there(path, disk):
            raise LedgerError(f"{path}: there is a ledger already, and what it says was spent stays spent")
        line = _seal(path, LedgerHead(-1, GENESIS), kind, facts, key)
        _replace(path, line + b"\n", disk)
        return LedgerHead(0, hashlib.sha256(line).hexdigest())


def append(
    path: Path, lines: Sequence[LedgerLine], kind: str, facts: dict[str, Any], *, key: bytes, disk: Disk
) -> LedgerHead:
    """Add one line after `lines`, under the caller's lock; it is on the disk when this returns.

    Raises:
        LedgerError: The file is not the one that `lines` were read from.
        StorageError: It cannot be written; whatever was to be paid for must then not happen.
    """
    line = _seal(path, lines[-1].head, kind, facts, key)
    before = _content(path, disk)
    if before.count(b"\n") != len(lines):
        raise LedgerError(f"{path}: the ledger was changed while it was written to")
    _replace(path, before + line + b"\n", disk)
    return LedgerHead(lines[-1].head.counter + 1, hashlib.sha256(line).hexdigest())


def _seal(path: Path, previous: LedgerHead, kind: str, facts: dict[str, Any], key: bytes) -> bytes:
    """The line after `previous`."""
    counter = previous.counter + 1
    now = round(time.time(), 3)
    fields = {"counter": counter, "previous": previous.sha256, "time": now, "kind": kind, "facts": facts}
    nonce = os.urandom(NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, wire.canonical_json(fields), _associated(path, counter))
    return (nonce + sealed).hex().encode()


def _open_line(path: Path, raw: bytes, previous: LedgerHead, key: bytes) -> LedgerLine:
    """One line, which must be the one after `previous`."""
    counter = previous.counter + 1
    try:
        sealed = bytes.fromhex(raw.decode("ascii"))
        if sealed.hex().encode() != raw:
            raise ValueError("not in canonical form")
        text = AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _associated(path, counter))
        fields = json.loads(text)
    except (ValueError, InvalidTag) as error:
        raise LedgerError(
            f"{path}: line {counter} is not what was written there, or site key or file name are others; {LOST}"
        ) from error
    if fields["counter"] != counter or fields["previous"] != previous.sha256:
        raise LedgerError(f"{path}: line {counter} does not follow the line before it; {LOST}")
    head = LedgerHead(counter, hashlib.sha256(raw).hexdigest())
    return LedgerLine(head, fields["time"], fields["kind"], fields["facts"])


def _associated(path: Path, counter: int) -> bytes:
    """What a line is tied to."""
    return b"\0".join((_PURPOSE, path.name.encode(), b"%d" % VERSION, b"%d" % counter))


def _content(path: Path, disk: Disk) -> bytes:
    """The file's bytes."""
    try:
        return disk.read(path)
    except FileNotFoundError as error:
        raise LedgerError(f"{path}: there is no such ledger; {LOST}") from error
    except OSError as error:
        raise LedgerError(f"{path}: the ledger cannot be read ({error.strerror})") from error


def _is_there(path: Path, disk: Disk) -> bool:
    """Whether something has that name."""
    try:
        disk.read(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _replace(path: Path, data: bytes, disk: Disk) -> None:
    """Write beside, fsync, rename, fsync the folder."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with suppress(FileNotFoundError):  # of a crash; never truncated, for it may be the ledger by another name
            disk.remove(beside)
        descriptor = disk.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        try:
            while data:
                data = data[disk.write(descriptor, data) :]
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)
        disk.replace(beside, path)
        descriptor = disk.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
        try:
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)
    except OSError as error:
        raise storage_error(path, error) from error
