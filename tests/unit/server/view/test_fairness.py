"""How evenly sites fare, by hand."""

import pytest

from server.view import fairness
from tests.samples.events import view


def test_worst_best_mean_and_spread_by_hand():
    found = fairness.spread({"a": 1.0, "b": 2.0, "c": 6.0}, higher_is_better=False)
    assert (found.worst, found.worst_site, found.best, found.best_site) == (6.0, "c", 1.0, "a")
    assert (found.mean, found.spread) == (3.0, 5.0)
    assert found.std == pytest.approx(2.1602468995)  # sqrt((4 + 1 + 9) / 3)


def test_a_high_share_is_a_good_one():
    found = fairness.spread({"a": 0.25, "b": 0.75, "c": None}, higher_is_better=True)
    assert (found.worst_site, found.best_site, found.mean) == ("a", "b", 0.5)
    assert fairness.spread({"a": None}, higher_is_better=True) is None


def scored(number: int, **losses: float) -> dict:
    return {"kind": "evaluated", "num_rounds": number, "sites": {site: {"loss": loss} for site, loss in losses.items()}}


def test_each_site_is_held_against_the_base_at_that_site():
    log = [{"kind": "run_started"}, scored(0, a=2.0, b=3.0), scored(1, a=1.0, b=1.0), scored(0, a=9.0, c=4.0)]
    assert view(log).base_losses == {"a": 2.0, "b": 3.0, "c": 4.0}
