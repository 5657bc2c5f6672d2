"""What was captured, as bytes to search: streams of a socket put together again, and files with all that is in them."""

import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.agent_pb2 import Chunk
from common.frame import wire

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME = struct.Struct("<4sHIQ")  # of ours, as common/frame/wire.py lays it out
_HTTP2_HEADER_BYTES = 9
_DATA, _PADDED = 0, 8
_SQLITE = b"SQLite format 3\x00"
_WAL_MAGIC, _WAL_HEADER_BYTES, _WAL_FRAME_BYTES = b"\x37\x7f\x06", 32, 24
_POINTER_BYTES = 4  # at the start of a page: the number of the page on which a long value goes on


def of_grpc(stream: bytes) -> Iterator[bytes]:
    """One way of a gRPC connection: headers and the like as they are, each call's frame with its pieces joined."""
    bodies: dict[int, bytes] = {}
    for kind, number, payload in _http2(stream):
        if kind == _DATA:
            bodies[number] = bodies.get(number, b"") + payload
        else:
            yield payload
    for body in bodies.values():
        yield b"".join(_pieces(body))


def _http2(stream: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, stream and payload of each HTTP/2 frame; of one that a closed connection cut, what came."""
    at = len(_PREFACE) if stream.startswith(_PREFACE) else 0
    while at + _HTTP2_HEADER_BYTES <= len(stream):
        size, kind, flags = int.from_bytes(stream[at : at + 3], "big"), stream[at + 3], stream[at + 4]
        number = int.from_bytes(stream[at + 5 : at + 9], "big")
        at += _HTTP2_HEADER_BYTES + size
        payload = stream[at - size : at]
        if kind == _DATA and flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        yield kind, number, payload


def _pieces(body: bytes) -> Iterator[bytes]:
    """The pieces of a frame, as `client.courier.line` cuts it; a compressed one would be missed, so it is an error."""
    at = 0
    while at + 5 <= len(body):
        is_compressed, size = struct.unpack_from(">BI", body, at)
        if is_compressed:
            raise ValueError("gRPC compressed a message; the capture cannot read it")
        yield Chunk.FromString(body[at + 5 : at + 5 + size]).data
        at += 5 + size


def of_folder(folder: Path) -> Iterator[bytes]:
    """Every file below a folder, its name included; SQLite's also by value and by page."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield str(path).encode() + b"\n" + data
        if data.startswith(_SQLITE):
            yield b"".join(_pages(data))
            yield from _values(path)
        if data.startswith(_WAL_MAGIC):
            yield b"".join(_logged_pages(data))


def _pages(data: bytes) -> Iterator[bytes]:
    """A database's pages, deleted ones included, without what would cut a long value at the end of each."""
    size = int.from_bytes(data[16:18], "big")
    size = 1 << 16 if size == 1 else size
    return (data[at + _POINTER_BYTES : at + size] for at in range(0, len(data), size))


def _logged_pages(data: bytes) -> Iterator[bytes]:
    """The same of a write-ahead log."""
    size = _WAL_FRAME_BYTES + int.from_bytes(data[8:12], "big")
    first = _WAL_HEADER_BYTES + _WAL_FRAME_BYTES
    return (data[at + _POINTER_BYTES : at + size - _WAL_FRAME_BYTES] for at in range(first, len(data), size))


def _values(path: Path) -> Iterator[bytes]:
    """Every value in a database that nobody has open, one by one."""
    database = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for name in names:
        for row in database.execute(f'SELECT * FROM "{name}"'):
            yield b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in row)
    database.close()


def copy(folder: Path, into: Path) -> None:
    """A folder as it is now; a database also as those see it who have it open."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data)
        if data.startswith(_SQLITE):
            _back_up(path, target.with_suffix(".seen"))


def _back_up(path: Path, into: Path) -> None:
    """A consistent copy of a database in use, its write-ahead log worked in."""
    source, target = sqlite3.connect(path), sqlite3.connect(into)
    source.backup(target)
    source.close()
    target.close()


def frames(captured: Iterable[bytes]) -> set[str]:
    """Digests of the whole frames of ours in captured bytes; says that the capture saw what crossed."""
    return {wire.digest_of(frame) for data in captured for frame in _frames(data)}


def _frames(data: bytes) -> Iterator[bytes]:
    """Whatever begins like a frame and is as long as it says."""
    at = data.find(wire.MAGIC)
    while at >= 0:
        if at + _FRAME.size <= len(data):
            _, _, head_bytes, body_bytes = _FRAME.unpack_from(data, at)
            end = at + wire.OVERHEAD_BYTES + head_bytes + body_bytes
            if end <= len(data):
                yield data[at:end]
        at = data.find(wire.MAGIC, at + 1)
