"""Heads of others' audit logs, kept and handed on so that no log is cut or written anew unnoticed.

A file of heads is JSON lines, append-only. A log's *owner* is its site's name, or `operator:KEY` for the log that a
coordinator signs with that key. A head may come late, by way of another run, so an older one alone says nothing; two
heads contradict each other if they are of one place and differ, or if the log is shorter and not earlier. Every head is
signed by its log's key for one federation, so whoever hands it on can neither change nor invent it. A log has one key.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuditError, AuthError, WireError
from common.frame import wire
from common.frame.records import MAX_NUMBER
from common.journal import Journal
from common.run.schema.section import SLUG
from common.trust import identity
from common.trust.audit_log import MAX_LINKS, Head

FIELDS: Final = ("owner", "sequence", "sha256", "time", "signer", "signature", "federation")
PURPOSE: Final = "audit-head"
MAX_OWNERS: Final = 2048  # in one message; with the longest names still under `wire.MAX_HEAD_BYTES`
MAX_FILE_BYTES: Final = 64 << 20
OPERATOR: Final = "operator:"
_OWNER: Final = re.compile(rf"(?:{SLUG[1:-1]}|{OPERATOR}[0-9a-f]{{64}})")
_SLUG: Final = re.compile(SLUG[1:-1])
_HEX: Final = re.compile("[0-9a-f]{64}")
_SIGNATURE: Final = re.compile("[0-9a-f]{128}")


@dataclass(frozen=True)
class SignedHead:
    """A head as it is told, handed on and kept.

    Attributes:
        head: Place, hash and time of the log's newest line.
        signer: Public key of the log, 64 hexadecimal digits.
        signature: By that key over owner, federation and head, 128 hexadecimal digits.
        federation: Id of the federation whose members may hold the log to it.
    """

    head: Head
    signer: str
    signature: str
    federation: str


def sign(head: Head, *, owner: str, federation: str, key: Ed25519PrivateKey) -> SignedHead:
    """Vouch for where a log stands."""
    signature = identity.sign(key, _signed_bytes(head, owner=owner, federation=federation), purpose=PURPOSE)
    return SignedHead(head, identity.public_hex(key), signature, federation)


def verify(owner: str, told: SignedHead, *, key: str = "") -> None:
    """Believe a head only if the key of its log signed it, for this owner and federation.

    Args:
        key: The owner's public key by the roster; empty: not known, so the head is held to the key that it names.

    Raises:
        AuditError: Another key, or another signature.
    """
    expected = owner.removeprefix(OPERATOR) if owner.startswith(OPERATOR) else key or told.signer
    try:
        if told.signer != expected:
            raise AuthError(f"by key {told.signer[:16]!r}, and {expected[:16]!r} is the owner's")
        data = _signed_bytes(told.head, owner=owner, federation=told.federation)
        identity.verify(told.signer, told.signature, data, purpose=PURPOSE)
    except AuthError as error:
        raise AuditError(
            f"the audit log of {wire.shown(owner)} is told to stand at entry {told.head.sequence} of federation "
            f"{wire.shown(told.federation)}, and its owner did not sign that: {error}"
        ) from error


def _signed_bytes(head: Head, *, owner: str, federation: str) -> bytes:
    """What a signature covers."""
    told = {"federation": federation, "owner": owner, "sequence": head.sequence, "sha256": head.sha256}
    return wire.canonical_json({**told, "time": float(head.time)})


def operator(public_key: str) -> str:
    """The owner of the log that a coordinator signs with this key."""
    return OPERATOR + public_key


def to_list(heads: Mapping[str, SignedHead]) -> list[list[Any]]:
    """Heads by owner as a frame carries them; the federation is the run's."""
    return [[owner, *_values(told)[:-1]] for owner, told in sorted(heads.items())]


def from_list(items: object, *, federation: str) -> dict[str, SignedHead]:
    """Heads by owner from a frame, as if for this federation; their signatures are not looked at.

    Raises:
        WireError: Not a list of heads, too long, or an owner twice.
    """
    if not isinstance(items, list) or len(items) > MAX_OWNERS:
        raise WireError(f"heads of audit logs are not a list of at most {MAX_OWNERS}")
    try:
        heads = dict(_checked(*[*item, federation]) for item in items)
    except (TypeError, ValueError) as error:
        raise WireError("a head of an audit log is not owner, place, hash, time, key and signature") from error
    if len(heads) != len(items):
        raise WireError("heads of audit logs name an owner twice")
    return heads


def links_from(items: object, *, sequence: int) -> list[str]:
    """Hashes of the last lines up to a head, from a frame: as many as the reader may need.

    Raises:
        WireError: More of them than there can be, or no hashes.
    """
    most = min(sequence + 1, MAX_LINKS)
    if not isinstance(items, list) or len(items) > most:
        raise WireError(f"a head at entry {sequence} comes with the hashes of at most {most} lines")
    if not all(isinstance(item, str) and _HEX.fullmatch(item) for item in items):
        raise WireError("a hash of a line is not 64 hexadecimal digits")
    return items


@dataclass
class Heads:
    """A file of heads; several processes of one user may add to it, and several federations of one operator.

    Attributes:
        path: The file; made with the first head.
        federation: Whose heads are told and kept; those of others in the file are left alone.
    """

    path: Path
    federation: str
    _known: dict[str, dict[int, SignedHead]] = field(default_factory=dict)
    _size: int = 0

    def keep(self, told: Mapping[str, SignedHead], *, keys: Mapping[str, str] | None = None) -> None:
        """Add what is news; all of it is on the disk when this returns, or none.

        Args:
            keys: Public key of each site by the roster; None: not known, so a log keeps the key of its first head.

        Raises:
            AuditError: What is told is no head, was not signed by its owner for this federation, is of a site that the
                roster does not name, or contradicts one that is kept; or the file is no file of heads, or full.
            StorageError: It cannot be written.
        """
        for owner, one in told.items():
            self._check(owner, one, keys)
        with closing(Journal(self.path)) as file:
            self._catch_up(file)
            fresh = {owner: one for owner, one in told.items() if self._is_news(owner, one)}
            values = ((owner, *_values(one)) for owner, one in fresh.items())
            lines = [wire.canonical_json(dict(zip(FIELDS, each, strict=True))) for each in values]
            if self._size + sum(len(line) + 1 for line in lines) > MAX_FILE_BYTES:
                raise AuditError(f"{self.path} has {self._size} bytes and takes no more heads; move it to your archive")
            if lines:
                file.append(b"".join(line + b"\n" for line in lines))
                self._take(lines)

    def newest(self) -> dict[str, SignedHead]:
        """The head that reaches furthest, of every owner.

        Raises:
            AuditError: The file is no file of heads.
        """
        with closing(Journal(self.path)) as file:
            self._catch_up(file)
        return {owner: known[max(known)] for owner, known in self._known.items()}

    def of(self, owner: str) -> list[Head]:
        """All that is kept of one log, by sequence."""
        known = self._known.get(owner, {})
        return [known[sequence].head for sequence in sorted(known)]

    def _check(self, owner: str, told: SignedHead, keys: Mapping[str, str] | None) -> None:
        """Refuse what could not be read back, and what its owner did not sign."""
        try:
            _checked(owner, *_values(told))
        except ValueError as error:
            raise AuditError(
                f"{wire.shown(owner)} tells no signed place of an audit log: its place, hash, time, key or signature "
                "has not its form"
            ) from error
        if told.federation != self.federation:
            raise AuditError(f"{owner} tells federation {told.federation} of its log, not {self.federation}")
        key = ""
        if keys is not None and not owner.startswith(OPERATOR):
            if owner not in keys:
                raise AuditError(f"{owner} tells of an audit log and is not in the roster; fetch the newest one")
            key = keys[owner]
        verify(owner, told, key=key)

    def _is_news(self, owner: str, told: SignedHead) -> bool:
        """Whether a head says something that is not kept yet.

        Raises:
            AuditError: It contradicts what is kept.
        """
        head, known = told.head, self._known.get(owner, {})
        if any(other.signer != told.signer for other in known.values()):
            raise AuditError(f"the audit log of {owner} is told under another key than before; take another name")
        if head.sequence in known and known[head.sequence].head != head:
            raise AuditError(_contradiction(owner, head, known[head.sequence].head))
        heads = [other.head for other in known.values()]
        later = [other for other in heads if other.sequence > head.sequence and other.time <= head.time]
        if later:
            raise AuditError(_contradiction(owner, head, later[-1]))
        return head.sequence >= 0 and head.sequence not in known

    def _catch_up(self, file: Journal) -> None:
        """Read what others have added; a last line that a crash cut is removed."""
        size = file.size_bytes
        if not self._size <= size <= MAX_FILE_BYTES:
            raise AuditError(f"{self.path} has {size} bytes: heads were removed, or it is no file of heads")
        file.cut()
        self._take(list(file.lines(self._size)))

    def _take(self, lines: Sequence[bytes]) -> None:
        """Lines that are in the file."""
        for owner, told in _parse(lines, name=str(self.path)):
            if told.federation == self.federation:
                self._known.setdefault(owner, {})[told.head.sequence] = told
        self._size += sum(len(line) + 1 for line in lines)


def read(path: Path) -> dict[str, list[SignedHead]]:
    """All heads of a file, by owner and sequence. The file is not touched: it may be another party's.

    Raises:
        AuditError: The file cannot be read, is not a file of heads, or holds one that its own signer did not sign.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise AuditError(f"{path} cannot be read as heads of audit logs ({error.strerror})") from error
    if len(data) > MAX_FILE_BYTES:
        raise AuditError(f"{path} is too large for a file of heads; the limit is {MAX_FILE_BYTES} bytes")
    found: dict[str, list[SignedHead]] = {}
    for owner, told in _parse(data.splitlines(), name=str(path)):
        verify(owner, told)
        found.setdefault(owner, []).append(told)
    return {owner: sorted(heads, key=lambda told: told.head.sequence) for owner, heads in found.items()}


def of(path: Path, owner: str, *, signer: str) -> list[Head]:
    """The heads of one log in a file, of which there must be some.

    Args:
        signer: The log's public key; heads by another key are of another log.

    Raises:
        AuditError: There are none; or see `read`.
    """
    found = read(path)
    if owner not in found:
        others = ", ".join(sorted(found)[:8]) or "nobody"
        raise AuditError(f"{path} holds no head of the log of {wire.shown(owner, limit=80)!r}, only of {others}")
    heads = [told.head for told in found[owner] if told.signer == signer]
    if not heads:
        raise AuditError(f"{path} holds no head of {owner}'s log that key {signer[:16]} signed; is the key the log's?")
    return heads


def _parse(lines: Iterable[bytes], *, name: str) -> list[tuple[str, SignedHead]]:
    """Lines as owners and heads."""
    try:
        found = [json.loads(line, object_pairs_hook=wire.unique_pairs) for line in lines]
        if any(fields.keys() != set(FIELDS) for fields in found):
            raise ValueError("not a head")
        return [_checked(*(fields[key] for key in FIELDS)) for fields in found]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AuditError(f"{name} cannot be read as heads of audit logs ({type(error).__name__})") from error


def _checked(
    owner: object, sequence: object, sha256: object, time: object, signer: object, signature: object, federation: object
) -> tuple[str, SignedHead]:
    """An owner and a head of the right types and ranges; ValueError if they are not."""
    owner, federation = _matching(_OWNER, owner, "owner"), _matching(_SLUG, federation, "federation")
    if type(sequence) is not int or not 0 <= sequence <= MAX_NUMBER:
        raise ValueError("no place")
    if not isinstance(time, int | float) or isinstance(time, bool) or not 0 <= time <= MAX_NUMBER:
        raise ValueError("no time")
    head = Head(sequence, _matching(_HEX, sha256, "hash"), float(time))
    return owner, SignedHead(
        head, _matching(_HEX, signer, "key"), _matching(_SIGNATURE, signature, "signature"), federation
    )


def _matching(pattern: re.Pattern[str], value: object, what: str) -> str:
    """A string of this form."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"no {what}")
    return value


def _values(told: SignedHead) -> tuple[int, str, float, str, str, str]:
    """A head's fields as they are written, after its owner."""
    head = told.head
    return head.sequence, head.sha256, head.time, told.signer, told.signature, told.federation


def _contradiction(owner: str, told: Head, kept: Head) -> str:
    """Both heads in full: whoever asks for the log later must be able to say which one it lacks."""
    return (
        f"the audit log of {owner} is told to stand at entry {told.sequence} ({told.sha256}, time {told.time:.3f}), "
        f"and entry {kept.sequence} ({kept.sha256}, time {kept.time:.3f}) is kept: it was cut or written anew"
    )
