"""A site's ledger, where its policy, its own file and its audit log meet: the promise, the file's place, the mirror."""

from pathlib import Path
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import ledger, ledger_file, policy
from client.budget import Header
from client.history import History
from client.ledger import Ledger
from client.policy_file import Policy
from common import accounting, config
from common.audit import AuditLog
from common.errors import ConfigError, LedgerError

ROW = "row"


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


def place(folder: Path, header: Header) -> Path:
    """The ledger's file: one for each data set and unit."""
    return folder / f"{header.dataset}.{quote(header.unit, safe='')}.ledger"


def open_site(node: config.NodeConfig, *, rules: Policy, key: Ed25519PrivateKey, history: History) -> Ledger:
    """Open the ledger of a site's data set.

    Args:
        node: The site's own file.
        rules: Its policy.
        key: Its identity.
        history: What its audit log says; read it before this is called, so that the ledger cannot be behind.

    Raises:
        LedgerError: It is missing, tampered with, cut, an older copy, or the policy promises something else.
    """
    header = promise(rules, node.data)
    path = place(Path(node.agent.log_folder), header)
    known = history.ledgers.get(path.name, ledger_file.Head(-1, ""))
    if known.counter < 0 and not path.exists():
        raise LedgerError(f"{path}: this data set has no ledger yet; run: silotune-client ledger create")
    return ledger.open_ledger(
        path,
        key=ledger_file.derive_key(key),
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
) -> Ledger:
    """Begin the ledger of a site's data set, and tell the audit log.

    Args:
        node: The site's own file.
        rules: Its policy.
        key: Its identity.
        history: What its audit log says.
        log: That log.
        num_units: Units in the data set; they bound delta.

    Raises:
        LedgerError: There is one, or there was one and it is lost.
        ConfigError: The policy's delta is too large for so many units.
    """
    header = promise(rules, node.data)
    path = place(Path(node.agent.log_folder), header)
    _check_delta(header, num_units)
    if path.name in history.ledgers and not path.exists():
        raise LedgerError(f"{path}: the audit log knows of this ledger and it is gone; {ledger_file.LOST}")
    made = ledger.create(path, key=ledger_file.derive_key(key), header=header)
    mirror(log, made)
    return made


def lower(node: config.NodeConfig, *, rules: Policy, key: Ed25519PrivateKey, history: History, log: AuditLog) -> Ledger:
    """Bring the ledger's budget down to the policy's, and tell the audit log.

    Raises:
        LedgerError: The policy's budget is not lower, or the ledger is not right.
    """
    header = promise(rules, node.data)
    found = Ledger(place(Path(node.agent.log_folder), header), key=ledger_file.derive_key(key))
    found.check_mirror(*history.ledgers.get(found.path.name, ledger_file.Head(-1, "")))
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


def _check_delta(header: Header, num_units: int) -> None:
    """A delta above 1/n would allow one unit in the clear."""
    if header.dp_delta > accounting.largest_delta(num_units):
        raise ConfigError(
            f"privacy.dp_delta = {header.dp_delta:g} is too large for {num_units} units; set "
            f"{accounting.delta_rule(num_units)}, in the policy, and sign it again"
        )
