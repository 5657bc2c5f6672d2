"""One connection of the SuperNode as HTTP/1.1: requests out, answers back, and bundles checked on the way in."""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import h11

from client.courier import bundle
from common.errors import AuthError

PIECE_BYTES: Final = 1 << 16
MAX_ANSWER_BYTES: Final = 16 << 20  # Flower sends arrays in pieces of 5 MiB
_SPARE_S: Final = 1.0
_REFUSED: Final = h11.Response(status_code=403, headers=[("content-length", "0"), ("connection", "close")])
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class End:
    """One end of the tunnel: its streams, and how far its HTTP has got."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection

    async def next(self) -> object:
        """The next event of this end's HTTP."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(PIECE_BYTES))
        return event

    async def send(self, event: h11.Event) -> None:
        """Say something to this end."""
        if data := self.http.send(event):
            self.writer.write(data)
            await self.writer.drain()


async def carry(near: End, far: End, *, bundles: Collection[str]) -> None:
    """Carry requests and answers, one after the other, until an end closes.

    Args:
        near: The SuperNode.
        far: The gateway.
        bundles: SHA-256 of the bundles that may pass, hex.

    Raises:
        OSError: A connection was cut.
        h11.ProtocolError: An end does not speak HTTP/1.1.
    """
    while (request := await _request(near, far)) is not None:
        await far.send(request)
        sending = asyncio.create_task(_pass_body(near, far))  # the answer may come before the request has ended
        try:
            may_go_on = await _answer(request, near, far, bundles=bundles)
        finally:
            await asyncio.wait([sending], timeout=_SPARE_S)
            is_sent = sending.done() and sending.exception() is None
            sending.cancel()
        is_open = all(end.http.our_state is h11.DONE and end.http.their_state is h11.DONE for end in (near, far))
        if not (may_go_on and is_sent and is_open):
            return
        near.http.start_next_cycle()
        far.http.start_next_cycle()


async def _request(near: End, far: End) -> h11.Request | None:
    """The SuperNode's next request; None when an end has closed meanwhile."""
    asked, closed = asyncio.create_task(near.next()), asyncio.create_task(far.next())
    try:
        await asyncio.wait([asked, closed], return_when=asyncio.FIRST_COMPLETED)
        event = await asked if asked.done() and not closed.done() else None
    finally:
        for task in (asked, closed):
            task.cancel()
        await asyncio.gather(asked, closed, return_exceptions=True)
    return event if isinstance(event, h11.Request) else None


async def _answer(request: h11.Request, near: End, far: End, *, bundles: Collection[str]) -> bool:
    """Hand one answer on; returns whether the connection may go on."""
    response = await far.next()
    if not isinstance(response, h11.Response):
        return False
    if 300 <= response.status_code < 400:  # Flower would follow it, to any place
        return await _refuse(near, "a redirect")
    if request.target == bundle.PATH and response.status_code < 300:
        # A bundle is taken whole and checked before it is handed on.
        body = bytearray()
        while isinstance(event := await far.next(), h11.Data):
            body += event.data
            if len(body) > bundle.MAX_BYTES:
                return await _refuse(near, f"a bundle above {bundle.MAX_BYTES} bytes")
        try:
            answer = bundle.check(bytes(body), allowed=bundles)
        except AuthError as error:
            return await _refuse(near, str(error))
        headers = [("content-type", "application/protobuf"), ("content-length", str(len(answer)))]
        for part in (h11.Response(status_code=200, headers=headers), h11.Data(data=answer), h11.EndOfMessage()):
            await near.send(part)
        return True
    codings = [value for name, value in response.headers if name == b"content-encoding"]
    if any(value.strip().lower() != b"identity" for value in codings):  # Flower would unpack it, to any size
        return await _refuse(near, "a compressed answer")
    await near.send(response)
    if not await _pass_body(far, near, max_bytes=MAX_ANSWER_BYTES):
        _log.error("refused: an answer above %d bytes", MAX_ANSWER_BYTES)
        return False
    return True


async def _refuse(near: End, what: str) -> bool:
    """Answer the SuperNode with a refusal, and say so in this program's log."""
    _log.error("refused: %s", what)
    await near.send(_REFUSED)
    await near.send(h11.EndOfMessage())
    return False


async def _pass_body(source: End, target: End, *, max_bytes: int | None = None) -> bool:
    """Pass the rest of a message on, piece by piece; returns whether it was within its limit, if it has one."""
    num_bytes = 0
    while isinstance(event := await source.next(), h11.Data | h11.EndOfMessage):
        num_bytes += len(event.data) if isinstance(event, h11.Data) else 0
        if max_bytes is not None and num_bytes > max_bytes:
            return False
        await target.send(event)
        if isinstance(event, h11.EndOfMessage):
            break
    return True
