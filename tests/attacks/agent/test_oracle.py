"""What an active coordinator may read off the held-out figures and counts of a site that demands privacy.

Names carry the numbers of the attack table. Each case has a control in which the attack works.
"""

import dataclasses
import math

import pytest
import torch

from client.agent.agent import SiteData
from client.agent.guard import Permissive
from client.policy import figures
from client.policy import rules as policy
from client.policy.figures import FigureNoise
from common import accounting
from common.data.rows import Message
from common.privacy import cost, noise
from common.privacy.noise import SeededNoise, SystemNoise
from tests import tiny
from tests.attacks.agent.test_privacy import POLICY, charges, create_ledger, paid, run_of

FIGURES = {"min_slice": "1\nnoise_multiplier = 2.0", "secagg": '"none"\ncount_noise = 4.0'}


def beside_rounds(rules, run):
    released = policy.beside_rounds(rules, run.privacy, num_evaluations=len(run.evaluated_rounds))
    return [event for events in released.values() for event in events]


@pytest.fixture
def noising(make):
    """A site that demands privacy, lets noised figures leave and has a ledger."""
    site = make(mode='"required"', **FIGURES)
    create_ledger(site)
    return site


@pytest.fixture
def strict(make):
    """The same without a word on held-out figures."""
    site = make(mode='"required"')
    create_ledger(site)
    return site


def loss_of(answer) -> float:
    return answer.head["nll_sum"] / answer.head["num_answer_tokens"]


def other_answer(site, data: SiteData) -> SiteData:
    """The rows in which one held-out patient was given another answer."""
    *others, last = data.held_out
    told = (last.messages[0], Message("assistant", "QQQQ QQQQ"))
    return SiteData(data.train, [*others, dataclasses.replace(last, messages=told)])


def test_a29_evaluations_answer_nothing_where_privacy_is_demanded_and_no_noise_is_set(strict):
    run = run_of(strict)
    opened = strict.open(run)
    assert opened.head["num_held_out"] == 0  # so that the coordinator does not ask
    assert strict.refused(strict.step("evaluate", run=run)) == (POLICY, "evaluation.noise_multiplier")
    assert charges(strict, "evaluate") == 0
    assert strict.step(run=run).kind == "update"


def test_a29_control_without_a_guard_evaluations_tell_a_held_out_patients_answer(noising):
    """The loss tells which of two answers a held-out patient's row has, and nothing is charged."""
    run, losses = run_of(noising), []
    noising.agent._guard = Permissive()
    for data in (noising.data, other_answer(noising, noising.data)):
        noising.data, noising.agent._run = data, None
        assert noising.open(run, approve=False).kind == "opened"
        losses.append(loss_of(noising.step("evaluate", run=run)))
    assert abs(losses[0] - losses[1]) > 1e-2
    assert charges(noising, "evaluate") == 0


def test_a29_an_evaluation_is_paid_for_once_and_given_again_as_it_was(noising):
    run = run_of(noising)
    noising.open(run)
    first = noising.step("evaluate", run=run)
    assert first.kind == "metrics"
    noising.start()
    noising.open(run, approve=False)
    again = noising.step("evaluate", run=run)
    assert loss_of(again) == loss_of(first)
    assert (charges(noising, "evaluate"), charges(noising, "counts"), charges(noising)) == (1, 1, 0)
    assert (first.head["num_generated"], first.head["seconds"]) == (0, 0.0)


def test_a29_no_more_evaluations_than_the_run_file_plans(make):
    site = make()
    run = site.manifest(evaluation__every_rounds="2", federation__num_rounds="4")
    assert run.run.evaluated_rounds == (0, 2, 4)
    site.open(run)
    assert site.step("evaluate", run=run).kind == "metrics"
    assert site.refused(site.step("evaluate", run=run, round_index=1)) == (POLICY, "rounds")
    assert site.step("evaluate", run=run, round_index=2).kind == "metrics"


def test_a29_what_evaluations_and_counts_cost_is_in_the_plan_and_refused_beyond_the_budget(make):
    site = make(mode='"required"', **FIGURES)
    create_ledger(site)
    run = run_of(site)
    beside = beside_rounds(site.gate.policy, run.run)
    assert beside == [accounting.DpEvent(1.0, 4.0, 1), *[accounting.DpEvent(1.0, 2.0, 1)] * 3]
    alone, whole = (cost.epsilon(run.run, dp_delta=1e-6, beside=more) for more in ((), beside))
    assert alone + 1 < whole < 8
    tight = make(mode='"required"', **{**FIGURES, "secagg": f'"none"\ncount_noise = 4.0\nmax_epsilon = {alone + 0.5}'})
    create_ledger(tight)
    assert tight.refused(tight.open(run)) == (POLICY, "privacy.max_epsilon")
    without = make(mode='"required"', secagg=f'"none"\ncount_noise = 40.0\nmax_epsilon = {alone + 0.5}')
    create_ledger(without)
    assert without.open(run).kind == "opened"


def test_a29_what_was_planned_is_what_is_charged(noising):
    run = run_of(noising)
    noising.open(run)
    answers = [noising.step(kind, run=run, round_index=number) for number in (0, 1) for kind in ("evaluate", "train")]
    answers.append(noising.step("evaluate", run=run, round_index=2))
    assert [answer.kind for answer in answers] == ["metrics", "update"] * 2 + ["metrics"]
    beside = beside_rounds(noising.gate.policy, run.run)
    planned = cost.epsilon(run.run, dp_delta=1e-6, beside=beside)
    assert paid(noising).spent() == pytest.approx(planned, abs=1e-9)


def test_a30_counts_are_noised_charged_and_told_alike_for_the_whole_run(noising):
    run = run_of(noising)
    opened = noising.open(run)
    assert (opened.head["num_truncated"], opened.head["num_dropped"]) == (None, None)
    whole, noising.data = noising.data, tiny.site_data("north", 60)  # 24 units more
    noising.start()
    again = noising.open(run, approve=False)
    told = ("num_examples", "num_held_out")
    assert [again.head[name] for name in told] == [opened.head[name] for name in told]
    assert noising.step(run=run).head["num_examples"] == opened.head["num_examples"]
    assert charges(noising, "counts") == 1
    noising.data = whole


def test_a30_control_without_a_guard_counts_are_exact(noising):
    noising.agent._guard = Permissive()
    opened = noising.open(run_of(noising))
    assert (opened.head["num_examples"], opened.head["num_held_out"]) == (9, 3)


def test_counts_have_the_noise_that_is_charged(noising):
    rules = noising.gate.policy
    source = SeededNoise(3)
    drawn = torch.tensor(
        [figures.counts((1000, 500), rules=rules, source=source)["train"] - 1000.0 for _ in range(2000)]
    )
    assert abs(float(drawn.mean())) < 0.4  # 4.5 standard errors
    assert float(drawn.std()) == pytest.approx(4.0, rel=0.08)


def test_held_out_figures_have_the_noise_that_is_charged(engine):
    """Two times the most that one unit adds, as the source of noise is asked for it."""

    class Told:
        def discrete(self, size: int, *, std: float, device: torch.device) -> torch.Tensor:
            self.std = std * noise.grid_step(1.0)
            return torch.zeros(size, dtype=torch.float64, device=device)

    source, objective = Told(), tiny.settings("tiny").training.objective
    noised_by = FigureNoise(2.0, 10.0, source)
    figures.score(engine, [], objective=objective, batch_size=2, num_rows=9, noised_by=noised_by)
    assert 2.0 <= source.std == pytest.approx(2.0, rel=1e-3)


def test_a30_a_run_that_no_noise_covers_is_told_no_number_of_held_out_rows(make):
    """Noise for whole sites is no promise to a unit."""
    site = make(mode='"required"\nsite_level = ["server"]')
    whole_sites = {
        "privacy__mode": '"site"',
        "privacy__sampling_prob": "0.5",
        "privacy__noise_multiplier": "4.0",
        "aggregation__weighting": '"uniform"',
        "federation__num_sites": "20",
    }
    assert site.open(site.manifest(**whole_sites)).head["num_held_out"] == 0
    assert len(site.data.held_out) == 3


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_unit_moves_the_sum_of_held_out_figures_by_its_bound_at_most(site, kind, monkeypatch):
    """Whatever a unit's loss is, infinite or none: the sum without noise moves by sqrt(F) at most, and no further."""
    monkeypatch.setattr("common.privacy.noise.added", lambda tensors, **_: dict(tensors))
    run = site.manifest(**({} if kind == "sft" else {"training__objective__kind": '"dpo"'}))
    if kind == "dpo":
        table = [tiny.pair(number) for number in range(12)]
        site.data, site.agent._guard = SiteData(table[:9], table[9:]), Permissive()
    assert site.open(run).kind == "opened"
    opened = site.agent._run
    rows = list(opened.held_out if kind == "sft" else opened.held_out_preferences)

    def total(given, max_loss) -> float:
        found = figures.score(
            opened.engine, given, objective=run.run.training.objective, batch_size=2, num_rows=1000,
            noised_by=FigureNoise(1.0, max_loss, SystemNoise()),
        )  # fmt: skip
        return found.nll_sum / max_loss

    without = [row for row in rows if row.unit != rows[-1].unit]
    for max_loss in (1e-3, 10.0):
        assert 0 < total(rows, max_loss) - total(without, max_loss) <= 1.0 + 1e-3
    assert total(rows, 1e-3) == pytest.approx(len({row.unit for row in rows}), abs=1e-3)  # all at the limit
    weight = next(p for name, p in opened.engine.model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight.fill_(math.inf)
    assert total(rows, 10.0) == pytest.approx(len({row.unit for row in rows}), abs=1e-3)
