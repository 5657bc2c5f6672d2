"""One process at work in a run's folder: a lock on its events, which a process gives up however it ends.

The lock is `flock` on `events.jsonl`, which is never replaced, so a folder holds no file more and no lock is left
behind. A run is live if somebody holds it.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from common import events, storage
from common.errors import RunBusyError

_TRIES, _PAUSE_S = 5, 0.2  # `is_live` holds the lock too, for a moment
_held: Final[dict[Path, int]] = {}  # by file: the thread of this process that is at work there


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a run's folder; within a thread, holding it twice is holding it once.

    Raises:
        RunBusyError: Another process, or another thread of this one, is at work in it.
        StorageError: The folder is not writable, or its file system knows no locks.
    """
    path = (folder / events.FILE).resolve()
    if _held.get(path) == threading.get_ident():
        yield
        return
    descriptor = _open(path)
    try:
        _take(descriptor, folder)
        while not _is_at(descriptor, path):  # whoever held it left without a word and took the empty file away
            os.close(descriptor)
            descriptor = _open(path)
            _take(descriptor, folder)
        _held[path] = threading.get_ident()
        try:
            yield
        finally:
            del _held[path]
            if not os.fstat(descriptor).st_size:
                path.unlink(missing_ok=True)  # refused before its first event: as if nobody had been here
    finally:
        os.close(descriptor)


def is_live(folder: Path) -> bool:
    """Whether a process is at work in a run's folder now.

    Raises:
        StorageError: The file system knows no locks.
    """
    path = folder / events.FILE
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not try_lock(file.fileno(), fcntl.LOCK_SH, path)


def require_free(folder: Path) -> None:
    """Refuse to begin beside a process that is at work.

    Raises:
        RunBusyError: There is one.
        StorageError: The file system knows no locks.
    """
    if is_live(folder):
        raise _busy(folder)


def _open(path: Path) -> int:
    """The events for writing; made if they are not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage.storage_error(path, error) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take(descriptor: int, folder: Path) -> None:
    """Take the lock, or raise."""
    for number in range(_TRIES):
        if try_lock(descriptor, fcntl.LOCK_EX, folder):
            return
        if number < _TRIES - 1:
            time.sleep(_PAUSE_S)
    raise _busy(folder)


def try_lock(descriptor: int, kind: int, path: Path) -> bool:
    """Whether a lock on an open file could be had at once; it goes when the file is closed.

    Args:
        descriptor: The open file.
        kind: `fcntl.LOCK_EX` or `fcntl.LOCK_SH`.
        path: What messages call it.

    Raises:
        StorageError: The file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise storage.storage_error(path, error) from error
    return True


def _busy(folder: Path) -> RunBusyError:
    """What the second one is told."""
    return RunBusyError(
        f"{folder}: another process is at work on this run; watch it with silotune-server watch {folder}, or end it "
        "first, and begin again once silotune-server status no longer says that it is running"
    )
