"""Figures of rows and how sure they are, against scipy, scikit-learn and hand-worked cases."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from server.evaluate.figures import bootstrap, labels
from server.evaluate.figures.bootstrap import Scores, of_rows


def table(scores: Scores) -> np.ndarray:
    return np.asarray(scores.rows)


def test_the_interval_is_that_of_scipy():
    draws = np.random.default_rng(1)
    before, after = draws.random(80), draws.random(80) + 0.1
    found = bootstrap.gain(of_rows(after), of_rows(before), num_resamples=8000)
    other = scipy.stats.bootstrap((after - before,), np.mean, n_resamples=8000, method="percentile", rng=2)
    assert found.mean == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(other.confidence_interval.low, abs=4e-3)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=4e-3)
    alone = bootstrap.interval(of_rows(after), num_resamples=8000)
    other = scipy.stats.bootstrap((after,), np.mean, n_resamples=8000, method="percentile", rng=2)
    assert alone.mean == pytest.approx(after.mean())
    assert (alone.low, alone.high) == pytest.approx(tuple(other.confidence_interval), abs=4e-3)


def test_pairs_are_kept_together():
    before = [float(number % 2) for number in range(40)]
    after = [score + 0.25 for score in before]
    found = bootstrap.gain(of_rows(after), of_rows(before))
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    shuffled = bootstrap.gain(of_rows(sorted(after)), of_rows(before))  # control: the same scores, not paired
    assert shuffled.high - shuffled.low > 0.2


def test_pairs_are_kept_together_in_ratios_too():
    counts = [float(1 + number % 7) for number in range(40)]
    before = Scores(tuple((3.0 * count, count) for count in counts), "perplexity", higher_is_better=False)
    after = Scores(tuple((2.0 * count, count) for count in counts), "perplexity", higher_is_better=False)
    found = bootstrap.gain(after, before, num_resamples=50)
    assert (found.low, found.mean, found.high) == pytest.approx([math.exp(2) - math.exp(3)] * 3)


def covered(rise: float, *, num_trials: int = 200) -> float:
    """Share of trials whose interval holds 0, with a true rise of `rise` standard deviations."""
    draws = np.random.default_rng(7)
    trials = [draws.normal(rise, 1.0, size=60) for _ in range(num_trials)]
    zero = of_rows([0.0] * 60)
    found = [bootstrap.gain(of_rows(gain), zero, num_resamples=400, seed=number) for number, gain in enumerate(trials)]
    return float(np.mean([interval.low <= 0 <= interval.high for interval in found]))


def test_the_interval_holds_the_truth_in_19_of_20_cases_and_not_a_falsehood():
    assert 0.90 <= covered(0.0) <= 0.985
    assert covered(0.7) < 0.2  # control


def test_scores_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        bootstrap.gain(of_rows([1.0, 0.0]), of_rows([1.0]))
    with pytest.raises(ValueError, match="0 and 0"):
        bootstrap.gain(of_rows([]), of_rows([]))
    with pytest.raises(ValueError, match="not pairs"):
        bootstrap.gain(of_rows([1.0]), Scores(((1.0, 1.0),), "ratio"))


def test_ratios_by_hand():
    rows = Scores(((2.0, 1.0), (4.0, 3.0)), "ratio")
    assert rows.value == 1.5
    assert Scores(rows.rows, "perplexity").value == pytest.approx(4.4816890703)
    assert Scores(rows.rows, "bits").value == pytest.approx(2.1640425613)


def test_a_perplexity_beyond_all_numbers_is_the_largest_and_ends_no_run():
    huge = Scores(((2000.0, 1.0), (10.0, 1.0)), "perplexity", higher_is_better=False)
    assert huge.value == pytest.approx(1.0142320547350045e304)  # e^700
    found = bootstrap.gain(huge, Scores(((10.0, 1.0), (10.0, 1.0)), "perplexity", higher_is_better=False))
    assert all(map(math.isfinite, (found.mean, found.low, found.high)))


def test_macro_f1_is_that_of_scikit_learn():
    draws = np.random.default_rng(3)
    for size in (3, 20, 200):
        wanted, given = draws.integers(0, 5, size), draws.integers(-1, 5, size)
        occurring = sorted({*wanted, *given} - {-1})
        other = sklearn.metrics.f1_score(wanted, given, labels=occurring, average="macro", zero_division=0)
        assert bootstrap.macro_f1(np.stack([given, wanted], axis=1).astype(float)) == pytest.approx(other)


def test_a_label_is_one_of_a_closed_set_exactly_after_normalisation():
    known = labels.label_set(["Card arrival", "lost_card"], [' "lost_card".', "card  ARRIVAL"])
    assert known == ("card arrival", "lost_card")
    assert [labels.number_of(text, known) for text in ("Card Arrival!", "lost_card", "a lost_card", "")] == [
        0,
        1,
        -1,
        -1,
    ]
    assert labels.label_set((), ["Yes", "no", "yes."]) == ("no", "yes")
    with pytest.raises(labels.DataError, match=r"row 2 \(so of 2 rows\) is empty or punctuation"):
        labels.label_set((), ["yes", "?", "..."])
    with pytest.raises(labels.DataError, match="a label is punctuation alone"):
        labels.label_set(["yes", "?"], ["yes"])
    with pytest.raises(labels.DataError, match="row 2 is none of the 2 labels"):
        labels.label_set(["yes", "no"], ["yes", "maybe"])
