"""Who may connect: sites and operators by the fingerprint of their TLS key, less those that were revoked."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.errors import ConfigError

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        name: As in the roster.
        node_key: SHA-256 of its node key's SubjectPublicKeyInfo in DER, hexadecimal.
    """

    name: str
    node_key: str


@dataclass(frozen=True)
class Members:
    """All who may connect.

    Attributes:
        sites: SHA-256 of a TLS key's SubjectPublicKeyInfo in DER, hexadecimal, to the site that holds it.
        operators: Such fingerprints of the operators.
        revoked: Such fingerprints that are refused whatever else lists them.
    """

    sites: Mapping[str, Site]
    operators: frozenset[str]
    revoked: frozenset[str] = field(default_factory=frozenset)

    def site_of(self, fingerprint: str) -> Site | None:
        """The site that holds a TLS key, unless it was revoked."""
        return None if fingerprint in self.revoked else self.sites.get(fingerprint)

    def is_operator(self, fingerprint: str) -> bool:
        """Whether an operator holds a TLS key that was not revoked."""
        return fingerprint in self.operators and fingerprint not in self.revoked


class Watched:
    """Members that are loaded again when one of their files changes."""

    def __init__(
        self, files: Sequence[Path], *, load: Callable[[], Members], clock: Callable[[], float], every_s: float
    ) -> None:
        self._files = files
        self._load = load
        self._clock = clock
        self._every_s = every_s
        self._stamps: list[tuple[int, ...]] = []
        self._looked_at = float("-inf")
        self._members: Members | None = None

    def now(self) -> Members:
        """The members now.

        Raises:
            SilotuneError: A file cannot be read or is not valid; it is tried again at the next call, and nobody is let
                in meanwhile.
        """
        if self._members is None or self._clock() - self._looked_at >= self._every_s:
            stamps = [_stamp(path) for path in self._files]
            if self._members is None or stamps != self._stamps:
                self._members = None
                self._members = self._load()
            self._stamps = stamps
            self._looked_at = self._clock()
        return self._members


def read_revoked(path: Path) -> frozenset[str]:
    """Read fingerprints, one a line; `#` begins a comment.

    Raises:
        ConfigError: The file cannot be read, or a line is no fingerprint.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read this list; make it, empty if nobody was revoked") from error
    entries = {number: line.partition("#")[0].strip() for number, line in enumerate(lines, start=1)}
    for number, entry in entries.items():
        if entry and not _FINGERPRINT.fullmatch(entry):
            raise ConfigError(f"{path}:{number}: not 64 digits of 0-9 and a-f")
    return frozenset(filter(None, entries.values()))


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does; nothing for a file that is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)
