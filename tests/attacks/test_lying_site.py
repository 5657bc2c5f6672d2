"""One site that lies about its number of rows or about its held-out figures, and how far it gets.

Each has a control: without the limit, or with a limit of one, the lie works.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import events
from common.event_kinds import Evaluated, RoundFinished, SiteFailed
from common.run.schema.gate import GateConfig
from server.aggregate import weights
from server.gate import rules, stopping
from server.gate.figures import Figures
from server.view import fairness
from tests import tiny
from tests.samples.events import PLAN, evaluated, view

HUGE = 2**53
CLAIMS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, HUGE).map(float), min_size=1, max_size=12
)


def claiming(answer, num_rows: int):
    """A site that claims this many rows whenever it tells a number."""
    opened = tiny.spoilt(answer, "open", tiny.with_head(num_examples=num_rows))
    return tiny.spoilt(opened, "train", tiny.with_head(num_examples=num_rows))


def step(engine, folder, nodes, changes=None):
    """The global step of one round, as one vector, and its events."""
    fed = tiny.federation(engine, folder, nodes, tiny.settings("tiny", changes))
    fed.wait()
    after = fed.play(engine.initial, round_index=0)
    log = events.read(fed.log.path)
    return torch.cat([(after[name] - engine.initial[name]).flatten() for name in sorted(after)]), log


def cosine(one, other) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_a_site_that_claims_all_rows_of_the_world_has_half_of_the_step_at_most(engine, tmp_path):
    nodes = tiny.make_nodes(engine)
    liar = {**nodes, 3: claiming(nodes[3], HUGE)}
    alone, _ = step(
        engine, tmp_path / "alone", {3: nodes[3]}, {"federation.min_sites": "1", "federation.num_sites": "1"}
    )
    others = {"federation.num_sites": "2"}
    honest, _ = step(engine, tmp_path / "honest", {1: nodes[1], 2: nodes[2]}, others)
    moved, log = step(engine, tmp_path / "liar", liar)
    assert torch.allclose(moved, (alone + honest) / 2, atol=1e-6 * float(moved.abs().max()) + 1e-7)
    assert [event.held_to_share for event in log if isinstance(event, RoundFinished)] == [["west"]]
    control, log = step(engine, tmp_path / "control", liar, {"aggregation.max_weight_share": "1.0"})
    assert cosine(control, alone) > 0.9999 > cosine(moved, alone)
    assert [event.held_to_share for event in log if isinstance(event, RoundFinished)] == [[]]


def test_a_share_that_nobody_passes_changes_no_bit(engine, tmp_path):
    nodes = tiny.make_nodes(engine)
    held, _ = step(engine, tmp_path / "held", nodes)
    free, _ = step(engine, tmp_path / "free", nodes, {"aggregation.max_weight_share": "1.0"})
    assert torch.equal(held, free)


@given(CLAIMS, st.floats(0.05, 1.0))
def test_no_weight_is_above_its_share_or_above_its_claim(claims, max_share):
    found = weights.capped(claims, max_share=max_share)
    assert found.keys() == claims.keys()
    assert all(0 < found[site] <= claims[site] for site in claims)
    if len(claims) >= weights.MIN_SITES:
        whole = math.fsum(found.values())
        assert max(found.values()) <= max(max_share, 1 / len(claims)) * whole * (1 + 1e-6)


@given(CLAIMS, st.floats(0.05, 1.0))
def test_updates_that_come_one_by_one_get_the_weights_of_all_together(claims, max_share):
    shares = weights.Shares[None](max_share)
    ready = [passed for site, claim in claims.items() for passed in shares.take(site, claim, None)]
    streamed = {site: weight for site, weight, _ in (*ready, *shares.close())}
    assert streamed == weights.capped(claims, max_share=max_share)


@given(CLAIMS.filter(lambda claims: len(claims) >= 3), st.floats(0.05, 1.0))
def test_what_is_not_too_large_keeps_its_claim(claims, max_share):
    found = weights.capped(claims, max_share=max_share)
    if max(claims.values()) <= max_share * math.fsum(claims.values()):
        assert found == claims  # the control: only a claim above its share is brought down


def lying(answer, nll_sum: float, num_tokens: int):
    return tiny.spoilt(answer, "evaluate", tiny.with_head(nll_sum=nll_sum, num_answer_tokens=num_tokens))


def evaluation(engine, folder, nodes):
    fed = tiny.federation(engine, folder, nodes, tiny.settings("tiny"))
    fed.wait()
    fed.evaluate(engine.initial, num_rounds=0, generate=False)
    log = events.read(fed.log.path)
    return [event for event in log if isinstance(event, Evaluated)][-1], log


def test_one_site_that_tells_a_loss_of_nothing_decides_nothing(engine, tmp_path):
    nodes = tiny.make_nodes(engine)
    honest, _ = evaluation(engine, tmp_path / "honest", nodes)
    lie, _ = evaluation(engine, tmp_path / "lie", {**nodes, 3: lying(nodes[3], 1e-12, 100)})
    losses = sorted(figures.loss for figures in honest.sites.values())
    assert losses[0] <= fairness.decisive(lie) <= losses[-1]
    assert lie.loss > losses[0] / 2.01  # the mean itself: half of it at most is the liar's
    gate = GateConfig(rules=[{"kind": "loss"}])
    bought = Figures("final", evaluated=dataclasses.replace(lie, stale=[]), base=honest)
    (verdict,) = rules.judge(gate, bought)
    assert not verdict.is_met
    fooled = dataclasses.replace(lie, trimmed_loss=lie.loss)  # the control: by the mean the lie would pass
    honest = dataclasses.replace(honest, trimmed_loss=honest.loss)
    (control,) = rules.judge(gate, Figures("final", evaluated=fooled, base=honest))
    assert control.is_met


def test_more_tokens_or_rows_than_a_site_can_have_are_no_figures(engine, tmp_path):
    nodes = tiny.make_nodes(engine)
    for number, change in enumerate(
        ({"num_answer_tokens": HUGE}, {"num_rows": 50}, {"num_generated": 9, "num_exact": 9})
    ):
        liar = tiny.spoilt(nodes[3], "evaluate", tiny.with_head(**change))
        event, log = evaluation(engine, tmp_path / str(number), {**nodes, 3: liar})
        assert sorted(event.sites) == ["north", "south"]
        assert [event.site for event in log if isinstance(event, SiteFailed)] == ["west"]


def test_a_liar_neither_ends_a_run_early_nor_keeps_it_going():
    run = tiny.settings("base", {"gate.rules": "[{kind = 'loss'}]", "gate.stop_after": "2"})
    falling = [evaluated(0, 4.0, a=4.0, b=4.1, c=3.9)]
    falling += [evaluated(number, 9.0, a=4.0 - number, b=4.1 - number, c=99.0) for number in (1, 2, 3)]
    assert stopping.bad_in_a_row(run, view([PLAN, *falling]), num_rounds=3) == []
    rising = [evaluated(0, 4.0, a=4.0, b=4.1, c=3.9)]
    rising += [evaluated(number, 2.0 / number, a=4.0 + number, b=4.1 + number, c=1e-14) for number in (1, 2, 3)]
    assert len(stopping.bad_in_a_row(run, view([PLAN, *rising]), num_rounds=3)) == 3
    trusting = [{**event, "trimmed_loss": None} for event in rising]  # the control: by the mean alone it goes on
    assert stopping.bad_in_a_row(run, view([PLAN, *trusting]), num_rounds=3) == []


@pytest.mark.parametrize(("last", "named"), [(1e-14, ["d"]), (99.0, ["d"]), (1.05, [])])
def test_a_figure_far_from_the_others_is_named(last, named):
    assert fairness.outliers({"a": 1.0, "b": 1.1, "c": 0.9, "d": last}) == named
