"""The courier's line to the agent: typed calls over a Unix domain socket. Imports no torch and no Flower."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import grpc

from common.agent_pb2 import Chunk, HelloRequest
from common.agent_pb2_grpc import AgentStub
from common.errors import ProtocolError, RemoteError, SilotuneError, TransportError, WireError

CHUNK_BYTES: Final = 1 << 20
OPTIONS: Final = (
    ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),  # of one piece, not of a frame
    ("grpc.enable_http_proxy", 0),
)
KINDS: Final = ("open", "train", "evaluate")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Hello:
    """What an agent tells about itself: the version of its frames, and whether it is working on one."""

    wire_version: int
    is_busy: bool


def call(socket_path: Path, kind: str, frame: bytes, timeout_s: float) -> bytes:
    """Let the agent answer one frame.

    Args:
        socket_path: Where the agent listens.
        kind: One of `KINDS`.
        frame: Opaque bytes.
        timeout_s: How long the answer may take, the wait for an earlier call included.

    Returns:
        The agent's frame, unread.

    Raises:
        ProtocolError: No such kind of call.
        TransportError: No agent listens there, or it did not answer in time.
        WireError: The frame is larger than the agent takes.
        RemoteError: The agent failed; its own log says why.
    """
    if kind not in KINDS:
        raise ProtocolError(f"the agent has no call for frames of kind {kind[:40]!r}; it knows {', '.join(KINDS)}")

    def exchange(stub: AgentStub) -> bytes:
        typed_call = {"open": stub.Open, "train": stub.Train, "evaluate": stub.Evaluate}[kind]
        return b"".join(chunk.data for chunk in typed_call(pieces(frame), timeout=timeout_s))

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
    """Cut a frame into chunks of at most `CHUNK_BYTES`."""
    for start in range(0, len(frame), CHUNK_BYTES):
        yield Chunk(data=frame[start : start + CHUNK_BYTES])


def _with_stub(socket_path: Path, use: Callable[[AgentStub], Result]) -> Result:
    """Open a channel, use it, close it; gRPC's errors become ours here and nowhere else."""
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    with grpc.secure_channel(f"unix:{socket_path.absolute()}", credentials, options=OPTIONS) as channel:
        try:
            return use(AgentStub(channel))
        except grpc.RpcError as error:
            raise _translated(error, socket_path=socket_path) from None  # the chain would carry the peer's text


def _translated(error: grpc.RpcError, *, socket_path: Path) -> SilotuneError:
    """Our error for a gRPC status; the peer's text is not repeated."""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return TransportError(
                f"no agent answers at {socket_path}; start `silotune-client serve NODE.toml` and let this user open it"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return TransportError(f"the agent at {socket_path} did not answer in time; its log says what it does")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return WireError(f"the agent at {socket_path} refused the frame's size")
        case code:
            return RemoteError(f"the agent at {socket_path} failed ({code.name}); its log says why")
