"""Looks for thousands of byte strings in captured bytes, and in whatever is compressed or encoded in them.

Needles are found by a rolling hash of their first 16, 32 or 64 bytes, compared in full before they count. Compressed
streams have no needle: they are found by their first bytes, undone and searched in turn, as are runs of base64, hex and
UTF-16.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.leaks.encodings import Encoding
from tests.leaks.unwrap import UNDO

WIDTHS = (16, 32, 64)  # of the windows that are hashed; no needle is shorter than the first
MAX_DEPTH = 4
GAP = b"\x00\xff\x00"  # between things that were undone, so that they make nothing together
_BLOCK_BYTES = 1 << 20
_MULTIPLIER = 0x9E3779B97F4A7C15
_TABLE_BITS = 22

Found = set[tuple[str, str]]


@dataclass(frozen=True)
class Needle:
    """Bytes that say that a canary is there in some form."""

    encoding: str
    canary: str
    data: bytes


class Searcher:
    """Finds canaries in captured bytes.

    Args:
        canaries: What to look for.
        encodings: The forms to look for.
        unwrap: Whether to undo compression and the like; off in a control only.
    """

    def __init__(self, canaries: Sequence[str], encodings: Mapping[str, Encoding], *, unwrap: bool = True) -> None:
        self._needles = [
            Needle(name, canary, data)
            for name, encoding in encodings.items()
            for canary in canaries
            for data in encoding.needles(canary)
        ]
        self._tables = {width: _Table(self._needles, width) for width in WIDTHS}
        self._max_depth = MAX_DEPTH if unwrap else 0

    def find(self, captured: Iterable[bytes]) -> Found:
        """Names of forms and canaries that are in the bytes."""
        return self._find(GAP.join(captured), way="", depth=0)

    def _find(self, data: bytes, *, way: str, depth: int) -> Found:
        """Search the bytes and what can be undone in them; `way` leads to them."""
        found = {(way + needle.encoding, needle.canary) for needle in self._hits(data)}
        if depth < self._max_depth:
            for name, undo in UNDO.items():
                if inner := GAP.join(undo(data)):
                    found |= self._find(inner, way=f"{way}{name}/", depth=depth + 1)
        return found

    def _hits(self, data: bytes) -> Iterator[Needle]:
        """Needles that are in the bytes."""
        view = np.frombuffer(data, np.uint8)
        for start in range(0, len(data), _BLOCK_BYTES):
            for width, hashes in _windows(view[start : start + _BLOCK_BYTES + max(WIDTHS) - 1]):
                for position, needle in self._tables[width].candidates(hashes):
                    if data.startswith(needle.data, start + position):
                        yield needle


class _Table:
    """The needles whose first bytes are hashed over one width."""

    def __init__(self, needles: Sequence[Needle], width: int) -> None:
        self._by_hash: dict[int, list[Needle]] = {}
        for needle in needles:
            if max(size for size in WIDTHS if size <= len(needle.data)) == width:
                self._by_hash.setdefault(_hash(needle.data[:width]), []).append(needle)
        self._hashes = np.asarray(sorted(self._by_hash), np.uint64)
        self._is_possible = np.zeros(1 << _TABLE_BITS, bool)
        self._is_possible[self._short(self._hashes)] = True

    def candidates(self, hashes: np.ndarray) -> Iterator[tuple[int, Needle]]:
        """Positions at which a needle may begin."""
        possible = np.flatnonzero(self._is_possible[self._short(hashes)])
        found = hashes[possible]
        nearest = np.searchsorted(self._hashes, found).clip(max=len(self._hashes) - 1)
        likely = possible[self._hashes[nearest] == found] if len(self._hashes) else ()
        return ((int(place), needle) for place in likely for needle in self._by_hash[int(hashes[place])])

    def _short(self, hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _TABLE_BITS)


def _windows(block: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Polynomial hashes of all windows of each width, by doubling."""
    hashes, width, factor = block.astype(np.uint64) + np.uint64(1), 1, _MULTIPLIER
    while width < max(WIDTHS) and len(hashes) > width:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        width, factor = 2 * width, factor * factor % (1 << 64)
        if width in WIDTHS:
            yield width, hashes


def _hash(window: bytes) -> int:
    """The hash of one window."""
    return next(int(hashes[0]) for width, hashes in _windows(np.frombuffer(window, np.uint8)) if width == len(window))
