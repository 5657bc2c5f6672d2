"""A disk in memory that forgets: what was not fsynced may or may not be there after a crash."""

import itertools
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from client.ledger import ledger
from client.ledger.budget import Header
from client.ledger.sealed import Disk
from common.accounting import DpEvent

KEY = bytes(range(32))
PATH = Path("/site/notes.ledger")
RUN = "ab" * 32
ROUND = DpEvent(0.0256, 0.9, 40)
HEADER = Header(dataset="notes", unit="patient_id", max_epsilon=8.0, dp_delta=1e-6)
ROUNDS_THAT_FIT = 30


class Crash(BaseException):
    """The machine stops."""


@dataclass
class Inode:
    """One file: what programs see, and what the platter holds."""

    now: bytes = b""
    durable: bytes = b""


@dataclass
class ForgetfulDisk:
    """Files of one folder. After a crash a rename may have left both names: worse than any journal allows.

    Attributes:
        rng: Decides what a crash leaves.
        crash_after: System calls until the crash; None for never.
        is_lying: fsync says that it did and does not.
        names: Name to file as programs see it.
        durable_names: As the platter has it.
    """

    rng: random.Random
    crash_after: int | None = None
    is_lying: bool = False
    names: dict[Path, Inode] = field(default_factory=dict)
    durable_names: dict[Path, Inode] = field(default_factory=dict)
    pending: list[tuple[Path, Inode | None]] = field(default_factory=list)
    opened: dict[int, Inode | None] = field(default_factory=dict)
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(3))

    def disk(self) -> Disk:
        """The calls of a ledger."""
        return Disk(
            self.open,
            self.write,
            self.fsync,
            self.close,
            self.replace,
            self.remove,
            self.read,
            lambda path: nullcontext(),
        )

    def _call(self) -> None:
        """One more system call, or the crash before it."""
        if self.crash_after is not None:
            if self.crash_after == 0:
                raise Crash
            self.crash_after -= 1

    def open(self, path: Path, flags: int, mode: int) -> int:
        self._call()
        number = next(self.numbers)
        if flags & os.O_DIRECTORY:
            self.opened[number] = None
            return number
        assert path not in self.names
        self.names[path] = Inode()
        self.pending.append((path, self.names[path]))
        self.opened[number] = self.names[path]
        return number

    def write(self, number: int, data: bytes) -> int:
        self._call()
        count = self.rng.randint(1, len(data))  # short writes are allowed to happen
        self.opened[number].now += data[:count]
        return count

    def fsync(self, number: int) -> None:
        self._call()
        inode = self.opened[number]
        if self.is_lying:
            return
        if inode is None:
            self.durable_names, self.pending = dict(self.names), []
        else:
            inode.durable = inode.now

    def close(self, number: int) -> None:
        self.opened.pop(number)  # a process that dies closes its files too, so this is no boundary

    def replace(self, old: Path, new: Path) -> None:
        self._call()
        inode = self.names.pop(old)
        self.names[new] = inode
        self.pending += [(new, inode), (old, None)]

    def remove(self, path: Path) -> None:
        self._call()
        if path not in self.names:
            raise FileNotFoundError(path)
        del self.names[path]
        self.pending.append((path, None))

    def read(self, path: Path) -> bytes:
        if path not in self.names:
            raise FileNotFoundError(path)
        return self.names[path].now

    def reboot(self) -> None:
        """Lose what the platter need not have: any part of the data and of the names since the last fsync."""
        names = dict(self.durable_names)
        for path, inode in self.pending:
            if self.rng.random() < 0.5:
                names.pop(path, None) if inode is None else names.update({path: inode})
        for inode in {id(inode): inode for inode in [*names.values(), *self.names.values()]}.values():
            inode.now = inode.durable = self._left(inode)
        self.names, self.durable_names, self.pending, self.opened = dict(names), names, [], {}
        self.crash_after = None

    def _left(self, inode: Inode) -> bytes:
        """The old content, the new one, part of the new one, or its length in zeros."""
        if inode.now == inode.durable:
            return inode.now
        part = inode.now[: self.rng.randint(0, len(inode.now))]
        return self.rng.choice([inode.durable, inode.now, part, bytes(len(part))])


@dataclass
class Account:
    """What the ledger's user knows, wherever the ledger crashed: promises that must hold for ever.

    Attributes:
        num_paid: Reservations that returned.
        num_tried: Reservations that began.
        mirror: Head after the last that returned.
    """

    num_paid: int = 0
    num_tried: int = 0
    mirror: tuple[int, str] = (-1, "")


def reserve(disk: Disk, account: Account, *, count: int) -> None:
    """Open the ledger and pay for rounds until done or crashed."""
    found = ledger.open_ledger(
        PATH,
        key=KEY,
        header=HEADER,
        expected_counter=account.mirror[0],
        expected_sha256=account.mirror[1],
        disk=disk,
    )
    for _ in range(count):
        account.num_tried += 1
        paid = found.reserve(RUN, account.num_tried, ROUND)
        account.num_paid += 1
        account.mirror = paid.head


def check(disk: Disk, account: Account) -> None:
    """All that was paid is there; nothing is there that was never tried; it is in order."""
    found = ledger.open_ledger(
        PATH,
        key=KEY,
        header=HEADER,
        expected_counter=account.mirror[0],
        expected_sha256=account.mirror[1],
        disk=disk,
    )
    charged = [one.round_index for one in found.budget().reservations]
    assert account.num_paid <= len(charged) <= account.num_tried
    assert charged == sorted(charged)
    account.mirror = found.head()
    account.num_paid = len(charged)
