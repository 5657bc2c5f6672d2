"""A dry handshake: one TLS connection and one request without effect, to learn how a gateway's listener answers.

No proxy is used but one that `dial` passes, and no redirect is followed; of the answer only its status, its date and a
refusal's one word are kept.
"""

import email.utils
import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from common.errors import AuthError, ConfigError, TransportError

MAX_BODY_BYTES: Final = 4096
REASON: Final = re.compile(r"[a-z_]{1,40}")
_HALF_S: Final = 0.5  # a Date header has whole seconds


Dial = Callable[[tuple[str, int], float], socket.socket]


@dataclass(frozen=True)
class Answer:
    """How a listener answered.

    Attributes:
        reason: The gateway's word for a refusal; empty where the answer is not the gateway's own.
        skew_s: This clock less the listener's, in seconds; None if it gave no date.
    """

    tls: str
    status: int
    reason: str
    skew_s: float | None


def ask(
    address: str,
    *,
    context: ssl.SSLContext,
    path: str,
    headers: Mapping[str, str],
    host: str = "",
    timeout_s: float = 10.0,
    clock: Callable[[], float] = time.time,
    dial: Dial = socket.create_connection,
) -> Answer:
    """Connect, send one POST without a body, and close.

    Args:
        address: `host:port`.
        host: Name that the listener's certificate must be for; empty: that of the address.
        dial: Opens the connection to a host and port, within so many seconds.

    Raises:
        ConfigError: The address is not host:port.
        TransportError: Nobody listens there, or it does not answer.
        AuthError: One side did not accept the other's certificate.
    """
    with _connected(address, context, host, timeout_s, dial) as secure:
        connection = http.client.HTTPConnection(host or split_address(address)[0])
        connection.sock = secure
        before = clock()
        connection.request("POST", path, body=b"", headers=dict(headers))
        response = connection.getresponse()
        skew_s = None
        with suppress(ValueError):
            there = email.utils.parsedate_to_datetime(response.getheader("date") or "").timestamp()
            skew_s = (before + clock()) / 2 - (there + _HALF_S)
        reason: object = ""
        with suppress(ValueError, TypeError, KeyError):
            reason = json.loads(response.read(MAX_BODY_BYTES))["detail"]
        is_word = isinstance(reason, str) and REASON.fullmatch(reason)
        return Answer(str(secure.version()), response.status, str(reason) if is_word else "", skew_s)


@contextmanager
def _connected(
    address: str, context: ssl.SSLContext, host: str, timeout_s: float, dial: Dial = socket.create_connection
) -> Iterator[ssl.SSLSocket]:
    """An open connection; whatever goes wrong on it becomes an error of ours."""
    name, port = split_address(address)
    try:
        with (
            dial((name, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host or name) as secure,
        ):
            yield secure
    except ssl.SSLCertVerificationError as error:
        raise AuthError(f"{address}: its certificate is not accepted: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise AuthError(f"{address}: TLS was ended: {error.reason or type(error).__name__}") from error
    except http.client.HTTPException as error:
        raise TransportError(f"{address}: closed the connection without an answer") from error
    except OSError as error:
        raise TransportError(f"{address}: no connection ({error.strerror or 'it does not answer'})") from error


def shake_hands(address: str, *, context: ssl.SSLContext, host: str = "", timeout_s: float = 10.0) -> str:
    """Connect and close; returns the version of TLS. With TLS 1.3 the other end judges our certificate only afterwards.

    Raises:
        ConfigError: The address is not host:port.
        TransportError: Nobody listens there.
        AuthError: Its certificate is not accepted, or it does not speak TLS.
    """
    with _connected(address, context, host, timeout_s) as secure:
        return str(secure.version())


def split_address(address: str) -> tuple[str, int]:
    """Take `host:port` apart.

    Example:
        >>> split_address("gate.example:9443"), split_address("[::1]:9443")
        (('gate.example', 9443), ('::1', 9443))
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address}: not an address; write host:port")
    return host.strip("[]"), int(port)
