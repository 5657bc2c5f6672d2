"""The ledger refuses at the right round, and finds every change."""

import contextlib
import json
import math
import multiprocessing
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger import ledger, sealed
from client.ledger.budget import Budget
from client.ledger.sealed import Disk
from client.memory import site_ledger
from common.accounting import DpEvent
from common.data.rows import Message
from common.errors import AccountingUnsupported, BudgetExhausted, LedgerError, PrivacyError
from tests.samples import ledgers, vault
from tests.samples.ledgers import HEADER, KEY, ROUND, RUN


@pytest.fixture
def path(tmp_path):
    """A ledger with two rounds."""
    made = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER)
    for round_index in range(2):
        made.reserve(RUN, round_index, ROUND)
    return made.path


def opened(path, **changes):
    """Open it; `changes` are of what the site expects."""
    return ledger.open_ledger(path, **{"key": KEY, "header": HEADER, **changes})


# What fits


def test_thirty_rounds_are_paid_and_the_next_is_refused(tmp_path):
    made = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER)
    made.budget().check_plan(ROUND, 30)
    with pytest.raises(BudgetExhausted, match=r"0\.000 of 8 is spent.* 8\.057; 30 of the 31 rounds would fit"):
        made.budget().check_plan(ROUND, 31)
    for round_index in range(30):
        made.reserve(RUN, round_index, ROUND)
    assert made.budget().spent() == pytest.approx(7.924, abs=1e-3)
    assert made.budget().remaining == pytest.approx(0.076, abs=1e-3)
    before = made.head()
    with pytest.raises(BudgetExhausted, match=r"7\.924 of 8 is spent, 0\.076 remains, .* 8\.057; 0 more such rounds"):
        made.reserve(RUN, 30, ROUND)
    assert made.head() == before
    fitting = made.budget().rounds_left(DpEvent(0.0256, 0.9, 1))
    made.reserve(RUN, 30, DpEvent(0.0256, 0.9, fitting))
    with pytest.raises(BudgetExhausted):
        made.reserve(RUN, 31, DpEvent(0.0256, 0.9, 1))


def test_a_round_reserved_again_is_charged_again(path):
    found = opened(path)
    before = found.budget().spent()
    assert found.budget().cost_of(ROUND) > 0
    found.reserve(RUN, 1, ROUND)
    assert found.budget().spent() > before
    assert len(found.budget().reservations) == 3


def test_cost_of_a_round_is_what_it_then_costs_and_falls(path):
    found = opened(path)
    foreseen, before = found.budget().cost_of(ROUND), found.budget().spent()
    found.reserve(RUN, 2, ROUND)
    assert found.budget().spent() - before == pytest.approx(foreseen, abs=1e-12)
    assert found.budget().cost_of(ROUND) < foreseen


def test_runs_share_the_budget_and_cost_less_together_than_apart(path):
    found = opened(path)
    found.reserve("cd" * 32, 0, DpEvent(0.01, 1.2, 100))
    runs = found.budget().per_run()
    assert [(run.run_sha256, run.num_reservations, run.num_steps) for run in runs] == [
        (RUN, 2, 80),
        ("cd" * 32, 1, 100),
    ]
    assert max(run.epsilon for run in runs) < found.budget().spent() < sum(run.epsilon for run in runs)


@pytest.mark.parametrize(
    ("event", "refusal"),
    [(DpEvent(1.0, 0.01, 1), AccountingUnsupported), (DpEvent(1.0, 0.5, 10), BudgetExhausted)],
)
def test_a_round_that_protects_nobody_writes_nothing(path, event, refusal):
    found = opened(path)
    before = found.head()
    with pytest.raises(refusal):
        found.reserve(RUN, 2, event)
    assert found.head() == before


def test_an_epsilon_that_is_no_number_is_refused():
    budget = Budget(HEADER, [])
    budget.check(ROUND)
    object.__setattr__(HEADER_OF_NAN := replace(HEADER), "max_epsilon", math.nan)
    with pytest.raises(BudgetExhausted):
        Budget(HEADER_OF_NAN, []).check(ROUND)
    with pytest.raises(BudgetExhausted):
        Budget(HEADER_OF_NAN, []).check_plan(ROUND, 1)


@pytest.mark.parametrize(
    "changes",
    [{"max_epsilon": 0.0}, {"max_epsilon": math.inf}, {"max_epsilon": math.nan}, {"dp_delta": 0.0}, {"dp_delta": 2e-5}],
)
def test_promises_that_promise_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        replace(HEADER, **changes)


# What was changed


def test_every_flipped_byte_is_found(path):
    data = bytearray(path.read_bytes())
    opened(path)
    for place in range(len(data)):
        flip = 1 << place % 8
        data[place] ^= flip
        path.write_bytes(data)
        with pytest.raises(LedgerError):
            opened(path)
        data[place] ^= flip
    path.write_bytes(data)
    opened(path)


def test_every_byte_cut_or_added_is_found_with_the_mirror(path):
    data, mirror = path.read_bytes(), opened(path).head()
    known = {"expected_counter": mirror.counter, "expected_sha256": mirror.sha256}
    opened(path, **known)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(LedgerError):
            opened(path, **known)
    for more in (b"\n", b"0", b"00\n", data[:10], data):
        path.write_bytes(data + more)
        with pytest.raises(LedgerError):
            opened(path, **known)


def test_lines_cannot_be_moved_removed_or_repeated(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for order in ([0, 2, 1], [1, 2], [0, 2], [0, 1, 1], [2, 0, 1]):
        path.write_bytes(b"".join(lines[place] for place in order))
        with pytest.raises(LedgerError):
            opened(path)


def test_lines_of_two_copies_cannot_be_put_together(path):
    """Each line is genuine and in its place, and the dear round of the one copy is gone."""
    backup = path.read_bytes()
    opened(path).reserve(RUN, 2, ROUND)
    path.write_bytes(backup)
    other = opened(path)
    other.reserve("cd" * 32, 0, DpEvent(0.01, 2.0, 1))
    other.reserve(RUN, 3, ROUND)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(backup)
    opened(path).reserve("cd" * 32, 1, DpEvent(0.01, 2.0, 1))
    path.write_bytes(path.read_bytes() + lines[-1])
    with pytest.raises(LedgerError, match="line 4 does not follow the line before it"):
        opened(path)


def test_a_cut_tail_is_whole_in_itself_and_only_the_mirror_finds_it(path):
    mirror = opened(path).head()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert len(opened(path).budget().reservations) == 1  # the control: the file alone cannot tell
    with pytest.raises(LedgerError, match=r"line 2, which the audit log knows.* older copy was restored"):
        opened(path, expected_counter=mirror.counter)


def test_a_restored_copy_that_was_written_on_is_found_by_its_hash(path):
    backup, mirror = path.read_bytes(), opened(path).reserve(RUN, 2, ROUND).head
    path.write_bytes(backup)
    opened(path).reserve("cd" * 32, 0, DpEvent(0.01, 2.0, 1))
    opened(path, expected_counter=mirror.counter)  # the control: as long as the lost one
    with pytest.raises(LedgerError, match="older copy was restored"):
        opened(path, expected_counter=mirror.counter, expected_sha256=mirror.sha256)


def test_a_ledger_that_goes_back_under_its_user_is_found(path):
    found, backup = opened(path), path.read_bytes()
    found.reserve(RUN, 2, ROUND)
    path.write_bytes(backup)
    with pytest.raises(LedgerError, match="replaced by an older copy"):
        found.reserve(RUN, 3, ROUND)


def test_a_ledger_ahead_of_the_audit_log_is_taken(path):
    assert opened(path, expected_counter=1).head().counter == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_epsilon": 16.0}, "max_epsilon = 8.0, the site's settings say 16.0"),
        ({"max_epsilon": 4.0}, "ledger lower"),
        ({"dp_delta": 1e-5}, "dp_delta"),
        ({"unit": "row"}, "unit = patient_id"),
        ({"dataset": "letters"}, "dataset"),
        ({"adjacency": "one unit replaced"}, "adjacency"),
    ],
)
def test_settings_that_promise_something_else_are_refused(path, changes, told):
    with pytest.raises(LedgerError, match=told):
        opened(path, header=replace(HEADER, **changes))


def test_a_budget_is_lowered_by_name_and_never_raised(path):
    found = opened(path)
    for wrong in (8.0, 9.0, 0.0, -1.0, math.nan):
        with pytest.raises(LedgerError, match="can only be lowered"):
            found.lower(wrong)
    found.lower(3.0)
    assert opened(path, header=replace(HEADER, max_epsilon=3.0)).budget().remaining < 3.0
    with pytest.raises(LedgerError, match="max_epsilon"):
        opened(path)
    found.lower(1.0)
    with pytest.raises(BudgetExhausted, match="of 1 is spent"):
        found.reserve(RUN, 2, ROUND)


@pytest.mark.parametrize("key", [bytes(32), KEY[::-1]])
def test_another_key_reads_nothing(path, key):
    with pytest.raises(LedgerError, match="line 0"):
        opened(path, key=key)


def test_a_ledger_under_another_name_is_another_ledger(path):
    moved = path.rename(path.with_name("letters.ledger"))
    with pytest.raises(LedgerError, match="line 0"):
        opened(moved)


def test_a_missing_and_an_empty_ledger_are_a_spent_budget(path):
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="a lost ledger is a spent budget"):
        opened(path)
    path.unlink()
    with pytest.raises(LedgerError, match="a lost ledger is a spent budget") as caught:
        opened(path)
    assert isinstance(caught.value, PrivacyError)


def test_a_ledger_is_not_begun_twice(path):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="there is a ledger already"):
        ledger.create(path, key=KEY, header=HEADER)
    assert path.read_bytes() == before


def test_the_file_is_private_and_tells_nothing(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = path.read_bytes()
    for text in (b"patient", b"notes", RUN.encode()):
        for form in (text, text.hex().encode()):
            assert form not in data
    lines = sealed.read(path, key=KEY, disk=Disk())
    assert "patient_id" in json.dumps(lines[0].facts)  # the control: it is what the file holds


def test_the_site_key_gives_one_ledger_key():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    one, other = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
    assert sealed.derive_key(one) == sealed.derive_key(one) != sealed.derive_key(other)
    assert len(sealed.derive_key(one)) == 32


# Who else writes


def _reserve_many(path: Path, count: int) -> None:
    found = opened(path)
    for round_index in range(count):
        with contextlib.suppress(BudgetExhausted):
            found.reserve(RUN, round_index, ROUND)


def test_two_processes_share_one_budget(tmp_path):
    path = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER).path
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_reserve_many, args=(path, 17)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = opened(path)
    assert len(found.budget().reservations) == ledgers.ROUNDS_THAT_FIT
    assert found.budget().spent() <= 8.0


def test_without_the_lock_two_writers_lose_a_charge(tmp_path):
    """The control of the test above: two that read before either writes."""
    path = ledger.create(tmp_path / "notes.ledger", key=KEY, header=HEADER).path
    lines = sealed.read(path, key=KEY, disk=Disk())
    before = path.read_bytes()
    held = Disk(read=lambda place: before)
    for disk in (Disk(), held):
        sealed.append(path, lines, ledger.RESERVED, {}, key=KEY, disk=disk)
    assert len(sealed.read(path, key=KEY, disk=Disk())) == 2


def test_one_data_set_has_one_budget_whatever_it_is_called(tmp_path):
    """Renamed in the policy, under another unit column or as a part of it; other people's rows are another one."""
    from client.memory.history import History
    from client.policy import file as policy_file
    from common.run import config
    from common.trust.audit_log import AuditLog
    from tests import tiny

    key, base = vault.SITE, "ab" * 32

    def create(name: str, rows, *, unit: str = "patient_id"):
        text = vault.policy_text(base).replace("[data.datasets.notes]", f"[data.datasets.{name}]")
        history = History()
        log = AuditLog(tmp_path / "audit.jsonl", key=key, on_entry=history.take, clock=lambda: vault.NOW)
        own = {"path": "rows.jsonl", "unit_column": unit}
        agent = {"log_folder": str(tmp_path), "policy": "p", "policy_signer": base, "identity_key": "k"}
        node = config.NodeConfig.model_validate({"site": {"name": "north"}, "data": own, "agent": agent})
        rules = policy_file.parse(text, name="policy.toml")
        units = len({row.unit for row in rows})
        return site_ledger.create(node, rules=rules, key=key, history=history, log=log, num_units=units, rows=rows)

    rows = [
        replace(tiny.row(n), messages=(Message("user", f"note {n}"), Message("assistant", "A"))) for n in range(400)
    ]
    made = create("notes", rows)
    others = [replace(row, unit=f"south-{n}", messages=(Message("user", f"other {n}"),)) for n, row in enumerate(rows)]
    for name, found, unit in (
        ("renamed", rows, "patient_id"),
        ("renamed", [replace(row, unit=f"row {n}") for n, row in enumerate(rows)], ""),
        ("part", rows[:40], "patient_id"),
        ("more", [*rows[:100], *others], "patient_id"),
        (
            "retold",
            [replace(row, messages=(Message("user", f"told anew {n}"),)) for n, row in enumerate(rows)],
            "patient_id",
        ),
    ):
        with pytest.raises(LedgerError, match=r"notes\.patient_id\.ledger, and what it says was spent stays spent"):
            create(name, found, unit=unit)
    assert create("others", others).budget().spent() == 0.0  # the control: these are other people
    assert b"north-1" not in made.path.read_bytes()
    made.path.unlink()
    with pytest.raises(LedgerError, match=r"notes\.patient_id\.ledger: the audit log knows"):
        create(
            "third",
            [replace(row, unit=f"west-{n}", messages=(Message("user", f"w {n}"),)) for n, row in enumerate(rows)],
        )
