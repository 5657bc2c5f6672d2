"""A startup kit: a few files of known names that are listed in SHA256SUMS, which the governance signed.

It comes as a tar file, which `unpack` takes apart: any other program would also write what is no part of a kit, as over
a site's own keys. A kit has public things only; one that brings a private key is refused.

The roster is not listed: it carries signatures of its own, which need not be there yet when the sums are signed.
"""

import hashlib
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from common import storage
from common.errors import AuthError, ConfigError
from common.frame import wire
from common.trust import governance
from common.trust.governance import Governance

SUMS: Final = "SHA256SUMS"
SIGNATURES: Final = "SHA256SUMS.sig"
PINNED: Final = "federation.json"
CA: Final = "ca.pem"
CERTIFICATE: Final = "site.pem"
ROSTER: Final = "roster.json"
POLICY: Final = "policy.toml"
REQUIRED: Final = frozenset((PINNED, CA, CERTIFICATE, ROSTER))
UNITS: Final = tuple(f"silotune-{name}.service" for name in ("agent", "courier", "link"))
NAMES: Final = REQUIRED | {SUMS, SIGNATURES, POLICY, "node.toml", "compose.yaml", *UNITS}
PURPOSE: Final = "startup kit"
MAX_FILES: Final = 64
MAX_BYTES: Final = 1 << 20  # of one file


def sums(files: Mapping[str, bytes]) -> bytes:
    """Checksums as `sha256sum -c` reads them, of all files but the roster: what the governance signs."""
    listed = sorted((name, data) for name, data in files.items() if name != ROSTER)
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in listed).encode()


def close(files: Mapping[str, bytes], signatures: Mapping[str, str], *, pinned: Governance) -> dict[str, bytes]:
    """Add the checksums and the signatures of them that were collected.

    Raises:
        AuthError: They are not a quorum's.
    """
    listed = sums(files)
    pinned.verify(listed, signatures, purpose=PURPOSE)
    return {**files, SUMS: listed, SIGNATURES: wire.canonical_json(dict(signatures))}


def verify(folder: Path, *, pinned: Governance) -> dict[str, bytes]:
    """Check a kit and read it; what is returned is what was checked, but for the roster, which `roster.parse` checks.

    Args:
        pinned: The governance, known from elsewhere than the kit.

    Returns:
        Name to content of every listed file, and of the roster.

    Raises:
        ConfigError: It is not a folder, or a file cannot be read.
        AuthError: The sums are not signed; a file was altered, added or removed.
    """
    data, signatures = (governance.read(folder / name) for name in (SUMS, SIGNATURES))
    pinned.verify(data, governance.parse(signatures, TypeAdapter(dict[str, str]), name=SIGNATURES), purpose=PURPOSE)
    listed = _listed(data)
    if strange := sorted(listed.keys() - NAMES):
        raise AuthError(
            f"{folder}: {wire.shown(strange[0])} is no part of a kit of this release, and a private key never is; "
            "ask who made the kit, or install the release that it was made with"
        )
    if missing := sorted(REQUIRED - listed.keys() - {ROSTER}):
        raise AuthError(f"{folder} is no startup kit: {missing[0]} is not in its {SUMS}")
    _check_names(folder, {*listed, ROSTER, SUMS, SIGNATURES})
    files = {name: governance.read(folder / name) for name in {*listed, ROSTER}}
    for name, digest in listed.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise AuthError(f"{folder / name} was altered after the kit was signed; fetch the kit again")
    return files


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a kit that came as a tar file into an empty folder; nothing else is written, nowhere else.

    Args:
        archive: Not compressed; one folder of files that have a kit's names.

    Raises:
        ConfigError: It cannot be read, or is no tar file.
        AuthError: It holds anything but a kit's files: another name, a path, a link, a file twice or one too large.
        StorageError: The disk is full and the like.
    """
    seen: dict[str, str] = {}
    try:
        with tarfile.open(archive, mode="r:") as packed:
            for entry in packed:
                if entry.isdir() and "/" not in entry.name.rstrip("/"):
                    continue
                parent, _, name = entry.name.partition("/")
                if name.endswith(".key"):
                    raise AuthError(f"{archive} brings a private key, {wire.shown(name)}: no kit does; ask who made it")
                data = packed.extractfile(entry) if entry.isreg() and name in NAMES else None
                if data is None or name in seen or entry.size > MAX_BYTES:
                    raise AuthError(f"{archive}: {wire.shown(entry.name)} is no part of a kit; ask for the kit again")
                seen[name] = parent
                storage.write_atomic(folder / name, data.read(), mode=0o600)
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{archive}: cannot be read as a tar file; give the kit as it came, or its folder") from error
    if len({*seen.values()}) != 1:
        raise AuthError(f"{archive}: is no kit, which is one folder of files")


def read_pinned(data: bytes) -> Governance:
    """Read a kit's federation.json; compare its words, or the file itself with the one that was pinned before.

    Raises:
        AuthError: It is malformed or contradicts itself.
    """
    return governance.check(governance.parse(data, TypeAdapter(Governance), name=PINNED))


def _listed(sums: bytes) -> dict[str, str]:
    """The signed list: name to hash."""
    try:
        lines = [line.split("  ") for line in sums.decode("ascii").splitlines()]
        listed = {name: digest for digest, name in lines}
    except ValueError as error:
        raise AuthError(f"{SUMS} has a line that is not a hash and a name") from error
    if (
        len(listed) != len(lines)
        or len(lines) > MAX_FILES
        or any(name in ("", ".", "..") or "/" in name or not name.isprintable() for name in listed)
    ):
        raise AuthError(f"{SUMS} lists a name twice, a path, or more than {MAX_FILES} files")
    return listed


def _check_names(folder: Path, wanted: set[str]) -> None:
    """Refuse a kit with more or fewer files than the list."""
    try:
        found = {entry.name for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink()}
        others = {entry.name for entry in folder.iterdir()} - found
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); give the unpacked kit's folder") from error
    if wrong := sorted((found ^ wanted) | others):
        raise AuthError(f"{folder}: {wire.shown(wrong[0])} was added, removed or made a link; fetch the kit again")
