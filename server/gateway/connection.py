"""Listeners: uvicorn's HTTP/1.1 protocol with a client certificate, deadlines and a cap on connections.

uvicorn tells an application nothing of the client's certificate. Here it is read from the transport when the handshake
is over and put into `scope["state"]`, so that it belongs to the connection and no header can set it.
"""

import asyncio
import socket
import ssl
from asyncio import sslproto
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import hosts
from server.gateway import tls
from server.gateway.limits import Seats
from server.gateway.refusals import RefusalLog
from server.gateway.settings import LimitsConfig
from server.gateway.tls import Peer

PEER: Final = "silotune_peer"
_STOP_S: Final = 3
_BACKLOG: Final = 256
_READ_BYTES: Final = 32 << 10  # of asyncio's 256 KiB, which a connection that was cut holds until the collector comes


@dataclass(frozen=True)
class Door:
    """What the connections of one listener share.

    Attributes:
        address: Host and port to listen on.
        seats: Open connections of each certificate.
    """

    name: str
    address: tuple[str, int]
    context: ssl.SSLContext
    limits: LimitsConfig
    seats: Seats
    log: RefusalLog


class Connection(H11Protocol):
    """One connection of a client that has shown its certificate."""

    def __init__(self, door: Door, **options: Any) -> None:
        super().__init__(**options)
        self._door = door
        self._peer: Peer | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the client's certificate, and cut a connection too many."""
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        peer = tls.peer_of(certificate)
        if not self._door.seats.take(peer.fingerprint):
            self._door.log.write(self._door.name, "connections", certificate=peer.name)
            transport.abort()
            return
        self._peer = peer
        self.app_state = {**self.app_state, PEER: peer}
        self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the seat back."""
        super().connection_lost(exc)
        self._stop_waiting()
        if self._peer is not None:
            self._door.seats.leave(self._peer.fingerprint)
            self._peer = None

    def data_received(self, data: bytes) -> None:
        """Drop what still comes on a connection that was cut."""
        if self._peer is not None:
            super().data_received(data)

    def handle_events(self) -> None:
        """Stop the header's clock when a request begins."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Start the header's clock: bytes of the next request do not stop it, only its whole header does."""
        self._wait_for_header()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Log what h11 refuses, too: bad framing, bad or contradicting lengths, headers that do not end."""
        self._refuse("malformed", status=400)
        super().send_400_response(msg)

    def _wait_for_header(self) -> None:
        """Start the clock."""
        self._stop_waiting()
        self._deadline = self.loop.call_later(self._door.limits.header_timeout_s, self._cut)

    def _stop_waiting(self) -> None:
        """Stop the clock."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        """Cut a connection whose next header has not come; one that is only idle is no refusal."""
        if self.conn.trailing_data[0]:
            self._refuse("slow_header")
            self.transport.abort()
        else:
            self.transport.close()

    def _refuse(self, reason: str, *, status: int = 0) -> None:
        """Log a refusal."""
        name = self._peer.name if self._peer is not None else ""
        self._door.log.write(self._door.name, reason, status=status, certificate=name)


class Listener(uvicorn.Server):
    """A server of uvicorn that opens its own socket, and leaves signals to whoever runs it."""

    def __init__(self, app: Any, door: Door) -> None:
        super().__init__(
            uvicorn.Config(  # without what a gateway does not need: no WebSockets, no proxy headers, no access log
                app,
                interface="asgi3",
                http=H11Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # what callers do wrong goes to the log of refusals
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, int(door.limits.header_timeout_s)),
                timeout_graceful_shutdown=_STOP_S,
                h11_max_incomplete_event_size=door.limits.header_kib << 10,
            )
        )
        self.servers: list[asyncio.base_events.Server] = []
        self._door = door

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit`; the port is free again whatever happens."""
        try:
            await super().serve(sockets)
        finally:
            for server in self.servers:
                server.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            ConfigError: The address cannot be used.
        """
        host, port = self._door.address
        sslproto.SSLProtocol.max_size = _READ_BYTES
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: Connection(self._door, config=self.config, server_state=self.server_state, app_state={}),
                host,
                port,
                ssl=self._door.context,
                ssl_handshake_timeout=self._door.limits.handshake_timeout_s,
                ssl_shutdown_timeout=_STOP_S,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise hosts.cannot_listen(host, port, error, options=f"{self._door.name}.listen") from error
        self.servers = [server]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: two servers share one process."""
        yield
