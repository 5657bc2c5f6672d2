"""What a proxy does when one of its two ends stops in the middle; spoken to as uvicorn does."""

import asyncio
import json

import httpx
import pytest

from server.gateway import rules, settings
from server.gateway.connection import PEER
from server.gateway.limits import Buckets
from server.gateway.members import Members
from server.gateway.proxy import Gate, Proxy
from server.gateway.refusals import RefusalLog
from server.gateway.tls import Peer

PATH = "/v1/fleet/get-run"
PEER_STATE = {PEER: Peer("alder", "a" * 64, 2.0)}
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": PATH,
    "raw_path": PATH.encode(),
    "query_string": b"",
    "root_path": "",
}


class Pieces(httpx.AsyncByteStream):
    """An answer of one piece, and then what a test wants."""

    def __init__(self, then) -> None:
        self.then, self.is_closed = then, False

    async def __aiter__(self):
        yield b"first"
        await self.then()

    async def aclose(self) -> None:
        self.is_closed = True


def speak(folder, *, received, answer, timeout_s=0.2, endless=frozenset()):
    """Send one request and return what was sent back, and the reasons in the log."""
    log, sent = RefusalLog(folder / "log", wall_clock=lambda: 1.5, clock=lambda: 0.0), []
    limits = settings.LimitsConfig(exchange_timeout_s=timeout_s, body_timeout_s=0.1)
    gate = Gate("fleet", rules.FLEET_PATHS, 1000, lambda *_: None, {}, endless)

    async def receive():
        if received:
            return received.pop(0)
        return await asyncio.sleep(60)

    async def send(message) -> None:
        sent.append(message)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://superlink") as upstream:
            buckets = Buckets(per_s=1.0, burst=1, clock=lambda: 0.0)
            app = Proxy(gate, lambda: Members({}, frozenset()), buckets, limits, upstream, log, lambda: 1.5)
            headers = [(b"content-length", b"3")]
            await app({**SCOPE, "headers": headers, "state": PEER_STATE}, receive, send)

    asyncio.run(asyncio.wait_for(run(), 10))
    log.close()
    return sent, [json.loads(line)["reason"] for line in (folder / "log").read_text().splitlines()]


def body(*pieces: bytes) -> list[dict]:
    return [{"type": "http.request", "body": piece, "more_body": piece != pieces[-1]} for piece in pieces]


async def whole(request: httpx.Request) -> httpx.Response:
    await request.aread()
    return httpx.Response(200, content=b"never sent")


def test_a_caller_that_leaves_in_the_middle_of_its_body_is_no_refusal(tmp_path):
    received = [*body(b"a", b"b")[:1], {"type": "http.disconnect"}]
    assert speak(tmp_path, received=received, answer=whole) == ([], [])


def test_a_body_that_stops_is_told_and_closed(tmp_path):
    sent, reasons = speak(tmp_path, received=body(b"a", b"b")[:1], answer=whole, timeout_s=5.0)
    assert (sent[0]["status"], reasons) == (408, ["slow_body"])
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize("reason", ["slow_answer", "superlink"])
def test_an_answer_that_breaks_off_is_never_ended_as_if_it_were_whole(tmp_path, reason):
    async def then() -> None:
        if reason == "superlink":
            raise httpx.ReadError("reset")
        await asyncio.sleep(60)

    stream = Pieces(then)
    sent, reasons = speak(tmp_path, received=body(b"abc"), answer=lambda _: httpx.Response(200, stream=stream))
    assert reasons == [reason]
    assert [message.get("body") for message in sent] == [None, b"first"]
    assert sent[-1]["more_body"]
    assert stream.is_closed


def test_a_log_that_is_followed_may_take_longer_than_other_answers(tmp_path):
    stream = Pieces(lambda: asyncio.sleep(0.5))
    answer = httpx.Response(200, stream=stream)
    sent, reasons = speak(tmp_path, received=body(b"abc"), answer=lambda _: answer, endless=frozenset({PATH}))
    assert (reasons, sent[-1]["more_body"], stream.is_closed) == ([], False, True)
