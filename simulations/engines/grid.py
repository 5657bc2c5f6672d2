"""A Flower `Grid` whose nodes are functions in this very process: for what has to be seen in Flower's own messages.

`simulations.bench.arms.bytes` counts their bytes, and tests of `GridFleet` tamper with them. A run in this process
takes `simulations.world.run.InProcessFleet`, which needs no message. A node is called when its reply is pulled.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import count

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import TransportError
from common.frame import envelope

Answer = Callable[[bytes], bytes | None]


class InProcessGrid(Grid):
    """Plays every node of a federation in this process.

    Args:
        answers: What each node does with a frame, by node id. None as a result means that no answer has come yet, so
            the call is made again at the next pull; `TransportError` means that the node's link broke.
    """

    def __init__(self, answers: Mapping[int, Answer]) -> None:
        self._answers = dict(answers)
        self._pending: dict[str, Message] = {}
        self._numbers = count(1)
        self._run = Run.create_empty(run_id=1)
        _identify(run_id=1)

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._run = run
        _identify(run_id=run.run_id)

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled; returns their ids."""
        numbered = {}
        for message in messages:
            if message.metadata.dst_node_id not in self._answers:
                raise TransportError(f"no node {message.metadata.dst_node_id} in this grid")
            message_id = f"{next(self._numbers):08d}"
            message.metadata.__dict__["_message_id"] = message_id  # as every Flower grid does: metadata has no setter
            numbered[message_id] = message
        self._pending |= numbered
        return list(numbered)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes answer, in the order of the ids, and return the replies that came."""
        replies = []
        for message_id in message_ids:
            request = self._pending.get(message_id)
            reply = answer(self._answers[request.metadata.dst_node_id], request) if request else None
            if reply is not None:
                del self._pending[message_id]
                replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull once: a node that has not answered by then has no reply."""
        return self.pull_messages(self.push_messages(messages))


def answer(node: Answer, request: Message) -> Message | None:
    """Let a function answer a Flower message, as a courier lets an agent.

    Args:
        node: Takes a frame, returns one; None means not yet.

    Returns:
        The reply; an error reply if the node raised `TransportError`; None if it has not answered.

    Raises:
        WireError: The request holds no well-formed frame.
    """
    try:
        frame = node(envelope.unpack(request.content))
    except TransportError:
        return Message(Error(envelope.AGENT_AWAY), reply_to=request)
    if frame is None:
        return None
    content = RecordDict({envelope.NAME: ArrayRecord({envelope.NAME: Array(*envelope.declare(frame))})})
    return Message(content, reply_to=request)


def _identify(*, run_id: int) -> None:
    """Name this process as the server's end: Flower keeps that per process and stamps every new message with it."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
