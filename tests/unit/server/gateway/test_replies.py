"""What a site may leave at the SuperLink: one answer to each message that it was handed, of the size that was said."""

import os
import subprocess
import sys

import pytest
from flwr.proto.error_pb2 import Error
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from client.doctor import host
from common.errors import ConfigError
from server.fleet import fleet
from server.gateway import replies as limits
from server.gateway.refusals import Refused
from server.gateway.replies import MAX_MESSAGE_BYTES, NUM_SMALL_OBJECTS, OVERHEAD_BYTES, PIECE_BYTES, Replies
from server.members import kits

SIZE = 12 << 20
ALLOWED = SIZE + OVERHEAD_BYTES + 12 * limits.HEAD_BYTES + 2 * PIECE_BYTES


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def replies(tmp_path) -> Replies:
    return Replies(tmp_path / "replies.json", wall_clock=Clock())


def hand(replies: Replies, message_id: str = "m1", *, site: str = "alder", run_id: int = 1, size: int | None = SIZE):
    group = "" if size is None else fleet.group_of(size)
    told = Metadata(message_id=message_id, run_id=run_id, group_id=group, created_at=100.0, ttl=60.0)
    replies.handed(site, PullMessagesResponse(messages_list=[Message(metadata=told)]).SerializeToString())


def announcement(*, to: str = "m1", own: str = "a1", num_objects: int = 6, error: str = "", count: int = 1) -> bytes:
    message = Message(metadata=Metadata(message_id=own, reply_to_message_id=to))
    if error:
        message.error.CopyFrom(Error(reason=error))
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="1" * 64) for _ in range(num_objects - 1)])
    request = PushMessagesRequest(messages_list=[message] * count, message_object_trees=[tree] * count)
    return request.SerializeToString()


def refusal(use, *arguments) -> tuple[int, str]:
    with pytest.raises(Refused) as found:
        use(*arguments)
    return found.value.status, found.value.reason


def test_one_answer_to_each_message_and_its_bytes_pass(replies):
    hand(replies)
    assert replies.check_push("alder", announcement()) == announcement()
    assert replies.check_push("alder", announcement()) == announcement()  # Flower tries again after a lost answer
    for _ in range(SIZE >> 20):
        replies.spend("alder", 1 << 20)


def test_a_site_that_was_not_asked_leaves_nothing(replies):
    hand(replies)
    assert refusal(replies.spend, "birch", 1) == (413, "reply_size")
    assert refusal(replies.check_push, "birch", announcement()) == (403, "reply_unasked")
    assert refusal(replies.check_push, "alder", announcement(to="m2")) == (403, "reply_unasked")
    assert refusal(replies.check_push, "alder", announcement(to="")) == (403, "reply_unasked")  # a message of its own


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"\xff" * 9, (400, "reply_malformed")),
        (announcement(count=2), (400, "reply_malformed")),
        (announcement(num_objects=NUM_SMALL_OBJECTS + 13), (413, "reply_size")),
        (announcement(error="a" * MAX_MESSAGE_BYTES), (413, "reply_size")),
    ],
)
def test_an_announcement_that_asks_for_more_room_is_refused(replies, body, told):
    hand(replies)
    assert refusal(replies.check_push, "alder", body) == told


PIECES = """
import random
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore import constant
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
array = Array("uint8", (12 << 20,), "silotune", random.Random(0).randbytes(12 << 20))
ids = {"node": Node(node_id=(1 << 64) - 1), "run_id": (1 << 64) - 1, "session_id": "0" * 64}
found = get_all_nested_objects(RecordDict({"a": ArrayRecord({"a": array})}))
pushed = [PushObjectRequest(object_id=name, object_content=one.deflate(), **ids) for name, one in found.items()]
print(len(pushed), sum(one.ByteSize() for one in pushed), constant.FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES)
"""


def test_an_answer_as_flower_cuts_it_by_the_couriers_unit_passes_whole(replies):
    env = host.environment((kits.TEMPLATES / "silotune-courier.service.j2").read_text())
    for changes, num_pieces in ((env, 12), ({}, 3)):
        told = subprocess.check_output([sys.executable, "-c", PIECES], env={**os.environ, **changes}, text=True)
        num_objects, num_bytes, num_at_once = map(int, told.split())
        assert (num_objects, num_at_once) == (num_pieces + 3, 1 if changes else 2)
        hand(replies, f"of {num_pieces}", run_id=num_pieces)
        replies.check_push("alder", announcement(to=f"of {num_pieces}", num_objects=num_objects))
        assert num_bytes < SIZE + limits.HEAD_BYTES * (num_pieces + 3)


def test_a_second_answer_to_one_message_is_refused(replies):
    hand(replies)
    replies.check_push("alder", announcement())
    assert refusal(replies.check_push, "alder", announcement(own="a2")) == (403, "reply_twice")
    assert refusal(replies.check_push, "alder", announcement(num_objects=5)) == (403, "reply_twice")


def test_bytes_are_counted_over_pieces_and_over_messages(replies):
    hand(replies)
    replies.spend("alder", ALLOWED)
    assert refusal(replies.spend, "alder", 1) == (413, "reply_size")
    replies.give_back("alder", PIECE_BYTES)
    replies.spend("alder", PIECE_BYTES)
    for number in range(2, 10):  # rounds that it answers with nothing do not save up
        hand(replies, f"m{number}")
    assert refusal(replies.spend, "alder", 2 * ALLOWED + 1) == (413, "reply_size")
    replies.spend("alder", 2 * ALLOWED)


def test_a_message_without_a_size_allows_an_answer_without_tensors(replies):
    hand(replies, size=None)
    assert refusal(replies.spend, "alder", 3 << 20) == (413, "reply_size")
    replies.spend("alder", fleet.SMALL_REPLY_BYTES)


def test_grants_end_with_their_message_and_outlive_a_restart(tmp_path):
    clock = Clock()
    hand(Replies(tmp_path / "replies.json", wall_clock=clock))
    again = Replies(tmp_path / "replies.json", wall_clock=clock)
    again.check_push("alder", announcement())
    clock.now = 160.0
    assert refusal(again.spend, "alder", 1) == (413, "reply_size")
    (tmp_path / "replies.json").write_text('{"alder": 3}')
    with pytest.raises(ConfigError, match="delete it"):
        Replies(tmp_path / "replies.json", wall_clock=clock)
