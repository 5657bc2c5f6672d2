"""Relays that write down what passes: one before an agent's socket, one before the SuperLink, where it ends TLS."""

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

_PIECE_BYTES = 1 << 16
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Ends]]
Serve = Callable[[Callable[..., Awaitable[None]]], Awaitable[asyncio.Server]]


@dataclass
class Record:
    """What passed, in plain text, one entry a connection.

    Attributes:
        out: From the side that holds rows: agent to courier, courier to SuperLink.
        back: The other way.
    """

    out: list[bytearray] = field(default_factory=list)
    back: list[bytearray] = field(default_factory=list)

    def sent(self) -> list[bytes]:
        """What the site's side sent."""
        return [bytes(one) for one in self.out]

    def all(self) -> list[bytes]:
        """Both ways."""
        return [bytes(one) for one in (*self.out, *self.back)]


@contextmanager
def before_socket(path: Path, target: Path) -> Iterator[Record]:
    """A Unix socket whose connections go on to an agent's; who connects is the courier."""
    record = Record()
    with _running(
        lambda accept: asyncio.start_unix_server(accept, path),
        lambda: asyncio.open_unix_connection(target),
        asked=record.back,
        answered=record.out,
    ):
        yield record


@contextmanager
def before_superlink(port: int, address: str, *, keys: Path) -> Iterator[Record]:
    """A TLS port on loopback with the SuperLink's own certificate; who connects is a courier's SuperNode."""
    near = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near.load_cert_chain(keys / "server.pem", keys / "server.key")
    far = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    host, far_port = address.split(":")
    record = Record()
    with _running(
        lambda accept: asyncio.start_server(accept, host, port, ssl=near),
        lambda: asyncio.open_connection(host, int(far_port), ssl=far),
        asked=record.out,
        answered=record.back,
    ):
        yield record


@contextmanager
def _running(serve: Serve, connect: Connect, *, asked: list[bytearray], answered: list[bytearray]) -> Iterator[None]:
    """Relay in a thread of its own until the block ends."""
    stop, started = threading.Event(), Queue[BaseException | None]()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ways = bytearray(), bytearray()
        asked.append(ways[0])
        answered.append(ways[1])
        with suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await connect()
            await _carry((reader, far_writer, ways[0]), (far_reader, writer, ways[1]))
        writer.close()

    async def relay() -> None:
        async with await serve(accept):
            started.put(None)
            await asyncio.to_thread(stop.wait)

    def work() -> None:
        try:
            asyncio.run(relay())
        except BaseException as error:
            started.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if (failure := started.get()) is not None:
        raise failure
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def _carry(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter, bytearray]) -> None:
    """Copy both ways until one ends; then both are closed."""
    tasks = [asyncio.create_task(_pump(*way)) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, (_, writer, _) in zip(tasks, ways, strict=True):
            task.cancel()
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray) -> None:
    """Write down, then pass on."""
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            record += piece
            writer.write(piece)
            await writer.drain()
