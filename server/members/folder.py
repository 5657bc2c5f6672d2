"""The coordinator's folder of a federation: where what lies, and how it is read and written."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import ConfigDict, Field, TypeAdapter

from common import storage
from common.errors import ConfigError
from common.frame import wire
from common.trust import governance, kit, roster
from common.trust.governance import Governance, HexKey, Slug
from common.trust.roster import Roster
from server.members import ca, founding_config
from server.members.ca import Issuer
from server.members.founding_config import FoundingConfig

CONFIG: Final = "federation.toml"
ISSUED: Final = "issued.json"
REVOKED: Final = "revoked.txt"
ISSUERS: Final = "ca"
KITS: Final = "kits"
NODES: Final = "nodes"
_CLOSED: Final = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Issued:
    """A certificate that a site was given.

    Attributes:
        serial: The certificate's serial number, hex.
        tls_fingerprint: SHA-256 of its public key.
        identity_key: Of the site that it was given to.
        expires_at: Seconds since 1970, UTC.
        is_revoked: Whether neither the certificate nor its site's keys are accepted any more.
    """

    __pydantic_config__ = _CLOSED

    name: Slug
    serial: Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]
    tls_fingerprint: HexKey
    identity_key: HexKey
    expires_at: int
    is_revoked: bool = False


@dataclass(frozen=True)
class Registry:
    """A federation as its coordinator holds it."""

    folder: Path
    config: FoundingConfig
    pinned: Governance
    roster: Roster
    issued: tuple[Issued, ...]

    @property
    def roster_path(self) -> Path:
        """The newest signed roster."""
        return self.folder / kit.ROSTER

    @property
    def crl_path(self) -> Path:
        """The revocation list of the sites' issuer, PEM."""
        return self.folder / ISSUERS / "sites.crl"

    def issuer(self, role: str) -> Issuer:
        """A role's issuer; see `ca.load`."""
        return ca.load(self.folder / ISSUERS, role)


def load(folder: Path) -> Registry:
    """Read a federation's folder.

    Raises:
        ConfigError: It is not one, or a file in it is missing.
        AuthError: Its roster is not signed, or a file is malformed.
    """
    issued_path = folder / ISSUED
    if not (folder / kit.PINNED).is_file():
        raise ConfigError(f"{folder} is no federation's folder; make one with silotune-server provision")
    pinned = governance.load(folder / kit.PINNED)
    return Registry(
        folder=folder,
        config=founding_config.load(folder / CONFIG),
        pinned=pinned,
        roster=roster.load(folder / kit.ROSTER, governance=pinned, epoch_min=1),
        issued=governance.parse(governance.read(issued_path), TypeAdapter(tuple[Issued, ...]), name=str(issued_path)),
    )


def write_issued(folder: Path, issued: Sequence[Issued]) -> None:
    """Write what was issued, and the list of revoked TLS keys that the gateway reads: one fingerprint a line.

    Raises:
        StorageError: The disk is full and the like.
    """
    revoked = (f"{entry.tls_fingerprint}  # {entry.name}\n" for entry in issued if entry.is_revoked)
    text = "# SHA-256 of the public keys of revoked certificates\n" + "".join(revoked)
    storage.write_atomic(folder / REVOKED, text.encode("ascii"))
    storage.write_atomic(folder / ISSUED, wire.canonical_json([dataclasses.asdict(entry) for entry in issued]))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one command at a time change a federation.

    Raises:
        ConfigError: The folder is missing, or another command is at work in it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{folder} is no federation's folder; make one with silotune-server provision") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"another command changes {folder} now; run this one again when it has ended") from error
    finally:
        os.close(descriptor)
