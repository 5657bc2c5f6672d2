"""What the round loop needs of a network: who is there, send a frame, take the replies that have come."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from common.frame import wire

SMALL_REPLY_BYTES: Final = (1 << 20) + wire.OVERHEAD_BYTES  # an answer without tensors
_SIZE: Final = "reply-bytes:"  # begins the group of a Flower message; Flower itself makes nothing of it


@dataclass(frozen=True)
class Reply:
    """What came back for one ticket.

    Attributes:
        ticket: As `Fleet.send` returned it.
        frame: The answer's bytes, unread; None if the node or the link failed.
        failure: A short code for why there is no frame, from a closed list of ours; empty if there is one.
    """

    ticket: str
    frame: bytes | None
    failure: str


class Fleet(Protocol):
    """The nodes of one run, as the round loop sees them."""

    @property
    def is_closed(self) -> bool:
        """Whether no other node will ever connect, as in a simulation."""

    @property
    def names(self) -> Mapping[int, str]:
        """Sites by node where they are known before they tell, as in a simulation; for showing only."""

    def explain(self, reference: str) -> str:
        """Tell what a site's own log has under a reference, where its rows are this user's own: in a simulation.

        Returns:
            Empty everywhere else: a site's log is its own.
        """

    def node_ids(self) -> list[int]:
        """Tell which nodes are connected now.

        Returns:
            Their ids, ascending.

        Raises:
            TransportError: The link did not answer.
        """

    def send(
        self, node_id: int, frame: bytes, *, kind: str, ttl_s: float, max_reply_bytes: int = SMALL_REPLY_BYTES
    ) -> str:
        """Hand one frame to the link for one node; returns at once.

        Args:
            node_id: One of `node_ids()`.
            frame: Opaque bytes.
            kind: The frame's kind, so that a courier need not read the frame to carry only what it knows.
            ttl_s: How long the frame and its reply stay valid.
            max_reply_bytes: Largest answer; the gateway lets no larger one reach the link.

        Returns:
            A ticket for `receive`.

        Raises:
            TransportError: The link did not take it.
        """

    def receive(self, tickets: Collection[str]) -> Iterator[Reply]:
        """Take the replies that are there, one at a time; never waits for a node.

        Args:
            tickets: Those still without a reply, asked in this order. A ticket gives at most one reply.

        Returns:
            Replies one by one, each fetched when asked for, so that memory does not grow with the number of nodes.

        Raises:
            TransportError: The link did not answer.
        """


def group_of(max_reply_bytes: int) -> str:
    """The group of a Flower message whose answer has at most so many bytes; the gateway reads it."""
    return f"{_SIZE}{max_reply_bytes}"


def max_reply_bytes(group_id: str) -> int:
    """How large the answer to a Flower message of a group may be; without a word on it, a small one.

    Example:
        >>> max_reply_bytes("reply-bytes:5000000"), max_reply_bytes("") == SMALL_REPLY_BYTES
        (5000000, True)
    """
    told = group_id.removeprefix(_SIZE)
    is_told = group_id.startswith(_SIZE) and told.isascii() and told.isdigit() and len(told) < 15
    return int(told) if is_told else SMALL_REPLY_BYTES
