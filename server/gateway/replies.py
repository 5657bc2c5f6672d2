"""How much each site may leave at the SuperLink: what it was asked for, once, and no more.

A SuperLink keeps every object that a node announces and sends, in memory and without limit. The coordinator's run says
with each message how large its answer can be (`server/fleet/fleet.py`; worked out from the manifest). The gateway
remembers what it handed to which site, lets in one answer to each message, and counts the bytes while they stream.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError

from common import storage
from common.errors import ConfigError
from server.fleet import fleet
from server.gateway.refusals import Refused

PIECE_BYTES: Final = 5 << 20  # Flower's ArrayChunk
MIN_PIECE_BYTES: Final = 1 << 20  # as the couriers' units set it, for slow lines
NUM_SMALL_OBJECTS: Final = 8  # message, its records and array, each of a few hundred bytes
OVERHEAD_BYTES: Final = 256 << 10  # of these and of the requests that carry them
HEAD_BYTES: Final = 512  # of a piece: its head, its request, its name in the array
MAX_MESSAGE_BYTES: Final = 4096  # a reply's own record: ids, dates, an error's code
NUM_KEPT: Final = 2  # messages of one run and site whose answer may still come: this one and a late one's


@dataclass
class Grant:
    """What one message allows.

    Attributes:
        message_id: Of the message that was handed to the site.
        max_bytes: Largest answer, as the coordinator said.
        until_s: End of the message's life, seconds since 1970.
        answer: Digest of the answer that was announced; empty: none yet.
        left_bytes: How much may still be sent: the answer, its overhead, and two pieces sent twice.
    """

    message_id: str
    run_id: int
    max_bytes: int
    until_s: float
    answer: str = ""
    left_bytes: int = 0

    def __post_init__(self) -> None:
        heads = OVERHEAD_BYTES + HEAD_BYTES * self.num_pieces
        self.left_bytes = self.max_bytes + heads + min(self.max_bytes, 2 * PIECE_BYTES)

    @property
    def num_pieces(self) -> int:
        """The most that the answer may be cut into."""
        return -(-self.max_bytes // MIN_PIECE_BYTES)


class Replies:
    """What every site may still send; grants outlive a restart of the gateway, what was spent of them does not.

    Args:
        file: Where grants are written whenever one is made.
        wall_clock: Seconds since 1970.

    Raises:
        ConfigError: The file is there and cannot be read.
    """

    def __init__(self, file: Path, *, wall_clock: Callable[[], float]) -> None:
        self._file = file
        self._wall_clock = wall_clock
        try:
            kept = json.loads(file.read_bytes()) if file.exists() else {}
            self._grants: dict[str, list[Grant]] = {
                str(site): [_grant(fields) for fields in grants] for site, grants in kept.items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: not the gateway's own list of messages; delete it, then start again") from error

    def handed(self, site: str, answer: bytes) -> None:
        """Note what a site was handed.

        Raises:
            Refused: 502, the SuperLink's answer is none.
            StorageError: The grants cannot be written.
        """
        try:
            messages = PullMessagesResponse.FromString(answer).messages_list
        except DecodeError:
            raise Refused(502, "superlink") from None
        for facts in (message.metadata for message in messages):
            max_bytes = fleet.max_reply_bytes(facts.group_id)
            grant = Grant(facts.message_id, facts.run_id, max_bytes, facts.created_at + facts.ttl)
            # A new one ends those of the same run but the newest.
            others = [kept for kept in self._alive(site) if kept.message_id != grant.message_id]
            same = [kept for kept in others if kept.run_id == grant.run_id][1 - NUM_KEPT :]
            self._grants[site] = [*(kept for kept in others if kept.run_id != grant.run_id), *same, grant]
        if messages:
            content = {name: [asdict(grant) for grant in grants] for name, grants in self._grants.items()}
            storage.write_atomic(self._file, json.dumps(content).encode(), mode=0o600)

    def check_push(self, site: str, body: bytes) -> bytes:
        """Check the announcement of an answer.

        Returns:
            The request without fields that this version does not know.

        Raises:
            Refused: 400 if it cannot be read or holds more than one message; 403 if the site was not asked, or has
                answered already; 413 if it is made of more objects than its size allows.
        """
        request = PushMessagesRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            raise Refused(400, "reply_malformed") from None
        request.DiscardUnknownFields()
        counts = (len(request.messages_list), len(request.message_object_trees), len(request.clientapp_runtime_list))
        if counts[:2] != (1, 1) or counts[2] > 1:
            raise Refused(400, "reply_malformed")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        if message.content.ByteSize() or message.ByteSize() > MAX_MESSAGE_BYTES:
            raise Refused(413, "reply_size")
        message_id = message.metadata.reply_to_message_id
        grant = next((grant for grant in self._alive(site) if grant.message_id == message_id), None)
        if grant is None:
            raise Refused(403, "reply_unasked")
        if _num_objects(tree) > NUM_SMALL_OBJECTS + grant.num_pieces:
            raise Refused(413, "reply_size")
        answer = hashlib.sha256(message.metadata.message_id.encode() + tree.SerializeToString()).hexdigest()
        if grant.answer not in ("", answer):  # the same again is Flower's own second try
            raise Refused(403, "reply_twice")
        grant.answer = answer
        return bytes(request.SerializeToString(deterministic=True))

    def spend(self, site: str, num_bytes: int) -> None:
        """Count bytes of an answer as they come; the oldest grant pays first.

        Raises:
            Refused: 413, more than the site was asked for.
        """
        grants = self._alive(site)
        if sum(grant.left_bytes for grant in grants) < num_bytes:
            raise Refused(413, "reply_size")
        for grant in grants:
            paid = min(grant.left_bytes, num_bytes)
            grant.left_bytes -= paid
            num_bytes -= paid

    def give_back(self, site: str, num_bytes: int) -> None:
        """Uncount bytes that the SuperLink did not keep."""
        if grants := self._alive(site):
            grants[-1].left_bytes += num_bytes

    def _alive(self, site: str) -> list[Grant]:
        """A site's grants whose time is not over."""
        now = self._wall_clock()
        self._grants[site] = [grant for grant in self._grants.get(site, []) if grant.until_s > now]
        return self._grants[site]


def _num_objects(tree: ObjectTree) -> int:
    """Objects of a tree, itself included; protobuf limits its depth."""
    return 1 + sum(map(_num_objects, tree.children))


def _grant(fields: dict[str, object]) -> Grant:
    """A grant of which nothing is spent: how much was, nobody wrote down."""
    return Grant(**{name: value for name, value in fields.items() if name != "left_bytes"})  # type: ignore[arg-type]
