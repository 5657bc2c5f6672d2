"""Privacy spent on one data set, across runs and restarts; refuses before the budget is passed.

`reserve` comes before the first step of a round that reads private rows, and the charge is on the disk when it returns.
There is no refund: a round that was reserved and died stays charged, and one that is reserved again is charged again.
Every reservation is checked against all that the file says at that moment, so several processes share one budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from client.ledger import sealed
from client.ledger.budget import TRAIN, Budget, Header, Reservation
from client.ledger.sealed import Disk, LedgerHead, LedgerLine
from common.accounting import DpEvent
from common.errors import LedgerError

CREATED, RESERVED, LOWERED = "created", "reserved", "lowered"
MARKS: Final = "marks"
DISK: Final = Disk()


class Ledger:
    """One ledger; make it with `create` or `open_ledger`."""

    def __init__(self, path: Path, *, key: bytes, disk: Disk = DISK) -> None:
        self.path = path
        self._key = key
        self._disk = disk
        self._head = LedgerHead(-1, sealed.GENESIS)
        self._lines()

    def budget(self) -> Budget:
        """Promise and charges, as the file has them now."""
        return _budget(self._lines())

    def marks(self) -> dict[str, list[str]]:
        """By which the data set is known under another name; empty of a ledger that was begun without."""
        return dict(self._lines()[0].facts.get(MARKS, {}))

    def head(self) -> LedgerHead:
        """(counter, sha256) of the last line, for the audit log to mirror."""
        return self._lines()[-1].head

    def reserve(
        self,
        run_sha256: str,
        round_index: int,
        event: DpEvent,
        *,
        purpose: str = TRAIN,
        released: Mapping[str, int] | None = None,
    ) -> Reservation:
        """Pay for a round or another release before it begins; the charge is on the disk when this returns.

        Args:
            event: What the round will do, at the most.
            purpose: See `Reservation`.
            released: Likewise; kept with the charge, so that both are on the disk or neither.

        Raises:
            BudgetExhausted: It would pass the budget; nothing was written.
            AccountingUnsupported: No epsilon can be proven for it; nothing was written.
            LedgerError: The file is not what this object has seen, or was tampered with.
            StorageError: It cannot be written; the round must not begin.

        Privacy: whatever leaves after this is within `max_epsilon` and `dp_delta` for each unit, one unit added or
            removed, all runs and processes of this ledger together. A crash in between stays charged; a round that is
            reserved twice is charged twice.
        """
        facts: dict[str, object] = {"run": run_sha256, "round_index": round_index, **asdict(event)}
        if purpose != TRAIN:
            facts |= {"purpose": purpose, "released": dict(released or {})}
        with self._disk.lock(self.path):
            lines = self._lines()
            _budget(lines).check(event)
            self._append(lines, RESERVED, facts)
            return self.budget().reservations[-1]

    def lower(self, max_epsilon: float) -> LedgerHead:
        """Make the promise stricter from now on. It cannot be made looser.

        Raises:
            LedgerError: The new budget is not below the present one.
        """
        with self._disk.lock(self.path):
            lines = self._lines()
            present = _budget(lines).header.max_epsilon
            if not 0 < max_epsilon < present:
                raise LedgerError(f"{self.path}: the budget is {present:g} and can only be lowered")
            return self._append(lines, LOWERED, {"max_epsilon": max_epsilon})

    def check_header(self, header: Header) -> None:
        """The site's settings must say what the ledger says.

        Raises:
            LedgerError: They do not; names the difference and the remedy.
        """
        found, wanted = asdict(self.budget().header), asdict(header)
        for name, value in wanted.items():
            if found[name] != value:
                raise LedgerError(
                    f"{self.path}: the ledger was made with {name} = {found[name]}, the site's settings say {value}; "
                    "set it back, or to lower a budget run: silotune-client ledger lower"
                )

    def check_mirror(self, counter: int, sha256: str = "") -> None:
        """The ledger must hold the line that was seen elsewhere, such as in the audit log.

        Raises:
            LedgerError: It was cut, or an older copy of it was restored.
        """
        lines = self._lines()
        if counter >= len(lines) or (counter >= 0 and sha256 not in ("", lines[counter].head.sha256)):
            raise LedgerError(
                f"{self.path}: line {counter}, which the audit log knows, is not in this ledger (its last is "
                f"{len(lines) - 1}): it was cut or an older copy was restored; {sealed.LOST}"
            )

    def _append(self, lines: Sequence[LedgerLine], kind: str, facts: dict[str, object]) -> LedgerHead:
        """One more line, under the caller's lock."""
        self._head = sealed.append(self.path, lines, kind, facts, key=self._key, disk=self._disk)
        return self._head

    def _lines(self) -> list[LedgerLine]:
        """The file as it is now, which must continue what this object has seen."""
        lines = sealed.read(self.path, key=self._key, disk=self._disk)
        seen = self._head.counter
        if seen >= len(lines) or (seen >= 0 and lines[seen].head != self._head):
            raise LedgerError(f"{self.path}: the ledger was replaced by an older copy; {sealed.LOST}")
        self._head = lines[-1].head
        return lines


def create(
    path: Path, *, key: bytes, header: Header, disk: Disk = DISK, marks: Mapping[str, Sequence[str]] | None = None
) -> Ledger:
    """Begin a ledger, with nothing spent.

    Args:
        path: Its file, mode 0600; the name is part of what is authenticated.
        key: 32 bytes, as `derive_key` gives them.
        marks: By which the data set is known under another name (`client.memory.site_ledger`).

    Raises:
        LedgerError: There is one already.
        StorageError: It cannot be written.
    """
    sealed.create(path, CREATED, {**asdict(header), MARKS: dict(marks or {})}, key=key, disk=disk)
    return Ledger(path, key=key, disk=disk)


def open_ledger(
    path: Path,
    *,
    key: bytes,
    header: Header,
    expected_counter: int = -1,
    expected_sha256: str = "",
    disk: Disk = DISK,
) -> Ledger:
    """Open a ledger that was begun before.

    Args:
        header: What the site's settings promise now.
        expected_counter: Of the last line that the audit log knows; -1 if it knows none.
        expected_sha256: Of that line.

    Raises:
        LedgerError: It is missing, tampered with, cut, an older copy, or the settings promise something else.
    """
    found = Ledger(path, key=key, disk=disk)
    found.check_mirror(expected_counter, expected_sha256)
    found.check_header(header)
    return found


def _budget(lines: Sequence[LedgerLine]) -> Budget:
    """The first line, with what was lowered since, and the charges."""
    lowered = [line.facts for line in lines if line.kind == LOWERED]
    begun = {name: value for name, value in lines[0].facts.items() if name != MARKS}
    header = Header(**{**begun, **(lowered[-1] if lowered else {})})
    charges = []
    for line in lines:
        if line.kind == RESERVED:
            facts = line.facts
            event = DpEvent(facts["sampling_prob"], facts["noise_multiplier"], facts["num_steps"])
            rest = {name: facts[name] for name in ("purpose", "released") if name in facts}
            charges.append(Reservation(facts["run"], facts["round_index"], event, line.head, line.time, **rest))
    return Budget(header, charges)
