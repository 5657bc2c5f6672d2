"""Files that are either wholly there or not at all, and what they hold by its hash."""

import hashlib
import os
import tempfile
from pathlib import Path

from common.errors import StorageError


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write, fsync and rename, so that a crash leaves the old file or the new one.

    Args:
        path: The file.
        data: All of it.
        mode: Who may read it, from the first moment on.

    Raises:
        StorageError: The disk is full, the folder is not writable, and the like. The old file is untouched.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces: 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one translation of a failed write."""
    return StorageError(
        f"{path}: cannot write ({error.strerror or error}); free space or fix permissions, then run again; "
        "finished rounds on disk are intact"
    )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
