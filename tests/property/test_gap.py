"""The aggregation gap equals the dense one, for any number of sites, rank and shape; of long sides, on average."""

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.aggregate import gap
from server.aggregate.methods import fedavg

A, B = "m.lora_A.weight", "m.lora_B.weight"
SIZES = {
    "num_sites": st.integers(1, 6),
    "rank": st.integers(1, 4),
    "d": st.integers(4, 12),
    "k": st.integers(4, 12),
    "seed": st.integers(0, 2**32 - 1),
}


def make(num_sites: int, rank: int, d: int, k: int, seed: int, *, drift: float = 0.3):
    """A global adapter, the sites' changes to it, and their weights."""
    generator = torch.Generator().manual_seed(seed)

    def pair(scale: float) -> dict[str, Tensor]:
        return {
            A: scale * torch.randn(rank, k, generator=generator),
            B: scale * torch.randn(d, rank, generator=generator),
        }

    weights = (1 + torch.randint(200, (num_sites,), generator=generator)).tolist()
    return pair(1.0), [pair(drift) for _ in range(num_sites)], [float(weight) for weight in weights]


def measured(before, changes, weights) -> tuple[float, float, dict[str, Tensor]]:
    """Norms of bias and step by the meter, and the new adapter."""
    meter, combined = gap.GapMeter(before, seed=1), fedavg.start(before, trained=list(before))
    for change, weight in zip(changes, weights, strict=True):
        meter.add(change, weight=weight)
        combined.add(change, weight=weight)
    after = fedavg.apply(before, combined.result())
    norms = meter.per_module(after)["m"]
    assert (norms.bias_error, norms.step_error) == (0, 0)  # no side is longer than the sketch's
    return norms.bias, norms.step, after


def dense(before, changes, weights) -> tuple[float, float]:
    """The same norms from whole matrices in float64, the bias by the right-hand side of the identity."""
    shares = [weight / sum(weights) for weight in weights]
    local = [{name: before[name].double() + change[name].double() for name in before} for change in changes]
    mean = {name: sum(p * site[name] for p, site in zip(shares, local, strict=True)) for name in before}
    covariance = sum(p * (s[B] - mean[B]) @ (s[A] - mean[A]) for p, s in zip(shares, local, strict=True))
    ideal = sum(p * s[B] @ s[A] for p, s in zip(shares, local, strict=True))
    step = ideal - before[B].double() @ before[A].double()
    return float(covariance.norm()), float(step.norm())


@given(**SIZES)
def test_the_factored_norms_equal_the_dense_ones(num_sites, rank, d, k, seed):
    before, changes, weights = make(num_sites, rank, d, k, seed)
    bias, step, _ = measured(before, changes, weights)
    expected_bias, expected_step = dense(before, changes, weights)
    assert bias == pytest.approx(expected_bias, abs=1e-4)
    assert step == pytest.approx(expected_step, rel=1e-4)


@given(**SIZES)
def test_the_bias_is_what_averaging_the_factors_leaves_out(num_sites, rank, d, k, seed):
    """The left-hand side: M - B_mean A_mean, with the adapter that the method really made."""
    before, changes, weights = make(num_sites, rank, d, k, seed)
    bias, _, after = measured(before, changes, weights)
    products = [
        weight / sum(weights) * (before[B] + change[B]).double() @ (before[A] + change[A]).double()
        for change, weight in zip(changes, weights, strict=True)
    ]
    assert bias == pytest.approx(float((sum(products) - after[B].double() @ after[A].double()).norm()), abs=1e-4)


@given(shared=st.sampled_from([A, B]), **SIZES)
def test_the_gap_is_zero_where_one_factor_is_shared(shared, num_sites, rank, d, k, seed):
    before, changes, weights = make(num_sites, rank, d, k, seed)
    same = [{**change, shared: changes[0][shared]} for change in changes]
    bias, step, _ = measured(before, same, weights)
    assert bias < 1e-5 * step


@given(**{**SIZES, "num_sites": st.just(1)})
def test_the_gap_of_one_site_is_zero(num_sites, rank, d, k, seed):
    bias, step, _ = measured(*make(num_sites, rank, d, k, seed))
    assert bias < 1e-5 * step


def test_control_with_both_factors_trained_the_gap_is_not_zero():
    bias, step, _ = measured(*make(4, 2, 8, 8, 1))
    assert gap.whole([gap.Norms(bias, step)]) > 0.01


def test_where_nothing_moved_the_gap_is_zero():
    before, _, _ = make(1, 2, 5, 5, 1)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    bias, step, _ = measured(before, [nothing, nothing], [1.0, 3.0])
    assert (bias, step) == (0, 0)
    assert gap.whole([gap.Norms(0.0, 0.0)]) == 0


def test_modules_are_taken_together_by_their_norms():
    assert gap.whole([gap.Norms(3.0, 5.0), gap.Norms(4.0, 12.0)]) == pytest.approx(5 / 13)


NUM_SEEDS = 120
WIDE = {"num_sites": 5, "rank": 2, "d": 300, "k": 281, "seed": 11}


def outlying(factor: str):
    """A round in which two alike rows of B, or columns of A, hold most of the energy, as far apart as a sketch is."""
    before, changes, weights = make(**WIDE)
    for change in changes:
        rows = change[B] if factor == B else change[A].T
        rows[[7, 7 + gap.MAX_WIDTH]] = 20 * rows[7]
    return before, changes, weights


ROUNDS = {"plain": make(**WIDE), "rows": outlying(B), "columns": outlying(A)}


def estimates(case: str) -> list[gap.Norms]:
    """What the meter says under each of many seeds."""
    before, changes, weights = ROUNDS[case]
    combined = fedavg.start(before, trained=list(before))
    for change, weight in zip(changes, weights, strict=True):
        combined.add(change, weight=weight)
    after, found = fedavg.apply(before, combined.result()), []
    for seed in range(NUM_SEEDS):
        meter = gap.GapMeter(before, seed=seed)
        for change, weight in zip(changes, weights, strict=True):
            meter.add(change, weight=weight)
        found.append(meter.per_module(after)["m"])
    return found


@pytest.fixture(scope="module")
def by_case():
    return {case: estimates(case) for case in ROUNDS}


def miss(values: list[float], exact: float) -> float:
    """Distance of a mean from what it should be, in standard errors of that mean."""
    found = torch.tensor(values, dtype=torch.float64)
    return abs(float(found.mean()) - exact) / max(float(found.std()) / len(values) ** 0.5, 1e-3 * exact)


@pytest.mark.parametrize("case", ROUNDS)
def test_where_the_norms_are_estimates_their_squares_are_right_on_average(case, by_case):
    norms, exact = by_case[case], dense(*ROUNDS[case])
    assert miss([each.bias**2 for each in norms], exact[0] ** 2) < 4
    assert miss([each.step**2 for each in norms], exact[1] ** 2) < 4


@pytest.mark.parametrize("case", ROUNDS)
def test_a_gap_is_within_two_of_its_standard_errors_in_nineteen_of_twenty_rounds(case, by_case):
    norms, exact = by_case[case], dense(*ROUNDS[case])
    gaps = torch.tensor([gap.whole([each]) for each in norms], dtype=torch.float64)
    errors = torch.tensor([gap.error([each]) for each in norms], dtype=torch.float64)
    assert float(((gaps - exact[0] / exact[1]).abs() <= 2 * errors).double().mean()) >= 0.95
    assert case != "plain" or float(errors.median()) < 0.3 * float(gaps.mean())


def test_control_without_chance_in_the_signs_the_squares_are_wrong(monkeypatch):
    drawn = torch.randint

    def alike(*args, **kwargs):
        return torch.zeros_like(drawn(*args, **kwargs)) + (gap.MAX_WIDTH if len(args) == 3 else 0)

    monkeypatch.setattr(torch, "randint", alike)
    monkeypatch.setitem(globals(), "NUM_SEEDS", 2)
    for case in ("rows", "columns"):
        assert miss([each.bias**2 for each in estimates(case)], dense(*ROUNDS[case])[0] ** 2) > 4


def test_one_seed_gives_one_estimate_and_another_gives_another(by_case, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_SEEDS", 2)
    assert estimates("plain") == by_case["plain"][:2]
    assert by_case["plain"][0].bias != by_case["plain"][1].bias


def test_the_gap_of_many_modules_is_told_more_exactly_than_that_of_one():
    norms = [gap.Norms(1.0, 2.0, 0.2, 0.8)] * 100
    assert gap.error(norms) == pytest.approx(gap.error(norms[:1]) / 10)
    assert gap.error(norms[:1]) == pytest.approx(0.5 * (0.2 / 1.0 + 0.8 / 4.0) / 2)


def test_values_at_the_limit_of_what_is_accepted_do_not_overflow():
    before = {A: torch.zeros(1, 30), B: torch.zeros(30, 1)}
    huge = {A: torch.full((1, 30), 1e6), B: torch.full((30, 1), -1e6)}
    bias, step, _ = measured(before, [huge] * 40, [2.0**53] * 40)
    assert step == pytest.approx(30e12, rel=1e-3)
    assert bias < 1e-3 * step


def held_bytes(num_sites: int) -> int:
    """Most that the meter holds at any time, in bytes."""
    before = {A: torch.zeros(2, 640), B: torch.zeros(640, 2)}
    generator = torch.Generator().manual_seed(1)
    changes = [
        {name: torch.randn(t.shape, generator=generator) for name, t in before.items()} for _ in range(num_sites)
    ]
    tracemalloc.start()
    meter = gap.GapMeter(before, seed=1)
    for change in changes:
        meter.add(change, weight=1.0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_memory_does_not_grow_with_the_number_of_sites():
    assert held_bytes(200) < 1.05 * held_bytes(20)


def test_control_if_all_sites_waited_memory_would_grow(monkeypatch):
    monkeypatch.setattr(gap, "BATCH", 10_000)
    assert held_bytes(200) > 2 * held_bytes(20)
