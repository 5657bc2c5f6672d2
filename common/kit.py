"""A startup kit: a folder whose every file is listed in SHA256SUMS, which the governance signed."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter

from common import governance, wire
from common.errors import AuthError, ConfigError
from common.governance import Governance

SUMS: Final = "SHA256SUMS"
SIGNATURES: Final = "SHA256SUMS.sig"
PINNED: Final = "federation.json"
CA: Final = "ca.pem"
CERTIFICATE: Final = "site.pem"
ROSTER: Final = "roster.json"
POLICY: Final = "policy.toml"
REQUIRED: Final = frozenset((PINNED, CA, CERTIFICATE, ROSTER))
PURPOSE: Final = "startup kit"
MAX_FILES: Final = 64


def seal(files: Mapping[str, bytes], keys: Sequence[Ed25519PrivateKey], *, pinned: Governance) -> dict[str, bytes]:
    """Add checksums, as `sha256sum -c` reads them, and the governance's signatures of them.

    Args:
        files: Name to content; no folders.
        keys: Governance keys that are at hand.
        pinned: The governance.

    Returns:
        All files of the kit.

    Raises:
        ConfigError: Too few governance keys, or a key that is none.
    """
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())).encode()
    signatures = pinned.sign(sums, keys, purpose=PURPOSE)
    return {**files, SUMS: sums, SIGNATURES: wire.canonical_json(signatures)}


def verify(folder: Path, *, pinned: Governance) -> dict[str, bytes]:
    """Check a kit and read it; what is returned is what was checked.

    Args:
        folder: The kit, unpacked.
        pinned: The governance, known from elsewhere than the kit.

    Returns:
        Name to content of every listed file.

    Raises:
        ConfigError: It is not a folder, or a file cannot be read.
        AuthError: The sums are not signed; a file was altered, added or removed.
    """
    sums, signatures = (governance.read(folder / name) for name in (SUMS, SIGNATURES))
    pinned.verify(sums, governance.parse(signatures, TypeAdapter(dict[str, str]), name=SIGNATURES), purpose=PURPOSE)
    listed = _listed(sums)
    if missing := sorted(REQUIRED - listed.keys()):
        raise AuthError(f"{folder} is no startup kit: {missing[0]} is not in its {SUMS}")
    _check_names(folder, {*listed, SUMS, SIGNATURES})
    files = {name: governance.read(folder / name) for name in listed}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != listed[name]:
            raise AuthError(f"{folder / name} was altered after the kit was signed; fetch the kit again")
    return files


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
    if len(listed) != len(lines) or len(lines) > MAX_FILES or any(_is_odd(name) for name in listed):
        raise AuthError(f"{SUMS} lists a name twice, a path, or more than {MAX_FILES} files")
    return listed


def _is_odd(name: str) -> bool:
    """Whether a name is not that of a plain file in the kit's own folder."""
    return name in ("", ".", "..") or "/" in name or not name.isprintable()


def _check_names(folder: Path, wanted: set[str]) -> None:
    """Refuse a kit with more or fewer files than the list."""
    try:
        found = {entry.name for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink()}
        others = {entry.name for entry in folder.iterdir()} - found
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror}); give the unpacked kit's folder") from error
    if wrong := sorted((found ^ wanted) | others):
        raise AuthError(f"{folder}: {wire.shown(wrong[0])} was added, removed or made a link; fetch the kit again")
