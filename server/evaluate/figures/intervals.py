"""Intervals and tests for shares and means, without a library: sites and coordinator draw them from counts alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Z_95: Final = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

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


_T_95: Final = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


def t_95(num_free: int) -> float:
    """The 97.5th percentile of Student's t with so many degrees of freedom, to four digits.

    Raises:
        ValueError: None is free.

    Source: a table up to 30, then the expansion of Abramowitz and Stegun 1964, 26.7.5.

    Example:
        >>> t_95(2), round(t_95(100), 4)
        (4.3027, 1.984)
    """
    if num_free < 1:
        raise ValueError("a single value has no spread")
    if num_free <= len(_T_95):
        return _T_95[num_free - 1]
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / num_free + second / num_free**2 + third / num_free**3


def mean_of_few(values: Sequence[float]) -> Estimate:
    """The mean of a few independent values, such as one a site, with Student's interval of 95 %.

    Raises:
        ValueError: Fewer than two.

    Example:
        >>> mean_of_few([1.0, 2.0, 3.0])
        Estimate(value=2.0, low=-0.484..., high=4.484...)
    """
    middle = statistics.fmean(values)
    spread = t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(middle, middle - spread, middle + spread)


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
    all_splits = math.lgamma(total + 1) - total * math.log(2)  # logarithms, as binomials overflow
    logs = [all_splits - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
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
