"""Refuse connections and look-ups beyond this machine, in this process; Python runs this file at every start.

`tests/guard.py` puts this folder on PYTHONPATH, so that children of a test are held to it as well. What is refused is
written to the file that SILOTUNE_NETGUARD_LOG names, as a library may swallow the error. Sockets that C code opens by
itself, such as gRPC's, are not seen.
"""

import os
import socket
import sys

LOG_KEY = "SILOTUNE_NETGUARD_LOG"
_HERE = ("", "localhost", "::1", "0.0.0.0", "::")


def _is_here(host):
    """Whether an address or name is this machine's loopback."""
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode(errors="replace")
    return host is None or host in _HERE or str(host).startswith("127.")


def _host(event, args):
    """The host that an audited call wants to reach; None if it reaches none."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = args[0], args[1]
        is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        return address[0] if is_internet and isinstance(address, tuple) else None
    return args[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else None


def _refuse(event, args):
    """Audit hook: raise and write down."""
    if not event.startswith("socket."):
        return
    host = _host(event, args)
    if _is_here(host):
        return
    with open(os.environ[LOG_KEY], "a") as log:
        log.write(f"{event} {host} by {sys.argv[:1]}\n")
    raise PermissionError(f"tests may not reach {host}")


if LOG_KEY in os.environ:
    sys.addaudithook(_refuse)
