"""Epsilon against numbers that were published or computed by others, and against two other accountants.

The tables are of `dp-accounting` 0.6.0 and of Opacus 1.6.0, measured apart from this code.
"""

import math
import sys
import time
from subprocess import run

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import accounting
from common.accounting import REPORT_GRID, DpEvent
from common.errors import AccountingUnsupported
from common.privacy import bounds

# sampling_prob, noise_multiplier, num_steps, dp_delta, RDP, PLD at grid 1e-4, PLD at grid 1e-3, PRV
KNOWN = [
    (0.01, 1.0, 500, 1e-5, 1.6529, 1.3261, 1.3265, 1.336),
    (0.032, 0.8, 300, 1e-5, 6.8009, 5.9505, 5.9506, 5.961),
    (0.032, 0.8, 100, 1e-5, 4.6202, 3.8718, 3.8718, None),
    (0.064, 1.0, 1000, 1e-5, 16.0563, 14.6834, 14.6836, 14.694),
    (0.25, 3.0, 200, 1e-5, 6.0992, 5.6208, 5.6209, 5.631),
    (0.25, 2.0, 50, 1e-5, 4.8843, 4.4403, 4.4403, None),
    (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466, 7.0466, None),
    (1.0, 20.0, 100, 1e-5, 2.1657, 1.9931, 1.9931, 2.003),
    (1.0, 8.0, 20, 1e-5, 2.4515, 2.2581, 2.2581, None),
    (0.016, 0.45, 96, 1e-5, 13.4721, 11.2117, None, None),
    (16 / 1500, 1.0, 96, 1e-5, None, 0.7567, None, None),
]
# units, batch, steps, noise multiplier for epsilon 1, 3 and 8 by RDP
THREE_EPOCHS = [
    (2_000, 256, 23, (2.91, 1.39, 0.82)),
    (10_000, 64, 468, (1.08, 0.72, 0.52)),
    (10_000, 256, 117, (1.50, 0.90, 0.62)),
    (50_000, 64, 2343, (0.96, 0.63, 0.47)),
]
LEDGER_ROUND = DpEvent(0.0256, 0.9, 40)


def close(found: float, known: float, tolerance: float = 1e-4) -> bool:
    """Equal in the digits that the table gives."""
    return math.isclose(found, known, rel_tol=0, abs_tol=tolerance)


def pld(row: tuple, grid: float = accounting.LEDGER_GRID) -> float:
    """The number of record."""
    q, sigma, steps, delta = row[:4]
    return accounting.epsilon(sampling_prob=q, noise_multiplier=sigma, num_steps=steps, dp_delta=delta, grid=grid)


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: f"{row[0]:g}-{row[1]:g}-{row[2]}")
def test_known_answers_of_three_columns(row):
    _, _, _, delta, rdp, fine, coarse, _ = row
    assert close(pld(row, REPORT_GRID), fine)
    if coarse is not None:
        assert close(pld(row), coarse)
    if rdp is not None:
        assert close(accounting.epsilon_rdp([DpEvent(*row[:3])], dp_delta=delta), rdp)


@pytest.mark.parametrize(
    ("change", "is_known"),
    [({}, True), ({0: 0.0333}, False), ({1: 0.79}, False), ({2: 315}, False), ({3: 2e-5}, False)],
    ids=["control", "sampling", "noise", "steps", "delta"],
)
def test_a_wrong_input_misses_the_known_answer(change, is_known):
    row = [change.get(place, value) for place, value in enumerate(KNOWN[1])]
    assert close(pld(tuple(row), REPORT_GRID), KNOWN[1][5]) is is_known


@pytest.mark.parametrize("row", [row for row in KNOWN if row[7] is not None], ids=lambda row: f"{row[0]:g}-{row[2]}")
@pytest.mark.filterwarnings("ignore:Optimal order is the largest:UserWarning", "ignore:divide by zero:RuntimeWarning")
def test_opacus_prv_reads_a_hundredth_more(row):
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(row[1], row[0], row[2])]
    found = float(accountant.get_epsilon(row[3]))
    assert close(found, row[7], 1e-3)
    assert 0 < found - pld(row, REPORT_GRID) < 0.012


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: f"{row[0]:g}-{row[1]:g}-{row[2]}")
def test_rdp_of_opacus_is_the_same_upper_bound(row):
    from opacus.accountants.analysis import rdp as opacus

    q, sigma, steps, delta = row[:4]
    orders = [1 + x / 10 for x in range(1, 100)] + [*range(11, 65), 128, 256, 512, 1024]
    moments = opacus.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    upper, _ = opacus.get_privacy_spent(orders=orders, rdp=moments, delta=delta)
    ours = accounting.epsilon_rdp([DpEvent(q, sigma, steps)], dp_delta=delta)
    assert 0.999 * upper < ours < 1.01 * upper  # ours leaves out orders that converge slowly
    assert pld(row) < upper


def test_thirty_rounds_fit_a_budget_of_eight_and_the_next_does_not():
    spent = [accounting.compose([LEDGER_ROUND] * rounds, dp_delta=1e-6) for rounds in (30, 31)]
    assert close(spent[0], 7.924, 1e-3)
    assert close(spent[1], 8.057, 1e-3)


def test_order_and_cut_of_equal_steps_do_not_matter():
    other = DpEvent(0.01, 1.1, 200)
    whole = accounting.compose([DpEvent(0.0256, 0.9, 80), other], dp_delta=1e-6)
    assert accounting.compose([LEDGER_ROUND, other, LEDGER_ROUND], dp_delta=1e-6) == whole
    assert whole > accounting.compose([DpEvent(0.0256, 0.9, 80)], dp_delta=1e-6)


def test_steps_composed_one_by_one_cost_the_same():
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for _ in range(5):
        accountant.compose(PoissonSampledDpEvent(0.0256, GaussianDpEvent(0.9)), 40)
    assert accounting.compose([LEDGER_ROUND] * 5, dp_delta=1e-6) == pytest.approx(
        accountant.get_epsilon(1e-6), abs=1e-9
    )


@pytest.mark.parametrize("limit", [7.9, 7.95, 8.6, 8.7])  # PLD reads 7.924 here, RDP 8.651
def test_whether_steps_fit_is_decided_by_the_number_of_record(limit):
    events = [LEDGER_ROUND] * 30
    fits = accounting.compose(events, dp_delta=1e-6) <= limit
    assert accounting.is_within(events, dp_delta=1e-6, max_epsilon=limit) is fits is (limit > 7.924)
    assert not accounting.is_within(events, dp_delta=1e-6, max_epsilon=math.nan)
    assert not accounting.is_within([DpEvent(1.0, 1e-3, 1)], dp_delta=1e-6, max_epsilon=limit)


def test_nothing_spent_is_zero():
    assert accounting.compose([], dp_delta=1e-6) == 0.0


@settings(max_examples=10)
@given(
    q=st.floats(1e-4, 1.0),
    sigma=st.floats(0.6, 30.0),
    steps=st.integers(1, 3000),
    dp_delta=st.sampled_from([1e-5, 1e-6, 1e-8]),
)
def test_every_kind_of_step_has_an_epsilon_that_rdp_confirms(q, sigma, steps, dp_delta):
    event = DpEvent(q, sigma, steps)
    upper = accounting.epsilon_rdp([event], dp_delta=dp_delta)
    if upper > accounting.MAX_EPSILON:
        with pytest.raises(AccountingUnsupported):
            accounting.compose([event], dp_delta=dp_delta)
    else:
        assert 0 <= accounting.compose([event], dp_delta=dp_delta) <= upper


def test_a_grid_too_coarse_for_small_losses_is_refined():
    event = DpEvent(0.0007, 13.847, 5595)  # at 1e-3 PLD reads 0.043 here, four times what RDP proves
    upper = accounting.epsilon_rdp([event], dp_delta=1e-5)
    assert accounting._epsilon_pld(accounting._merged([event]), 1e-5, 1e-3) > upper
    assert accounting.compose([event], dp_delta=1e-5) <= upper


# sampling_prob, noise_multiplier, num_steps, grid, epsilon at delta 1e-6 by `self_compose` of dp-accounting at once
IN_ONE_PIECE = [
    (0.0005, 2.26, 1_000_000, 1e-3, 1.864108),
    (0.0005, 2.26, 1_000_000, 1e-4, 0.998146),
    (0.0005, 2.26, 999_999, 1e-4, 0.998146),
    (0.0005, 8.0, 1_000_000, 1e-4, 0.291313),
]


@pytest.mark.parametrize("row", IN_ONE_PIECE, ids=lambda row: f"{row[1]:g}-{row[2]}-{row[3]:g}")
def test_a_million_steps_in_two_stages_cost_what_they_cost_in_one(row):
    q, sigma, steps, grid, known = row
    assert accounting._epsilon_pld(((q, sigma, steps),), 1e-6, grid) == pytest.approx(known, abs=3e-6)


def test_two_stages_equal_one_where_one_is_quick():
    for steps in (10_001, 12_345, 20_000):
        whole = accounting._step_loss(0.0005, 8.0, 1e-4).self_compose(steps).get_epsilon_for_delta(1e-6)
        assert accounting._epsilon_pld(((0.0005, 8.0, steps),), 1e-6, 1e-4) == pytest.approx(whole, abs=1e-7)


@pytest.mark.parametrize("sigma", [500.0, 2000.0])
def test_a_million_steps_cost_at_least_the_exact_epsilon_and_at_most_that_of_rdp(sigma):
    """Without sampling, T steps are one Gaussian mechanism of mu = sqrt(T) / sigma, whose epsilon is known."""
    event = DpEvent(1.0, sigma, 1_000_000)
    exact = bounds.gdp_epsilon(1000 / sigma, dp_delta=1e-6)
    found = accounting.compose([event], dp_delta=1e-6)
    assert exact <= found <= accounting.epsilon_rdp([event], dp_delta=1e-6)
    assert found == pytest.approx(exact, rel=0.05)


@pytest.mark.slow
def test_a_plan_of_a_million_steps_takes_seconds():
    began = time.perf_counter()
    plan = {"sampling_prob": 0.0005, "dp_delta": 1e-6}
    sigma = accounting.noise_multiplier(epsilon=1.0, num_steps=1_000_000, **plan)
    curve = accounting.planned_curve(DpEvent(0.0005, sigma, 1000), 1000, dp_delta=1e-6)
    assert time.perf_counter() - began < 60
    assert 0.99 < curve[-1] <= 1.0


def test_the_curve_of_a_long_plan_is_never_below_what_a_round_has_cost(monkeypatch):
    event = DpEvent(1.0, 40.0, 5)
    exact = accounting.planned_curve(event, 11, dp_delta=1e-6)
    assert exact == [accounting.compose([event.times(number)], dp_delta=1e-6) for number in range(1, 12)]
    monkeypatch.setattr(accounting, "MAX_CURVE_POINTS", 4)
    assert accounting.planned_curve(event, 11, dp_delta=1e-6) == [
        exact[end - 1] for end in (1, 3, 3, 6, 6, 6, 9, 9, 9, 11, 11)
    ]
    assert accounting.planned_curve(event, 4, dp_delta=1e-6) == exact[:4]


@pytest.mark.parametrize("pair", [(2.0, 1.9), (math.nan, 1.0), (1.0, math.nan)])
def test_accountants_that_contradict_each_other_give_no_epsilon(pair):
    accounting._check_agreement(1.9, 2.0)
    with pytest.raises(AccountingUnsupported, match="contradict"):
        accounting._check_agreement(*pair)


def test_noise_that_protects_nobody_is_refused_quickly():
    with pytest.raises(AccountingUnsupported, match="above 1000"):
        accounting.epsilon(sampling_prob=1.0, noise_multiplier=1e-3, num_steps=10**6, dp_delta=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.1, 0.0, 1),
        (0.1, math.inf, 1),
        (0.1, math.nan, 1),
        (0.1, 1.0, 0),
        (0.1, 1.0, True),
        (0.1, 1.0, 1.5),
    ],
)
def test_events_that_no_step_can_be_are_refused(values):
    with pytest.raises(ValueError, match="must be"):
        DpEvent(*values)


@pytest.mark.parametrize("dp_delta", [0.0, 1.0, -1e-5, math.nan])
def test_deltas_that_promise_nothing_are_refused(dp_delta):
    with pytest.raises(ValueError, match="dp_delta"):
        accounting.compose([LEDGER_ROUND], dp_delta=dp_delta)


@pytest.mark.parametrize(("units", "batch", "steps", "noise"), THREE_EPOCHS)
def test_noise_of_the_published_table_costs_its_epsilon_by_rdp(units, batch, steps, noise):
    delta = accounting.largest_delta(units)
    for sigma, known in zip(noise, (1, 3, 8), strict=True):
        low, high = (
            accounting.epsilon_rdp([DpEvent(batch / units, value, steps)], dp_delta=delta)
            for value in (sigma + 0.0075, sigma - 0.0075)  # the table's rounding, and 0.4 % of its own search
        )
        assert low < known < high


@pytest.mark.parametrize(
    ("units", "batch", "steps", "noise"),
    [THREE_EPOCHS[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in THREE_EPOCHS[1:])],
)
def test_calibration_gives_the_least_noise_that_fits(units, batch, steps, noise):
    plan = {"dp_delta": accounting.largest_delta(units), "sampling_prob": batch / units, "num_steps": steps}
    sigma = accounting.noise_multiplier(epsilon=3.0, **plan)
    assert 0.9 * noise[1] < sigma < noise[1] + 0.005
    assert accounting.epsilon(noise_multiplier=sigma, **plan) <= 3.0
    assert accounting.epsilon(noise_multiplier=sigma * (1 - 2e-4), **plan) > 3.0


def test_calibration_refuses_what_no_noise_reaches():
    with pytest.raises(AccountingUnsupported, match="no noise reaches"):
        accounting.noise_multiplier(epsilon=1e-3, dp_delta=1e-6, sampling_prob=1.0, num_steps=10_000)


@pytest.mark.parametrize(
    ("num_sites", "target", "sigma", "num_parameters", "ratio"),
    [
        (5, 8, 2.684, 11_300_000, 1805),
        (5, 3, 6.219, 11_300_000, 4181),
        (20, 8, 2.684, 11_300_000, 451),
        (20, 8, 2.684, 460_000, 91),
        (5, 3, 6.219, 460_000, 842),
        (1000, 8, 2.684, 11_300_000, 9.0),
        (1000, 8, 2.684, 460_000, 1.8),
    ],
)
def test_client_level_noise_of_few_sites_drowns_the_signal(num_sites, target, sigma, num_parameters, ratio):
    found = accounting.client_level_noise_ratio(
        num_sites=num_sites, noise_multiplier=sigma, num_parameters=num_parameters
    )
    assert found == pytest.approx(ratio, rel=0.015)  # the table's parameters are rounded to three digits
    spent = accounting.epsilon(sampling_prob=1.0, noise_multiplier=sigma, num_steps=20, dp_delta=1e-5)
    assert spent == pytest.approx(target, abs=2e-3)


def test_most_of_a_plan_is_spent_in_its_first_round():
    steps, delta = DpEvent(8 / 4120, 0.7, 50), 1e-5
    curve = accounting.planned_curve(steps, 20, dp_delta=delta)
    assert len(curve) == 20
    assert curve == sorted(curve)
    assert curve[0] > 6 * curve[-1] / 20
    assert accounting.planned_curve(steps, 1, dp_delta=delta, spent=[DpEvent(8 / 4120, 0.7, 950)])[0] == curve[-1]


PLAN = {"sampling_prob": 8 / 4120, "dp_delta": 1e-5}  # 4,120 units, batches of 8, 20 rounds of 50 steps, epsilon 4


def curve(sigma: float, epsilon) -> list[float]:
    """Epsilon of that plan after rounds 1, 5, 10 and 20."""
    return [epsilon(DpEvent(PLAN["sampling_prob"], sigma, 50 * rounds)) for rounds in (1, 5, 10, 20)]


def test_the_plan_that_reads_3_04_after_round_one_does_so_by_rdp_and_1_68_by_pld():
    sigma = _rdp_noise(4.0, 8 / 4120, 1000)
    by_rdp = curve(sigma, lambda event: accounting.epsilon_rdp([event], dp_delta=1e-5))
    assert by_rdp == pytest.approx([3.04, 3.42, 3.68, 4.00], abs=0.015)
    by_pld = curve(sigma, lambda event: accounting.compose([event], dp_delta=1e-5))
    assert by_pld == pytest.approx([1.68, 2.33, 2.65, 3.01], abs=0.005)


@pytest.mark.filterwarnings("ignore:Optimal order is the largest:UserWarning", "ignore:divide by zero:RuntimeWarning")
def test_a_plan_of_epsilon_4_by_the_number_of_record_reads_2_36_after_round_one_and_opacus_agrees():
    from opacus.accountants import PRVAccountant

    def by_prv(event: DpEvent) -> float:
        accountant = PRVAccountant()
        accountant.history = [(event.noise_multiplier, event.sampling_prob, event.num_steps)]
        return float(accountant.get_epsilon(1e-5))

    sigma = accounting.noise_multiplier(epsilon=4.0, num_steps=1000, **PLAN)
    ours = [accounting.planned_curve(DpEvent(8 / 4120, sigma, 50), 20, dp_delta=1e-5)[at] for at in (0, 4, 9, 19)]
    assert ours == pytest.approx([2.36, 3.15, 3.53, 4.00], abs=0.005)
    assert all(0 < other - own < 0.012 for own, other in zip(ours, curve(sigma, by_prv), strict=True))


def test_clipping_by_a_noised_count_leaves_the_total_as_it_was():
    for sigma, count_std in ((1.0, 12.8), (0.6, 3.2), (2.0, 1.5)):
        gradient = accounting.gradient_noise_multiplier(sigma, count_noise_std=count_std)
        assert (gradient**-2 + (2 * count_std) ** -2) ** -0.5 == pytest.approx(sigma)
    with pytest.raises(ValueError, match="count_noise_std"):
        accounting.gradient_noise_multiplier(2.0, count_noise_std=1.0)


def test_opacus_splits_the_noise_the_same_way():
    import torch
    from opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer

    weights = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = AdaClipDPOptimizer(
        torch.optim.SGD([weights], lr=1.0),
        noise_multiplier=1.1,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.1,
        unclipped_num_std=0.8,
        max_grad_norm=1.0,
        expected_batch_size=64,
        generator=torch.Generator().manual_seed(1),
    )
    weights.grad_sample = torch.zeros(1, 200_000)
    weights.summed_grad = torch.zeros(200_000)
    optimizer.unclipped_num = torch.tensor(0)
    optimizer.add_noise()
    ours = accounting.gradient_noise_multiplier(1.1, count_noise_std=0.8)
    assert float(weights.grad.std()) == pytest.approx(ours, rel=0.01)
    assert ours > 1.3 * 1.1  # what an optimizer without the split would give is far off


@pytest.mark.parametrize(
    ("num_units", "largest"), [(1, 1e-5), (2, 1e-5), (2_000, 1e-5), (10_000, 1e-5), (50_000, 1.8485e-6)]
)
def test_delta_is_far_below_one_in_the_number_of_units(num_units, largest):
    assert accounting.largest_delta(num_units) == pytest.approx(largest, rel=1e-4)


def test_importing_loads_neither_torch_nor_the_accountants():
    code = (
        "import sys, common.accounting; print(sorted({'torch', 'scipy', 'dp_accounting', 'numpy'} & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def _rdp_noise(epsilon: float, sampling_prob: float, num_steps: int) -> float:
    """Noise by RDP, as that plan was made."""
    low, high = 0.3, 3.0
    for _ in range(30):
        middle = (low + high) / 2
        event = DpEvent(sampling_prob, middle, num_steps)
        spent = accounting.epsilon_rdp([event], dp_delta=accounting.largest_delta(4120))
        low, high = (middle, high) if spent > epsilon else (low, middle)
    return high
