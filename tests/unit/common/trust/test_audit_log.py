"""What is written into an audit log cannot be changed, moved or removed unnoticed."""

import hashlib
import json
import os
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuditError, StorageError
from common.trust import audit_log, identity
from common.trust.audit_log import GENESIS, AuditLog, Head

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))


PUBLIC = identity.public_hex(KEY)


def open_log(path, **options) -> AuditLog:
    return AuditLog(path, key=KEY, clock=lambda: 1_700_000_000.0, **options)


@pytest.fixture
def path(tmp_path):
    """A log of six entries."""
    log = open_log(tmp_path / "audit.jsonl")
    for number in range(6):
        log.append("left", run="ab" * 32, round_index=number, num_bytes=7 * number)
    return log.path


def lines(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refused(path, *, heads=()) -> str:
    with pytest.raises(AuditError) as caught:
        audit_log.verify(path, PUBLIC, heads=heads)
    return str(caught.value)


def test_a_whole_log_is_right_and_its_head_is_the_last_line(path):
    head = audit_log.verify(path, PUBLIC)
    assert head == open_log(path).head
    assert head.sequence == 5
    assert [entry.facts["round_index"] for entry in audit_log.read(path, PUBLIC)] == list(range(6))


def test_a_log_goes_on_where_it_ended(path):
    open_log(path).append("approved", run="ab" * 32)
    assert audit_log.verify(path, PUBLIC).sequence == 6


def test_the_file_is_for_this_user_alone(path):
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_single_flipped_bit_is_found(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = open_log(path)
    for number in range(2):
        log.append("left", round_index=number)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        refused(path)
    path.write_bytes(good)
    assert audit_log.verify(path, PUBLIC).sequence == 1


def test_the_changed_line_is_named(path):
    path.write_bytes(path.read_bytes().replace(b'"num_bytes":21', b'"num_bytes":22'))
    assert "entry 3 was changed" in refused(path)


@pytest.mark.parametrize("number", range(5))
def test_a_removed_line_is_found(path, number):
    kept = lines(path)
    del kept[number]
    path.write_bytes(b"".join(kept))
    assert f"entry {number} " in refused(path)


def test_moved_and_doubled_lines_are_found(path):
    good = lines(path)
    for order in ([1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5]):
        path.write_bytes(b"".join(good[number] for number in order))
        assert "does not follow" in refused(path)


def test_a_cut_tail_is_found_by_a_head_that_is_known_elsewhere(path):
    heads = [entry.head for entry in audit_log.read(path, PUBLIC)]
    for num_kept in range(6):
        path.write_bytes(b"".join(lines(path)[:num_kept]))
        assert "tail was cut" in refused(path, heads=[heads[num_kept]])
        audit_log.verify(path, PUBLIC, heads=heads[:num_kept])  # control: heads of what is there
        path.write_bytes(b"".join(lines(path)))
        for number in range(num_kept, 6):
            open_log(path).append("left", run="ab" * 32, round_index=number, num_bytes=7 * number)


def test_a_log_that_was_written_anew_is_found_by_an_old_head(path, tmp_path):
    other = open_log(tmp_path / "anew.jsonl")
    for number in range(9):
        other.append("left", round_index=number)
    audit_log.verify(other.path, PUBLIC)
    assert "is another one in it" in refused(other.path, heads=[audit_log.verify(path, PUBLIC)])


def test_a_log_of_another_key_is_refused(path):
    with pytest.raises(AuditError, match="signature"):
        audit_log.verify(path, identity.public_hex(OTHER))


def test_a_line_without_end_is_refused(path):
    path.write_bytes(path.read_bytes()[:-1])
    assert "no end" in refused(path)


def test_a_line_that_a_crash_cut_is_dropped_and_told(path):
    good = path.read_bytes()
    for _ in range(20):
        path.write_bytes(good + lines(path)[5][: random.Random(3).randrange(1, 90)])
        log = open_log(path)
        last = list(audit_log.read(path, PUBLIC))[-1]
        assert (last.kind, log.head) == ("recovered", last.head)
        path.write_bytes(good)


def test_two_processes_write_one_chain(path):
    seen = []
    first, second = open_log(path, on_entry=seen.append), open_log(path)
    for number in range(4):
        (first, second)[number % 2].append("approved", run=str(number))
    first.refresh()
    assert [entry.facts["run"] for entry in seen[6:]] == ["0", "1", "2", "3"]
    assert audit_log.verify(path, PUBLIC).sequence == 9


def test_a_log_that_was_shortened_or_rewritten_under_the_agent_takes_no_more(path):
    log = open_log(path)
    path.write_bytes(b"".join(lines(path)[:3]))
    with pytest.raises(AuditError, match="shorter"):
        log.append("left")
    assert len(lines(path)) == 3


def test_a_log_that_is_not_whole_cannot_be_opened(path):
    path.write_bytes(b"".join(lines(path)[1:]))
    with pytest.raises(AuditError):
        open_log(path)


def test_nothing_goes_on_if_the_log_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        open_log(tmp_path / "file" / "audit.jsonl")


def test_an_entry_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    log = open_log(path)
    log.append("approved", run="ab" * 32)
    assert synced == [path.read_bytes()]


def test_an_entry_on_a_full_disk_leaves_the_log_as_it_was(path, monkeypatch):
    log, before = open_log(path), path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        log.append("left")
    assert path.read_bytes() == before


def test_links_lead_from_any_head_to_any_later_one_and_nowhere_else(path):
    log, heads = open_log(path), [entry.head for entry in audit_log.read(path, PUBLIC)]
    assert log.links == [hashlib.sha256(line[:-1]).hexdigest() for line in lines(path)]
    for start, end in ((-1, 5), (0, 5), (2, 4), (3, 3)):
        before = heads[start].sha256 if start >= 0 else GENESIS
        between = log.links[start + 1 : end + 1]
        assert audit_log.follow(before, between) == heads[end].sha256
        assert audit_log.follow(before, [*between, "00" * 32]) != heads[end].sha256
        assert audit_log.follow("00" * 31 + "01", between) != heads[end].sha256


def test_only_the_last_links_are_held(path, monkeypatch):
    monkeypatch.setattr(audit_log, "MAX_LINKS", 4)
    assert open_log(path).links == [hashlib.sha256(line[:-1]).hexdigest() for line in lines(path)[-4:]]


def test_an_empty_log_has_the_empty_head(tmp_path):
    (tmp_path / "audit.jsonl").write_bytes(b"")
    assert audit_log.verify(tmp_path / "audit.jsonl", PUBLIC) == Head()


def test_facts_stay_json(path):
    assert json.loads(lines(path)[2])["facts"] == {"run": "ab" * 32, "round_index": 2, "num_bytes": 14}
