"""Lower bounds on epsilon from what a mechanism was seen to do; an audit holds them against what is claimed.

Two estimators. The Gaussian fit takes the scores as normal, which holds for a mechanism whose noise is our own, and is
sharp. The one-run bound takes nothing for granted and is blunt: it cannot pass its `ceiling`, however bad the leak.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import torch
from torch import Tensor

CONFIDENCE: Final = 0.95
NUM_RESAMPLES: Final = 1000
NUM_HALVINGS: Final = 60
FEWEST_GUESSES: Final = 100
GUESSED_SHARE: Final = 0.25  # the canaries in the middle tell nothing, and a wrong guess costs more than none
MOST: Final = 1e6  # an epsilon above this is infinite for every purpose


@dataclass(frozen=True)
class Fit:
    """What the Gaussian fit found.

    Attributes:
        mu: Distance of the means in standard deviations; the parameter of Gaussian differential privacy.
        mu_lower: What it is at least, with the confidence that was asked for.
        epsilon: Of `mu_lower`; infinite where the scores do not vary at all.
    """

    mu: float
    mu_lower: float
    epsilon: float


@dataclass(frozen=True)
class OneRun:
    """What the one-run bound found.

    Attributes:
        epsilon: At least this.
        ceiling: What it would be if every guess were right.
        num_guesses: How many canaries were guessed.
        num_right: How many of them rightly.
    """

    epsilon: float
    ceiling: float
    num_guesses: int
    num_right: int


def gdp_delta(epsilon: float, *, mu: float) -> float:
    """Delta of a Gaussian mechanism with parameter mu.

    Source: Dong, Roth and Su 2022, arXiv:1905.02383, corollary 2.13; Balle and Wang 2018, arXiv:1805.06530.

    Example:
        >>> round(gdp_delta(0.0, mu=1.0), 6)  # total variation of N(0, 1) and N(1, 1)
        0.382925
    """
    left = NormalDist().cdf(-epsilon / mu + mu / 2)
    log_right = float(torch.special.log_ndtr(torch.tensor(-epsilon / mu - mu / 2, dtype=torch.float64)))
    return left - math.exp(epsilon + log_right)


def gdp_epsilon(mu: float, *, dp_delta: float) -> float:
    """The least epsilon of a Gaussian mechanism with parameter mu.

    Args:
        mu: Sensitivity over standard deviation; of T equal steps sqrt(T) times that of one. At most 0 gives 0.

    Example:
        >>> round(gdp_epsilon(20**0.5 / 8, dp_delta=1e-5), 3)
        2.258
    """
    if mu <= 0 or gdp_delta(0.0, mu=mu) <= dp_delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * 40  # beyond it no float's delta is left
    if not high < MOST:
        return math.inf
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if gdp_delta(middle, mu=mu) > dp_delta else (low, middle)
    return low


def gaussian_fit(scores_m: Tensor, is_in_m: Tensor, *, dp_delta: float, confidence: float = CONFIDENCE) -> Fit:
    """Epsilon that a mechanism has at least, if its scores are normal.

    The bound is the distance less its bootstrap standard error times the normal quantile, so that a confidence can be
    asked for that no number of resamples could show.

    Args:
        scores_m: A score for each canary, higher if it was used.
        is_in_m: Which were used; both kinds are needed.
        confidence: Probability with which a right mechanism is not overestimated.

    Raises:
        ValueError: Fewer than two canaries of a kind.

    Shape: (m,) both. Source: Andrew et al. 2024, arXiv:2302.03098, section 3; Efron 1979 for the bootstrap.
    """
    inside, outside = scores_m[is_in_m].double(), scores_m[~is_in_m].double()
    if min(len(inside), len(outside)) < 2:
        raise ValueError("a Gaussian fit needs two canaries that were used and two that were not")
    mu = float(_distance(inside[None], outside[None]))
    if not math.isfinite(mu):  # no spread, or no numbers: nothing here could be claimed
        return Fit(math.inf, math.inf, math.inf)
    generator = torch.Generator().manual_seed(0)
    resampled = _distance(_resampled(inside, generator), _resampled(outside, generator))
    mu_lower = mu - NormalDist().inv_cdf(confidence) * float(resampled.std())
    return Fit(mu, mu_lower, gdp_epsilon(mu_lower, dp_delta=dp_delta))


def one_run(scores_m: Tensor, is_in_m: Tensor, *, dp_delta: float, confidence: float = CONFIDENCE) -> OneRun:
    """Epsilon that a mechanism has at least, whatever the scores are distributed like.

    The canaries with the highest scores are guessed to have been used and those with the lowest not to.

    Args:
        is_in_m: Which were used; each with probability 1/2, for itself.
    """
    num_guesses = choose_guesses(len(scores_m))
    num_right = num_right_guesses(scores_m, is_in_m, num_guesses=num_guesses)
    epsilon, ceiling = (
        one_run_epsilon(
            num_canaries=len(scores_m),
            num_guesses=num_guesses,
            num_right=right,
            dp_delta=dp_delta,
            confidence=confidence,
        )
        for right in (num_right, num_guesses)
    )
    return OneRun(epsilon, ceiling, num_guesses, num_right)


def one_run_p_value(epsilon: float, *, num_canaries: int, num_guesses: int, num_right: int, dp_delta: float) -> float:
    """Probability of so many right guesses, or more, under (epsilon, delta); above 1 it says nothing.

    Args:
        num_canaries: m; each was used with probability 1/2, for itself.

    Source: Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2 and appendix D.
    """
    pmf_k = _binomial(num_guesses, epsilon)
    tail = float(pmf_k[num_right:].sum())
    below_i = pmf_k[:num_right].flip(0).cumsum(0)  # P[v > Bin >= v - i] for i = 1, 2, ...
    share = float((below_i / torch.arange(1, num_right + 1)).max()) if num_right else 0.0
    return tail + 2 * num_canaries * dp_delta * share


def one_run_epsilon(
    *, num_canaries: int, num_guesses: int, num_right: int, dp_delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that so many right guesses refute; see `one_run_p_value`.

    Example:
        >>> round(one_run_epsilon(num_canaries=100, num_guesses=100, num_right=100, dp_delta=1e-5), 1)
        3.5
    """
    low, high = 0.0, 64.0
    given = {"num_canaries": num_canaries, "num_guesses": num_guesses, "num_right": num_right}
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        is_refuted = one_run_p_value(middle, **given, dp_delta=dp_delta) < 1 - confidence
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def choose_guesses(num_canaries: int) -> int:
    """How many guesses an audit makes: even, and fixed before the scores are known, or the bound would not hold."""
    wanted = max(FEWEST_GUESSES, round(GUESSED_SHARE * num_canaries))
    return min(num_canaries, wanted) // 2 * 2


def num_right_guesses(scores_m: Tensor, is_in_m: Tensor, *, num_guesses: int) -> int:
    """Guess that the canaries with the highest scores were used and those with the lowest were not; count the right.

    Args:
        num_guesses: Even; half of them on each side.
    """
    half = num_guesses // 2
    order = scores_m.argsort(descending=True)
    return int(is_in_m[order[:half]].sum()) + int((~is_in_m[order[len(order) - half :]]).sum())


def _distance(inside_bn: Tensor, outside_bn: Tensor) -> Tensor:
    """Difference of the means over the pooled standard deviation, row by row; a row without spread is infinite."""
    difference_b = (inside_bn.mean(1) - outside_bn.mean(1)).abs()  # a wrong sign would tell as much
    return difference_b / ((inside_bn.var(1) + outside_bn.var(1)) / 2).sqrt()


def _resampled(values_n: Tensor, generator: torch.Generator) -> Tensor:
    """Rows drawn with replacement."""
    picks_bn = torch.randint(len(values_n), (NUM_RESAMPLES, len(values_n)), generator=generator)
    return values_n[picks_bn]


def _binomial(number: int, epsilon: float) -> Tensor:
    """Probabilities of 0 to `number` right guesses, each right with probability e^epsilon / (1 + e^epsilon)."""
    count_k = torch.arange(number + 1, dtype=torch.float64)
    log_ways_k = math.lgamma(number + 1) - torch.lgamma(count_k + 1) - torch.lgamma(number - count_k + 1)
    log_right = -math.log1p(math.exp(-epsilon))
    return (log_ways_k + number * log_right - (number - count_k) * epsilon).exp()
