"""The newest signed roster: the link fetches it from the gateway and brings it to the agent, which judges it.

The link believes nothing in it. The agent has no network; it takes the bytes over its socket and holds them against the
governance that it pinned (`client/join/membership.py`).
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h11

from client.courier import line
from client.courier.relay import End
from common.errors import AuthError, RemoteError, SilotuneError, StorageError, TransportError
from common.frame import wire
from common.frame.wire import Frame
from common.trust import governance, roster

EVERY_S: Final = 30.0
FETCH_S: Final = 60.0  # for a whole answer, on a slow line too
BRING_S: Final = 20.0
MAX_BYTES: Final = governance.MAX_FILE_BYTES
_log = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@dataclass
class Messenger:
    """Brings a roster whenever the gateway has another one.

    Attributes:
        connect: Opens a connection to the gateway, with this site's certificate.
        known: SHA-256 of the roster file that was fetched last; empty before the first.
        waiting: That file, until the agent has judged it.
        trouble: The last warning that was logged, so that each is logged once.
    """

    agent: Path
    connect: Connect
    host: str
    known: str = ""
    waiting: bytes = b""
    trouble: str = ""

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Fetch, and bring what is new; a failure is logged once, and the next look tries again."""
        trouble = ""
        try:
            async with asyncio.timeout(FETCH_S):
                data = await fetch(self.connect, host=self.host, known=self.known)
            if data:
                self.waiting, self.known = data, hashlib.sha256(data).hexdigest()
            if self.waiting:
                is_judged = await asyncio.to_thread(bring, self.agent, self.waiting)
                self.waiting = b"" if is_judged else self.waiting
        except SilotuneError as error:
            trouble = str(error)
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            trouble = f"the gateway did not give the roster ({type(error).__name__})"
        if trouble and trouble != self.trouble:
            _log.warning("%s; trying again every %g s", trouble, EVERY_S)
        self.trouble = trouble


async def fetch(connect: Connect, *, host: str, known: str) -> bytes:
    """Ask the gateway for its roster.

    Args:
        known: SHA-256 of the roster file that is here.

    Returns:
        The file, unchecked; empty if it is the one that is here.

    Raises:
        AuthError: The gateway refuses, or its answer is larger than a roster may be.
        OSError: The connection was cut.
        h11.ProtocolError: The answer is no HTTP.
    """
    reader, writer = await connect()
    end = End(reader, writer, h11.Connection(h11.CLIENT))
    headers = [("host", host), ("content-length", "0"), ("connection", "close"), (roster.KNOWN, known or "none")]
    try:
        await end.send(h11.Request(method="POST", target=roster.PATH, headers=headers))
        await end.send(h11.EndOfMessage())
        answer, data = await end.next(), bytearray()
        if not isinstance(answer, h11.Response) or answer.status_code not in (200, 204):
            status = answer.status_code if isinstance(answer, h11.Response) else "an end"
            raise AuthError(f"the gateway answers {status} where the roster should be; is it of this release?")
        while isinstance(event := await end.next(), h11.Data):
            data += event.data
            if len(data) > MAX_BYTES:
                raise AuthError(f"the gateway's roster is above {MAX_BYTES} bytes; it was not taken")
        if not isinstance(event, h11.EndOfMessage):
            raise AuthError("the gateway's roster did not come whole")
        return bytes(data)
    finally:
        writer.transport.abort()


def bring(agent: Path, data: bytes) -> bool:
    """Let the agent judge a roster.

    Returns:
        Whether it has: it took the roster or refused it, and need not see it again. False while it is at work.

    Raises:
        TransportError: It is not there, or this user may not open its socket.
        StorageError: It could not write the roster.
        WireError: Its answer is malformed, or the roster is longer than what it takes.
    """
    if line.hello(agent).is_busy:
        return False
    try:
        answer = line.call(agent, roster.KIND, wire.pack(Frame(roster.KIND, {}, data)), BRING_S)
        taken = wire.expect(answer, "taken", max_body_bytes=0)
    except RemoteError as error:
        if error.code == StorageError.__name__:
            raise StorageError("the agent could not write the newest roster; its log says why") from error
        if not error.code:
            raise TransportError(f"the agent did not judge the newest roster: {error}") from error
        _log.error("the agent refused the gateway's roster: %s, reference %s", error.code, error.reference)
        return True
    _log.warning("the agent has the roster of epoch %s", wire.shown(taken.head.get("epoch")))
    return True
