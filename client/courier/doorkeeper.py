"""Who may come to the agent's socket, by what the kernel says of them; gRPC for Python cannot ask for it.

The doorkeeper listens where couriers knock, looks at the user and groups of each caller, and only then joins the
connection to gRPC's own socket beside it, which nobody but the agent's user can open.
"""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from common.errors import ConfigError

SO_PEERGROUPS: Final = 59  # linux/asm-generic/socket.h; Python's socket module has no name for it
MAX_CONNECTIONS: Final = 16
MAX_GROUPS: Final = 256  # what fits the largest answer that Python asks the kernel for; with more, nobody gets in
_PIECE_BYTES: Final = 1 << 18
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid of unix(7)
_GROUP: Final = struct.Struct("I")
_log = logging.getLogger(__name__)


class Doorkeeper:
    """Lets in this user, root, and the members of one group.

    Args:
        outer: Where to listen; made with mode 0600.
        inner: gRPC's own socket.
        group_id: Whose members come in, too; None: nobody's.
        on_stranger: Told the user id of everybody who was sent away.

    Raises:
        ConfigError: It cannot listen there.
    """

    def __init__(self, outer: Path, *, inner: Path, group_id: int | None, on_stranger: Callable[[int], None]) -> None:
        self._inner, self._group_id, self._on_stranger = inner, group_id, on_stranger
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            with making_socket(outer):
                self._listener.bind(str(outer.absolute()))
                self._listener.listen()
        except ConfigError:
            self._listener.close()
            raise
        threading.Thread(target=self._run, name="doorkeeper", daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more; who is in stays until gRPC ends."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        """Join each caller to gRPC, or send it away, until the listener is closed."""
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            try:
                user_id, group_ids = credentials(caller)
            except OSError:
                caller.close()
                _log.warning("sent a caller away whose user and groups the kernel does not tell")
                continue
            if user_id not in (0, os.getuid()) and self._group_id not in group_ids:
                caller.close()
                _log.warning("sent user id %d away from the socket", user_id)
                self._on_stranger(user_id)
            elif self._places.acquire(blocking=False):
                threading.Thread(target=self._join, args=(caller,), name="caller", daemon=True).start()
            else:
                caller.close()
                _log.warning("more than %d connections to the socket", MAX_CONNECTIONS)

    def _join(self, caller: socket.socket) -> None:
        """Carry bytes both ways until one side ends."""
        try:
            with caller, socket.socket(socket.AF_UNIX) as inner:
                inner.connect(str(self._inner))
                back = threading.Thread(target=_carry, args=(inner, caller), daemon=True)
                back.start()
                _carry(caller, inner)
                back.join()
        except OSError:
            _log.warning("a caller's connection ended early")
        finally:
            self._places.release()


def process(peer: socket.socket) -> tuple[int, int, int]:
    """Process, user and group id at the other end of a Unix socket, as they were when it connected or listened.

    Source: unix(7), SO_PEERCRED.
    """
    process_id, user_id, group_id = _CREDENTIALS.unpack(
        peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return process_id, user_id, group_id


def credentials(caller: socket.socket) -> tuple[int, set[int]]:
    """User id and group ids of the process that connected, as they were then.

    Source: socket(7), SO_PEERGROUPS.
    """
    _, user_id, group_id = process(caller)
    groups = caller.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS * _GROUP.size)
    return user_id, {group_id, *(number for (number,) in _GROUP.iter_unpack(groups))}


@contextmanager
def making_socket(path: Path) -> Iterator[None]:
    """Make a socket that has mode 0600 from the first moment: the umask holds meanwhile."""
    umask = os.umask(0o177)
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is gRPC's
        raise ConfigError(f"cannot listen on {path}; see the permissions of its folder") from error
    finally:
        os.umask(umask)


def _carry(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until the source ends, then end both."""
    with suppress(OSError):
        while data := source.recv(_PIECE_BYTES):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
