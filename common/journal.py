"""Files of lines that are only appended to: logs of events, audit and refusals, heads, raters' answers."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from common.errors import StorageError
from common.storage import PRIVATE, make_folder, storage_error

Lock = Literal["wait", "refuse", "none"]


class Journal:
    """One such file, open for writing; use it under `contextlib.closing`.

    A writer that is killed leaves whole lines and at most one without its end, of which nobody was told that it was
    kept. The next writer cuts it.

    Args:
        mode: Who may read a file that is made here; None: what this process' umask leaves of 0666. Folders that are
            made for a file that is this user's alone are so, too.
        lock: What to do while another process or thread has the file open: wait, refuse, or write beside it, where
            another lock keeps writers apart.
        is_synced: Whether `append` waits for the disk, so that a line outlives a loss of power.

    Raises:
        StorageError: The file cannot be written, or another writer has it.
    """

    def __init__(self, path: Path, *, mode: int | None = PRIVATE, lock: Lock = "wait", is_synced: bool = True) -> None:
        self._path, self._is_synced = path, is_synced
        try:
            make_folder(path.parent, is_private=mode == PRIVATE)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o666 if mode is None else mode)
        except OSError as error:
            raise storage_error(path, error) from error
        # nothing of ours stands between the end of a `closing` and the lock's: a lock that is left locks its owner out
        self.close: Callable[[], None] = partial(os.close, self._file)
        try:
            if lock != "none":
                fcntl.flock(self._file, fcntl.LOCK_EX | (fcntl.LOCK_NB if lock == "refuse" else 0))
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise StorageError(f"{path}: another session writes to it; end that one first") from None
            raise

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return os.fstat(self._file).st_size

    def lines(self, offset: int = 0) -> Iterator[bytes]:
        """Whole lines from a byte on, without their ends."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(offset)
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]

    def cut(self) -> int:
        """Remove a last line without its end; returns how many bytes it had."""
        size = self.size_bytes
        if not size or os.pread(self._file, 1, size - 1) == b"\n":
            return 0
        num_whole = os.pread(self._file, size, 0).rfind(b"\n") + 1
        os.ftruncate(self._file, num_whole)
        return size - num_whole

    def append(self, lines: bytes) -> None:
        """Write whole lines: all of them or, on a full disk, none.

        Raises:
            StorageError: They could not be written.
        """
        self.cut()
        size = self.size_bytes
        try:
            if os.write(self._file, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._is_synced:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise storage_error(self._path, error) from error
