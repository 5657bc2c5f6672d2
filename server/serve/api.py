"""The endpoint: `/v1/models`, `/v1/chat/completions` and `/v1/completions`, one answer at a time.

Requests wait in a queue of a set length; a request to a full queue is answered with 429. No request is logged.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.serve.engine import Answer, Models, Sampling
from server.serve.requests import ChatRequest, Refused, TextRequest, parse
from server.serve.trusted_hosts import TrustedHosts

MAX_IDLE: Final = 32  # connections without a request
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Limits:
    """What one client can make this process do.

    Attributes:
        body_kib: Largest body of a request.
        body_timeout_s: In which it must have arrived.
        max_tokens: Most tokens of an answer.
        queue: Requests that may wait behind the one that is answered.
        request_timeout_s: After which an answer is cut off, its wait included.
    """

    body_kib: int = 1024
    body_timeout_s: float = 30.0
    max_tokens: int = 1024
    queue: int = 16
    request_timeout_s: float = 600.0


@dataclass(frozen=True)
class Job:
    """A request that can be answered.

    Attributes:
        model: The adapter's name, or the base's.
        is_chat: Which of the two forms.
        is_stream: Whether pieces are sent as they come.
        with_usage: Whether a stream ends with the counts.
    """

    model: str
    ids: list[int]
    sampling: Sampling
    is_chat: bool
    is_stream: bool
    with_usage: bool


class Caller(H11Protocol):
    """One connection; of those that ask nothing only so many stay, and the oldest goes first.

    uvicorn counts idle connections with all others and refuses everybody when there are enough of them.
    """

    idle: ClassVar[dict["Caller", None]] = {}  # in the order in which they fell idle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._fall_idle()

    def handle_events(self) -> None:
        """Busy from a request's whole header on."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle.pop(self, None)

    def on_response_complete(self) -> None:
        """Idle again."""
        self._fall_idle()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone."""
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def _fall_idle(self) -> None:
        """Take a place among the idle; the oldest of too many is cut."""
        self.idle.pop(self, None)
        self.idle[self] = None
        if len(self.idle) > MAX_IDLE:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.abort()


class Line:
    """The queue: one at a time, a set number behind it."""

    def __init__(self, length: int) -> None:
        self._length, self._present, self._lock = length, 0, asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for one's turn.

        Raises:
            Refused: The queue is full.
        """
        if self._present > self._length:
            raise Refused("too many requests are waiting; try again later", status=429, kind="rate_limit_error")
        self._present += 1
        try:
            async with self._lock:
                yield
        finally:
            self._present -= 1


class Api:
    """Routes over one set of models."""

    def __init__(self, models: Models, limits: Limits, *, api_key: str = "") -> None:
        self._models, self._limits, self._api_key = models, limits, api_key
        self._line = Line(limits.queue)
        self._started_s = int(time.time())

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self._check_key(request)
        facts = {"object": "model", "created": self._started_s, "owned_by": "silotune"}
        return JSONResponse({"object": "list", "data": [{"id": name, **facts} for name in self._models.names]})

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = parse(await self._body(request), ChatRequest)
        ids = await run_in_threadpool(self._models.chat_ids, asked.model, asked.messages)
        return await self._respond(self._job(asked, ids))

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = parse(await self._body(request), TextRequest)
        ids = await run_in_threadpool(self._models.text_ids, asked.model, asked.text)
        return await self._respond(self._job(asked, ids))

    def _check_key(self, request: Request) -> None:
        """The bearer token, where one is needed; compared in constant time."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key and not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise Refused("the API key is missing or wrong", status=401, kind="authentication_error")

    async def _body(self, request: Request) -> bytes:
        """A body of JSON within its limit; a web page cannot send that type across origins without asking first."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("content-type must be application/json", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body_kib << 10:
                        raise Refused(f"the body is larger than {self._limits.body_kib} KiB", status=413)
        except TimeoutError:
            raise Refused(f"the body took longer than {self._limits.body_timeout_s} s", status=408) from None
        return bytes(body)

    def _job(self, asked: ChatRequest | TextRequest, ids: list[int]) -> Job:
        """A request against the limits.

        Raises:
            Refused: More tokens are asked for than are allowed, or than the model has room for.
        """
        room = self._models.max_tokens - len(ids)
        if not ids or room < 1:
            raise Refused(f"the prompt has {len(ids)} tokens; 1 to {self._models.max_tokens - 1} are possible")
        if asked.limit and asked.limit > min(room, self._limits.max_tokens):
            most = min(room, self._limits.max_tokens)
            raise Refused(f"max_tokens: {asked.limit} are asked for, {most} are possible after this prompt")
        limit = asked.limit or min(room, self._limits.max_tokens)
        temperature = 1.0 if asked.temperature is None else asked.temperature
        sampling = Sampling(limit, temperature, asked.top_p or 1.0, asked.seed, asked.stops)
        options = asked.stream_options
        if options and options.include_usage and not asked.stream:
            raise Refused("stream_options: only for a stream")
        is_chat = isinstance(asked, ChatRequest)
        return Job(asked.model, ids, sampling, is_chat, bool(asked.stream), bool(options and options.include_usage))

    async def _respond(self, job: Job) -> Response:
        """The whole answer, or a stream whose place in the queue is taken before its headers are sent."""
        answer = Answer(len(job.ids))

        async def pieces() -> AsyncIterator[str]:
            steps: Iterator[str] = self._models.answer(job.model, job.ids, job.sampling, answer)
            try:
                async with asyncio.timeout(self._limits.request_timeout_s), self._line.turn():
                    async for piece in iterate_in_threadpool(steps):
                        yield piece
            except TimeoutError:
                raise Refused("the answer took too long", status=503, kind="server_error") from None

        if job.is_stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(_events(job, answer, pieces()), media_type="text/event-stream", headers=headers)
        text = "".join([piece async for piece in pieces()])
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if job.is_chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": answer.finish, "logprobs": None}
        return JSONResponse(_head(job) | {"choices": [choice], "usage": _usage(answer)})


async def _events(job: Job, answer: Answer, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Server-sent events; what fails once they have begun is one of them."""
    head = _head(job, "chunk")
    try:
        if job.is_chat:
            yield _event(head | {"choices": [_choice(job, {"role": "assistant", "content": ""})]})
        async for piece in pieces:
            yield _event(head | {"choices": [_choice(job, {"content": piece})]})
    except Refused as refused:
        yield _event(_error(refused))
        return
    yield _event(head | {"choices": [_choice(job, {}, finish=answer.finish)]})
    if job.with_usage:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def application(models: Models, limits: Limits, *, api_key: str = "", names: Collection[str] = LOOPBACK) -> Starlette:
    """The endpoint as an ASGI application.

    Args:
        api_key: Bearer token that every request must bear; empty: none.
        names: Hosts by which it may be addressed, so that no web page reaches it by a name of its own; empty: any.
    """
    api = Api(models, limits, api_key=api_key)

    async def on_refused(request: Request, error: Any) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(_error(error), status_code=error.status, headers=headers)

    async def on_http(request: Request, error: Any) -> Response:  # no such path or method
        return JSONResponse(_error(Refused(str(error.detail))), status_code=error.status_code)

    return Starlette(
        routes=[
            Route("/v1/models", api.list_models, methods=["GET"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHosts, names=names)],
        exception_handlers={Refused: on_refused, HTTPException: on_http},
    )


def _error(refused: Refused) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": str(refused), "type": refused.kind, "param": None, "code": None}}


def _head(job: Job, form: str = "") -> dict[str, Any]:
    """What every object of one answer begins with."""
    kind, prefix = ("chat.completion", "chatcmpl") if job.is_chat else ("text_completion", "cmpl")
    kind = f"{kind}.{form}" if form and job.is_chat else kind
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": job.model}


def _choice(job: Job, delta: dict[str, str], *, finish: str | None = None) -> dict[str, Any]:
    """One piece of a stream."""
    content: dict[str, Any] = {"delta": delta} if job.is_chat else {"text": delta.get("content", "")}
    return {"index": 0, **content, "finish_reason": finish, "logprobs": None}


def _usage(answer: Answer) -> dict[str, int]:
    """Counts of tokens."""
    total = answer.num_prompt_tokens + answer.num_tokens
    counts = {"prompt_tokens": answer.num_prompt_tokens, "completion_tokens": answer.num_tokens}
    return counts | {"total_tokens": total}


def _event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
