"""Scores of rows, the figure that they make, and how sure it is.

N rows, K numbers a row. A statistic is a function of (N, K) numbers to one figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from common.privacy import roc

Table = NDArray[np.float64]
NUM_RESAMPLES: Final = 2000
MAX_NATS: Final = 700.0  # whose exponential a float can hold


@dataclass(frozen=True)
class Interval:
    """A figure and where it may lie.

    Attributes:
        mean: Of the rows that there are.
        low: Lower end of the interval of 95 %.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What each row scored in one figure; numbers only, never text.

    Attributes:
        rows: One tuple a row, all of one length.
        statistic: How the rows make the figure; a name in `STATISTICS`.
        higher_is_better: Whether a rise is an improvement.
    """

    rows: tuple[tuple[float, ...], ...]
    statistic: str = "mean"
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        """The figure."""
        return STATISTICS[self.statistic](np.asarray(self.rows, dtype=np.float64))


def of_rows(values: Sequence[float], *, higher_is_better: bool = True) -> Scores:
    """Scores whose mean is the figure."""
    return Scores(tuple((float(value),) for value in values), "mean", higher_is_better)


def mean(rows_nk: Table) -> float:
    """Mean of the first column."""
    return float(rows_nk[:, 0].mean())


def ratio(rows_nk: Table) -> float:
    """Sum of the first column over the sum of the second."""
    return float(rows_nk[:, 0].sum() / rows_nk[:, 1].sum())


def perplexity(rows_nk: Table) -> float:
    """Exponential of nats (first column) a counted thing, such as a token (second column).

    At most e^700: what a float cannot hold, and nobody can tell from it, would end the run after all its work.
    """
    return math.exp(min(ratio(rows_nk), MAX_NATS))


def bits(rows_nk: Table) -> float:
    """Nats (first column) a counted thing, such as a byte (second column), in bits."""
    return ratio(rows_nk) / math.log(2)


def macro_f1(rows_nk: Table) -> float:
    """Mean over labels of the F1 of each; the columns are the number of the label given, and of the one wanted.

    A label counts if some row gives or wants it. -1 is an answer that is no label: wrong, and no label of its own.

    Source: scikit-learn's `f1_score(average="macro")` over those labels.

    Example:
        >>> macro_f1(np.array([[0, 0], [1, 0], [1, 1], [-1, 1]], dtype=float))
        0.5833333333333333
    """
    given_n, wanted_n = rows_nk.astype(np.int64).T
    size = int(max(given_n.max(), wanted_n.max())) + 1
    num_given = np.bincount(given_n[given_n >= 0], minlength=size)
    num_wanted = np.bincount(wanted_n, minlength=size)
    num_right = np.bincount(wanted_n[given_n == wanted_n], minlength=size)
    occurs = (num_given + num_wanted) > 0
    return float((2 * num_right[occurs] / (num_given + num_wanted)[occurs]).mean())


def high(rows_nk: Table) -> float:
    """The 90th percentile of the first column, between two rows by the straight line."""
    return float(np.percentile(rows_nk[:, 0], 90))


def largest(rows_nk: Table) -> float:
    """The largest of the first column."""
    return float(rows_nk[:, 0].max())


def total(rows_nk: Table) -> float:
    """Sum of the first column."""
    return float(rows_nk[:, 0].sum())


def auc(rows_nk: Table) -> float:
    """Probability that a member (second column 1) has a higher first column than a non-member (0).

    Rows of one side only say nothing, which is 0.5; a resample of few rows may be such.
    """
    is_in_n = rows_nk[:, 1] > 0
    if is_in_n.all() or not is_in_n.any():
        return 0.5
    return roc.auc(torch.from_numpy(rows_nk[is_in_n, 0]), torch.from_numpy(rows_nk[~is_in_n, 0]))


def kappa(rows_nk: Table) -> float:
    """Cohen's kappa of two raters, whose labels, numbered from 0, are the columns; 0 where chance alone would agree.

    Source: Cohen 1960, doi:10.1177/001316446002000104; scikit-learn's `cohen_kappa_score` gives no number there.

    Example:
        >>> kappa(np.array([[0, 0], [0, 1], [1, 1], [1, 1]], dtype=float))
        0.5
    """
    first_n, second_n = rows_nk.astype(np.int64).T
    size = int(rows_nk.max()) + 1
    shares = [np.bincount(labels_n, minlength=size) / len(rows_nk) for labels_n in (first_n, second_n)]
    by_chance = float(shares[0] @ shares[1])
    return 0.0 if by_chance == 1 else float(((first_n == second_n).mean() - by_chance) / (1 - by_chance))


STATISTICS: Final[Mapping[str, Callable[[Table], float]]] = {
    "mean": mean,
    "ratio": ratio,
    "perplexity": perplexity,
    "bits": bits,
    "macro_f1": macro_f1,
    "high": high,
    "largest": largest,
    "total": total,
    "auc": auc,
    "kappa": kappa,
}


def interval(scores: Scores, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """A figure with its interval by the bootstrap over rows; see `gain`."""
    rows_nk = np.asarray(scores.rows, dtype=np.float64)
    statistic = STATISTICS[scores.statistic]
    draws = [statistic(rows_nk[drawn]) for drawn in _resamples(len(rows_nk), num_resamples, seed)]
    return _around(statistic(rows_nk), draws)


def gain(after: Scores, before: Scores, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """How much a figure rose from `before` to `after`, both of the same rows in the same order.

    Rows are drawn anew with replacement, and both scores of a row are drawn together: what makes a row hard for both
    does not widen the interval. The ends are the 2.5th and 97.5th percentile. It knows of no other chance than which
    rows there were; under some 30 rows it is too narrow.

    Raises:
        ValueError: No rows, not as many of both, or another statistic.

    Source: Koehn 2004, aclanthology.org/W04-3250; Efron and Tibshirani 1993, the percentile method.
    """
    if not after.rows or len(after.rows) != len(before.rows) or after.statistic != before.statistic:
        raise ValueError(f"{len(after.rows)} and {len(before.rows)} scores are not pairs")
    after_nk, before_nk = (np.asarray(scores.rows, dtype=np.float64) for scores in (after, before))
    statistic = STATISTICS[after.statistic]
    resamples = _resamples(len(after_nk), num_resamples, seed)
    draws = [statistic(after_nk[drawn]) - statistic(before_nk[drawn]) for drawn in resamples]
    return _around(statistic(after_nk) - statistic(before_nk), draws)


def _resamples(num_rows: int, num_resamples: int, seed: int) -> list[NDArray[Any]]:
    """Which rows each resample holds."""
    generator = np.random.default_rng(seed)
    return [generator.integers(num_rows, size=num_rows) for _ in range(num_resamples)]


def _around(value: float, draws: Sequence[float]) -> Interval:
    """A figure with the percentiles of its resamples."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
