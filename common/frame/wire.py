"""Frames: the only bytes that cross between server and site; version, lengths and hash checked, never pickle.

Layout, little-endian: magic `SILO` (4) | version (u16) | head length (u32) | body length (u64) | head | body | SHA-256
of all that precedes (32). The head is canonical JSON, an object with a `kind`; the body is raw bytes.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any, Final

from common import site_states
from common.errors import RemoteError, WireError

MAGIC: Final = b"SILO"
VERSION: Final = 1
MAX_HEAD_BYTES: Final = 1 << 21
_PREFIX: Final = struct.Struct("<4sHIQ")
_DIGEST_BYTES: Final = 32
OVERHEAD_BYTES: Final = _PREFIX.size + _DIGEST_BYTES
Bytes = bytes | memoryview


@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        kind: What it is: `open`, `train`, `evaluate`, `opened`, `update`, `metrics` or `refused`.
        head: Small named values; JSON scalars, lists and objects.
        body: Tensors as safetensors bytes, a manifest, or nothing. Of an answer that was expected it is a view of the
            answer's bytes, as a copy of a large one costs more than adding it up.
    """

    kind: str
    head: dict[str, Any] = field(default_factory=dict)
    body: Bytes = b""


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: the same value gives the same bytes.

    Raises:
        ValueError: A number is not finite.

    Example:
        >>> canonical_json({"b": 1, "a": "é"})
        b'{"a":"\\xc3\\xa9","b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def pack(frame: Frame) -> bytes:
    """Frame to bytes.

    Raises:
        ValueError: The head names a kind of its own, or holds a number that is not finite.
    """
    if "kind" in frame.head:
        raise ValueError("a frame's kind is not part of its head")
    head = canonical_json({"kind": frame.kind, **frame.head})
    framed = b"".join((_PREFIX.pack(MAGIC, VERSION, len(head), len(frame.body)), head, frame.body))
    return framed + hashlib.sha256(framed).digest()


def unpack(data: bytes, *, max_body_bytes: int) -> Frame:
    """Bytes to frame; nothing is parsed before lengths and hash are right.

    Args:
        data: What arrived.
        max_body_bytes: Largest body that the reader accepts.

    Raises:
        WireError: Wrong magic, version, length or hash; head that is not the canonical form of an object with a `kind`;
            body too large.
    """
    kind, head, body = _open(data, max_body_bytes=max_body_bytes)
    return Frame(kind, head, bytes(body))


def expect(data: bytes, kind: str, *, max_body_bytes: int) -> Frame:
    """Unpack an answer that must be of one kind.

    Raises:
        RemoteError: The peer refused.
        WireError: The frame is malformed or of another kind.
    """
    frame = Frame(*_open(data, max_body_bytes=max_body_bytes))
    if frame.kind == "refused":
        code, reference = (shown(frame.head.get(key, "")) for key in ("code", "reference"))
        text = f"{site_states.of_code(code)} ({code}); the site's log has the reason under reference {reference}"
        raise RemoteError(text, code=code, reference=reference)
    if frame.kind != kind:
        raise WireError(f"frame is of kind '{shown(frame.kind)}', expected '{kind}'")
    return frame


def shown(text: object, *, limit: int = 64) -> str:
    """A peer's text, fit for a message: short and without control characters.

    Example:
        >>> shown("update\\x1b[2J")
        'update?[2J'
    """
    return "".join(character if character.isprintable() else "?" for character in str(text)[:limit])


def _open(data: bytes, *, max_body_bytes: int) -> tuple[str, dict[str, Any], memoryview]:
    """Kind, head and body of a frame that was found right."""
    head_bytes, body = _split(data, max_body_bytes=max_body_bytes)
    head = _parse_head(head_bytes)
    kind = head.pop("kind", None)
    if not isinstance(kind, str):
        raise WireError("frame head has no 'kind'")
    return kind, head, body


def _split(data: bytes, *, max_body_bytes: int) -> tuple[bytes, memoryview]:
    """Head and body after all checks of the envelope."""
    if len(data) < OVERHEAD_BYTES:
        raise WireError(f"frame of {len(data)} bytes is shorter than its envelope of {OVERHEAD_BYTES}")
    magic, version, head_size, body_size = _PREFIX.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"not a silotune frame of version {VERSION}; both ends need the same silotune release")
    if head_size > MAX_HEAD_BYTES or body_size > max_body_bytes:
        raise WireError(f"frame of {head_size} + {body_size} bytes; limits are {MAX_HEAD_BYTES} + {max_body_bytes}")
    if len(data) != OVERHEAD_BYTES + head_size + body_size:
        raise WireError(f"frame of {len(data)} bytes declares {OVERHEAD_BYTES + head_size + body_size}")
    end = len(data) - _DIGEST_BYTES
    if hashlib.sha256(memoryview(data)[:end]).digest() != data[end:]:
        raise WireError("frame hash does not match its bytes")
    return data[_PREFIX.size : _PREFIX.size + head_size], memoryview(data)[_PREFIX.size + head_size : end]


def _parse_head(head_bytes: bytes) -> dict[str, Any]:
    """The head as an object; one in canonical form has no duplicate keys, no NaN and no half characters."""
    try:
        head = json.loads(head_bytes)
        is_canonical = canonical_json(head) == head_bytes
    except (ValueError, RecursionError) as error:
        raise WireError("frame head is not strict JSON") from error
    if not isinstance(head, dict) or not is_canonical:
        raise WireError("frame head is not a JSON object in canonical form")
    return head


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses duplicate keys with ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result
