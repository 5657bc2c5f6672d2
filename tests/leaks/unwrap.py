"""Undoes compression and encodings wherever they begin in captured bytes."""

import base64
import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow

MAX_STREAM_BYTES = 64 << 20
_PIECE_BYTES = 1 << 14
_ZIP_HEADER = struct.Struct("<4s5H3I2H")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-]{24,}(?:\r?\n[A-Za-z0-9+/_\-]+)*")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_HEX = re.compile(rb"[0-9a-fA-F]{32,}")
_WIDE = re.compile(rb"(?:[^\x00]\x00){12,}", re.DOTALL)
_SOFT_BREAKS = re.compile(rb"(?:[!-~ \t]{4,76}=\r?\n)+[!-~ \t]{0,76}")
_MAGICS: Mapping[str, tuple[bytes, Callable[[], Any]]] = {
    "gzip": (rb"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
    "zlib": (rb"\x78[\x01\x5e\x9c\xda]", zlib.decompressobj),
    "bz2": (rb"BZh[1-9]1AY&SY", bz2.BZ2Decompressor),
    "xz": (rb"\xfd7zXZ\x00", lzma.LZMADecompressor),
}


def _places(magic: bytes, data: bytes) -> Iterator[int]:
    """Where these bytes are; places may overlap."""
    return (match.start() for match in re.finditer(b"(?=" + magic + b")", data, re.DOTALL))


def _streams(magic: bytes, start: Callable[[], Any]) -> Callable[[bytes], Iterator[bytes]]:
    """What undoes every stream that begins with these bytes; half a stream gives what it holds."""
    return lambda data: (_decompress(start(), data, at) for at in _places(magic, data))


def _decompress(stream: Any, data: bytes, at: int) -> bytes:
    """Feed a decompressor in small pieces, as most places only look like a stream."""
    out = bytearray()
    try:
        while at < len(data) and not stream.eof and len(out) < MAX_STREAM_BYTES:
            out += stream.decompress(data[at : at + _PIECE_BYTES])
            at += _PIECE_BYTES
    except (zlib.error, lzma.LZMAError, OSError, EOFError):
        return bytes(out)
    return bytes(out)


def _zip(data: bytes) -> Iterator[bytes]:
    """Deflated entries of zip files, npz among them."""
    for at in _places(rb"PK\x03\x04", data):
        if at + _ZIP_HEADER.size <= len(data):
            *_, name_bytes, extra_bytes = _ZIP_HEADER.unpack_from(data, at)
            yield _decompress(zlib.decompressobj(wbits=-15), data, at + _ZIP_HEADER.size + name_bytes + extra_bytes)


def _zstd(data: bytes) -> Iterator[bytes]:
    """Zstandard frames; Python has no decompressor of its own before 3.14."""
    whole = pyarrow.py_buffer(data)
    for at in _places(rb"\x28\xb5\x2f\xfd", data):
        out = bytearray()
        try:
            stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(whole.slice(at)), "zstd")
            while len(out) < MAX_STREAM_BYTES and (piece := stream.read(1)):
                out += piece
        except OSError:
            pass
        yield bytes(out)


def _base64(data: bytes) -> Iterator[bytes]:
    """Runs of letters of base64, line breaks aside, read from each place within a group of four."""
    for match in _BASE64.finditer(data):
        letters = match[0].translate(_STANDARD, b"\r\n")
        for start in range(4):
            usable = letters[start : len(letters) - ((len(letters) - start) % 4 == 1)]
            yield base64.b64decode(usable + b"=" * (-len(usable) % 4))


def _hex(data: bytes) -> Iterator[bytes]:
    """Runs of hexadecimal digits, read from the first and from the second."""
    for match in _HEX.finditer(data):
        for start in range(2):
            yield bytes.fromhex(match[0][start : start + (len(match[0]) - start) // 2 * 2].decode())


def _wide(data: bytes) -> Iterator[bytes]:
    """Letters with a zero byte between them."""
    return (match[0][::2] for match in _WIDE.finditer(data))


def _soft_breaks(data: bytes) -> Iterator[bytes]:
    """Lines that quoted-printable broke."""
    return (re.sub(rb"=\r?\n", b"", match[0]) for match in _SOFT_BREAKS.finditer(data))


UNDO: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {
    **{name: _streams(magic, start) for name, (magic, start) in _MAGICS.items()},
    "zip": _zip,
    "zstd": _zstd,
    "base64": _base64,
    "hex": _hex,
    "wide": _wide,
    "joined": _soft_breaks,
}
