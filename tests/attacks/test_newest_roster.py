"""How the newest roster comes to a site's agent: what the link makes of a gateway's answers, right ones and any others.

What a running gateway answers, and to whom, is in `test_gateway.py`.
"""

import asyncio
import logging

from client.courier import tunnel
from client.courier.newest_roster import MAX_BYTES, Messenger
from simulations.engines.deployment import HOST
from tests.samples.rosters import GOOD, changed, signed


async def look(messenger: Messenger, answers: list[bytes]) -> None:
    """Look as often as there are answers, of which each is the whole of what the gateway says."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()

    async with await asyncio.start_server(say, HOST, 0) as server:
        messenger.connect = lambda: asyncio.open_connection(*server.sockets[0].getsockname())
        while answers:
            await messenger.look()


def answer(body: bytes, *, length: int | None = None, status: int = 200) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} OK\r\ncontent-length: {size}\r\n\r\n".encode() + body


def test_answers_that_are_no_roster_are_told_once_and_the_next_good_one_is_taken(member, caplog):
    caplog.set_level(logging.WARNING)
    messenger = Messenger(member.door.socket_path, tunnel._open, HOST)
    bad = {
        "above 4194304 bytes": answer(bytes(MAX_BYTES + 1)),
        "ProtocolError": answer(b"{}", length=9),
        "answers 404": answer(b"", status=404),
        "answers 302": answer(b"", status=302),
        "(RemoteProtocolError)": b"SSH-2.0-x\r\n\r\n",
    }
    for told, data in bad.items():
        asyncio.run(look(messenger, [data, data]))
        assert caplog.text.count(told) == 1, told
        caplog.clear()
    assert member.log()[-1].kind != "refused"  # nothing of it reached the agent
    asyncio.run(look(messenger, [answer(signed(changed())), answer(b"", status=204)]))
    assert (member.log()[-1].kind, member.log()[-1].facts["epoch"]) == ("roster", 5)
    asyncio.run(look(messenger, [answer(signed(GOOD))]))
    assert (member.log()[-1].kind, member.log()[-1].facts["rule"]) == ("refused", "roster")


def test_a_roster_waits_for_an_agent_that_is_away(member, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    messenger = Messenger(tmp_path / "nobody.sock", tunnel._open, HOST)
    asyncio.run(look(messenger, [answer(signed(changed())), answer(b"", status=204)]))
    assert caplog.text.count("no agent answers") == 1
    messenger.agent = member.door.socket_path
    asyncio.run(look(messenger, [answer(b"", status=204)]))
    assert (member.log()[-1].kind, messenger.waiting) == ("roster", b"")
