"""Hosts as people write them: which are this machine, how a URL writes them, and a socket that listens on one."""

import contextlib
import ipaddress
import socket
from typing import Final

from common.errors import ConfigError

EVERYWHERE: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104  compared, not listened on


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host; a name other than localhost is not looked up.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "::ffff:127.0.0.1")]
        [True, True, True, True]
        >>> [is_loopback(host) for host in ("0.0.0.0", "::", "127.0.0.1.example.org", "")]
        [False, False, False, False]
    """
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return host == "localhost"


def in_url(host: str) -> str:
    """A host as a URL writes it.

    Example:
        >>> in_url("::1"), in_url("127.0.0.1")
        ('[::1]', '127.0.0.1')
    """
    return f"[{host}]" if ":" in host else host


def of_header(value: str) -> str:
    """The host that a request's Host header names, without port and brackets.

    Example:
        >>> of_header("[::1]:8000"), of_header("LOCALHOST:8000"), of_header("127.0.0.1")
        ('::1', 'localhost', '127.0.0.1')
    """
    name = value[1:].partition("]")[0] if value.startswith("[") else value.partition(":")[0]
    return name.lower()


def listen(host: str, port: int, *, options: str) -> socket.socket:
    """Listen on the first address of a host, IPv4 or IPv6.

    Args:
        port: 0 takes a free one.
        options: What a message asks the caller to change.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise cannot_listen(host, port, error, options=options) from error


def cannot_listen(host: str, port: int, error: OSError, *, options: str) -> ConfigError:
    """The error of a host or port that cannot be listened on; arguments as for `listen`."""
    return ConfigError(f"cannot listen on {in_url(host)}:{port} ({error.strerror}); choose another with {options}")
