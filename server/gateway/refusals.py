"""What a refusal is, and the log of refusals: one JSON line each, never a body, a key or a header's value."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from common.errors import ConfigError, ProtocolError
from server.gateway.limits import Buckets

NOBODY: Final = ""
_LINES_PER_S: Final = 20.0
_BURST_LINES: Final = 200


class Refused(ProtocolError):
    """A request that is answered with an error status.

    Attributes:
        status: HTTP status.
        reason: Code for the log and the caller.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class RefusalLog:
    """Appends to one file; of one certificate 20 lines a second at most, so that nobody fills the disk."""

    def __init__(self, path: Path, *, wall_clock: Callable[[], float], clock: Callable[[], float]) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot write this log ({error.strerror}); set log.file to another path"
            ) from error
        self._wall_clock = wall_clock
        self._buckets = Buckets(per_s=_LINES_PER_S, burst=_BURST_LINES, clock=clock)
        self._num_unwritten: dict[tuple[str, str], int] = {}

    def write(self, listener: str, reason: str, *, status: int = 0, certificate: str = NOBODY, path: str = "") -> None:
        """Write one refusal.

        Args:
            listener: `fleet` or `control`.
            reason: Code of the rule.
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
        os.write(self._file, json.dumps(line).encode("ascii") + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
