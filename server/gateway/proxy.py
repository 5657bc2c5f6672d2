"""One request: who asks, for what, how much; then on to the SuperLink, piece by piece, and the answer back.

Nothing of a request reaches the SuperLink before its path, its headers, its certificate and its node key have passed.
The body is counted while it flows and never held, but for a run's start, whose bundle is checked.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common.errors import SilotuneError, StorageError
from common.trust import roster
from server.gateway import rules, standing
from server.gateway.connection import PEER
from server.gateway.limits import Buckets
from server.gateway.members import Members, Site
from server.gateway.refusals import RefusalLog, Refused
from server.gateway.replies import Replies
from server.gateway.rules import Body, Headers
from server.gateway.settings import LimitsConfig
from server.gateway.tls import Peer

_CONNECT_S: Final = 5.0
_LINGER_S: Final = 1.0
_LINGER_BYTES: Final = 1 << 20
_MAX_NOTED_BYTES: Final = 4 << 20  # of an answer that the gateway reads itself
_MAX_UPSTREAM: Final = 256
_KEEP_S: Final = 3.0  # less than the SuperLink keeps an idle connection


@dataclass(frozen=True)
class Gate:
    """What one listener lets through.

    Attributes:
        max_body_bytes: Largest request; of paths that carry no piece of an array, `rules.MAX_SMALL_BODY_BYTES`.
        check_peer: Takes headers, fingerprint and members; returns the caller's name in the roster, or raises Refused.
        check_body: For a path, what checks and may rewrite a whole body, given the caller's name; other bodies are
            passed on as they come.
        endless: Paths whose answers may take as long as they like.
        replies: What each caller may leave at the SuperLink; None where callers leave nothing.
    """

    name: str
    paths: frozenset[str]
    max_body_bytes: int
    check_peer: Callable[[Headers, str, Members], str]
    check_body: Mapping[str, Callable[[str, bytes], bytes]]
    endless: frozenset[str]
    replies: Replies | None = None


@dataclass
class Call:
    """A request that may pass.

    Attributes:
        name: Of the caller, in the roster.
        max_body_bytes: Largest that is let through.
        num_spent: Bytes counted against what the caller was asked for.
    """

    path: str
    name: str
    body: Body
    max_body_bytes: int
    num_spent: int = 0


@dataclass(frozen=True)
class Proxy:
    """The ASGI application of one listener.

    Attributes:
        members: Gives those who may connect now.
        upstream: Client of the SuperLink; see `connect`.
        wall_clock: Seconds since 1970.
    """

    gate: Gate
    members: Callable[[], Members]
    buckets: Buckets
    limits: LimitsConfig
    upstream: httpx.AsyncClient
    log: RefusalLog
    wall_clock: Callable[[], float]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        async with AsyncExitStack() as stack:
            try:
                response = await self._answer(request, stack)
            except Refused as refusal:
                self._log(request, refusal)
                await _refuse(refusal, receive, send)
            except ClientDisconnect:
                return
            else:
                # If the body breaks off, uvicorn closes the connection, so that nobody takes it for whole.
                try:
                    async with asyncio.timeout(self._time_s(scope["path"])):
                        await response(scope, receive, send)
                except (httpx.HTTPError, TimeoutError) as error:
                    reason = "slow_answer" if isinstance(error, TimeoutError) else "superlink"
                    self._log(request, Refused(0, reason))

    def _time_s(self, path: str) -> float | None:
        """How long an answer on a path may take."""
        return None if path in self.gate.endless else self.limits.exchange_timeout_s

    async def _answer(self, request: Request, stack: AsyncExitStack) -> Response:
        """Check a request, pass it on, and return the answer, whose body is yet to come."""
        call = self._check(request)
        try:
            async with asyncio.timeout(self.limits.exchange_timeout_s):
                if call.path == roster.PATH:
                    return standing.newest_roster(request.scope["headers"], known=self._members())
                if call.path == roster.STANDING_PATH:
                    return await standing.tell(self.upstream, self._site(request))
                return await self._forward(request, call, stack)
        except TimeoutError:
            raise Refused(504, "slow_exchange") from None

    def _check(self, request: Request) -> Call:
        """Apply the rules that need no body; raises Refused."""
        peer: Peer = request.scope["state"][PEER]
        headers = request.scope["headers"]
        if not self.buckets.take(peer.fingerprint):
            raise Refused(503, "rate")  # 503 and not 429: Flower tries again after 502, 503 and 504 only
        if self.wall_clock() > peer.expires_at:
            raise Refused(403, "expired")
        path = rules.check_path(
            request.method, request.scope["raw_path"], request.scope["query_string"], allowed=self.gate.paths
        )
        most = rules.max_body_bytes(path, self.gate.max_body_bytes)
        body = rules.check_headers(headers, max_bytes=self.limits.header_kib << 10, max_body_bytes=most)
        if path in rules.SITE_PATHS:
            return Call(path, self._site(request).name, body, 0)
        name = self.gate.check_peer(headers, peer.fingerprint, self._members())
        return Call(path, name, body, most)

    def _site(self, request: Request) -> Site:
        """The site that calls, by its certificate; raises Refused."""
        peer: Peer = request.scope["state"][PEER]
        return rules.check_certificate(peer.fingerprint, known=self._members())

    def _members(self) -> Members:
        """Those who may connect now; nobody while the files cannot be read."""
        try:
            return self.members()
        except SilotuneError as error:
            raise Refused(503, "members_unreadable") from error

    async def _pieces(self, request: Request, call: Call) -> AsyncIterator[bytes]:
        """The body as it comes, up to the cap, and of an answer's pieces up to what the caller was asked for."""
        size_bytes = 0
        counted = self.gate.replies if call.path == rules.PUSH_OBJECT else None
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout(self.limits.body_timeout_s):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise Refused(408, "slow_body") from None
            if piece is None:
                return
            size_bytes += len(piece)
            if size_bytes > call.max_body_bytes:
                raise Refused(413, "body_size")
            if counted:
                counted.spend(call.name, len(piece))
                call.num_spent += len(piece)
            if piece:
                yield piece

    async def _forward(self, request: Request, call: Call, stack: AsyncExitStack) -> Response:
        """Send a request to the SuperLink; the connection is closed with the stack."""
        path = call.path
        content: bytes | AsyncIterator[bytes] = self._pieces(request, call)
        size_bytes = call.body.size_bytes
        check = self.gate.check_body.get(path)
        if check or path == rules.ACTIVATE_NODE:
            content = b"".join([piece async for piece in self._pieces(request, call)])
            content = check(call.name, content) if check else content
            size_bytes = len(content)
        headers = rules.forwarded(request.scope["headers"])
        if size_bytes is not None:
            headers.append((b"content-length", str(size_bytes).encode()))
        timeout = httpx.Timeout(self._time_s(path), connect=_CONNECT_S)
        outgoing = self.upstream.build_request("POST", path, headers=headers, content=content, timeout=timeout)
        is_kept = False
        try:
            answer = await self.upstream.send(outgoing, stream=True)
            if path == rules.ACTIVATE_NODE and answer.status_code == rules.UNKNOWN_NODE:
                await answer.aclose()
                await standing.register(self.upstream, self._site(request))
                answer = await self.upstream.send(outgoing, stream=True)
            is_kept = answer.status_code == 200
        except httpx.HTTPError as error:
            raise Refused(502, "superlink") from error
        finally:
            if call.num_spent and self.gate.replies and not is_kept:
                self.gate.replies.give_back(call.name, call.num_spent)
        stack.push_async_callback(answer.aclose)
        if answer.has_redirect_location or 300 <= answer.status_code < 400:
            raise Refused(502, "redirect")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(502, "compressed")  # nobody asked for that, and the header would not be handed on
        response: Response = StreamingResponse(answer.aiter_raw(), answer.status_code)
        if self.gate.replies and path == rules.PULL_MESSAGES and answer.status_code == 200:
            response = Response(await self._noted(answer, call.name, self.gate.replies))
        response.raw_headers = rules.returned(answer.headers.raw)
        return response

    async def _noted(self, answer: httpx.Response, name: str, replies: Replies) -> bytes:
        """Read the messages that are handed to a site, and note how much it may answer."""
        read = bytearray()
        try:
            async for piece in answer.aiter_raw():
                read += piece
                if len(read) > _MAX_NOTED_BYTES:
                    raise Refused(502, "superlink")
        except httpx.HTTPError as error:
            raise Refused(502, "superlink") from error
        try:
            replies.handed(name, bytes(read))
        except StorageError as error:
            raise Refused(503, "replies_unwritable") from error
        return bytes(read)

    def _log(self, request: Request, refusal: Refused) -> None:
        """Write one line."""
        peer: Peer = request.scope["state"][PEER]
        path = request.scope["raw_path"].decode("latin-1")
        shown = path if path in self.gate.paths else ""
        self.log.write(self.gate.name, refusal.reason, status=refusal.status, certificate=peer.name, path=shown)


def connect(address: str, *, context: ssl.SSLContext) -> httpx.AsyncClient:
    """Make the client of a SuperLink: no redirects, no proxies, nothing from the environment."""
    return httpx.AsyncClient(
        base_url=f"https://{address}",
        verify=context,
        follow_redirects=False,
        trust_env=False,
        limits=httpx.Limits(max_connections=_MAX_UPSTREAM, keepalive_expiry=_KEEP_S),
    )


async def _refuse(refusal: Refused, receive: Receive, send: Send) -> None:
    """Answer with a code, read a little of what still comes so that the answer arrives, and close."""
    response = JSONResponse({"detail": refusal.reason}, refusal.status, headers={"connection": "close"})
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            size_bytes = 0
            while size_bytes < _LINGER_BYTES:
                message = await receive()
                size_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
