"""Heads of the other parties' audit logs, as every request hands them on: kept here, so that nobody cuts a log unseen.

A request names the newest heads that the coordinator knows: of the sites' logs, and of its own, for which it also shows
that it continues the head that was told before. Each is signed by its log's key, so the coordinator can leave a head
out, or tell an old one again, and can make none up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from common.errors import AuditError, PolicyRefusedError
from common.frame.records import HEADS, LINKS
from common.frame.wire import Frame
from common.trust import audit_log
from common.trust import heads as audit_heads
from common.trust.audit_log import Head
from common.trust.heads import Heads, SignedHead

HEADS_FILE: Final = "audit-heads.jsonl"
RULE: Final = "audit.heads"


@dataclass(frozen=True)
class Told:
    """What a request says of the audit logs.

    Attributes:
        heads: By owner; their signatures are not looked at yet.
        coordinator: The owner of the log of whoever signed the run.
        links: Hashes of the lines of that log, up to its head.
    """

    heads: dict[str, SignedHead]
    coordinator: str
    links: list[str]


def read(request: Frame, *, signer: str, federation: str) -> Told:
    """The heads in a request; the log of whoever signed the run must be among them.

    Args:
        signer: The operator's public key under the run's manifest.
        federation: Id of this site's federation, for which they must be signed.

    Raises:
        WireError: They are malformed, or too many.
        PolicyRefusedError: The coordinator does not tell where its own log stands.
    """
    heads = audit_heads.from_list(request.head.get(HEADS, []), federation=federation)
    coordinator = audit_heads.operator(signer)
    if coordinator not in heads:
        raise PolicyRefusedError(
            f"{RULE}: the coordinator does not tell where the audit log of operator {signer[:16]} stands", rule=RULE
        )
    links = audit_heads.links_from(request.head.get(LINKS), sequence=heads[coordinator].head.sequence)
    return Told(heads, coordinator, links)


@dataclass(frozen=True)
class Own:
    """This site's own log.

    Attributes:
        site: Its name.
        key: Its public identity key, hex.
        line_hashes: Hash of the head at every entry, by its place.
    """

    site: str
    key: str
    line_hashes: Sequence[bytes]


def keep(told: Told, heads: Heads, *, own: Own, keys: Mapping[str, str] | None) -> None:
    """Hold what is told against signatures and against what is known, and keep what is news.

    Heads of sites that the roster here does not name (admitted since, or revoked) and of other operators are left out.

    Args:
        heads: Those of the others, kept here.
        own: This site's log, which is held against what it is said to have told.
        keys: Public keys of all sites by the roster; None where this site reads none: then a log keeps the key of its
            first head.

    Raises:
        PolicyRefusedError: A head that its owner did not sign for this federation; a log that went back or was written
            anew, this site's own included; or no more heads can be kept.
        StorageError: They cannot be written.
    """
    try:
        if own.site in told.heads:
            _check_own(told.heads[own.site], own)
        _check_continues(told, heads)
        counted = {owner: one for owner, one in told.heads.items() if _counts(owner, told, own.site, keys)}
        heads.keep(counted, keys=keys)
    except AuditError as error:
        raise PolicyRefusedError(f"{RULE}: {error}", rule=RULE) from error


def _counts(owner: str, told: Told, site: str, keys: Mapping[str, str] | None) -> bool:
    """Whether a log is the coordinator's or another member's."""
    if owner == told.coordinator:
        return True
    return owner != site and not owner.startswith(audit_heads.OPERATOR) and (keys is None or owner in keys)


def _check_own(told: SignedHead, own: Own) -> None:
    """What this site is said to have told must be in its log.

    Raises:
        AuditError: It is not, or this site never signed it.
    """
    audit_heads.verify(own.site, told, key=own.key)
    head = told.head
    if head.sequence >= len(own.line_hashes) or own.line_hashes[head.sequence].hex() != head.sha256:
        raise AuditError(
            f"this site's own log lacks entry {head.sequence} ({head.sha256}), of which it told the coordinator: "
            "its tail was cut or an older copy was restored"
        )


def _check_continues(told: Told, heads: Heads) -> None:
    """The coordinator's log must lead from the head that is kept to the one that is told.

    Raises:
        AuditError: It does not: a line before the kept head was changed, or the log is another one; or too few hashes
            came to tell.
    """
    known = heads.newest().get(told.coordinator)
    now, kept = told.heads[told.coordinator].head, known.head if known else Head()
    num_lines = now.sequence - kept.sequence
    if num_lines < 0 or (known is None and num_lines > len(told.links)):
        return  # it went back, which `Heads.keep` finds; or it is the first that is heard of a long log
    if num_lines > len(told.links):
        raise AuditError(
            f"the audit log of {told.coordinator} has {num_lines} entries more than this site knows of, and the hashes "
            f"of {len(told.links)} came, so nothing shows that it was not written anew; compare the logs "
            f"(operations.md, Compare logs), and if the coordinator's holds entry {kept.sequence} with hash "
            f"{kept.sha256}, remove {HEADS_FILE} here"
        )
    if audit_log.follow(kept.sha256, told.links[len(told.links) - num_lines :]) != now.sha256:
        raise AuditError(
            f"the audit log of {told.coordinator} is told to stand at entry {now.sequence} ({now.sha256}), which does "
            f"not continue entry {kept.sequence} ({kept.sha256}), which is kept: the log was written anew"
        )
