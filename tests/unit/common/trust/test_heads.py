"""Heads of others' logs: what contradicts what, who signed it, what is too much, and what is written."""

import dataclasses
import json
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import AuditError, StorageError, WireError
from common.frame import wire
from common.frame.wire import Frame
from common.trust import heads as audit_heads
from common.trust import identity
from common.trust.audit_log import GENESIS, MAX_LINKS, Head
from common.trust.heads import Heads, SignedHead

FIRST, SECOND = Head(4, "a" * 64, 100.0), Head(9, "b" * 64, 200.0)
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
PUBLIC = identity.public_hex(KEY)
SERVER = audit_heads.operator(PUBLIC)


def signed(key=KEY, federation="onco-eu", **heads: Head) -> dict[str, SignedHead]:
    """Heads as their owners tell them; `server` is an operator."""
    named = {SERVER if name == "server" else name: head for name, head in heads.items()}
    return {name: audit_heads.sign(head, owner=name, federation=federation, key=key) for name, head in named.items()}


@pytest.fixture
def path(tmp_path):
    """Heads of two sites."""
    heads = Heads(tmp_path / "heads.jsonl", "onco-eu")
    for told in ({"north": FIRST, "south": FIRST}, {"north": SECOND}):
        heads.keep(signed(**told))
    return heads.path


@pytest.fixture
def heads(path):
    """The same file, opened anew."""
    return Heads(path, "onco-eu")


def test_heads_are_kept_by_owner(path, heads):
    assert heads.newest() == signed(north=SECOND, south=FIRST)
    assert heads.of("north") == audit_heads.of(path, "north", signer=PUBLIC) == [FIRST, SECOND]
    assert [one.head for one in audit_heads.read(path)["north"]] == [FIRST, SECOND]


def test_the_same_head_is_kept_once(path, heads):
    before = path.read_bytes()
    heads.keep(signed(north=SECOND, south=FIRST))
    heads.keep(signed(north=FIRST))
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
        heads.keep(signed(north=head, west=FIRST))
    assert path.read_bytes() == before
    heads.keep(signed(north=Head(10, "c" * 64, 500.0), west=FIRST))  # control: it went on


def test_an_older_head_that_comes_late_by_way_of_another_run_is_no_contradiction(heads):
    heads.keep(signed(north=Head(7, "c" * 64, 150.0)))
    assert heads.newest()["north"].head == SECOND
    with pytest.raises(AuditError):
        heads.keep(signed(north=Head(7, "d" * 64, 150.0)))


def test_two_processes_keep_one_file(path, heads):
    other = Heads(path, "onco-eu")
    other.keep(signed(west=FIRST))
    with pytest.raises(AuditError, match="written anew"):
        heads.keep(signed(west=Head(4, "c" * 64, 100.0)))
    heads.keep(signed(west=SECOND))
    assert other.newest()["west"].head == SECOND


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
    told = dataclasses.replace(signed(west=FIRST)["west"], head=head)
    with pytest.raises(AuditError, match="tells no signed place"):
        heads.keep({owner: told})
    heads.keep(signed(west=FIRST, server=SECOND))  # control


FALSE = {
    "another head": {"head": Head(5, "c" * 64, 300.0)},
    "another time": {"head": dataclasses.replace(FIRST, time=101.0)},
    "another's signature": {"signature": signed(OTHER, west=FIRST)["west"].signature},
    "another owner's head": {"signature": signed(north=FIRST)["north"].signature},
    "another federation's head": {"signature": signed(KEY, "onco-us", west=FIRST)["west"].signature},
    "a line's signature": {"signature": identity.sign(KEY, b"west", purpose="audit")},
    "another's key": {"signer": identity.public_hex(OTHER)},
    "no key": {"signer": ""},
    "no signature": {"signature": ""},
}


@pytest.mark.parametrize("change", FALSE.values(), ids=FALSE)
@pytest.mark.parametrize("keys", [None, {"west": PUBLIC}], ids=["unknown", "roster"])
def test_a_head_that_its_owner_did_not_sign_for_this_federation_is_not_kept(path, heads, change, keys):
    before = path.read_bytes()
    honest = signed(west=FIRST)
    false = {"west": dataclasses.replace(honest["west"], **change)}
    with pytest.raises(AuditError, match="sign"):
        heads.keep(false, keys=keys)
    assert path.read_bytes() == before
    heads.keep(honest, keys=keys)  # control


def test_a_head_for_another_federation_is_not_kept(heads):
    with pytest.raises(AuditError, match="onco-us"):
        heads.keep(signed(KEY, "onco-us", west=FIRST))
    heads.keep(signed(west=FIRST))  # control


def test_by_the_roster_a_site_has_one_key_and_others_have_none(heads):
    with pytest.raises(AuditError, match="did not sign"):
        heads.keep(signed(OTHER, west=FIRST), keys={"west": PUBLIC})
    with pytest.raises(AuditError, match="not in the roster"):
        heads.keep(signed(west=FIRST), keys={"east": PUBLIC})
    heads.keep(signed(west=FIRST, server=FIRST), keys={"west": PUBLIC})  # control
    with pytest.raises(AuditError, match="did not sign"):
        heads.keep({SERVER: audit_heads.sign(SECOND, owner=SERVER, federation="onco-eu", key=OTHER)})


def test_without_a_roster_a_log_keeps_the_key_of_its_first_head(heads):
    heads.keep(signed(OTHER, west=FIRST))
    with pytest.raises(AuditError, match="another key than before"):
        heads.keep(signed(west=SECOND))
    heads.keep(signed(OTHER, west=SECOND))  # control


def test_an_operator_keeps_heads_of_two_federations_apart(path, heads):
    abroad = Heads(path, "onco-us")
    abroad.keep(signed(OTHER, "onco-us", north=Head(1, "c" * 64, 500.0)))
    assert abroad.of("north") == [Head(1, "c" * 64, 500.0)]
    assert heads.newest() == signed(north=SECOND, south=FIRST)
    assert audit_heads.of(path, "north", signer=PUBLIC) == [FIRST, SECOND]


def test_a_head_in_a_file_that_was_changed_proves_nothing(path):
    path.write_bytes(path.read_bytes().replace(b"a" * 64, b"c" * 64))
    with pytest.raises(AuditError, match="did not sign"):
        audit_heads.read(path)


def test_heads_by_another_key_are_of_another_log(path):
    with pytest.raises(AuditError, match="that key"):
        audit_heads.of(path, "north", signer=identity.public_hex(OTHER))


def test_a_file_that_is_full_takes_no_more_and_says_so(heads, monkeypatch):
    monkeypatch.setattr(audit_heads, "MAX_FILE_BYTES", heads.path.stat().st_size + 10)
    with pytest.raises(AuditError, match="takes no more heads; move it"):
        heads.keep(signed(west=FIRST))
    assert heads.newest() == signed(north=SECOND, south=FIRST)


def test_heads_that_were_removed_under_a_process_are_noticed(path, heads):
    heads.newest()
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(AuditError, match="removed"):
        heads.keep(signed(west=FIRST))


def test_a_line_that_a_crash_cut_does_not_count(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    heads = Heads(path, "onco-eu")
    assert heads.newest() == signed(north=FIRST, south=FIRST)
    heads.keep(signed(north=SECOND))
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_file_as_it_was(path, heads, monkeypatch):
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError):
            heads.keep(signed(west=FIRST))
    assert path.read_bytes() == before
    heads.keep(signed(west=FIRST))
    assert audit_heads.of(path, "west", signer=PUBLIC) == [FIRST]


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
        {"signer": "ab"},
        {"signature": "ab"},
        {"federation": "../x"},
        {"more": 1},
    ],
)
def test_a_file_that_holds_no_heads_is_refused(tmp_path, change):
    Heads(tmp_path / "heads.jsonl", "onco-eu").keep(signed(north=Head(1, GENESIS, 1.5)))
    good = json.loads((tmp_path / "heads.jsonl").read_text())
    assert audit_heads.of(tmp_path / "heads.jsonl", "north", signer=PUBLIC) == [Head(1, GENESIS, 1.5)]
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
        audit_heads.of(path, "west", signer=PUBLIC)
    with pytest.raises(AuditError):
        audit_heads.of(tmp_path / "missing.jsonl", "north", signer=PUBLIC)


def test_heads_travel_as_they_are():
    told = signed(north=FIRST, server=SECOND)
    assert audit_heads.from_list(audit_heads.to_list(told), federation="onco-eu") == told
    other = audit_heads.from_list(audit_heads.to_list(told), federation="onco-us")
    with pytest.raises(AuditError, match="did not sign"):
        audit_heads.verify("north", other["north"])


def test_the_longest_list_fits_a_frame_and_a_longer_one_is_refused():
    owners = [f"{number:04d}{'a' * 60}" for number in range(audit_heads.MAX_OWNERS - 1)]
    longest = SignedHead(Head(2**53, "f" * 64, 1_800_000_000.123), "e" * 64, "d" * 128, "onco-eu")
    told = dict.fromkeys([*owners, SERVER], longest)
    links = ["f" * 64] * MAX_LINKS
    data = wire.pack(Frame("train", {"heads": audit_heads.to_list(told), "links": links}))
    head = wire.unpack(data, max_body_bytes=0).head
    assert audit_heads.links_from(head["links"], sequence=2**40) == links
    assert audit_heads.from_list(head["heads"], federation="onco-eu") == told
    more = audit_heads.to_list({"west": longest})
    with pytest.raises(WireError, match="at most"):
        audit_heads.from_list([*audit_heads.to_list(told), *more], federation="onco-eu")


WEST = audit_heads.to_list(signed(west=FIRST))[0]


@pytest.mark.parametrize(
    "items",
    [
        {},
        "abcd",
        None,
        ["abcd"],
        [7],
        [[]],
        [WEST[:-1]],
        [[*WEST, 1]],
        [["west", 1.0, *WEST[2:]]],
        [["../west", *WEST[1:]]],
        [["west\n", *WEST[1:]]],
        [["west", 2**53 + 1, *WEST[2:]]],
        [[*WEST[:-1], "ab"]],
        [[*WEST[:-2], "ab", WEST[-1]]],
        [WEST, WEST],
    ],
)
def test_what_is_no_list_of_heads_is_refused(items):
    with pytest.raises(WireError):
        audit_heads.from_list(items, federation="onco-eu")
    assert audit_heads.from_list([WEST], federation="onco-eu") == signed(west=FIRST)  # control
