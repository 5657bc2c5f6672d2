import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RemoteError, WireError
from common.frame import wire
from common.frame.wire import Frame
from common.trust import identity, signed_frame

VECTORS = json.loads((Path(__file__).parents[3] / "vectors" / "frames.json").read_text())
SMALL = wire.pack(Frame("train", {"round_index": 3}, b"body"))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HEADS = st.dictionaries(TEXT.filter(lambda key: key != "kind"), SCALARS | TEXT | st.lists(SCALARS, max_size=3))


def envelope(head: bytes, body: bytes = b"", *, magic: bytes = b"SILO", version: int = 2) -> bytes:
    """A frame with a right hash, whatever else is wrong with it."""
    before = struct.pack("<4sHIQ", magic, version, len(head), len(body)) + head
    return before + body + hashlib.sha256(before + hashlib.sha256(body).digest()).digest()


def unpack(data: bytes) -> Frame:
    return wire.unpack(data, max_body_bytes=1000)


@given(kind=TEXT, head=HEADS, body=st.binary(max_size=100))
def test_unpack_returns_what_was_packed(kind, head, body):
    assert unpack(wire.pack(Frame(kind, head, body))) == Frame(kind, head, body)


@given(head=HEADS)
def test_the_same_head_gives_the_same_bytes_in_any_order(head):
    backwards = dict(reversed(head.items()))
    assert wire.pack(Frame("open", head)) == wire.pack(Frame("open", backwards))


@pytest.mark.parametrize("kind", sorted(VECTORS["frames"]))
def test_stored_frames_stay_readable_and_are_still_written_the_same(kind):
    stored = VECTORS["frames"][kind]
    frame = Frame(kind, stored["head"], bytes.fromhex(stored["body"]))
    assert unpack(bytes.fromhex(stored["bytes"])) == frame
    assert wire.pack(frame).hex() == stored["bytes"]


def test_layout_is_the_documented_one():
    head = b'{"kind":"train","round_index":3}'
    assert envelope(head, b"body") == SMALL
    assert SMALL[:18] == b"SILO" + b"\2\0" + b"\x20\0\0\0" + b"\4\0\0\0\0\0\0\0"


@pytest.mark.parametrize("position", range(len(SMALL)))
def test_no_single_byte_can_change(position):
    for flip in (0x01, 0x20, 0x80, 0xFF):
        changed = bytearray(SMALL)
        changed[position] ^= flip
        with pytest.raises(WireError):
            unpack(bytes(changed))


@pytest.mark.parametrize("size", range(len(SMALL)))
def test_no_beginning_of_a_frame_is_a_frame(size):
    with pytest.raises(WireError):
        unpack(SMALL[:size])


def test_unpack_refuses_bytes_that_no_length_declares_though_the_hash_is_right():
    before, body = wire.pack(Frame("update", {}, b"body"))[:-36], b"bodymore"
    digest = hashlib.sha256(before + hashlib.sha256(body).digest()).digest()
    with pytest.raises(WireError, match="declares"):
        wire.unpack(before + body + digest, max_body_bytes=100)


def test_unpack_refuses_trailing_bytes():
    with pytest.raises(WireError, match="declares"):
        unpack(SMALL + b"\0")


@pytest.mark.parametrize("wrong", [{"magic": b"SILX"}, {"version": 1}, {"version": 3}, {"version": 0}])
def test_unpack_refuses_another_format_and_names_the_remedy(wrong):
    with pytest.raises(WireError, match="same silotune release"):
        unpack(envelope(b'{"kind":"open"}', **wrong))


def test_body_over_the_limit_is_refused_and_one_at_the_limit_is_not():
    data = wire.pack(Frame("train", {}, bytes(11)))
    assert wire.unpack(data, max_body_bytes=11).body == bytes(11)
    with pytest.raises(WireError, match=r"\b10\b"):
        wire.unpack(data, max_body_bytes=10)


def test_head_over_the_limit_is_refused():
    with pytest.raises(WireError, match="limits"):
        unpack(envelope(b'{"kind":"' + b"a" * wire.MAX_HEAD_BYTES + b'"}'))


def test_declared_lengths_are_checked_before_anything_is_hashed_or_copied():
    huge = struct.pack("<4sHIQ", b"SILO", 2, 2**32 - 1, 2**64 - 1) + bytes(40)
    with pytest.raises(WireError, match="limits"):
        unpack(huge)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{}",
        b"[]",
        b"7",
        b'"kind"',
        b"null",
        b'{"kind":7}',
        b'{"kind":null}',
        b'{"kind":["open"]}',
        b'{"kind":"open"',
        b'{"kind":"open"}{}',
        b'{"kind":"open","kind":"open"}',
        b'{"kind":"open","x":{"a":1,"a":2}}',
        b'{"kind":"open","x":NaN}',
        b'{"kind":"open","x":Infinity}',
        b'{"kind":"open","x":-Infinity}',
        b'{"kind":"open","x":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"kind":"\xff"}',
        b"\x80\x04\x95N.",
    ],
)
def test_unpack_refuses_heads_that_are_not_strict_json_objects(head):
    with pytest.raises(WireError):
        unpack(envelope(head))


@pytest.mark.parametrize(
    "head",
    [
        b' {"kind":"open"}',
        b'{"kind": "open"}',
        b'{"kind":"open"}\n',
        b'{"kind":"open","a":1}',
        b'{"a":1e0,"kind":"open"}',
        b'{"kind":"op\\u0065n"}',
        b'\xef\xbb\xbf{"kind":"open"}',
        '{"kind":"open"}'.encode("utf-16"),
        b'{"kind":"\\ud800"}',
    ],
)
def test_unpack_refuses_a_second_way_to_write_the_same_head(head):
    with pytest.raises(WireError):
        unpack(envelope(head))


def test_pack_refuses_numbers_that_are_not_finite():
    with pytest.raises(ValueError, match="JSON"):
        wire.pack(Frame("update", {"train_loss": float("nan")}))


def test_pack_refuses_a_head_that_names_a_kind_of_its_own():
    with pytest.raises(ValueError, match="kind"):
        wire.pack(Frame("update", {"kind": "refused"}))


def test_expect_gives_a_frame_of_the_right_kind():
    assert wire.expect(SMALL, "train", max_body_bytes=4) == Frame("train", {"round_index": 3}, b"body")


def test_expect_refuses_another_kind():
    with pytest.raises(WireError, match="'train', expected 'update'"):
        wire.expect(SMALL, "update", max_body_bytes=4)


def test_expect_tells_a_refusals_code_and_reference():
    refused = wire.pack(Frame("refused", {"code": "DataError", "reference": "0a1b"}))
    with pytest.raises(RemoteError, match=r"DataError.*0a1b"):
        wire.expect(refused, "update", max_body_bytes=0)


@pytest.mark.parametrize("head", [{}, {"code": None}, {"code": ["x"] * 1000, "reference": {"a": "\x1b[2J\n" * 1000}}])
def test_a_refusal_cannot_put_long_or_unprintable_text_into_a_message(head):
    with pytest.raises(RemoteError) as caught:
        wire.expect(wire.pack(Frame("refused", head)), "update", max_body_bytes=0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_wrong_kind_cannot_put_long_or_unprintable_text_into_a_message():
    with pytest.raises(WireError) as caught:
        wire.expect(wire.pack(Frame("\x1b[2J" * 99, {})), "update", max_body_bytes=0)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_with_our_error_only(data):
    with pytest.raises(WireError):
        unpack(data)


@given(st.binary(max_size=60))
def test_arbitrary_heads_in_a_right_envelope_raise_our_error_only(head):
    try:
        unpack(envelope(head))
    except WireError:
        return
    assert json.loads(head)["kind"] is not None


def test_the_digest_of_a_frame_is_what_ends_its_bytes_and_commits_to_head_and_body():
    frame = Frame("update", {"site": "north"}, b"body")
    assert wire.digest(frame) == wire.digest_of(wire.pack(frame)) == wire.pack(frame)[-32:].hex()
    assert wire.digest(Frame("update", {"site": "south"}, b"body")) != wire.digest(frame)
    assert wire.digest(Frame("update", {"site": "north"}, b"bodY")) != wire.digest(frame)


def test_the_hash_of_a_body_follows_the_body_and_not_the_head():
    frame = wire.expect(wire.pack(Frame("update", {"site": "north"}, b"body")), "update", max_body_bytes=4)
    assert frame.body_sha256 == hashlib.sha256(b"body").digest()
    assert frame.with_head({"site": "south"}) == Frame("update", {"site": "south"}, b"body")
    assert frame.with_head({"site": "south"}).body_sha256 == frame.body_sha256
    changed = dataclasses.replace(frame, body=b"other")
    assert changed.body_sha256 == hashlib.sha256(b"other").digest()


def test_a_large_body_is_hashed_once_to_be_signed_and_packed_and_once_to_be_read_and_checked(monkeypatch):
    key, hashed = Ed25519PrivateKey.generate(), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: (hashed.append(len(data)), sha256(data))[1])
    signed = signed_frame.sign(Frame("update", {"site": "north"}, bytes(5000)), key=key, federation="f")
    packed = wire.pack(signed)
    assert sum(size >= 5000 for size in hashed) == 1
    arrived = wire.expect(packed, "update", max_body_bytes=5000)
    signed_frame.check(arrived, key=identity.public_hex(key), federation="f")
    assert sum(size >= 5000 for size in hashed) == 2
