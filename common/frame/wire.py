"""Frames: the only bytes that cross between server and site; version, lengths and hash checked, never pickle.

Layout, little-endian: magic `SILO` (4) | version (u16) | head length (u32) | body length (u64) | head | body | digest
(32). The head is canonical JSON, an object with a `kind`; the body is raw bytes. The digest is the SHA-256 of all that
precedes, with the SHA-256 of the body (32 bytes) in the place of the body: so a large body is hashed once, for the
digest, for a signature and for an audit log, each of which needs its hash.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from common.errors import RemoteError, WireError
from common.frame import site_states

MAGIC: Final = b"SILO"
VERSION: Final = 2
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

    @cached_property
    def body_sha256(self) -> bytes:
        """Hash of the body, computed once; 32 bytes."""
        return hashlib.sha256(self.body).digest()

    def with_head(self, head: dict[str, Any]) -> "Frame":
        """The same body under another head, without hashing it again."""
        return _knowing(replace(self, head=head), self.__dict__.get("body_sha256"))


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
    before = _before(frame)
    return b"".join((before, frame.body, hashlib.sha256(before + frame.body_sha256).digest()))


def digest(frame: Frame) -> str:
    """The digest that `pack` gives a frame, in lower-case hexadecimal; it commits to head and body.

    Raises:
        ValueError: As `pack`.
    """
    return hashlib.sha256(_before(frame) + frame.body_sha256).hexdigest()


def digest_of(packed: bytes) -> str:
    """The digest at the end of a frame that `pack` made, or `unpack` or `expect` found whole; see `digest`."""
    return packed[-_DIGEST_BYTES:].hex()


def unpack(data: bytes, *, max_body_bytes: int) -> Frame:
    """Bytes to frame; nothing is parsed before lengths and hash are right.

    Args:
        max_body_bytes: Largest body that the reader accepts.

    Raises:
        WireError: Wrong magic, version, length or hash; head that is not the canonical form of an object with a `kind`;
            body too large.
    """
    frame = _open(data, max_body_bytes=max_body_bytes)
    return _knowing(replace(frame, body=bytes(frame.body)), frame.body_sha256)


def expect(data: bytes, kind: str, *, max_body_bytes: int) -> Frame:
    """Unpack an answer that must be of one kind.

    Raises:
        RemoteError: The peer refused.
        WireError: The frame is malformed or of another kind.
    """
    frame = _open(data, max_body_bytes=max_body_bytes)
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


def _before(frame: Frame) -> bytes:
    """All that precedes the body."""
    if "kind" in frame.head:
        raise ValueError("a frame's kind is not part of its head")
    head = canonical_json({"kind": frame.kind, **frame.head})
    return _PREFIX.pack(MAGIC, VERSION, len(head), len(frame.body)) + head


def _knowing(frame: Frame, body_sha256: bytes | None) -> Frame:
    """The frame with the hash of its body, where that is known already."""
    if body_sha256 is not None:
        frame.__dict__["body_sha256"] = body_sha256  # where the cached property keeps it
    return frame


def _open(data: bytes, *, max_body_bytes: int) -> Frame:
    """A frame that was found right; its body is a view of the data."""
    head_bytes, body, body_sha256 = _split(data, max_body_bytes=max_body_bytes)
    head = _parse_head(head_bytes)
    kind = head.pop("kind", None)
    if not isinstance(kind, str):
        raise WireError("frame head has no 'kind'")
    return _knowing(Frame(kind, head, body), body_sha256)


def _split(data: bytes, *, max_body_bytes: int) -> tuple[bytes, memoryview, bytes]:
    """Head, body and the body's hash after all checks of the envelope."""
    if len(data) < OVERHEAD_BYTES:
        raise WireError(f"frame of {len(data)} bytes is shorter than its envelope of {OVERHEAD_BYTES}")
    magic, version, head_size, body_size = _PREFIX.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"not a silotune frame of version {VERSION}; both ends need the same silotune release")
    if head_size > MAX_HEAD_BYTES or body_size > max_body_bytes:
        raise WireError(f"frame of {head_size} + {body_size} bytes; limits are {MAX_HEAD_BYTES} + {max_body_bytes}")
    if len(data) != OVERHEAD_BYTES + head_size + body_size:
        raise WireError(f"frame of {len(data)} bytes declares {OVERHEAD_BYTES + head_size + body_size}")
    start, end = _PREFIX.size + head_size, len(data) - _DIGEST_BYTES
    body = memoryview(data)[start:end]
    body_sha256 = hashlib.sha256(body).digest()
    if hashlib.sha256(data[:start] + body_sha256).digest() != data[end:]:
        raise WireError("frame hash does not match its bytes")
    return data[_PREFIX.size : start], body, body_sha256


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
