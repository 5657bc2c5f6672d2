"""What a private round costs its site, paid before a row is read; and the one answer that was paid for.

Training again would draw other noise, and be another release: a round that was answered is answered with the kept
bytes or not at all.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger.budget import COUNTS, EVALUATE, TRAIN
from client.ledger.ledger import Ledger
from client.memory import site_ledger
from client.memory.history import History
from client.policy import rules as policy
from client.policy.file import Policy
from common import storage
from common.accounting import DpEvent
from common.errors import PolicyRefusedError, WireError
from common.frame import wire
from common.frame.wire import Frame
from common.privacy import cost
from common.run import config
from common.run.manifest import RunManifest
from common.trust.audit_log import AuditLog

ANSWERS_FOLDER: Final = "answers"
MAX_ANSWER_BYTES: Final = 2047 << 20
_PREFIX: Final = {TRAIN: "", EVALUATE: "evaluate-"}


class Payment:
    """The ledger of a site's data set, as the gatekeeper uses it.

    Args:
        log: That log, where the ledger is mirrored.
    """

    def __init__(
        self, node: config.NodeConfig, *, rules: Policy, key: Ed25519PrivateKey, history: History, log: AuditLog
    ) -> None:
        self._node, self._rules, self._key, self._history, self._log = node, rules, key, history, log
        self._folder = Path(node.agent.log_folder) / ANSWERS_FOLDER

    def check(self, run: RunManifest) -> None:
        """The rounds that are left of a run must fit what is left of the budget.

        Raises:
            BudgetExhausted: They do not; tells what remains.
            LedgerError: The ledger is missing or not what the audit log knows.
        """
        if run.run.privacy.mode == "unit":
            steps = self._history.run(run.sha256).steps
            num_done = sum(kind == TRAIN for kind, _ in steps)
            num_left = max(0, run.run.federation.num_rounds - num_done)
            ledger, beside = self._open(), self._beside_rounds(run)
            asked = beside.get(EVALUATE, [])[sum(kind == EVALUATE for kind, _ in steps) :]
            counts = [] if self._counts(ledger, run) else beside.get(COUNTS, [])
            if num_left or asked or counts:
                ledger.budget().check_plan(cost.event_per_round(run.run), num_left, beside=[*asked, *counts])

    def counts(self, run: RunManifest, noised: Callable[[], Mapping[str, int]]) -> Mapping[str, int]:
        """The counts of rows that a run is told: the same ones in every process, and charged once.

        Args:
            noised: Makes them; called if they were not made before.

        Raises:
            BudgetExhausted: They do not fit; nothing was charged.
            LedgerError: The ledger is missing or not what the audit log knows.
        """
        ledger = self._open()
        known = self._counts(ledger, run)
        if known:
            return known
        made = noised()
        (event,) = self._beside_rounds(run)[COUNTS]
        ledger.reserve(run.sha256, 0, event, purpose=COUNTS, released=made)
        site_ledger.mirror(self._log, ledger)
        return made

    def _beside_rounds(self, run: RunManifest) -> dict[str, list[DpEvent]]:
        asked = run.run
        return policy.beside_rounds(self._rules, asked.privacy, num_evaluations=len(asked.evaluated_rounds))

    def _counts(self, ledger: Ledger, run: RunManifest) -> Mapping[str, int]:
        """Those that a run was told; empty if it was told none."""
        for paid in ledger.budget().reservations:
            if (paid.purpose, paid.run_sha256) == (COUNTS, run.sha256):
                return paid.released
        return {}

    def answered(self, run: RunManifest, round_index: int, *, kind: str = TRAIN) -> Frame | None:
        """The answer that a round, or an evaluation, was given; None if it was given none.

        Raises:
            PolicyRefusedError: It was given one that is not kept any more.
        """
        if (kind, round_index) not in self._history.run(run.sha256).steps:
            return None
        try:
            return wire.unpack(self._answer_file(run, round_index, kind).read_bytes(), max_body_bytes=MAX_ANSWER_BYTES)
        except (OSError, WireError) as error:
            raise PolicyRefusedError(
                f"rounds: {kind} of round {round_index} was answered, and its answer is not kept any more; going on "
                "needs the next round",
                rule="rounds",
            ) from error

    def pay(self, run: RunManifest, round_index: int, *, kind: str = TRAIN) -> None:
        """Charge a round or an evaluation; on the disk, and in the audit log, when this returns.

        Raises:
            BudgetExhausted: It would pass the budget; nothing was charged.
            LedgerError: The ledger is missing or not what the audit log knows.
        """
        ledger = self._open()
        if kind == TRAIN:
            ledger.reserve(run.sha256, round_index, cost.event_per_round(run.run))
        else:
            event = self._beside_rounds(run)[EVALUATE][0]
            ledger.reserve(run.sha256, round_index, event, purpose=EVALUATE)
        site_ledger.mirror(self._log, ledger)

    def keep(self, run: RunManifest, round_index: int, reply: Frame, *, kind: str = TRAIN) -> None:
        """Keep an answer until the next one of its kind in the run; it is as protected as what leaves.

        Raises:
            StorageError: It cannot be written; it must not leave then.
        """
        path = self._answer_file(run, round_index, kind)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.write_atomic(path, wire.pack(reply), mode=storage.PRIVATE)
        for old in self._folder.glob(f"{run.sha256}-{_PREFIX[kind]}[0-9]*"):
            if old != path:
                old.unlink()

    def _open(self) -> Ledger:
        """The ledger as it is now: people may have lowered it meanwhile."""
        return site_ledger.open_site(self._node, rules=self._rules, key=self._key, history=self._history)

    def _answer_file(self, run: RunManifest, round_index: int, kind: str) -> Path:
        return self._folder / f"{run.sha256}-{_PREFIX[kind]}{round_index}"
