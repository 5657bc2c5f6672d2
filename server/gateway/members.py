"""Who may connect: sites and operators by the fingerprint of their TLS key, less those that were revoked."""

import base64
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.errors import ConfigError, SilotuneError
from common.trust import governance, roster

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_PEM: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----\n([A-Za-z0-9+/=\n]{1,2048})-----END PUBLIC KEY-----\n?")
_RELOAD_S: Final = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        node_key: SHA-256 of its node key's SubjectPublicKeyInfo in DER, hexadecimal.
        node_pem: That key as the node sends it, PEM.
    """

    name: str
    node_key: str
    node_pem: bytes


@dataclass(frozen=True)
class Members:
    """All who may connect.

    Attributes:
        sites: SHA-256 of a TLS key's SubjectPublicKeyInfo in DER, hexadecimal, to the site that holds it.
        operators: Such fingerprints of the operators.
        revoked: Such fingerprints that are refused whatever else lists them.
        roster: The signed roster that says so, as it lies in its file.
    """

    sites: Mapping[str, Site]
    operators: frozenset[str]
    revoked: frozenset[str] = field(default_factory=frozenset)
    roster: bytes = b""

    def site_of(self, fingerprint: str) -> Site | None:
        """The site that holds a TLS key, unless it was revoked."""
        return None if fingerprint in self.revoked else self.sites.get(fingerprint)

    def is_operator(self, fingerprint: str) -> bool:
        """Whether an operator holds a TLS key that was not revoked."""
        return fingerprint in self.operators and fingerprint not in self.revoked


class Watched:
    """Members that are loaded again when one of their files changes, and each half minute: a retiring key may end."""

    def __init__(
        self, files: Sequence[Path], *, load: Callable[[], Members], clock: Callable[[], float], every_s: float
    ) -> None:
        self._files = files
        self._load = load
        self._clock = clock
        self._every_s = every_s
        self._stamps: list[tuple[int, ...]] = []
        self._looked_at = float("-inf")
        self._loaded: Members | SilotuneError = ConfigError("not read yet")

    def now(self) -> Members:
        """The members now.

        Raises:
            SilotuneError: A file cannot be read or is not valid: nobody is let in until it is.
        """
        now = self._clock()
        if now - self._looked_at >= self._every_s:
            self._looked_at = now
            stamps: list[tuple[int, ...]] = [(int(now / _RELOAD_S),)]
            for path in self._files:
                try:
                    status = path.stat()
                    stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
                except OSError:  # not there
                    stamps.append(())
            if stamps != self._stamps or isinstance(self._loaded, SilotuneError):
                self._stamps = stamps
                try:
                    self._loaded = self._load()
                except SilotuneError as error:
                    self._loaded = error
                    _log.error("nobody is let in: %s", error)
        if isinstance(self._loaded, SilotuneError):
            raise self._loaded.with_traceback(None)
        return self._loaded


def load(*, roster_file: Path, governance_file: Path, watermark: Path, revoked_file: Path, now_s: float) -> Members:
    """Read the signed roster and the list of revoked keys.

    Args:
        governance_file: The governance that must have signed it.
        watermark: This gateway's note of the newest roster seen; made at the first start.
        revoked_file: See `read_revoked`.
        now_s: Seconds since 1970: a replaced key counts until its end.

    Raises:
        ConfigError: A file cannot be read.
        AuthError: The roster is not signed by enough governance keys, or older than one seen before.
        StorageError: The note cannot be written.
    """
    pinned = governance.load(governance_file)
    if not watermark.exists():
        roster.start_watermark(watermark, roster.load(roster_file, governance=pinned, epoch_min=1))
    current = roster.accept(roster_file, governance=pinned, watermark=watermark)
    sites: dict[str, Site] = {}
    for entry in current.sites:
        pem = entry.node_key.encode("ascii")
        site = Site(entry.name, node_key_fingerprint(pem), pem)
        sites[entry.tls_fingerprint] = site
        if entry.retiring_tls_fingerprint and now_s < entry.retires_at:
            sites[entry.retiring_tls_fingerprint] = site
    operators = frozenset(operator.tls_fingerprint for operator in current.operators)
    return Members(sites, operators, read_revoked(revoked_file), governance.read(roster_file))


def node_key_fingerprint(pem: bytes) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo in DER, from its PEM; only the text is taken apart.

    Raises:
        ValueError: It is not one public key in PEM form.
    """
    match = _PEM.fullmatch(pem)
    if match is None:
        raise ValueError("not one public key in PEM form")
    return hashlib.sha256(base64.b64decode(match[1].replace(b"\n", b""), validate=True)).hexdigest()


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
