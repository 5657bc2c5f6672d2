"""What a data set's privacy budget is, what was charged to it, and what would still fit: pure arithmetic, no disk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from client.ledger.sealed import VERSION, LedgerHead
from common import accounting
from common.accounting import DpEvent
from common.errors import BudgetExhausted

ADJACENCY: Final = "one unit added or removed"
MAX_ROUNDS: Final = 1000
TRAIN: Final = "train"  # what a charge is for
EVALUATE: Final = "evaluate"
COUNTS: Final = "counts"


@dataclass(frozen=True)
class Header:
    """What the site promises to the units of one data set, once and for all runs.

    Attributes:
        dataset: The data set's name in the site's policy.
        unit: Whose privacy it is: the column of the unit, or `row`.
        max_epsilon: All that may ever be spent.
        dp_delta: Delta of the promise.
        adjacency: What differs between two data sets that must look alike.
        version: Of the ledger's format.

    Raises:
        ValueError: No promise can have these values.
    """

    dataset: str
    unit: str
    max_epsilon: float
    dp_delta: float
    adjacency: str = ADJACENCY
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 0 < self.max_epsilon < math.inf:
            raise ValueError("max_epsilon must be finite and above 0")
        if not 0 < self.dp_delta <= accounting.MAX_DELTA:
            raise ValueError(f"dp_delta must be above 0 and at most {accounting.MAX_DELTA:g}")


@dataclass(frozen=True)
class Reservation:
    """A round that was paid for.

    Attributes:
        run_sha256: Of the run's manifest.
        round_index: Of its round, from 0.
        event: The steps.
        head: The ledger's line.
        time: Unix seconds.
        purpose: `train`, `evaluate`, or `counts` of rows.
        released: Figures that were noised and told for this charge, where they must be told again as they are.
    """

    run_sha256: str
    round_index: int
    event: DpEvent
    head: LedgerHead
    time: float
    purpose: str = TRAIN
    released: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunCost:
    """What one run was charged.

    Attributes:
        run_sha256: Of its manifest.
        num_reservations: Rounds, those that were charged twice counted twice.
        num_steps: Their steps in all.
        num_evaluations: Held-out figures that were charged, likewise.
        epsilon: Of this run alone; those of several runs do not add up, the whole is less than their sum.
        last_time: Of the last reservation, Unix seconds.
    """

    run_sha256: str
    num_reservations: int
    num_steps: int
    num_evaluations: int
    epsilon: float
    last_time: float


@dataclass(frozen=True)
class Budget:
    """A promise, and all that was charged to it.

    Attributes:
        header: The promise, as it stands now.
        reservations: The charges, in order.
    """

    header: Header
    reservations: Sequence[Reservation]

    def spent(self, more: Sequence[DpEvent] = ()) -> float:
        """Epsilon of all charges together, and of `more` on top of them.

        Raises:
            AccountingUnsupported: No epsilon can be proven for them.
        """
        events = [one.event for one in self.reservations]
        return accounting.compose([*events, *more], dp_delta=self.header.dp_delta)

    @property
    def remaining(self) -> float:
        """The budget less what was spent. A round costs less the later it comes, so see `rounds_left`."""
        return max(0.0, self.header.max_epsilon - self.spent())

    def cost_of(self, event: DpEvent) -> float:
        """What spending would grow by if these steps came next."""
        return self.spent([event]) - self.spent()

    def rounds_left(self, event: DpEvent, *, limit: int = MAX_ROUNDS, beside: Sequence[DpEvent] = ()) -> int:
        """How many times these steps still fit, with others beside them; counts to `limit`."""
        low, high = 0, 1
        while high <= limit and self._holds(event, high, beside):
            low, high = high, high * 2
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._holds(event, middle, beside) else (low, middle)
        return low

    def check(self, event: DpEvent) -> None:
        """Do these steps fit? Written so that NaN refuses.

        Raises:
            BudgetExhausted: They do not; names what remains and what would fit.
            AccountingUnsupported: No epsilon can be proven for them.
        """
        after = self.spent([event])
        if not after <= self.header.max_epsilon:
            single = DpEvent(event.sampling_prob, event.noise_multiplier, 1)
            fitting = self.rounds_left(single, limit=event.num_steps)
            raise BudgetExhausted(
                f"{self._refusal(after)}; 0 more such rounds fit, {fitting} of the {event.num_steps} steps would"
            )

    def check_plan(self, event_per_round: DpEvent, num_rounds: int, *, beside: Sequence[DpEvent] = ()) -> None:
        """Do all rounds of a run fit, and what is released beside them? See `check`."""
        planned = [event_per_round.times(num_rounds)] if num_rounds else []
        after = self.spent([*planned, *beside])
        if not after <= self.header.max_epsilon:
            fitting = self.rounds_left(event_per_round, limit=num_rounds, beside=beside)
            raise BudgetExhausted(f"{self._refusal(after)}; {fitting} of the {num_rounds} rounds would fit")

    def per_run(self) -> list[RunCost]:
        """What each run was charged, in the order of their first rounds."""
        runs: dict[str, list[Reservation]] = {}
        for one in self.reservations:
            runs.setdefault(one.run_sha256, []).append(one)
        costs = []
        for run_sha256, charges in runs.items():
            epsilon = accounting.compose([one.event for one in charges], dp_delta=self.header.dp_delta)
            rounds = [one.event.num_steps for one in charges if one.purpose == TRAIN]
            num_evaluations = sum(one.purpose == EVALUATE for one in charges)
            costs.append(RunCost(run_sha256, len(rounds), sum(rounds), num_evaluations, epsilon, charges[-1].time))
        return costs

    def _refusal(self, after: float) -> str:
        """What remains, and what was asked for."""
        return (
            f"privacy budget of '{self.header.dataset}': {self.spent():.3f} of {self.header.max_epsilon:g} is spent, "
            f"{self.remaining:.3f} remains, and this would make it {after:.3f}"
        )

    def _holds(self, event: DpEvent, number: int, beside: Sequence[DpEvent]) -> bool:
        """Whether an event fits so many times."""
        events = [*(one.event for one in self.reservations), event.times(number), *beside]
        limit, dp_delta = self.header.max_epsilon, self.header.dp_delta
        return accounting.is_within(events, dp_delta=dp_delta, max_epsilon=limit)
