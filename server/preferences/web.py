"""Blind ranking in a browser: one page, its tasks one at a time, every answer on the disk before the next is sent.

The page needs nothing but this server. Whoever has the address with its token may rank; without the token every request
is refused. Texts are put into the page as text, never as markup. The key of the comparison is not known here.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from common import hosts
from common.errors import ConfigError, StorageError
from server.preferences.answers import CHOICES, Session
from server.preferences.files import Turns
from server.serve.trusted_hosts import TrustedHosts

PAGE: Final = Path(__file__).with_name("page.html")
MAX_BODY_BYTES: Final = 1000
LOOPBACK: Final = "127.0.0.1"
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Door:
    """Where a page is served.

    Attributes:
        host: Address or name to listen on.
        port: 0 takes a free one.
        certificate: PEM file; needed where others than this machine can reach the host.
        key: Its private key, PEM.
    """

    host: str = LOOPBACK
    port: int = 0
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--certificate and --key go together; give both, or neither")
        if not hosts.is_loopback(self.host) and self.certificate is None:
            raise ConfigError(
                f"--host {self.host}: others could read what is ranked on its way; give --certificate and --key, or "
                f"leave it at {LOOPBACK} and reach it through an SSH tunnel"
            )


def make(session: Session, *, token: str, host: str = LOOPBACK) -> Starlette:
    """Make the application of one rater's session.

    Args:
        session: Open; it is changed by the rater's answers.
        host: What the server listens on; requests that name another host are refused, so that no other site's page can
            reach a rater's machine under its own name.
    """
    page = PAGE.read_text(encoding="utf-8")
    hashes = []  # of the page's own style and script, beside which it gets nothing but what its server answers
    for tag in ("style", "script"):
        [body] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        hashes.append(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'")
    policy = (
        f"default-src 'none'; style-src {hashes[0]}; script-src {hashes[1]}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers={**HEADERS, "Content-Security-Policy": policy})

    async def state(request: Request) -> Response:
        return JSONResponse(state_of(session), headers=HEADERS)

    async def answer(request: Request) -> Response:
        given = await _json(request)
        number, choice = given.get("task"), given.get("answer")
        if type(number) is not int or choice not in CHOICES:
            raise HTTPException(400)
        return _changed(session, lambda: session.answer(number, choice))

    async def undo(request: Request) -> Response:
        if (await _json(request)).get("task") != session.last:
            return JSONResponse(state_of(session), status_code=409, headers=HEADERS)
        return _changed(session, session.undo)

    routes = [
        Route("/{token}/", _guarded(show, token)),
        Route("/{token}/state", _guarded(state, token)),
        Route("/{token}/answer", _guarded(answer, token), methods=["POST"]),
        Route("/{token}/undo", _guarded(undo, token), methods=["POST"]),
    ]
    names = [] if host in hosts.EVERYWHERE else [host, "localhost"] if hosts.is_loopback(host) else [host.lower()]
    app = Starlette(routes=routes, middleware=[Middleware(TrustedHosts, names=names)])
    app.router.redirect_slashes = False  # a redirect would tell which addresses there are
    return app


def state_of(session: Session) -> dict[str, Any]:
    """What the page shows: progress and the current task, and nothing of candidates or key."""
    task = session.current
    return {
        "num_tasks": len(session.tasks),
        "num_done": session.num_done,
        "last": session.last,
        "task": task
        and {
            "number": task.number,
            "prompt": _turns(task.prompt),
            "left": _turns(task.left),
            "right": _turns(task.right),
        },
    }


def serve(session: Session, *, door: Door, say: Callable[[str], None]) -> None:
    """Serve until stopped.

    Args:
        say: Told the address, which holds the token.

    Raises:
        ConfigError: The address cannot be listened on, or the certificate cannot be used.
    """
    token = secrets.token_urlsafe(24)
    config = uvicorn.Config(
        make(session, token=token, host=door.host),
        access_log=False,  # which would keep the token
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=2,
        ssl_certfile=door.certificate,
        ssl_keyfile=door.key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--certificate {door.certificate}, --key {door.key}: cannot be used ({error.strerror}); give PEM files "
            "that fit together"
        ) from error
    with hosts.listen(door.host, door.port, options="--host or --port") as listener:
        scheme = "https" if door.certificate else "http"
        name = socket.gethostname() if door.host in hosts.EVERYWHERE else hosts.in_url(door.host)
        say(f"{scheme}://{name}:{listener.getsockname()[1]}/{token}/")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


Endpoint = Callable[[Request], Awaitable[Response]]


def _guarded(endpoint: Endpoint, token: str) -> Endpoint:
    """Let nobody through without the token, and no page of another origin."""

    async def guard(request: Request) -> Response:
        if not hmac.compare_digest(request.path_params["token"].encode(), token.encode()):
            raise HTTPException(404)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403)
        return await endpoint(request)

    return guard


async def _json(request: Request) -> dict[str, Any]:
    """A small JSON object; a form, which other sites' pages can send without being asked, is refused."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413)
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400) from None
    if not isinstance(given, dict):
        raise HTTPException(400)
    return given


def _changed(session: Session, change: Callable[[], None]) -> Response:
    """Change the session and tell where it stands; 409 if the page was behind, 507 if the disk is full."""
    try:
        change()
    except ValueError:
        return JSONResponse(state_of(session), status_code=409, headers=HEADERS)
    except StorageError:
        raise HTTPException(507) from None
    return JSONResponse(state_of(session), headers=HEADERS)


def _turns(turns: Turns) -> list[dict[str, str]]:
    """Turns as JSON types."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
