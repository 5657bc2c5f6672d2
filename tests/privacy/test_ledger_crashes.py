"""A ledger that is stopped at any place never forgets a charge.

Most stops are of a disk in memory (`tests/samples/ledgers.py`), which may lose whatever was not fsynced; a few are
real.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.ledger import ledger
from client.ledger.sealed import Disk
from common.errors import LedgerError, StorageError
from tests.samples import ledgers
from tests.samples.ledgers import HEADER, KEY, PATH, ROUND, RUN, Account, Crash, ForgetfulDisk

ROOT = Path(__file__).parents[2]
NUM_CRASHES = 10_000


def _live(rng: random.Random, *, is_lying: bool = False, num_crashes: int) -> int:
    """Many lives of one ledger after another, each ended by a crash at some system call; returns the crashes."""
    done = 0
    while done < num_crashes:
        world = ForgetfulDisk(rng)
        ledger.create(PATH, key=KEY, header=HEADER, disk=world.disk())
        account = Account()
        world.is_lying = is_lying
        while account.num_tried < ledgers.ROUNDS_THAT_FIT - 3 and done < num_crashes:
            world.crash_after = rng.randint(0, 24)
            with contextlib.suppress(Crash):
                ledgers.reserve(world.disk(), account, count=3)
            world.reboot()
            done += 1
            ledgers.check(world.disk(), account)
    return done


@pytest.mark.parametrize(
    "num_crashes", [1_000, pytest.param(NUM_CRASHES, marks=pytest.mark.slow)], ids=["1000", "10000"]
)
def test_killed_at_any_system_call_it_never_under_counts(num_crashes):
    assert _live(random.Random(1), num_crashes=num_crashes) == num_crashes


def test_a_disk_that_lies_about_fsync_makes_it_under_count():
    """The control: the crashes do lose what was not fsynced."""
    with pytest.raises((LedgerError, AssertionError)):
        _live(random.Random(1), is_lying=True, num_crashes=200)


@pytest.mark.parametrize("call", range(8))
def test_each_system_call_of_a_reservation_is_a_place_to_stop(call):
    for seed in range(40):
        world, account = ForgetfulDisk(random.Random(seed)), Account()
        ledger.create(PATH, key=KEY, header=HEADER, disk=world.disk())
        ledgers.reserve(world.disk(), account, count=1)
        world.crash_after = call
        with contextlib.suppress(Crash):
            ledgers.reserve(world.disk(), account, count=1)
        world.reboot()
        ledgers.check(world.disk(), account)


@pytest.mark.parametrize("call", range(8))
def test_a_crash_while_it_is_begun_leaves_none_or_an_empty_one(call):
    for seed in range(40):
        world = ForgetfulDisk(random.Random(seed), crash_after=call)
        with contextlib.suppress(Crash):
            ledger.create(PATH, key=KEY, header=HEADER, disk=world.disk())
        world.reboot()
        if PATH in world.names:
            ledgers.check(world.disk(), Account())


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_pays_for_nothing_and_says_so(tmp_path, call):
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    path = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER).path
    before = path.read_bytes()
    broken = ledger.open_ledger(path, key=KEY, header=HEADER, disk=Disk(**{call: fail}))
    with pytest.raises(StorageError, match="No space left"):
        broken.reserve(RUN, 0, ROUND)
    assert path.read_bytes() == before
    assert ledger.open_ledger(path, key=KEY, header=HEADER).reserve(RUN, 0, ROUND).head.counter == 1


WORKER = """
import sys
from client.ledger import ledger
from tests.samples.ledgers import HEADER, KEY, RUN
from common.accounting import DpEvent
found = ledger.open_ledger(__import__("pathlib").Path(sys.argv[1]), key=KEY, header=HEADER)
number = len(found.budget().reservations)
while True:
    found.reserve(RUN, number, DpEvent(0.001, 4.0, 1))
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("num_kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_all_that_it_was_told_is_paid(tmp_path, num_kills):
    path = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER).path
    rng = random.Random(num_kills)
    for _ in range(num_kills):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as worker:
            told = int(worker.stdout.readline())
            time.sleep(rng.random())
            os.kill(worker.pid, signal.SIGKILL)
            told = max([told, *(int(line) for line in worker.stdout if line.endswith("\n"))])
        charged = [one.round_index for one in ledger.open_ledger(path, key=KEY, header=HEADER).budget().reservations]
        assert charged == list(range(len(charged)))
        assert told <= len(charged) <= told + 1
