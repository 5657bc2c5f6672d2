"""A log of a hundred entries, changed in every way that leaves a file: all of it is found, and a whole log is not."""

import io

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuditError
from common.trust import audit_log, identity
from common.trust.audit_log import AuditLog, Head

KEY = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
PUBLIC = identity.public_hex(KEY)
NUM_ENTRIES = 100
KINDS = ("offered", "approved", "opened", "left", "refused")
SAMPLED = 1009  # bits; every 1009th in the gate, every one in the slow test


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """Entries of every kind that a site writes."""
    clock = iter(range(1_700_000_000, 1_700_001_000))
    log = AuditLog(tmp_path_factory.mktemp("log") / "audit.jsonl", key=KEY, clock=lambda: float(next(clock)))
    for number in range(NUM_ENTRIES):
        log.append(KINDS[number % 5], run="ab" * 32, round_index=number, num_bytes=7 * number, rule="rounds")
    return log.path.read_bytes()


@pytest.fixture(scope="module")
def lines(whole) -> list[bytes]:
    return whole.splitlines(keepends=True)


@pytest.fixture(scope="module")
def heads(lines, tmp_path_factory) -> list[Head]:
    """The head after each entry."""
    path = tmp_path_factory.mktemp("heads") / "audit.jsonl"
    path.write_bytes(b"".join(lines))
    return [entry.head for entry in audit_log.read(path, PUBLIC)]


@pytest.fixture
def path(whole, tmp_path):
    (tmp_path / "audit.jsonl").write_bytes(whole)
    return tmp_path / "audit.jsonl"


def is_found(path, data: bytes, *, heads=()) -> bool:
    path.write_bytes(data)
    try:
        audit_log.verify(path, PUBLIC, heads=heads)
    except AuditError:
        return True
    return False


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_control_the_untouched_log_is_whole(path, whole, heads):
    assert not is_found(path, whole, heads=heads)
    assert audit_log.verify(path, PUBLIC) == heads[-1]
    assert len(heads) == NUM_ENTRIES


def test_flipped_bits_all_over_the_log_are_found(path, whole):
    assert all(is_found(path, flipped(whole, bit)) for bit in range(0, 8 * len(whole), SAMPLED))


@pytest.mark.slow
def test_every_flipped_bit_is_found(whole, lines, heads):
    """From the changed line on, as `audit.read` goes; the lines before are those of the untouched log."""
    num_found = start = 0
    for number, line in enumerate(lines):
        previous = heads[number - 1] if number else Head()
        after = b"".join(lines[number + 1 : number + 3])
        for bit in range(8 * len(line)):
            num_found += _is_found_from(flipped(line, bit) + after, previous)
        start += len(line)
    assert (num_found, start) == (8 * len(whole), len(whole))


def _is_found_from(data: bytes, head: Head) -> bool:
    try:
        for line in audit_log._whole_lines(io.BytesIO(data)):
            head = audit_log._read_line(line, head, PUBLIC).head
    except AuditError:
        return True
    return False


def test_any_removed_entry_is_found(path, lines, heads):
    for number in range(NUM_ENTRIES):
        known = heads[-1:] if number == NUM_ENTRIES - 1 else ()  # the last one alone needs a head
        assert is_found(path, b"".join(lines[:number] + lines[number + 1 :]), heads=known)


def test_any_two_neighbours_in_the_other_order_are_found(path, lines):
    for number in range(NUM_ENTRIES - 1):
        moved = [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
        assert is_found(path, b"".join(moved))


def test_any_entry_moved_to_the_end_or_doubled_is_found(path, lines):
    for number in range(NUM_ENTRIES - 1):
        assert is_found(path, b"".join([*lines[:number], *lines[number + 1 :], lines[number]]))
        assert is_found(path, b"".join([*lines[: number + 1], *lines[number:]]))


def test_any_cut_tail_is_found_by_a_head_that_others_keep_and_by_nothing_else(path, lines, heads):
    for num_kept in range(NUM_ENTRIES):
        cut = b"".join(lines[:num_kept])
        assert is_found(path, cut, heads=heads[-1:])
        assert not is_found(path, cut)  # control: alone it looks whole


def test_a_cut_within_a_line_is_found(path, whole, lines):
    for num_cut in range(1, len(lines[-1]), 29):
        assert is_found(path, whole[:-num_cut])


def test_an_older_copy_that_was_gone_on_with_is_found_by_a_head_that_others_keep(path, lines, heads):
    for num_kept in range(0, NUM_ENTRIES, 9):
        path.write_bytes(b"".join(lines[:num_kept]))
        log = AuditLog(path, key=KEY)
        for number in range(num_kept, NUM_ENTRIES + 3):
            log.append("left", round_index=number)
        data = path.read_bytes()
        assert is_found(path, data, heads=[heads[num_kept]])
        assert is_found(path, data, heads=heads[-1:])
        assert not is_found(path, data, heads=heads[:num_kept])  # control: heads of what is there


def test_entries_signed_by_another_key_are_found(path, lines, tmp_path):
    other = AuditLog(tmp_path / "other.jsonl", key=Ed25519PrivateKey.from_private_bytes(bytes([2]) * 32))
    for number in range(NUM_ENTRIES):
        other.append("left", round_index=number)
    theirs = other.path.read_bytes().splitlines(keepends=True)
    for number in (0, 50, NUM_ENTRIES):
        assert is_found(path, b"".join([*lines[:number], *theirs[number : number + 1]])) == (number < NUM_ENTRIES)
