"""Heads of the other parties' audit logs, as every request hands them on: kept here, so that nobody cuts a log unseen.

A request names the newest heads that the coordinator knows: of the sites' logs, and of its own, for which it also shows
that it continues the head that was told before. Each is signed by its log's key, so the coordinator can leave a head
out, or tell an old one again, and can make none up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.memory.history import AUDIT_FILE
from common.errors import AuditError, ConfigError, PolicyRefusedError
from common.frame.records import HEADS, LINKS
from common.frame.wire import Frame
from common.run import config
from common.trust import audit_log, identity
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
        counted = {
            owner: head
            for owner, head in told.heads.items()
            if owner == told.coordinator
            or (owner != own.site and not owner.startswith(audit_heads.OPERATOR) and (keys is None or owner in keys))
        }
        heads.keep(counted, keys=keys)
    except AuditError as error:
        raise PolicyRefusedError(f"{RULE}: {error}", rule=RULE) from error


def _check_own(told: SignedHead, own: Own) -> None:
    """What this site is said to have told must be in its log."""
    audit_heads.verify(own.site, told, key=own.key)
    head = told.head
    if head.sequence >= len(own.line_hashes) or own.line_hashes[head.sequence].hex() != head.sha256:
        raise AuditError(
            f"this site's own log lacks entry {head.sequence} ({head.sha256}), of which it told the coordinator: "
            "its tail was cut or an older copy was restored"
        )


def _check_continues(told: Told, heads: Heads) -> None:
    """The coordinator's log must lead from the head that is kept to the one that is told."""
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


def log_of(node: config.NodeConfig) -> tuple[Path, str]:
    """The log's file and the public key of its signer.

    Raises:
        ConfigError: The site has no identity key, so that it keeps no log; or the key cannot be used.
    """
    if not node.agent.identity_key:
        raise ConfigError("this site has no identity key, so it keeps no audit log; set agent.identity_key in its file")
    key = identity.load(Path(node.agent.identity_key))
    return Path(node.agent.log_folder) / AUDIT_FILE, identity.public_hex(key)


def heads_of(node: config.NodeConfig) -> Path:
    """The file of heads beside the log; see `log_of`."""
    return log_of(node)[0].with_name(HEADS_FILE)
