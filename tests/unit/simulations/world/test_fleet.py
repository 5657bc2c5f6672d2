"""The fleet of a simulation keeps to what the round loop needs, as one over Flower does (`test_grid.py`)."""

import pytest

from common.errors import TransportError
from simulations.world.run import InProcessFleet


def send_all(fleet, frame: bytes = b"frame") -> dict[str, int]:
    return {fleet.send(node, frame, kind="train", ttl_s=60.0): node for node in fleet.node_ids()}


def test_each_node_gets_the_very_frame_and_its_answer_comes_back_once():
    seen, frame = [], bytes(1000)
    fleet = InProcessFleet({7: lambda received: seen.append(received) or b"7", 3: lambda received: b"3"})
    tickets = send_all(fleet, frame)
    assert list(tickets.values()) == [3, 7]
    assert {tickets[reply.ticket]: reply.frame for reply in fleet.receive(tickets)} == {3: b"3", 7: b"7"}
    assert seen[0] is frame
    assert list(fleet.receive([*tickets, "unheard of"])) == []


def test_nodes_work_one_at_a_time_and_only_when_their_reply_is_asked_for():
    asked = []
    fleet = InProcessFleet({node: lambda frame, node=node: asked.append(node) or frame for node in (1, 2)})
    replies = fleet.receive(send_all(fleet))
    assert asked == []
    next(replies)
    assert asked == [1]


def test_a_node_that_does_not_answer_gives_no_reply_and_can_answer_later():
    late = iter([None, b"late"])
    fleet = InProcessFleet({1: lambda _: next(late)})
    tickets = send_all(fleet)
    assert list(fleet.receive(tickets)) == []
    assert [reply.frame for reply in fleet.receive(tickets)] == [b"late"]


def test_a_broken_link_is_a_code_and_a_nodes_own_mistake_is_not_hidden():
    def fail_by(error: Exception):
        def node(_: bytes) -> bytes:
            raise error

        return node

    fleet = InProcessFleet({1: fail_by(TransportError("patient-row-4711"))})
    (reply,) = fleet.receive(send_all(fleet))
    assert (reply.frame, reply.failure) == (None, "agent-away")
    fleet = InProcessFleet({1: fail_by(ZeroDivisionError())})
    with pytest.raises(ZeroDivisionError):
        list(fleet.receive(send_all(fleet)))
    with pytest.raises(TransportError, match="no node 9"):
        fleet.send(9, b"", kind="train", ttl_s=1.0)
