"""Token buckets, and how many connections one certificate has open."""

from collections import Counter
from collections.abc import Callable
from typing import Final

_MAX_KEYS: Final = 10_000


class Buckets:
    """One token bucket for each key.

    Example:
        >>> now = [0.0]
        >>> buckets = Buckets(per_s=1.0, burst=2, clock=lambda: now[0])
        >>> [buckets.take("site") for _ in range(3)]
        [True, True, False]
        >>> now[0] = 1.0
        >>> buckets.take("site"), buckets.take("site")
        (True, False)
    """

    def __init__(self, *, per_s: float, burst: int, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}  # tokens left, and when

    def take(self, key: str) -> bool:
        """Take one token; returns whether there was one."""
        now = self._clock()
        if key not in self._levels and len(self._levels) >= _MAX_KEYS:
            # A bucket that has filled up again is as a new one.
            levels = self._levels.items()
            self._levels = {name: level for name, level in levels if self._tokens(name, now) < self._burst}
        tokens = self._tokens(key, now)
        self._levels[key] = (tokens - 1 if tokens >= 1 else tokens, now)
        return tokens >= 1

    def _tokens(self, key: str, now: float) -> float:
        """How many there are now."""
        tokens, since = self._levels.get(key, (self._burst, now))
        return min(self._burst, tokens + (now - since) * self._per_s)


class Seats:
    """So many connections for each key.

    Example:
        >>> seats = Seats(2)
        >>> [seats.take("site") for _ in range(3)]
        [True, True, False]
        >>> seats.leave("site")
        >>> seats.take("site")
        True
    """

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._taken: Counter[str] = Counter()

    def take(self, key: str) -> bool:
        """Take a seat; returns whether there was one."""
        if self._taken[key] >= self._num_seats:
            return False
        self._taken[key] += 1
        return True

    def leave(self, key: str) -> None:
        """Give a seat back."""
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]
