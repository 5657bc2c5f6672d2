import httpx
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.run import RunNotRunningException

from common.errors import TransportError
from common.frame import envelope
from server.fleet.fleet import Fleet
from server.fleet.grid import GridFleet
from simulations.engines.grid import InProcessGrid

CANARY = "patient-row-4711"


def send_all(fleet: Fleet, frame: bytes = b"frame") -> dict[str, int]:
    return {fleet.send(node, frame, kind="train", ttl_s=60.0): node for node in fleet.node_ids()}


def test_each_node_gets_the_frame_and_its_answer_comes_back():
    fleet = GridFleet(InProcessGrid({7: lambda frame: frame + b"7", 3: lambda frame: frame + b"3"}))
    tickets = send_all(fleet)
    assert {tickets[reply.ticket]: reply.frame for reply in fleet.receive(tickets)} == {3: b"frame3", 7: b"frame7"}


def test_node_ids_ascend():
    assert GridFleet(InProcessGrid(dict.fromkeys([9, 2, 5], bytes))).node_ids() == [2, 5, 9]


def test_tickets_may_be_dropped_while_receiving():
    fleet = GridFleet(InProcessGrid({node: lambda frame: frame for node in range(4)}))
    tickets = send_all(fleet)
    for reply in fleet.receive(tickets):
        del tickets[reply.ticket]
    assert not tickets


def test_one_reply_is_fetched_at_a_time():
    asked = []
    fleet = GridFleet(InProcessGrid({node: lambda frame, node=node: asked.append(node) or frame for node in (1, 2)}))
    replies = fleet.receive(send_all(fleet))
    next(replies)
    assert asked == [1]


def test_a_node_that_does_not_answer_gives_no_reply_and_can_answer_later():
    late = iter([None, b"late"])
    fleet = GridFleet(InProcessGrid({1: lambda _: next(late)}))
    tickets = send_all(fleet)
    assert list(fleet.receive(tickets)) == []
    assert [reply.frame for reply in fleet.receive(tickets)] == [b"late"]


def test_a_broken_link_is_a_code():
    def break_off(_: bytes) -> bytes:
        raise TransportError(CANARY)

    fleet = GridFleet(InProcessGrid({1: break_off}))
    (reply,) = fleet.receive(send_all(fleet))
    assert (reply.frame, reply.failure) == (None, "agent-away")


class Tampering(InProcessGrid):
    """Changes replies on their way, as a hostile peer would."""

    def __init__(self, change):
        super().__init__({1: lambda frame: frame})
        self._change = change

    def pull_messages(self, message_ids):
        return [self._change(reply) for reply in super().pull_messages(message_ids)]


def with_error(code: int):
    return lambda reply: Message(Error(code, reason=CANARY), reply_to=reply)


@pytest.mark.parametrize(
    ("code", "failure"), [(2, "courier-failed"), (5, "node-away"), (0, "unknown"), (424242, "unknown")]
)
def test_a_peers_error_text_is_not_repeated(code, failure):
    fleet = GridFleet(Tampering(with_error(code)))
    request = Message(RecordDict(), 1, "query.train")
    assert CANARY in with_error(code)(request).error.reason  # control: Flower would carry it
    (reply,) = fleet.receive(send_all(fleet))
    assert (reply.frame, reply.failure) == (None, failure)


def test_a_malformed_reply_is_a_failure():
    def lie(reply: Message) -> Message:
        array = Array("float32", (4,), envelope.STYPE, reply.content["frame"]["frame"].data)
        return Message(RecordDict({"frame": ArrayRecord({"frame": array})}), reply_to=reply)

    fleet = GridFleet(Tampering(lie))
    (reply,) = fleet.receive(send_all(fleet))
    assert (reply.frame, reply.failure) == (None, "malformed")


class Refusing(InProcessGrid):
    """A link that takes no message."""

    def push_messages(self, messages):
        return [None for _ in messages]


class Broken(InProcessGrid):
    """A link of which every call raises."""

    def __init__(self, error):
        super().__init__({1: bytes})
        self._error = error

    def get_node_ids(self):
        raise self._error

    push_messages = pull_messages = lambda self, _: self.get_node_ids()


def test_a_link_that_refuses_is_a_transport_error():
    with pytest.raises(TransportError, match="did not take"):
        GridFleet(Refusing({1: bytes})).send(1, b"", kind="open", ttl_s=1.0)


@pytest.mark.parametrize(
    ("error", "told"),
    [(httpx.ConnectError(CANARY), "SuperLink did not answer"), (RunNotRunningException(CANARY), "was stopped")],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda fleet: fleet.node_ids(),
        lambda fleet: fleet.send(1, b"", kind="open", ttl_s=1.0),
        lambda fleet: list(fleet.receive(["1"])),
    ],
)
def test_a_link_that_is_away_is_a_transport_error(use, error, told):
    with pytest.raises(TransportError, match=told) as caught:
        use(GridFleet(Broken(error)))
    assert caught.value.is_retryable
    assert CANARY not in str(caught.value)
