"""Heads of the other parties' audit logs, as every request hands them on: kept here, so that nobody cuts a log unseen.

A request names the newest heads that the coordinator knows: of the sites' logs, and of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from common import audit_heads
from common.audit import Head
from common.audit_heads import Heads
from common.errors import AuditError, PolicyRefusedError
from common.records import HEADS
from common.wire import Frame

HEADS_FILE: Final = "audit-heads.jsonl"
RULE: Final = "audit.heads"


def read(request: Frame, *, signer: str) -> dict[str, Head]:
    """The heads in a request; the log of whoever signed the run must be among them.

    Args:
        request: To train or to evaluate.
        signer: The operator's public key under the run's manifest.

    Raises:
        WireError: They are malformed, or too many.
        PolicyRefusedError: The coordinator does not tell where its own log stands.
    """
    told = audit_heads.from_list(request.head.get(HEADS, []))
    if audit_heads.operator(signer) not in told:
        raise PolicyRefusedError(
            f"{RULE}: the coordinator does not tell where the audit log of operator {signer[:16]} stands", rule=RULE
        )
    return told


def keep(told: Mapping[str, Head], heads: Heads, *, site: str, line_hashes: Sequence[bytes]) -> None:
    """Hold what is told against what is known, and keep what is news.

    Args:
        told: Heads by owner.
        heads: Those of the others, kept here.
        site: This site's name.
        line_hashes: Of every entry of this site's own log, by its place.

    Raises:
        PolicyRefusedError: A log went back or was written anew, this site's own included; or no more heads can be kept.
        StorageError: They cannot be written.
    """
    own = told.get(site)
    if own and (own.sequence >= len(line_hashes) or line_hashes[own.sequence].hex() != own.sha256):
        raise PolicyRefusedError(
            f"{RULE}: this site's own log lacks entry {own.sequence} ({own.sha256}), of which it told the coordinator: "
            "its tail was cut or an older copy was restored",
            rule=RULE,
        )
    try:
        heads.keep({owner: head for owner, head in told.items() if owner != site})
    except AuditError as error:
        raise PolicyRefusedError(f"{RULE}: {error}", rule=RULE) from error
