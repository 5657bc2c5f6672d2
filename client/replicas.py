"""Heads of the other parties' audit logs, as every request hands them on: kept here, so that nobody cuts a log unseen.

A request names the newest heads that the coordinator knows: of the sites' logs, and of its own, for which it also shows
that it continues the head that was told before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from common import audit, audit_heads
from common.audit import Head
from common.audit_heads import Heads
from common.errors import AuditError, PolicyRefusedError
from common.records import HEADS, LINKS
from common.wire import Frame

HEADS_FILE: Final = "audit-heads.jsonl"
RULE: Final = "audit.heads"


@dataclass(frozen=True)
class Told:
    """What a request says of the audit logs.

    Attributes:
        heads: By owner.
        coordinator: The owner of the log of whoever signed the run.
        links: Hashes of the lines of that log, up to its head.
    """

    heads: dict[str, Head]
    coordinator: str
    links: list[str]


def read(request: Frame, *, signer: str) -> Told:
    """The heads in a request; the log of whoever signed the run must be among them.

    Args:
        request: To train or to evaluate.
        signer: The operator's public key under the run's manifest.

    Raises:
        WireError: They are malformed, or too many.
        PolicyRefusedError: The coordinator does not tell where its own log stands.
    """
    heads, coordinator = audit_heads.from_list(request.head.get(HEADS, [])), audit_heads.operator(signer)
    if coordinator not in heads:
        raise PolicyRefusedError(
            f"{RULE}: the coordinator does not tell where the audit log of operator {signer[:16]} stands", rule=RULE
        )
    links = audit_heads.links_from(request.head.get(LINKS), sequence=heads[coordinator].sequence)
    return Told(heads, coordinator, links)


def keep(told: Told, heads: Heads, *, site: str, line_hashes: Sequence[bytes]) -> None:
    """Hold what is told against what is known, and keep what is news.

    Args:
        told: As `read` gives it.
        heads: Those of the others, kept here.
        site: This site's name.
        line_hashes: Of every entry of this site's own log, by its place.

    Raises:
        PolicyRefusedError: A log went back or was written anew, this site's own included; or no more heads can be kept.
        StorageError: They cannot be written.
    """
    own = told.heads.get(site)
    if own and (own.sequence >= len(line_hashes) or line_hashes[own.sequence].hex() != own.sha256):
        raise PolicyRefusedError(
            f"{RULE}: this site's own log lacks entry {own.sequence} ({own.sha256}), of which it told the coordinator: "
            "its tail was cut or an older copy was restored",
            rule=RULE,
        )
    try:
        _check_continues(told, heads)
        heads.keep({owner: head for owner, head in told.heads.items() if owner != site})
    except AuditError as error:
        raise PolicyRefusedError(f"{RULE}: {error}", rule=RULE) from error


def _check_continues(told: Told, heads: Heads) -> None:
    """The coordinator's log must lead from the head that is kept to the one that is told.

    Raises:
        AuditError: It does not: a line before the kept head was changed, or the log is another one.
    """
    now, kept = told.heads[told.coordinator], heads.newest().get(told.coordinator, Head())
    num_lines = now.sequence - kept.sequence
    if not 0 <= num_lines <= len(told.links):
        return  # it went back, which `Heads.keep` finds; or this site has not heard of it for too long
    if audit.follow(kept.sha256, told.links[len(told.links) - num_lines :]) != now.sha256:
        raise AuditError(
            f"the audit log of {told.coordinator} is told to stand at entry {now.sequence} ({now.sha256}), which does "
            f"not continue entry {kept.sequence} ({kept.sha256}), which is kept: the log was written anew"
        )
