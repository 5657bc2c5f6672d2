import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from common.errors import TransportError, WireError
from common.frame import envelope
from simulations.engines.grid import InProcessGrid


def message(node: int = 1, frame: bytes = b"frame") -> Message:
    return Message(RecordDict({"frame": ArrayRecord({"frame": Array(*envelope.declare(frame))})}), node, "query.train")


def test_it_is_a_flower_grid():
    grid = InProcessGrid({1: bytes})
    assert isinstance(grid, Grid)
    grid.set_run(Run.create_empty(run_id=42))
    assert grid.run.run_id == message().metadata.run_id == 42


def test_replies_belong_to_their_requests():
    grid = InProcessGrid({node: lambda frame, node=node: frame + bytes([node]) for node in (1, 2)})
    ids = list(grid.push_messages([message(1), message(2)]))
    replies = list(grid.pull_messages(reversed(ids)))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids[::-1]
    assert [reply.metadata.src_node_id for reply in replies] == [2, 1]
    assert [envelope.unpack(reply.content) for reply in replies] == [b"frame\2", b"frame\1"]


def test_a_reply_is_given_once():
    grid = InProcessGrid({1: lambda frame: frame})
    ids = list(grid.push_messages([message()]))
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["unheard of"])) == []


def test_nodes_work_only_when_their_reply_is_pulled():
    asked = []
    grid = InProcessGrid({1: lambda frame: asked.append(frame) or frame})
    ids = grid.push_messages([message()])
    assert not asked
    grid.pull_messages(ids)
    assert asked == [b"frame"]


def test_frames_are_not_copied_on_their_way():
    frame = bytes(1000)
    seen = []
    grid = InProcessGrid({1: lambda received: seen.append(received) or received})
    (reply,) = grid.send_and_receive([message(frame=frame)])
    assert seen[0] is frame
    assert envelope.unpack(reply.content) is frame


def test_send_and_receive_leaves_out_the_silent():
    grid = InProcessGrid({1: lambda frame: None, 2: lambda frame: frame})
    assert len(list(grid.send_and_receive([message(1), message(2)]))) == 1


def test_an_unknown_node_is_refused():
    with pytest.raises(TransportError):
        InProcessGrid({1: bytes}).push_messages([message(2)])


def test_a_request_without_a_frame_is_refused():
    grid = InProcessGrid({1: bytes})
    with pytest.raises(WireError):
        grid.send_and_receive([Message(RecordDict(), 1, "query.train")])


def test_a_nodes_own_mistake_is_not_hidden():
    def fail(_: bytes) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        InProcessGrid({1: fail}).send_and_receive([message()])
