"""A site whose agent is asked as a courier asks it: over its Unix socket, by the product's own service and line."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from client.courier import door, line
from common.errors import WireError
from common.frame import wire
from common.frame.exchanges import EXCHANGES
from common.trust import roster
from tests.samples import vault

TIMEOUT_S = 60.0


@dataclass
class Running(vault.Vault):
    """Serves until `stop`; an agent that was started anew answers at the same door."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.place = Path(tempfile.mkdtemp(prefix="silotune-"))  # short: a socket's path has 107 bytes at most
        self.door = door.serve(
            lambda frame: self.agent.answer(frame), socket_path=self.place / "agent.sock", max_message_bytes=vault.MAX
        )

    def send(self, data: bytes) -> bytes:
        """What comes back through the socket."""
        return line.call(self.door.socket_path, _kind(data), data, TIMEOUT_S)

    def stop(self) -> None:
        """Close the door."""
        self.door.stop(None).wait()
        shutil.rmtree(self.place)


def _kind(data: bytes) -> str:
    """The call that a courier would make of a frame; of one that is none, any."""
    try:
        kind = wire.unpack(data, max_body_bytes=vault.MAX).kind
    except WireError:
        return "train"
    return kind if kind in (*EXCHANGES, roster.KIND) else "train"
