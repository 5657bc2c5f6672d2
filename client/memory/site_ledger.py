"""A site's ledger, where its policy, its own file and its audit log meet: the promise, the file's place, the mirror."""

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import ledger, sealed
from client.ledger.budget import Header
from client.ledger.ledger import Ledger
from client.memory.history import History
from client.policy import rules as policy
from client.policy.file import Policy
from common import accounting
from common.data.rows import Row
from common.errors import ConfigError, LedgerError
from common.run import config
from common.trust.audit_log import AuditLog

ROW = "row"
MAX_MARKS: Final = 2048
MIN_SHARED: Final = 0.1  # a few sentences stand in many data sets
_MARKING: Final = b"silotune/v1/marks"


def promise(rules: Policy, data: config.NodeDataConfig) -> Header:
    """What the site's settings promise to the units of its data set.

    Raises:
        PolicyRefusedError: The policy does not list what the site's own file reads.
        ConfigError: The policy's delta or epsilon can be no promise.
    """
    policy.check_node(rules, data)
    dataset = next(name for name, listed in rules.data.datasets.items() if listed.path == data.path)
    limits = rules.privacy
    try:
        return Header(dataset, data.unit_column or ROW, float(limits.max_epsilon), float(limits.dp_delta))
    except ValueError as error:
        raise ConfigError(f"[privacy] of the policy: {error}") from None


def ledger_path(folder: Path, header: Header) -> Path:
    """The ledger's file: one for each data set and unit."""
    return folder / f"{header.dataset}.{quote(header.unit, safe='')}.ledger"


def open_site(node: config.NodeConfig, *, rules: Policy, key: Ed25519PrivateKey, history: History) -> Ledger:
    """Open the ledger of a site's data set.

    Args:
        history: What its audit log says; read it before this is called, so that the ledger cannot be behind.

    Raises:
        LedgerError: It is missing, tampered with, cut, an older copy, or the policy promises something else.
    """
    header = promise(rules, node.data)
    path = ledger_path(Path(node.agent.log_folder), header)
    known = history.ledgers.get(path.name, sealed.LedgerHead(-1, ""))
    if known.counter < 0 and not path.exists():
        raise LedgerError(f"{path}: this data set has no ledger yet; run: silotune-client ledger create")
    return ledger.open_ledger(
        path,
        key=sealed.derive_key(key),
        header=header,
        expected_counter=known.counter,
        expected_sha256=known.sha256,
    )


def create(
    node: config.NodeConfig,
    *,
    rules: Policy,
    key: Ed25519PrivateKey,
    history: History,
    log: AuditLog,
    num_units: int,
    rows: Sequence[Row] = (),
) -> Ledger:
    """Begin the ledger of a site's data set, and tell the audit log.

    Args:
        num_units: Units in the data set; they bound delta.
        rows: All of its rows; they are known again under another name.

    Raises:
        LedgerError: There is one, or there was one and it is lost; or the rows or units have one under another name.
        ConfigError: The policy's delta is too large for so many units.
    """
    header = promise(rules, node.data)
    path = ledger_path(Path(node.agent.log_folder), header)
    if header.dp_delta > accounting.largest_delta(num_units):  # above 1/n it would allow one unit in the clear
        raise ConfigError(
            f"privacy.dp_delta = {header.dp_delta:g} is too large for {num_units} units; set "
            f"{accounting.delta_rule(num_units)}, in the policy, and sign it again"
        )
    for name in history.ledgers:
        if not (lost := path.with_name(name)).exists():
            raise LedgerError(f"{lost}: the audit log knows of this ledger and it is gone; {sealed.LOST}")
    marks = marks_of(rows, unit=header.unit, secret=sealed.derive_key(key, purpose=_MARKING))
    _check_new(path, marks, key=sealed.derive_key(key))
    made = ledger.create(path, key=sealed.derive_key(key), header=header, marks=marks)
    mirror(log, made)
    return made


def lower(node: config.NodeConfig, *, rules: Policy, key: Ed25519PrivateKey, history: History, log: AuditLog) -> Ledger:
    """Bring the ledger's budget down to the policy's, and tell the audit log.

    Raises:
        LedgerError: The policy's budget is not lower, or the ledger is not right.
    """
    header = promise(rules, node.data)
    found = Ledger(ledger_path(Path(node.agent.log_folder), header), key=sealed.derive_key(key))
    found.check_mirror(*history.ledgers.get(found.path.name, sealed.LedgerHead(-1, "")))
    found.lower(header.max_epsilon)
    mirror(log, found)
    return found


def mirror(log: AuditLog, paid: Ledger) -> None:
    """Note in the audit log where the ledger stands. Call it after every reservation, before the round begins.

    Raises:
        StorageError: It cannot be written; the round must not begin.
    """
    head = paid.head()
    log.append("ledger", ledger=paid.path.name, counter=head.counter, ledger_sha256=head.sha256)


def marks_of(rows: Sequence[Row], *, unit: str, secret: bytes) -> dict[str, list[str]]:
    """Keyed hashes of units and of texts, of each the smallest: they lie in the ledger, encrypted, and tell no name.

    Of two data sets those below a common bound are the same share of each that the sets have in common.

    Args:
        unit: The column of the unit, or `row`, whose names are places and tell nothing of the rows.
        secret: Of the site.

    Source: Broder 1997, On the resemblance and containment of documents; the smallest hashes as a sketch.
    """
    units = {row.unit for row in rows} if unit != ROW else set()
    texts = {"\0".join(part for message in row.messages for part in (message.role, message.content)) for row in rows}
    found = {"units": units, "texts": texts}
    return {
        kind: sorted(hmac.digest(secret, f"{kind}\0{name}".encode(), "sha256")[:8].hex() for name in names)[:MAX_MARKS]
        for kind, names in found.items()
    }


def shared(one: Sequence[str], other: Sequence[str]) -> float:
    """Share of the smaller of two sets that the larger one holds too, from their marks.

    Example:
        >>> shared(["01", "05", "09"], ["05", "09", "0c", "0f"]), shared(["01"], ["02"])
        (0.6666666666666666, 0.0)
    """
    full = [marks[-1] for marks in (one, other) if len(marks) >= MAX_MARKS]
    bound = min(full, default="g")
    sets = [{mark for mark in marks if mark <= bound} for marks in (one, other)]
    return len(sets[0] & sets[1]) / max(1, min(map(len, sets)))


def _check_new(path: Path, marks: Mapping[str, Sequence[str]], *, key: bytes) -> None:
    """No other ledger of this site is of the same units or texts, whatever policy and file call them.

    Raises:
        LedgerError: One is, or one that lies there cannot be read.
    """
    for other in sorted(path.parent.glob("*.ledger")):
        if other == path:
            continue
        known = Ledger(other, key=key).marks()
        share = max((shared(marks[kind], known.get(kind, ())) for kind in marks), default=0.0)
        if share >= MIN_SHARED:
            raise LedgerError(
                f"{100 * share:.0f} % of these units or texts have a ledger already, {other}, and what it says was "
                "spent stays spent: one data set has one budget. Call the data set and its unit column as before, in "
                "the policy and the site's own file"
            )
