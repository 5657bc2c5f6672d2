"""How much each site of a round counts: by its number of rows, which is its own claim and so is held to a share.

n sites, s the largest share.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import Final, Generic, TypeVar

MIN_SITES: Final = 3  # among two, a largest share below 1 would make both equal whatever they hold
ROUNDING: Final = 1e-9
T = TypeVar("T")


def capped(claims: Mapping[str, float], *, max_share: float) -> dict[str, float]:
    """Bring down the largest weights until no site has more than its share of what is left.

    Args:
        claims: Site to the weight that it asks for; greater than zero.
        max_share: Largest share of the sum, greater than 0; 1: any.

    Returns:
        Site to weight: those of m sites are s / (1 - m s) times the sum of all others, the others are as claimed. Where
        no weights could keep to the share, n s <= 1, all are equal. Fewer than `MIN_SITES` sites keep their claims.

    Example:
        >>> capped({"north": 100.0, "south": 90.0, "west": 9e15}, max_share=0.5)
        {'north': 100.0, 'south': 90.0, 'west': 190.0}
        >>> capped({"north": 100.0, "south": 90.0, "west": 80.0}, max_share=0.5)
        {'north': 100.0, 'south': 90.0, 'west': 80.0}
    """
    if len(claims) < MIN_SITES or max_share >= 1:
        return dict(claims)
    ordered = sorted(claims.values(), reverse=True)
    if len(ordered) * max_share <= 1:
        return dict.fromkeys(claims, ordered[-1])
    for num_capped, largest in enumerate(ordered):
        limit = max_share * math.fsum(ordered[num_capped:]) / (1 - num_capped * max_share)
        if largest <= limit or (num_capped + 1) * max_share >= 1 - ROUNDING:  # more sites cannot have a share above s
            break
    return {site: min(claim, limit) for site, claim in claims.items()}


class Shares(Generic[T]):
    """Weights of a round's updates, those of the largest claims last, when it is known what the others have.

    Fewer than 1 / s sites can be above their share, so no more than these wait, whatever the number of sites.

    Args:
        max_share: As in `capped`.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._num_held = max(1, math.ceil(1 / max_share) - 1) if max_share < 1 else 0
        self._held: list[tuple[float, str, T]] = []
        self._passed: dict[str, float] = {}

    def take(self, site: str, claim: float, update: T) -> Iterator[tuple[str, float, T]]:
        """Take an update with the weight that its site claims; gives one that is ready with its weight, if there is."""
        heapq.heappush(self._held, (claim, site, update))
        if len(self._held) > self._num_held:
            smallest, name, ready = heapq.heappop(self._held)
            self._passed[name] = smallest
            yield name, smallest, ready

    def close(self) -> Iterator[tuple[str, float, T]]:
        """All are in: gives those that waited."""
        found = capped(self._passed | {site: claim for claim, site, _ in self._held}, max_share=self._max_share)
        for _, site, update in sorted(self._held, key=lambda held: held[:2]):
            yield site, found[site], update
