"""Files that hold a private key: of one owner, mode 0600, never overwritten; anything else is refused."""

import ctypes
import os
import resource
import stat
import sys
from pathlib import Path
from typing import Final

from common.errors import ConfigError
from common.storage import storage_error

MODE: Final = 0o600
MAX_BYTES: Final = 16384
_PR_SET_DUMPABLE: Final = 4


def folder(path: Path) -> Path:
    """Make a folder for keys, mode 0700, or check one that is there.

    Raises:
        ConfigError: It is not a folder, belongs to somebody else, or others may write in it.
        StorageError: It cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
    except FileExistsError as error:
        raise ConfigError(f"{path} is a file; name a folder for the keys") from error
    except OSError as error:
        raise storage_error(path, error) from error
    if facts.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user; run as its owner, or: chown {os.geteuid()} {path}")
    if facts.st_mode & 0o022:
        raise ConfigError(f"{path}: others may write in this folder of keys; run: chmod 700 {path}")
    return path


def write(path: Path, data: bytes) -> None:
    """Write a new key file, mode 0600 from its first byte on.

    Raises:
        ConfigError: The file is there already, or its folder is not fit for keys; see `folder`.
        StorageError: The disk is full and the like; no part of the file stays.
    """
    folder(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already; a key is never overwritten: name another folder") from error
    except OSError as error:
        raise storage_error(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, MODE)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def harden() -> None:
    """Keep this process' memory out of core dumps, and from other processes of its user; children inherit the former.

    Source: prctl(2), PR_SET_DUMPABLE; getrlimit(2), RLIMIT_CORE.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def read(path: Path) -> bytes:
    """Read a key file; the checks are of the open file, so that it cannot be swapped in between.

    From then on the process holds a key, so its memory is kept in (`harden`).

    Raises:
        ConfigError: It is missing, no regular file, of another owner, of another mode than 0600, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such key file; check the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot open this key file ({error.strerror}); check its owner and path") from error
    harden()
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
            raise ConfigError(f"{path} is not a key file; check the path")
        if facts.st_uid != os.geteuid():
            raise ConfigError(
                f"{path}: this key belongs to another user; run: chown {os.geteuid()} {path} && chmod 600 {path}"
            )
        if stat.S_IMODE(facts.st_mode) != MODE:
            raise ConfigError(f"{path}: mode {stat.S_IMODE(facts.st_mode):04o}, must be 0600; run: chmod 600 {path}")
        return file.read(MAX_BYTES)
