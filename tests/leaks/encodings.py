"""Forty-eight forms in which a text of a row may leave a site, and what to look for to find each.

A form's name is the way to it: `base64/gzip/utf-8` is UTF-8, compressed, in base64. What stands after a slash is found
by undoing what stands before it; all others are searched for as bytes. A hash of a canary is no leak: it tells nothing
to who does not know the row. Containers that keep bytes as they are (strings of protobuf, npy, safetensors, tar) are
no forms of their own: what is in them is found without opening them.
"""

import base64
import bz2
import codecs
import gzip
import html
import json
import lzma
import quopri
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow

from tests.leaks.canaries import PATTERN

EDGE_TOKENS = 5  # at each end of a canary: their ids depend on the text around it
XOR_KEY = 0x5A

Encode = Callable[[str], bytes]
Tokenize = Callable[[str], list[int]]
Ids = np.ndarray


@dataclass(frozen=True)
class Encoding:
    """One form.

    Attributes:
        encode: A text, as a leak would send it.
        needles: Bytes of which one is in every encoded text that holds the canary; none if it is found by undoing.
    """

    encode: Encode
    needles: Callable[[str], tuple[bytes, ...]]


def all_of(tokenize: Tokenize) -> dict[str, Encoding]:
    """The forms by name.

    Args:
        tokenize: Ids of a text by the base that the sites train.
    """
    plain = {name: _plain(encode) for name, encode in {**CHARACTERS, **CHANGES, **ESCAPES, **NUMBERS}.items()}
    wrapped = {name: Encoding(encode, lambda _: ()) for name, encode in WRAPPED.items()}
    percent = Encoding(_percent, lambda canary: (_percent(canary), _percent(canary, safe="?>")))  # gRPC spares these
    return {**plain, "percent": percent, **_bases(), **_of_tokens(tokenize), **wrapped}


def _plain(encode: Encode) -> Encoding:
    """A form that does not depend on what stands around a text."""
    return Encoding(encode, lambda canary: (encode(canary),))


def _codec(name: str) -> Encode:
    return lambda text: text.encode(name)


def _array(dtype: str) -> Encode:
    """Every byte of a text as a number of its own."""
    return lambda text: np.frombuffer(text.encode(), np.uint8).astype(dtype).tobytes()


def _percent(text: str, *, safe: str = "") -> bytes:
    return urllib.parse.quote(text, safe=safe).encode()


def _bfloat16(text: str) -> bytes:
    """Every byte as a bfloat16, which holds whole numbers up to 256."""
    numbers = np.frombuffer(text.encode(), np.uint8).astype("<f4")
    return (numbers.view("<u4") >> 16).astype("<u2").tobytes()


def _xor(text: str) -> bytes:
    return bytes(byte ^ XOR_KEY for byte in text.encode())


CHARACTERS: Mapping[str, Encode] = {
    **{name: _codec(name) for name in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-7")},
    "latin-1": _codec("latin-1"),
    "ebcdic": _codec("cp037"),
}
CHANGES: Mapping[str, Encode] = {
    "upper-case": lambda text: text.upper().encode(),
    "lower-case": lambda text: text.lower().encode(),
    "reversed": lambda text: text[::-1].encode(),
    "rot13": lambda text: codecs.encode(text, "rot13").encode(),
    "xor": _xor,
}
ESCAPES: Mapping[str, Encode] = {
    "hex": lambda text: text.encode().hex().encode(),
    "hex-upper": lambda text: text.encode().hex().upper().encode(),
    "json": lambda text: json.dumps(text)[1:-1].encode(),
    "html": lambda text: html.escape(text).encode("ascii", "xmlcharrefreplace"),
    "quoted-printable": lambda text: quopri.encodestring(text.encode()),
    "backslash": _codec("unicode_escape"),
}
NUMBERS: Mapping[str, Encode] = {
    "bytes-uint16-le": _array("<u2"),
    "bytes-float32": _array("<f4"),
    "bytes-bfloat16": _bfloat16,
}
WRAPPED: Mapping[str, Encode] = {
    "gzip/utf-8": lambda text: gzip.compress(text.encode()),
    "zlib/utf-8": lambda text: zlib.compress(text.encode()),
    "bz2/utf-8": lambda text: bz2.compress(text.encode()),
    "xz/utf-32-le": lambda text: lzma.compress(text.encode("utf-32-le")),  # a short text would be stored as it is
    "zstd/utf-32-le": lambda text: pyarrow.compress(text.encode("utf-32-le"), codec="zstd", asbytes=True),
    "base64/gzip/utf-8": lambda text: base64.b64encode(gzip.compress(text.encode())),
}


def _bases() -> dict[str, Encoding]:
    """Forms that turn groups of bytes into groups of letters, so that a text looks different at each offset."""
    standard = {f"base64-{offset}": _base64_at(offset) for offset in range(3)}
    return {
        **standard,
        "base64-url": _grouped(base64.urlsafe_b64encode, 3),
        "base64-utf-16": _grouped(base64.b64encode, 3, codec="utf-16-le"),
        "base32": _grouped(base64.b32encode, 5),
        "base85": _grouped(base64.b85encode, 4),
        "ascii85": _grouped(base64.a85encode, 4),
    }


def _base64_at(offset: int) -> Encoding:
    """Base64 of a text whose canary begins so many bytes after a whole group."""

    def encode(text: str) -> bytes:
        found = PATTERN.search(text)
        start = found.start() if found else 0
        return base64.b64encode(b" " * offset + text[start:].encode())

    def needles(canary: str) -> tuple[bytes, ...]:
        return (_whole_groups(base64.b64encode, canary.encode(), size=3, offset=offset),)

    return Encoding(encode, needles)


def _grouped(encode: Callable[[bytes], bytes], size: int, *, codec: str = "utf-8") -> Encoding:
    """A form over groups of `size` bytes, wherever the canary stands."""

    def needles(canary: str) -> tuple[bytes, ...]:
        data = canary.encode(codec)
        return tuple(_whole_groups(encode, data, size=size, offset=offset) for offset in range(size))

    return Encoding(lambda text: encode(text.encode(codec)), needles)


def _whole_groups(encode: Callable[[bytes], bytes], data: bytes, *, size: int, offset: int) -> bytes:
    """The groups that hold nothing but `data`, which begins `offset` bytes after the start of a group."""
    start = -offset % size
    return encode(data[start : start + (len(data) - start) // size * size])


def _of_tokens(tokenize: Tokenize) -> dict[str, Encoding]:
    """Forms of a text's token ids."""

    def inner(canary: str) -> Ids:
        return np.asarray(tokenize(canary)[EDGE_TOKENS:-EDGE_TOKENS])

    def form(pack: Callable[[Ids], bytes], *others: Callable[[Ids], bytes]) -> Encoding:
        return Encoding(
            lambda text: pack(np.asarray(tokenize(text))),
            lambda canary: tuple(one(inner(canary)) for one in (pack, *others)),
        )

    def typed(dtype: str) -> Encoding:
        return form(lambda ids: ids.astype(dtype).tobytes())

    names = {f"tokens-int{bits}": f"i{bits // 8}" for bits in (16, 32, 64)}
    orders = {"le": "<", "be": ">"}
    return {
        **{f"{name}-{order}": typed(sign + dtype) for name, dtype in names.items() for order, sign in orders.items()},
        "tokens-float32": typed("<f4"),
        "tokens-float64": typed("<f8"),
        "tokens-decimal": form(_decimal(", "), _decimal(","), _decimal(" ")),
        "tokens-varint": form(lambda ids: b"".join(_varint(int(number)) for number in ids)),
        "tokens-deltas": form(lambda ids: np.diff(ids).astype("<i4").tobytes()),
    }


def _decimal(between: str) -> Callable[[Ids], bytes]:
    return lambda ids: between.join(map(str, ids.tolist())).encode()


def _varint(number: int) -> bytes:
    """As protobuf packs it: seven bits a byte, the lowest first."""
    return bytes(_sevens(number))


def _sevens(number: int) -> Iterator[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number
