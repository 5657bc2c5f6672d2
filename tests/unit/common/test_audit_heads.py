"""Heads of others' logs: what contradicts what, what is too much, and what is written."""

import json

import pytest

from common import audit_heads, wire
from common.audit import GENESIS, MAX_LINKS, Head
from common.audit_heads import Heads
from common.errors import AuditError, StorageError, WireError
from common.wire import Frame

FIRST, SECOND = Head(4, "a" * 64, 100.0), Head(9, "b" * 64, 200.0)
SERVER = audit_heads.operator("5e" * 32)


@pytest.fixture
def path(tmp_path):
    """Heads of two sites."""
    heads = Heads(tmp_path / "heads.jsonl")
    for told in ({"north": FIRST, "south": FIRST}, {"north": SECOND}):
        heads.keep(told)
    return heads.path


@pytest.fixture
def heads(path):
    """The same file, opened anew."""
    return Heads(path)


def test_heads_are_kept_by_owner(path, heads):
    assert heads.newest() == {"north": SECOND, "south": FIRST}
    assert heads.of("north") == audit_heads.of(path, "north") == [FIRST, SECOND]
    assert audit_heads.read(path) == {"north": [FIRST, SECOND], "south": [FIRST]}


def test_the_same_head_is_kept_once(path, heads):
    before = path.read_bytes()
    heads.keep({"north": SECOND, "south": FIRST})
    heads.keep({"north": FIRST})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "head",
    [
        Head(9, "c" * 64, 200.0),
        Head(9, "b" * 64, 201.0),
        Head(8, "c" * 64, 201.0),
        Head(8, "c" * 64, 200.0),
        Head(0, GENESIS, 500.0),
    ],
)
def test_a_log_that_went_back_or_was_written_anew_is_noticed(path, heads, head):
    before = path.read_bytes()
    with pytest.raises(AuditError, match="cut or written anew"):
        heads.keep({"north": head, "west": FIRST})
    assert path.read_bytes() == before
    heads.keep({"north": Head(10, "c" * 64, 500.0), "west": FIRST})  # control: it went on


def test_an_older_head_that_comes_late_by_way_of_another_run_is_no_contradiction(heads):
    heads.keep({"north": Head(7, "c" * 64, 150.0)})
    assert heads.newest()["north"] == SECOND
    with pytest.raises(AuditError):
        heads.keep({"north": Head(7, "d" * 64, 150.0)})


def test_two_processes_keep_one_file(path, heads):
    other = Heads(path)
    other.keep({"west": FIRST})
    with pytest.raises(AuditError, match="written anew"):
        heads.keep({"west": Head(4, "c" * 64, 100.0)})
    heads.keep({"west": SECOND})
    assert other.newest()["west"] == SECOND


@pytest.mark.parametrize(
    ("owner", "head"),
    [
        ("west", Head(1, "", 1.0)),
        ("west", Head(1, "A" * 64, 1.0)),
        ("west", Head(1, "x" * 64, 1.0)),
        ("west", Head()),
        ("west", Head(1, "a" * 64, float("nan"))),
        ("west", Head(1, "a" * 64, -1.0)),
        ("West", FIRST),
        ("operator:west", FIRST),
        ("a" * 65, FIRST),
    ],
)
def test_what_is_no_head_is_not_kept(heads, owner, head):
    with pytest.raises(AuditError, match="tells no place, hash and time"):
        heads.keep({owner: head})
    heads.keep({"west": FIRST, SERVER: SECOND})  # control


def test_a_file_that_is_full_takes_no_more_and_says_so(heads, monkeypatch):
    monkeypatch.setattr(audit_heads, "MAX_FILE_BYTES", heads.path.stat().st_size + 10)
    with pytest.raises(AuditError, match="takes no more heads; move it"):
        heads.keep({"west": FIRST})
    assert heads.newest() == {"north": SECOND, "south": FIRST}


def test_heads_that_were_removed_under_a_process_are_noticed(path, heads):
    heads.newest()
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(AuditError, match="removed"):
        heads.keep({"west": FIRST})


def test_a_line_that_a_crash_cut_does_not_count(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    heads = Heads(path)
    assert heads.newest() == {"north": FIRST, "south": FIRST}
    heads.keep({"north": SECOND})
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_file_as_it_was(path, heads, monkeypatch):
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit_heads.os, "fsync", full)
        with pytest.raises(StorageError):
            heads.keep({"west": FIRST})
    assert path.read_bytes() == before
    heads.keep({"west": FIRST})
    assert audit_heads.of(path, "west") == [FIRST]


@pytest.mark.parametrize(
    "change",
    [
        {"owner": None},
        {"sequence": "1"},
        {"sequence": True},
        {"sequence": -1},
        {"sha256": "ab"},
        {"time": "1"},
        {"time": True},
        {"more": 1},
    ],
)
def test_a_file_that_holds_no_heads_is_refused(tmp_path, change):
    good = {"owner": "north", "sequence": 1, "sha256": GENESIS, "time": 1.5}
    (tmp_path / "heads.jsonl").write_text(json.dumps(good) + "\n")
    assert audit_heads.of(tmp_path / "heads.jsonl", "north") == [Head(1, GENESIS, 1.5)]
    (tmp_path / "heads.jsonl").write_text(json.dumps(good | change) + "\n")
    with pytest.raises(AuditError, match="cannot be read"):
        audit_heads.read(tmp_path / "heads.jsonl")


@pytest.mark.parametrize("line", ["x", "[]", "7", '{"owner":"a","owner":"b","sequence":1,"sha256":"ab","time":1}'])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "heads.jsonl").write_text(line + "\n")
    with pytest.raises(AuditError, match="cannot be read"):
        audit_heads.read(tmp_path / "heads.jsonl")


def test_a_file_without_the_owners_heads_is_not_taken_for_proof(path, tmp_path):
    with pytest.raises(AuditError, match=r"no head of the log of 'west', only of north, south"):
        audit_heads.of(path, "west")
    with pytest.raises(AuditError):
        audit_heads.of(tmp_path / "missing.jsonl", "north")


def test_heads_travel_as_they_are():
    told = {"north": FIRST, SERVER: SECOND}
    assert audit_heads.from_list(audit_heads.to_list(told)) == told


def test_the_longest_list_fits_a_frame_and_a_longer_one_is_refused():
    owners = [f"{number:04d}{'a' * 60}" for number in range(audit_heads.MAX_OWNERS - 1)]
    told = dict.fromkeys([*owners, SERVER], Head(2**40, "f" * 64, 1_800_000_000.123))
    links = ["f" * 64] * MAX_LINKS
    data = wire.pack(Frame("train", {"heads": audit_heads.to_list(told), "links": links}))
    assert audit_heads.links_from(wire.unpack(data, max_body_bytes=0).head["links"], sequence=2**40) == links
    assert audit_heads.from_list(wire.unpack(data, max_body_bytes=0).head["heads"]) == told
    with pytest.raises(WireError, match="at most"):
        audit_heads.from_list([*audit_heads.to_list(told), ["west", 1, "f" * 64, 1.0]])


@pytest.mark.parametrize(
    "items",
    [
        {},
        "abcd",
        None,
        ["abcd"],
        [7],
        [[]],
        [["north", 1, "f" * 64]],
        [["north", 1, "f" * 64, 1.0, 1]],
        [["north", 1.0, "f" * 64, 1.0]],
        [["../north", 1, "f" * 64, 1.0]],
        [["north\n", 1, "f" * 64, 1.0]],
        [["north", 2**53 + 1, "f" * 64, 1.0]],
        [["north", 1, "f" * 64, 1.0], ["north", 2, "e" * 64, 2.0]],
    ],
)
def test_what_is_no_list_of_heads_is_refused(items):
    with pytest.raises(WireError):
        audit_heads.from_list(items)
