"""(epsilon, delta) from sampling, noise and steps; and the noise for an epsilon. Refuses what it cannot prove.

All figures are of the Poisson-sampled Gaussian mechanism with one unit added or removed: every unit is in a step with
probability `sampling_prob`, each for itself, and the sum of the clipped units gets noise of standard deviation
`noise_multiplier` times the clip norm. Shuffled batches of fixed size are not covered.

The number of record is the privacy loss distribution (PLD) of dp-accounting, rounded up. Renyi differential privacy
(RDP) is another proof of the same promise by other code, and the looser of the two; if it came out below the PLD, one
of them would be wrong, so no epsilon is given then.
"""

import bisect
import functools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.errors import AccountingUnsupported

LEDGER_GRID: Final = 1e-3
REPORT_GRID: Final = 1e-4
FINEST_GRID: Final = 1e-5
MAX_EPSILON: Final = 1000.0
MAX_DELTA: Final = 1e-5
MAX_NOISE_MULTIPLIER: Final = 4096.0
CALIBRATION_TOLERANCE: Final = 1e-4
MAX_STEPS_AT_ONCE: Final = 10_000
MAX_CURVE_POINTS: Final = 100
Kinds = tuple[tuple[float, float, int], ...]  # sampling, noise, steps


@dataclass(frozen=True)
class DpEvent:
    """Steps of one kind that read private units.

    Attributes:
        sampling_prob: Probability with which a unit is in a step.
        noise_multiplier: Standard deviation of the noise over the clip norm.
        num_steps: How many steps; empty batches count.

    Raises:
        ValueError: A value that no step can have.
    """

    sampling_prob: float
    noise_multiplier: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_prob <= 1:
            raise ValueError("sampling_prob must be above 0 and at most 1")
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError("noise_multiplier must be finite and above 0")
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError("num_steps must be a whole number of at least 1")

    def times(self, number: int) -> "DpEvent":
        """Give the steps of so many such events together."""
        return DpEvent(self.sampling_prob, self.noise_multiplier, self.num_steps * number)


def epsilon(
    *, sampling_prob: float, noise_multiplier: float, num_steps: int, dp_delta: float, grid: float = LEDGER_GRID
) -> float:
    """Epsilon of equal steps; see `compose`.

    With `sampling_prob` 1 and one step a round it is the epsilon of client-level noise when all sites take part.

    Example:
        >>> round(epsilon(sampling_prob=0.01, noise_multiplier=1.0, num_steps=500, dp_delta=1e-5), 4)
        1.3265
    """
    return compose([DpEvent(sampling_prob, noise_multiplier, num_steps)], dp_delta=dp_delta, grid=grid)


def compose(events: Sequence[DpEvent], *, dp_delta: float, grid: float = LEDGER_GRID) -> float:
    """Epsilon of all events together, in whatever order they happened.

    Steps of equal sampling and noise are added up and composed once: the same epsilon to 1e-9, and much quicker than
    one after the other.

    Args:
        events: What happened; none is epsilon 0.
        dp_delta: Delta of the promise, above 0 and below 1.
        grid: Spacing of the loss distribution. The ledger decides with 1e-3; 1e-4 is for reports, a little tighter.

    Returns:
        Epsilon by PLD, an upper bound.

    Raises:
        AccountingUnsupported: RDP does not confirm it, or epsilon is above 1000, where no promise is left.
        ValueError: A delta that no promise can have.

    Units: nats. Adjacency: one unit added or removed.
    Source: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 (connect the dots).
    """
    _check_delta(dp_delta)
    if not events:
        return 0.0
    epsilon = _epsilon(_merged(events), dp_delta, grid)
    if epsilon == math.inf:
        raise AccountingUnsupported(
            f"epsilon is above {MAX_EPSILON:.0f}, which protects nobody; raise noise_multiplier or take fewer steps"
        )
    return epsilon


def is_within(events: Sequence[DpEvent], *, dp_delta: float, max_epsilon: float) -> bool:
    """Whether `compose` would give `max_epsilon` at most; asks RDP first, which is quicker where much is left."""
    _check_delta(dp_delta)
    kinds = _merged(events)
    return _epsilon_rdp(kinds, dp_delta) <= max_epsilon or _epsilon(kinds, dp_delta, LEDGER_GRID) <= max_epsilon


def epsilon_rdp(events: Sequence[DpEvent], *, dp_delta: float) -> float:
    """Epsilon by Renyi differential privacy: an upper bound that is looser than `compose`.

    Source: Mironov et al. 2019, arXiv:1908.10530, by dp-accounting.
    """
    _check_delta(dp_delta)
    return _epsilon_rdp(_merged(events), dp_delta)


def noise_multiplier(*, epsilon: float, dp_delta: float, sampling_prob: float, num_steps: int) -> float:
    """The least noise whose epsilon does not pass a given one, to one part in 10,000.

    Args:
        epsilon: What may be spent by all steps together, above 0.
        dp_delta: Delta of the promise.
        sampling_prob: Probability with which a unit is in a step.

    Raises:
        AccountingUnsupported: No noise that could be used reaches it.

    Example:
        >>> round(noise_multiplier(epsilon=2.2582, dp_delta=1e-5, sampling_prob=1.0, num_steps=20), 2)
        8.0
    """
    if not 0 < epsilon < math.inf:
        raise ValueError("epsilon must be finite and above 0")

    def fits(noise: float) -> bool:
        return is_within([DpEvent(sampling_prob, noise, num_steps)], dp_delta=dp_delta, max_epsilon=epsilon)

    high = 1.0
    while not fits(high):
        high *= 2
        if high > MAX_NOISE_MULTIPLIER:
            raise AccountingUnsupported(f"no noise reaches epsilon {epsilon:g}; raise it or take fewer steps")
    while fits(high / 2):
        high /= 2
    low = high / 2
    while high > low * (1 + CALIBRATION_TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def largest_delta(num_units: int) -> float:
    """The largest delta that a data set may be given: min(1e-5, 1/(n ln n)).

    A mechanism that shows each unit in the clear with probability delta keeps the promise, so delta has to be far below
    1/n; 1/(n ln n) is below the n^-1.1 that is common in machine learning for every n from 4 on. For few units that
    would still be a probability that nobody would call negligible (0.027 for 14 units), hence the constant, which is
    the delta of most published results.

    Args:
        num_units: Units in the data set, such as patients.

    Source: Dwork and Roth 2014, doi.org/10.1561/0400000042, section 2.3; Ponomareva et al. 2023, arXiv:2303.00654
        (n^-1.1); Abadi et al. 2016, arXiv:1607.00133, section 5 (1e-5).

    Example:
        >>> largest_delta(14), largest_delta(2_000), round(largest_delta(50_000), 8)
        (1e-05, 1e-05, 1.85e-06)
    """
    if num_units < 1:
        raise ValueError("num_units must be at least 1")
    return MAX_DELTA if num_units < 3 else min(MAX_DELTA, 1 / (num_units * math.log(num_units)))


def delta_rule(num_units: int) -> str:
    """What `largest_delta` allows, with its rule; two digits, never rounded up.

    Example:
        >>> delta_rule(14), delta_rule(50_000)[:15]
        ('at most 1e-05, the smaller of 1e-5 and 1 / (n ln n)', 'at most 1.8e-06')
    """
    largest = largest_delta(num_units)
    step = 10.0 ** (math.floor(math.log10(largest)) - 1)
    return f"at most {math.floor(largest / step * (1 + 1e-9)) * step:.2g}, the smaller of 1e-5 and 1 / (n ln n)"


def planned_curve(
    event_per_round: DpEvent, num_rounds: int, *, dp_delta: float, spent: Sequence[DpEvent] = ()
) -> list[float]:
    """Epsilon after each round of a plan. It is steep at first: the first round is never budget over rounds.

    Args:
        spent: What the data set has been used for before.

    Returns:
        One epsilon a round, all that was spent before it included. Of more than 100 rounds, the first one and each
        hundredth of the plan are composed; a round between them gets the next one's epsilon, which it cannot pass.
    """
    num_points = min(num_rounds, MAX_CURVE_POINTS)
    ends = sorted({1, *(-(-num_rounds * point // num_points) for point in range(1, num_points + 1))})
    epsilons = [compose([*spent, event_per_round.times(end)], dp_delta=dp_delta) for end in ends]
    return [epsilons[bisect.bisect_left(ends, number)] for number in range(1, num_rounds + 1)]


def gradient_noise_multiplier(noise_multiplier: float, *, count_noise_std: float) -> float:
    """The gradient's share of the noise when the clip norm follows a noised count of the units under it.

    Both releases together cost what `noise_multiplier` alone would: the accountant is given `noise_multiplier`, the
    gradient gets the larger value that is returned.

    Args:
        noise_multiplier: Of the step as a whole.
        count_noise_std: Standard deviation of the noise on the count; about a twentieth of the batch.

    Raises:
        ValueError: The count alone would cost more than the step may.

    Source: Andrew et al. 2021, arXiv:1905.03871, theorem 1.

    Example:
        >>> round(gradient_noise_multiplier(1.0, count_noise_std=12.8), 6)
        1.000764
    """
    left = noise_multiplier**-2 - (2 * count_noise_std) ** -2
    if not left > 0:
        raise ValueError("count_noise_std must be above half of noise_multiplier")
    return float(left**-0.5)


def client_level_noise_ratio(*, num_sites: float, noise_multiplier: float, num_parameters: int) -> float:
    """L2 norm of the noise on the mean of the sites' updates, in units of the clip norm; the signal is at most 1.

    Args:
        num_sites: Sites in a round, on average.
        noise_multiplier: Standard deviation of the noise on the sum over the clip norm.
        num_parameters: Values in an update.

    Example:
        >>> round(client_level_noise_ratio(num_sites=5, noise_multiplier=2.684, num_parameters=11_300_000), -1)
        1800.0
    """
    return noise_multiplier * math.sqrt(num_parameters) / num_sites


@functools.lru_cache(maxsize=1024)  # a ledger asks again and again what the same past has cost
def _epsilon(kinds: Kinds, dp_delta: float, grid: float) -> float:
    """The number of record, confirmed; infinite if it would be above what is worth a proof."""
    upper = _epsilon_rdp(kinds, dp_delta)
    if not upper <= MAX_EPSILON:
        return math.inf
    while (epsilon := _epsilon_pld(kinds, dp_delta, grid)) > upper and grid > 2 * FINEST_GRID:
        grid /= 10  # of many steps with much noise each, a coarse grid rounds up by more than they cost
    _check_agreement(epsilon, upper)
    return epsilon


def _epsilon_rdp(kinds: Kinds, dp_delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").addFilter(_is_no_dropped_order)
    accountant = RdpAccountant()
    for sampling_prob, noise, num_steps in kinds:
        step = dp_accounting.PoissonSampledDpEvent(sampling_prob, dp_accounting.GaussianDpEvent(noise))
        accountant.compose(step, num_steps)
    return float(accountant.get_epsilon(dp_delta))


def _check_agreement(pld: float, rdp: float) -> None:
    """Two right proofs cannot be in this order; NaN is in none."""
    if not pld <= rdp:
        raise AccountingUnsupported(
            f"two accountants contradict each other: epsilon {pld:.4f} by PLD, at most {rdp:.4f} by RDP; "
            "use other steps or noise"
        )


def _epsilon_pld(kinds: Kinds, dp_delta: float, grid: float) -> float:
    """Epsilon by PLD alone."""
    # dp-accounting cuts the tails of a power by Chernoff's bound, with orders down to one in the number of cells. For
    # many steps of few cells that cuts next to nothing, and an array of millions of cells is left. So these are
    # composed in two stages, of which the second has more cells; the mass that is cut counts as infinite loss both
    # times (1e-15 for each of the first stage), so the result is an upper bound as before.
    losses = []
    for sampling_prob, noise, num_steps in kinds:
        loss = _step_loss(sampling_prob, noise, grid)
        num_outer, num_left = 1, 0
        if num_steps > MAX_STEPS_AT_ONCE and loss._pmf_remove.size**2 < num_steps:
            num_outer, num_left = divmod(num_steps, math.isqrt(num_steps))
        whole = loss.self_compose((num_steps - num_left) // num_outer)
        if num_outer > 1:
            whole = whole.self_compose(num_outer)
        losses.append(whole.compose(loss.self_compose(num_left)) if num_left else whole)
    return float(functools.reduce(lambda left, right: left.compose(right), losses).get_epsilon_for_delta(dp_delta))


@functools.lru_cache(maxsize=32)
def _step_loss(sampling_prob: float, noise: float, grid: float) -> Any:
    """The loss distribution of one step, which takes most of the time."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=grid,
        sampling_prob=sampling_prob,
        pessimistic_estimate=True,
        use_connect_dots=True,
    )


def _merged(events: Sequence[DpEvent]) -> Kinds:
    """Steps added up by sampling and noise, in one order."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[(event.sampling_prob, event.noise_multiplier)] += event.num_steps
    return tuple((*kind, num_steps) for kind, num_steps in sorted(steps.items()))


def _check_delta(dp_delta: float) -> None:
    """Refuse what is no delta, NaN included."""
    if not 0 < dp_delta < 1:
        raise ValueError("dp_delta must be above 0 and below 1")


def _is_no_dropped_order(record: logging.LogRecord) -> bool:
    """Keep dp-accounting from warning of orders that it leaves out: fewer orders only raise epsilon."""
    return "failed to converge" not in str(record.msg)
