"""Any Flower `Grid` as the fleet that the round loop needs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import httpx
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from common.errors import TransportError, WireError
from common.frame import envelope
from server.fleet import fleet
from server.fleet.fleet import SMALL_REPLY_BYTES, Reply


class GridFleet:
    """Sends and receives frames over a Flower grid, one message at a time.

    A frame of kind `train` travels as Flower message type `query.train`: the category says nothing (Flower knows only
    train, evaluate and query), the action is a row of `common.frame.exchanges`.

    Args:
        grid: Whose nodes.
        is_closed: See `Fleet.is_closed`.
        names: See `Fleet.names`.
        explain: See `Fleet.explain`.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        is_closed: bool = False,
        names: Mapping[int, str] | None = None,
        explain: Callable[[str], str] = lambda reference: "",
    ) -> None:
        self._grid, self._is_closed, self._names, self._explain = grid, is_closed, names or {}, explain

    @property
    def is_closed(self) -> bool:
        """Whether no other node will ever connect."""
        return self._is_closed

    @property
    def names(self) -> Mapping[int, str]:
        """Sites by node where they are known before they tell."""
        return self._names

    def explain(self, reference: str) -> str:
        """Tell what a site's own log has under a reference; empty where that is not for this user to see."""
        return self._explain(reference)

    def node_ids(self) -> list[int]:
        """Tell which nodes are connected now, ascending; see `Fleet.node_ids`."""
        with _translated():
            return sorted(self._grid.get_node_ids())

    def send(
        self, node_id: int, frame: bytes, *, kind: str, ttl_s: float, max_reply_bytes: int = SMALL_REPLY_BYTES
    ) -> str:
        """Hand one frame to the link for one node; see `Fleet.send`."""
        group_id = fleet.group_of(max_reply_bytes)
        message = Message(_pack(frame), node_id, f"query.{kind}", ttl=ttl_s, group_id=group_id)
        with _translated():
            tickets = list(self._grid.push_messages([message]))
        if len(tickets) != 1 or not tickets[0]:
            raise TransportError(
                f"the link did not take a {kind} frame of {len(frame)} bytes; is the run still active?"
            )
        return tickets[0]

    def receive(self, tickets: Collection[str]) -> Iterator[Reply]:
        """Take the replies that are there, one at a time, in the order of the tickets; see `Fleet.receive`."""
        for ticket in tuple(tickets):
            for message in self._pull(ticket):
                yield _reply(ticket, message)

    def _pull(self, ticket: str) -> list[Message]:
        """Return the reply to one ticket, if it is there."""
        with _translated():
            return list(self._grid.pull_messages([ticket]))


def _pack(frame: bytes) -> RecordDict:
    """Wrap a frame as a message's content; Flower cuts it into pieces of 5 MiB."""
    return RecordDict({envelope.NAME: ArrayRecord({envelope.NAME: Array(*envelope.declare(frame))})})


def _reply(ticket: str, message: Message) -> Reply:
    """Read one Flower message; a failure is told by our own code only."""
    if message.has_error():
        return Reply(ticket=ticket, frame=None, failure=envelope.failure_name(message.error.code))
    try:
        return Reply(ticket=ticket, frame=envelope.unpack(message.content), failure="")
    except WireError:
        return Reply(ticket=ticket, frame=None, failure=envelope.failure_name(envelope.BAD_CONTENT))


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what a Flower grid raises into errors of ours."""
    try:
        yield
    except httpx.HTTPError as error:
        what = type(error).__name__
        raise TransportError(f"the SuperLink did not answer ({what}); is it running? See its log") from error
    except RunNotRunningException as error:
        raise TransportError("the run was stopped at the SuperLink; start it again with --resume") from error
