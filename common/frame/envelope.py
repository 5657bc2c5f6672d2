"""How a frame lies inside a Flower message: one record with one array of raw bytes, declared strictly.

Flower itself is not imported here: its records are mappings, and an array is read by its four public fields. So the
server, the courier and the in-process grid share one reading of what is well-formed. `Array.numpy()` is never used on
received data: it ignores the declared type and shape and opens zip files.
"""

from collections.abc import Mapping
from typing import Final, Protocol

from common.errors import WireError

NAME: Final = "frame"  # of the only record in a message, and of the only array in that record
DTYPE: Final = "uint8"
STYPE: Final = "silotune.frame"  # not Flower's own kind, so that no numpy loader takes it by accident

AGENT_AWAY: Final = 1001
BAD_CONTENT: Final = 1002
COURIER_FAILED: Final = 1003

FAILURES: Final[Mapping[int, str]] = {
    1: "bundle-not-loaded",
    2: "courier-failed",
    3: "request-expired",
    4: "reply-expired",
    5: "node-away",
    7: "bundle-refused",
    8: "courier-crashed",
    AGENT_AWAY: "agent-away",
    BAD_CONTENT: "malformed",
    COURIER_FAILED: "courier-failed",
}


class Declared(Protocol):
    """The four fields of a Flower `Array`."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


def declare(frame: bytes) -> tuple[str, tuple[int, ...], str, bytes]:
    """Give the four arguments of the Flower `Array` that carries a frame: dtype, shape, stype, data."""
    return DTYPE, (len(frame),), STYPE, frame


def unpack(content: Mapping[str, object]) -> bytes:
    """Take the frame out of a message's content.

    Args:
        content: Flower's `RecordDict`, or any mapping of the same form.

    Raises:
        WireError: More or less than one record with one array, or bytes that differ from their declaration.

    Example:
        >>> from types import SimpleNamespace
        >>> array = SimpleNamespace(**dict(zip(("dtype", "shape", "stype", "data"), declare(b"abc"))))
        >>> unpack({"frame": {"frame": array}})
        b'abc'
    """
    array = _only(_only(content, what="record"), what="array")
    declared = tuple(getattr(array, field, None) for field in ("dtype", "shape", "stype"))
    data = getattr(array, "data", None)
    if not isinstance(data, bytes):
        raise WireError("a message's array holds no bytes")
    if declared != (DTYPE, (len(data),), STYPE):
        raise WireError(f"a message's array of {len(data)} bytes is declared as something else")
    return data


def failure_name(code: int) -> str:
    """Name a failure of the link; a code that is not known gives `unknown`, never the peer's text."""
    return FAILURES.get(code, "unknown")


def _only(entries: object, *, what: str) -> object:
    """Return the single entry, which must have our name."""
    if not isinstance(entries, Mapping) or list(entries) != [NAME]:
        raise WireError(f"a message must hold exactly one {what}, named {NAME}")
    return entries[NAME]
