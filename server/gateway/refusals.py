"""What a refusal is, and the log of refusals: one JSON line each, never a body, a key or a header's value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from common.errors import ConfigError, ProtocolError, StorageError
from common.journal import Journal
from server.gateway.limits import Buckets

NOBODY: Final = ""
_LINES_PER_S: Final = 20.0
_BURST_LINES: Final = 200


class Refused(ProtocolError):
    """A request that is answered with an error status.

    Attributes:
        reason: Code for the log and the caller.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class RefusalLog:
    """Appends to one file; of one certificate 20 lines a second at most, so that nobody fills the disk."""

    def __init__(self, path: Path, *, wall_clock: Callable[[], float], clock: Callable[[], float]) -> None:
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no such folder for this log; make it, or set log.file to another path")
        try:
            self._journal = Journal(path, lock="none", is_synced=False)  # callers decide how many lines there are
        except StorageError as error:
            raise ConfigError(f"{error}; or set log.file to another path") from error
        self._wall_clock = wall_clock
        self._buckets = Buckets(per_s=_LINES_PER_S, burst=_BURST_LINES, clock=clock)
        self._num_unwritten: dict[tuple[str, str], int] = {}

    def write(self, listener: str, reason: str, *, status: int = 0, certificate: str = NOBODY, path: str = "") -> None:
        """Write one refusal.

        Args:
            status: The HTTP status that was sent; 0: the connection was cut.
            certificate: The name in the caller's certificate; empty: it showed none that counts.
            path: One of the listed paths; empty: another one.
        """
        key = (listener, certificate)
        if not self._buckets.take(f"{listener}/{certificate}"):
            self._num_unwritten[key] = self._num_unwritten.get(key, 0) + 1
            return
        line: dict[str, str | int | float] = {
            "time": round(self._wall_clock(), 3),
            "listener": listener,
            "reason": reason,
            "status": status,
            "certificate": certificate,
            "path": path,
        }
        if num_unwritten := self._num_unwritten.pop(key, 0):
            line["num_unwritten"] = num_unwritten
        self._journal.append(json.dumps(line).encode("ascii") + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._journal.close()
