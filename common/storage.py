"""Files that are either wholly there or not at all, and what they hold by its hash."""

import fcntl
import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from common.errors import StorageError

PRIVATE: Final = 0o600  # of what was made from rows, of logs and of keys
_UMASK: Final = os.umask(0o077)  # read by setting it; here, where no other thread makes files yet
os.umask(_UMASK)
_LEFTOVER: Final = re.compile(r"\..+\.[a-z0-9_]{8}")  # as `tempfile` names them


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write, fsync and rename, so that a crash leaves the old file or the new one.

    Args:
        mode: Who may read it, from the first moment on; None: what this process' umask leaves of 0666. Folders that
            are made for a file that is this user's alone are so, too.

    Raises:
        StorageError: The disk is full, the folder is not writable, and the like. The old file is untouched.
    """
    temporary = ""
    try:
        make_folder(path.parent, is_private=mode == PRIVATE)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            with suppress(OSError):  # a file system without locks: there `remove_leftovers` removes nothing
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK if mode is None else mode)
            os.replace(temporary, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # makes the rename itself durable
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def make_folder(folder: Path, *, is_private: bool) -> None:
    """Make a folder and those above it that are missing; private ones get mode 0700, whatever the umask."""
    for path in [*reversed(folder.parents), folder] if is_private else []:
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Remove the temporary files that a kill left of `write_atomic`, and count them.

    Those that are being written are locked by their writer, and stay.
    """
    num_removed = 0
    for path in folder.rglob(".*"):
        if not _LEFTOVER.fullmatch(path.name) or not path.is_file():
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            num_removed += 1
    return num_removed


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces: 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one translation of a failed write."""
    return StorageError(
        f"{path}: cannot write ({error.strerror or error}); free space or fix permissions, then run again; "
        "what was finished before is intact"
    )
