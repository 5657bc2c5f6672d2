from collections import Counter

import pytest

from server.fleet import sampling

SITES = [f"site-{number}" for number in range(10)]


def choose(round_index: int, *, num_sites: int = 3, seed: int = 1, sites=SITES) -> list[str]:
    return sampling.choose(sites, num_sites=num_sites, seed=seed, round_index=round_index)


@pytest.mark.parametrize("num_sites", [0, 10, 11])
def test_all_sites_train_where_no_fewer_are_wanted(num_sites):
    assert choose(0, num_sites=num_sites) == SITES


def test_a_cohort_has_its_size_and_no_site_twice():
    for round_index in range(50):
        cohort = choose(round_index)
        assert len(set(cohort)) == 3
        assert set(cohort) <= set(SITES)
        assert cohort == sorted(cohort)


def test_a_cohort_is_a_function_of_seed_and_round():
    assert choose(4) == choose(4) == choose(4, sites=SITES[::-1])
    assert [choose(k) for k in range(20)] != [choose(k, seed=2) for k in range(20)]
    assert len({tuple(choose(k)) for k in range(20)}) > 10


def chi_squared(counts: Counter, num_rounds: int) -> float:
    expected = 3 * num_rounds / len(SITES)
    return sum((counts[site] - expected) ** 2 / expected for site in SITES)


def test_every_site_is_chosen_equally_often():
    """9 degrees of freedom: 33.7 is passed by chance once in 10,000; without replacement even less often."""
    counts = Counter(site for k in range(2000) for site in choose(k))
    assert set(counts) == set(SITES)
    assert chi_squared(counts, 2000) < 33.7


def test_control_a_sampler_with_a_favourite_fails_that_test():
    counts = Counter(site for k in range(2000) for site in (choose(k) if k % 10 else SITES[:3]))
    assert chi_squared(counts, 2000) > 33.7


def test_pairs_of_sites_meet():
    """A sampler that always drew neighbours would pass the test above."""
    pairs = Counter((first, second) for k in range(2000) for first, second in [choose(k, num_sites=2)])
    assert len(pairs) == 45
    assert max(pairs.values()) < 3 * min(pairs.values())


def test_a_panel_stays_the_same_while_sites_come_and_go():
    whole = sampling.panel(SITES, num_sites=4, seed=1)
    assert len(whole) == 4
    assert whole == sampling.panel(SITES[::-1], num_sites=4, seed=1)
    for gone in SITES:
        rest = sampling.panel([site for site in SITES if site != gone], num_sites=4, seed=1)
        assert len(set(whole) - set(rest)) == (gone in whole)
        assert gone not in rest
    assert sampling.panel(SITES, num_sites=0, seed=1) == sampling.panel(SITES, num_sites=10, seed=1) == SITES


def test_every_site_is_in_a_panel_equally_often():
    counts = Counter(site for seed in range(2000) for site in sampling.panel(SITES, num_sites=3, seed=seed))
    assert set(counts) == set(SITES)
    assert all(abs(counts[site] - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for site in SITES)
