"""Intervals and tests, against scipy's and published numbers."""

import pytest
import scipy.stats

from server.evaluate.figures import intervals


@pytest.mark.parametrize(("count", "total"), [(0, 7), (7, 7), (8, 10), (81, 263), (1004, 1967)])
def test_shares_have_the_wilson_interval_of_scipy(count, total):
    expected = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    found = intervals.share(count, total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == count / total
    exact = scipy.stats.binomtest(count, total).proportion_ci(method="exact")  # control: another interval
    assert (found.low, found.high) != pytest.approx((exact.low, exact.high), abs=1e-4)


def test_newcombes_published_wilson_interval():
    found = intervals.share(81, 263)  # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("count", "total"), [(0, 1), (5, 10), (9, 10), (1004, 1967), (885, 1964), (0, 0)])
def test_the_sign_test_is_the_exact_binomial_one(count, total):
    expected = scipy.stats.binomtest(count, total).pvalue if total else 1.0
    assert intervals.sign_test(count, total) == pytest.approx(expected, rel=1e-9)


def test_the_mean_of_differences_has_the_normal_interval():
    found = intervals.mean([1.0, 2.0, 3.0, 4.0])  # standard deviation 1.29099, error 0.645497
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 1.234848, 3.765152), abs=1e-6)


@pytest.mark.parametrize(
    "call", [lambda: intervals.share(3, 2), lambda: intervals.share(0, 0), lambda: intervals.mean([])]
)
def test_nothing_is_estimated_from_nothing(call):
    with pytest.raises(ValueError, match=r"share|mean"):
        call()
