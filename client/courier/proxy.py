"""The way to the gateway through an HTTP proxy: CONNECT, and from then on bytes pass as they are.

TLS is between link and gateway as without a proxy, so a proxy that opens it is refused by its certificate. Which proxy
is used says the site's own file alone; no environment variable is read.
"""

import base64
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import h11

from common import keyfile
from common.doctor import probe
from common.errors import ConfigError, TransportError
from common.frame.wire import shown
from common.run.config import LinkConfig

MAX_HEAD_BYTES: Final = 16 << 10
_PIECE_BYTES: Final = 4096
_CHALLENGE: Final = b"proxy-authenticate"
_FORBIDDEN, _NEEDS_PASSWORD, _UNREACHABLE = 403, 407, (502, 503, 504)


@dataclass(frozen=True)
class Proxy:
    """A proxy of the site's network.

    Attributes:
        password_file: Where `name:password` was read from; empty: none is shown to it.
    """

    host: str
    port: int
    password_file: str = ""
    credentials: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        return f"the proxy {_authority(self.host, self.port)}"


def of_site(settings: LinkConfig) -> Proxy | None:
    """The proxy that a site's own file names; None without one.

    Raises:
        ConfigError: Its file of name and password is open to others, or holds something else.
    """
    if not settings.proxy:
        return None
    host, port = probe.split_address(settings.proxy.removeprefix("http://").rstrip("/"))
    path = settings.proxy_auth_file
    if not path:
        return Proxy(host, port)
    credentials = keyfile.read(Path(path)).strip()
    if b":" not in credentials or any(byte < 32 for byte in credentials):
        raise ConfigError(f"{path}: must hold one line, NAME:PASSWORD, for {settings.proxy}")
    return Proxy(host, port, path, credentials)


def connect(
    proxy: Proxy, target: tuple[str, int], *, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> socket.socket:
    """Open a tunnel to a host and port; nothing has been sent through it yet.

    Args:
        target: Host, whose name the proxy looks up, and port.
        timeout_s: For all of it, however slowly the proxy answers.

    Raises:
        TransportError: There is no tunnel; the message says what the proxy did, and what to do.
    """
    deadline = clock() + timeout_s
    try:
        opened = socket.create_connection((proxy.host, proxy.port), timeout=timeout_s)
    except OSError as error:
        raise TransportError(
            f"{proxy} cannot be reached ({error.strerror or 'it does not answer'}); check link.proxy in the site's "
            "file, and that this machine may connect to it"
        ) from error
    try:
        _ask(opened, proxy, target, lambda: deadline - clock())
    except TimeoutError as error:
        opened.close()
        raise TransportError(
            f"{proxy} did not open a tunnel within {timeout_s:g} s; check link.proxy, and ask its administrator "
            f"whether it may reach {_authority(*target)}"
        ) from error
    except (OSError, h11.RemoteProtocolError) as error:
        opened.close()
        raise TransportError(
            f"{proxy} closed the connection, or does not answer as an HTTP proxy does; check host and port of "
            "link.proxy: it must be an HTTP proxy that takes CONNECT without TLS to itself"
        ) from error
    except TransportError:
        opened.close()
        raise
    opened.settimeout(None)
    return opened


def _ask(opened: socket.socket, proxy: Proxy, target: tuple[str, int], left_s: Callable[[], float]) -> None:
    """Ask for the tunnel, and read the answer's head, which may be no longer than `MAX_HEAD_BYTES`."""
    http, name = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES), _authority(*target)
    headers = [("Host", name)]
    if proxy.credentials:
        headers.append(("Proxy-Authorization", f"Basic {base64.b64encode(proxy.credentials).decode('ascii')}"))
    request = h11.Request(method="CONNECT", target=name, headers=headers)
    opened.sendall((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while not isinstance(answer := http.next_event(), h11.Response):
        if answer is not h11.NEED_DATA:
            continue  # an answer of 1xx, after which the answer comes
        if (timeout_s := left_s()) <= 0:
            raise TimeoutError
        opened.settimeout(timeout_s)
        http.receive_data(opened.recv(_PIECE_BYTES))
    status = answer.status_code
    if status == _NEEDS_PASSWORD and proxy.credentials:
        raise TransportError(f"{proxy} does not take the name and password (407); correct {proxy.password_file}")
    if status == _NEEDS_PASSWORD:
        schemes = [value.decode("latin-1").partition(" ")[0] for key, value in answer.headers if key == _CHALLENGE]
        if schemes and all(scheme.lower() != "basic" for scheme in schemes):
            raise TransportError(
                f"{proxy} takes {shown(', '.join(schemes))} only (407), and the link knows Basic; ask its "
                f"administrator to let this machine connect to {name} without a password"
            )
        raise TransportError(
            f"{proxy} wants a name and a password (407); write NAME:PASSWORD into a file of mode 0600 and name it as "
            "link.proxy_auth_file"
        )
    if status == _FORBIDDEN:
        raise TransportError(f"{proxy} forbids a tunnel (403); ask its administrator to allow CONNECT to {name}")
    if status in _UNREACHABLE:
        raise TransportError(f"{proxy} does not reach {name} ({status}); check the address, and ask its administrator")
    if not 200 <= status < 300:
        raise TransportError(
            f"{proxy} answered {status} to CONNECT {name}; check link.proxy, and ask its administrator"
        )
    if http.trailing_data[0]:  # the gateway says nothing before it is spoken to
        raise h11.RemoteProtocolError("bytes that nobody asked for")


def _authority(host: str, port: int) -> str:
    """Host and port as a request names them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
