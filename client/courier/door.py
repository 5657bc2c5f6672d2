"""The agent's door: a gRPC server on a Unix domain socket. The size limit holds before anything is parsed."""

import grp
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import grpc

from client.agent import sitelog
from client.courier.doorkeeper import Doorkeeper, making_socket
from client.courier.line import OPTIONS, join, pieces
from common.agent_pb2 import Chunk, HelloReply, HelloRequest
from common.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from common.errors import ConfigError, WireError
from common.frame import wire

MAX_CALLS: Final = 8  # at once, those that wait included
INNER_SUFFIX: Final = ".in"  # gRPC's own socket, mode 0600, behind the one that is knocked at
MAX_PATH_BYTES: Final = 107  # Linux, unix(7)
READ_S: Final = 60.0  # in which a whole frame must have come, over a socket of this machine
_POLL_S: Final = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """A running door."""

    server: grpc.Server
    keeper: Doorkeeper
    socket_path: Path

    def stop(self, grace_s: float | None) -> threading.Event:
        """Let nobody in any more, and end the running call within `grace_s`; the event is set once that is done."""
        self.keeper.close()
        self.socket_path.unlink(missing_ok=True)
        stopped: threading.Event = self.server.stop(grace_s)
        return stopped


def serve(
    answer: Callable[[bytes], bytes],
    *,
    socket_path: Path,
    max_message_bytes: int,
    courier_group: str = "",
    on_stranger: Callable[[int], None] = lambda user_id: None,
) -> Service:
    """Open the agent's door and return; the calls run in threads.

    Args:
        answer: Takes a frame, gives a frame; never called by two threads at once.
        socket_path: Where to listen: in a folder that nobody else may write to.
        max_message_bytes: Largest frame that is taken. A longer one is refused before it has come.
        courier_group: Unix group whose members may open the socket too, for a courier under another user; empty: only
            this user may.
        on_stranger: Told the user id of everybody who was sent away.

    Returns:
        The running door: `wait(service)` until a signal, or `service.stop(grace)`.

    Raises:
        ConfigError: The folder is missing or open to others, the path is too long or taken, an agent listens there, or
            there is no such group.
    """
    try:
        group_id = grp.getgrnam(courier_group).gr_gid if courier_group else None
    except KeyError as error:
        raise ConfigError(f"there is no group {courier_group!r}; create it, or remove agent.courier_group") from error
    inner = socket_path.with_name(socket_path.name + INNER_SUFFIX)
    check_folder(inner)
    for path in (socket_path, inner):
        _clear(path)
    server = grpc.server(ThreadPoolExecutor(MAX_CALLS), options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    add_AgentServicer_to_server(_Door(answer, max_message_bytes=max_message_bytes), server)
    credentials = grpc.local_server_credentials(grpc.LocalConnectionType.UDS)
    with making_socket(inner):
        server.add_secure_port(f"unix:{inner.absolute()}", credentials)
    server.start()
    keeper = Doorkeeper(socket_path, inner=inner, group_id=group_id, on_stranger=on_stranger)
    if group_id is not None:
        try:
            os.chown(socket_path, -1, group_id)
        except OSError as error:
            raise ConfigError(
                f"cannot give {socket_path} to group {courier_group!r}; is this user a member of it?"
            ) from error
        socket_path.chmod(0o660)
    return Service(server, keeper, socket_path)


def wait(running: Service, *, grace_s: float = 5.0) -> None:
    """Sleep until SIGTERM or SIGINT, then let the running call end within `grace_s` and close the door."""
    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stopped.wait()
    running.stop(grace_s).wait()


class _Door(AgentServicer):
    """The calls of `common/agent.proto`."""

    def __init__(self, answer: Callable[[bytes], bytes], *, max_message_bytes: int, read_s: float = READ_S) -> None:
        self._answer, self._read_s = answer, read_s
        self._max_message_bytes = max_message_bytes
        self._turn = threading.Lock()

    def Hello(self, request: HelloRequest, context: Any) -> HelloReply:
        """Answer at once, also while a call is worked on."""
        return HelloReply(wire_version=wire.VERSION, is_busy=self._turn.locked())

    def Exchange(self, request_iterator: Iterator[Chunk], context: Any) -> Iterator[Chunk]:
        """Wait for a turn, read within the limit, answer; so at most one frame is in memory."""
        while context.is_active():  # for as long as the caller is there
            if self._turn.acquire(timeout=_POLL_S):
                break
        else:
            return
        reply: bytes | None = None
        try:
            frame = self._read(request_iterator, context)
            try:
                reply = self._answer(frame)
            except Exception as error:  # noqa: BLE001 - gRPC would send the text, which may hold a row, to the peer
                _log.error("the agent raised %s at %s", type(error).__name__, ", ".join(sitelog.places(error)))
        finally:
            self._turn.release()
        if reply is None:
            context.abort(grpc.StatusCode.INTERNAL, "agent-failed")
            raise RuntimeError("gRPC aborts by raising")
        yield from pieces(reply)

    def _read(self, chunks: Iterator[Chunk], context: Any) -> bytes:
        """Join the pieces within the limit; only a code crosses if that fails."""
        late = threading.Timer(self._read_s, context.cancel)  # who begins a frame and does not go on loses the turn
        late.daemon = True
        late.start()
        try:
            return join(chunks, max_bytes=self._max_message_bytes)
        except WireError as error:
            _log.warning("refused a frame: %s", error)
        finally:
            late.cancel()
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad-frame")
        raise RuntimeError("gRPC aborts by raising")


def check_folder(socket_path: Path) -> None:
    """Refuse a folder in which another user could put a socket of the same name.

    Raises:
        ConfigError: It is missing or open to others, or the socket's path is too long.
    """
    folder = socket_path.absolute().parent
    if len(os.fsencode(socket_path.absolute())) > MAX_PATH_BYTES:
        raise ConfigError(f"{socket_path}: a socket's path may have {MAX_PATH_BYTES} bytes; choose a shorter folder")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; create it with mode 0700 for the agent's user")
    facts = folder.stat()
    if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{folder} is open to other users; the agent's socket needs a folder of its own, mode 0700")


def _clear(socket_path: Path) -> None:
    """Remove the socket that a dead process left; refuse anything else that is there."""
    if not (socket_path.exists() or socket_path.is_symlink()):
        return
    if not stat.S_ISSOCK(socket_path.lstat().st_mode):
        raise ConfigError(f"{socket_path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(socket_path)) == 0:
            raise ConfigError(f"an agent already listens on {socket_path}; stop it or choose another path")
    socket_path.unlink()
