"""The factored aggregation gap equals the dense one, for any number of sites, rank and shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.aggregate import fedavg, gap

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
    meter, combined = gap.GapMeter(before), fedavg.start(before, trained=list(before))
    for change, weight in zip(changes, weights, strict=True):
        meter.add(change, weight=weight)
        combined.add(change, weight=weight)
    after = fedavg.apply(before, combined.result())
    return *meter.per_module(after)["m"], after


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
    assert gap.whole([(bias, step)]) > 0.01


def test_where_nothing_moved_the_gap_is_zero():
    before, _, _ = make(1, 2, 5, 5, 1)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    bias, step, _ = measured(before, [nothing, nothing], [1.0, 3.0])
    assert (bias, step) == (0, 0)
    assert gap.whole([(0.0, 0.0)]) == 0


def test_modules_are_taken_together_by_their_norms():
    assert gap.whole([(3.0, 5.0), (4.0, 12.0)]) == pytest.approx(5 / 13)


def test_beyond_the_rank_limit_a_sum_that_has_a_low_rank_stays_exact():
    """All sites move within the same four directions, so that nothing is cut."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator)
    before = {A: torch.zeros(2, 30), B: torch.zeros(40, 2)}
    changes = [
        {A: torch.randn(2, 4, generator=generator) @ right, B: left @ torch.randn(4, 2, generator=generator)}
        for _ in range(60)
    ]
    assert gap.RANK_FACTOR * 2 < 60 * 2
    weights = [1.0 + k for k in range(60)]
    bias, step, _ = measured(before, changes, weights)
    expected_bias, expected_step = dense(before, changes, weights)
    assert bias == pytest.approx(expected_bias, rel=1e-4)
    assert step == pytest.approx(expected_step, rel=1e-4)


def test_beyond_the_rank_limit_the_figure_stays_near_the_exact_one():
    before, changes, weights = make(60, 2, 40, 40, 5, drift=0.05)
    bias, step, _ = measured(before, changes, weights)
    expected_bias, expected_step = dense(before, changes, weights)
    assert gap.whole([(bias, step)]) == pytest.approx(expected_bias / expected_step, rel=0.35)


def test_values_at_the_limit_of_what_is_accepted_do_not_overflow():
    before = {A: torch.zeros(1, 30), B: torch.zeros(30, 1)}
    huge = {A: torch.full((1, 30), 1e6), B: torch.full((30, 1), -1e6)}
    bias, step, _ = measured(before, [huge] * 40, [2.0**53] * 40)
    assert step == pytest.approx(30e12, rel=1e-3)
    assert bias < 1e-3 * step


def peak_bytes(num_sites: int) -> int:
    """Most that the meter holds at any time, in bytes of tensors."""
    before = {A: torch.zeros(2, 64), B: torch.zeros(64, 2)}
    meter = gap.GapMeter(before)
    generator = torch.Generator().manual_seed(1)
    most = 0
    for _ in range(num_sites):
        change = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in before.items()}
        meter.add(change, weight=1.0)
        held = [tensor for product in meter._products.values() for tensor in (product.left_dm, product.right_mk)]
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in held))
    return most


def test_memory_does_not_grow_with_the_number_of_sites():
    assert peak_bytes(200) == peak_bytes(50) <= gap.RANK_FACTOR * 2 * 2 * 64 * 4


def test_control_without_the_rank_limit_memory_would_grow(monkeypatch):
    monkeypatch.setattr(gap, "RANK_FACTOR", 10_000)
    assert peak_bytes(200) > 3 * peak_bytes(20)
