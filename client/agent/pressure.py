"""A bound on what is written because others ask for it: so many events a minute, the rest counted."""

import time
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0


class Limit:
    """Counts events, minute by minute.

    Args:
        max_a_minute: How many are within the bound.
        clock: Seconds.

    Example:
        >>> now = [0.0]
        >>> limit = Limit(2, clock=lambda: now[0])
        >>> [limit.allows() for _ in range(4)], limit.take_suppressed()
        ([True, True, False, False], 0)
        >>> now[0] = WINDOW_S
        >>> limit.take_suppressed(), limit.take_suppressed(), limit.allows()
        (2, 0, True)
    """

    def __init__(self, max_a_minute: int, *, clock: Callable[[], float] = time.time) -> None:
        self.max_a_minute = max_a_minute
        self._clock = clock
        self._started_at = clock()
        self._num_events = 0
        self._num_untold = 0

    @property
    def is_first_suppressed(self) -> bool:
        """Whether the event that was counted last is the first beyond the bound."""
        return self._num_events == self.max_a_minute + 1

    def allows(self) -> bool:
        """Count one event; whether it is within the bound."""
        self._begin_anew_if_over()
        self._num_events += 1
        return self._num_events <= self.max_a_minute

    def take_suppressed(self) -> int:
        """How many events the minutes that are over had beyond the bound; each is told once."""
        self._begin_anew_if_over()
        told, self._num_untold = self._num_untold, 0
        return told

    def _begin_anew_if_over(self) -> None:
        """A minute ends when it has passed, or when the clock was set back."""
        now = self._clock()
        if not 0 <= now - self._started_at < WINDOW_S:
            self._num_untold += max(0, self._num_events - self.max_a_minute)
            self._started_at, self._num_events = now, 0
