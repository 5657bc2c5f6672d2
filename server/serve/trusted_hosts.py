"""Requests that address this machine by a name that it does not go by are refused.

So no page of another site can reach a server on loopback under its own name (DNS rebinding). Starlette's middleware of
this kind cannot read an IPv6 address.
"""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common import hosts


class TrustedHosts:
    """ASGI middleware.

    Attributes:
        app: What answers requests that are let through.
        names: Hosts by which it may be addressed, in small letters and without brackets; empty: any.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 400."""
        is_known = not self.names or hosts.of_header(Headers(scope=scope).get("host", "")) in self.names
        answer: ASGIApp = self.app if is_known else PlainTextResponse("unknown host", status_code=400)
        await answer(scope, receive, send)
