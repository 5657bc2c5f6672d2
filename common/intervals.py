"""Intervals and tests for shares and means, without a library: sites and coordinator draw them from counts alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Z_95: Final = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def share(count: int, total: int) -> Estimate:
    """A share of `total` independent rows, with Wilson's score interval.

    Raises:
        ValueError: Not 0 <= count <= total, or nothing in total.

    Source: Wilson 1927, doi.org/10.1080/01621459.1927.10502953; Brown et al. 2001, doi.org/10.1214/ss/1009213286.

    Example:
        >>> share(8, 10)
        Estimate(value=0.8, low=0.490..., high=0.943...)
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total} is no share")
    observed, square = count / total, Z_95**2
    middle = (observed + square / (2 * total)) / (1 + square / total)
    spread = math.sqrt(observed * (1 - observed) / total + square / (4 * total**2)) * Z_95 / (1 + square / total)
    return Estimate(observed, max(0.0, middle - spread), min(1.0, middle + spread))


def sign_test(count: int, total: int) -> float:
    """Two-sided p-value of the exact sign test: how likely a split as uneven as this is, if both sides are as likely.

    Raises:
        ValueError: Not 0 <= count <= total.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.4.

    Example:
        >>> round(sign_test(9, 10), 6)
        0.021484
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no split")
    fewer = min(count, total - count)
    logs = [_log_binomial(total, k) - total * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of paired differences, with the normal interval; under some 30 rows it is too narrow.

    Raises:
        ValueError: Fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("there are not the two values that an interval of a mean needs")
    middle = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(middle, middle - Z_95 * error, middle + Z_95 * error)


def _log_binomial(total: int, count: int) -> float:
    """Logarithm of the number of ways to choose."""
    return math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
