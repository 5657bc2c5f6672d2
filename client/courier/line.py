"""The courier's line to the agent: frames over a Unix domain socket. Imports no torch and no Flower."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc

from common.agent_pb2 import Chunk, HelloRequest
from common.agent_pb2_grpc import AgentStub
from common.errors import ProtocolError, RemoteError, TransportError, WireError
from common.frame.exchanges import EXCHANGES
from common.run.schema.section import MAX_MESSAGE_MIB
from common.trust import roster

CHUNK_BYTES: Final = 1 << 20
MAX_REPLY_BYTES: Final = (MAX_MESSAGE_MIB + 1) << 20  # the largest update that a run file can allow, and its frame
OPTIONS: Final = (
    ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),  # of one piece, not of a frame
    ("grpc.enable_http_proxy", 0),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message could become a large one
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Hello:
    """An agent's answer to a greeting: the version of its frames, and whether it is working on one."""

    wire_version: int
    is_busy: bool


def call(socket_path: Path, kind: str, frame: bytes, timeout_s: float) -> bytes:
    """Let the agent answer one frame.

    Args:
        kind: One of `EXCHANGES`, or `roster.KIND`, which the link brings.
        timeout_s: How long the answer may take, the wait for an earlier call included.

    Raises:
        ProtocolError: No such kind of call.
        TransportError: No agent listens there, or it did not answer in time.
        WireError: The frame is larger than the agent takes, or the reply did not come whole.
        RemoteError: The agent failed; its own log says why.
    """
    if kind not in (*EXCHANGES, roster.KIND):
        raise ProtocolError(f"the agent has no call for frames of kind {kind[:40]!r}; it knows {', '.join(EXCHANGES)}")

    def exchange(stub: AgentStub) -> bytes:
        return join(stub.Exchange(pieces(frame), timeout=timeout_s), max_bytes=MAX_REPLY_BYTES)

    return _with_stub(socket_path, exchange)


def hello(socket_path: Path, *, timeout_s: float = 5.0) -> Hello:
    """Ask whether an agent is there; it answers at once, also while it trains.

    Raises:
        TransportError: No agent listens there.
    """

    def ask(stub: AgentStub) -> Hello:
        reply = stub.Hello(HelloRequest(), timeout=timeout_s)
        return Hello(wire_version=reply.wire_version, is_busy=reply.is_busy)

    return _with_stub(socket_path, ask)


def pieces(frame: bytes) -> Iterator[Chunk]:
    """Cut a frame into chunks of at most `CHUNK_BYTES`; the first holds the frame's length.

    Example:
        >>> join(pieces(b"frame"), max_bytes=5)
        b'frame'
    """
    yield Chunk(data=frame[:CHUNK_BYTES], frame_bytes=len(frame))
    for start in range(CHUNK_BYTES, len(frame), CHUNK_BYTES):
        yield Chunk(data=frame[start : start + CHUNK_BYTES])


def join(chunks: Iterator[Chunk], *, max_bytes: int) -> bytes:
    """Join the pieces of a frame, never holding more than it may have.

    Raises:
        WireError: It is longer than `max_bytes`, or longer or shorter than its first piece says.
    """
    first = next(chunks, None)
    if first is None or first.frame_bytes > max_bytes:
        raise WireError(f"no frame, or one above {max_bytes} bytes")
    frame = bytearray(first.data)
    while len(frame) <= first.frame_bytes and (chunk := next(chunks, None)) is not None:
        frame += chunk.data
    if len(frame) != first.frame_bytes:
        raise WireError(f"a frame of {first.frame_bytes} bytes did not come as such")
    return bytes(frame)


def _with_stub(socket_path: Path, use: Callable[[AgentStub], Result]) -> Result:
    """Open a channel, use it, close it; gRPC's errors become ours here and nowhere else."""
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    with grpc.secure_channel(f"unix:{socket_path.absolute()}", credentials, options=OPTIONS) as channel:
        try:
            return use(AgentStub(channel))
        except grpc.RpcError as error:
            code = error.code()
    # Raised out here: the chain would carry the peer's text.
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            raise TransportError(
                f"no agent answers at {socket_path}; start `silotune-client serve NODE.toml` and let this user open it"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TransportError(f"the agent at {socket_path} did not answer in time; its log says what it does")
        case grpc.StatusCode.RESOURCE_EXHAUSTED | grpc.StatusCode.INVALID_ARGUMENT:
            raise WireError(f"the agent at {socket_path} refused the frame: too long, or not whole")
        case _:
            raise RemoteError(f"the agent at {socket_path} failed ({code.name}); its log says why")
