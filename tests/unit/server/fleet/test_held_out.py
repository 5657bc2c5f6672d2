"""The mean rests on every site that ever answered."""

import pytest

from client.agent.agent import SiteData
from common.adapter import adapter
from common.errors import ProtocolError
from common.frame.records import SiteMetrics
from common.model import base
from server.fleet import held_out
from server.fleet.run import OwnRows
from tests import tiny


@pytest.fixture
def ready(federate):
    def make(nodes, changes=None):
        fed = federate(nodes, {"federation.num_sites": "0", **(changes or {})})
        fed.wait()
        return fed

    return make


def evaluate(fed, engine, *, num_rounds: int = 1, generate: bool = False) -> float:
    return fed.evaluate(engine.initial, num_rounds=num_rounds, generate=generate)


def metrics(site: str, nll_sum: float, num_tokens: int, *, generated: int = 0, exact: int = 0) -> SiteMetrics:
    return SiteMetrics(site, "", 0, nll_sum, num_tokens, 1, generated, exact, 0.1)


def test_the_mean_is_over_answer_tokens_and_not_over_sites():
    assert held_out.mean_loss([metrics("a", 10.0, 10), metrics("b", 90.0, 30)], max_share=0.5) == 2.5


def test_exact_match_is_over_generated_rows():
    both = [metrics("a", 1, 1, generated=10, exact=1), metrics("b", 1, 1, generated=30, exact=9)]
    assert held_out.exact_match(both) == 0.25
    assert held_out.exact_match([metrics("a", 1, 1)]) is None


def test_every_site_is_asked_whether_it_trained_or_not(ready, nodes, engine, told):
    loss = evaluate(ready(nodes, {"federation.sites_per_round": "2"}), engine)
    (event,) = told("evaluated")
    assert event["loss"] == loss
    assert sorted(event["sites"]) == ["north", "south", "west"]
    assert event["stale"] == []
    assert event["exact_match"] is None


def test_beyond_a_number_of_sites_the_same_sample_is_asked_every_time_and_another_one_while_it_is_away(
    ready, nodes, engine, told
):
    changes = {"evaluation.sites_per_round": "2"}
    asked: list[int] = []

    def noting(number: int):
        def node(frame: bytes) -> bytes:
            asked.append(number)
            return nodes[number](frame)

        return node

    fed = ready({number: noting(number) for number in nodes}, changes)
    numbers = {name: number for number, name in enumerate(("north", "south", "west"), start=1)}
    all_there, panels = fed.fleet, []
    for away in (None, None, "panel", None):
        panel = panels[0] if panels else []
        there = {number for number in nodes if away is None or number != numbers[panel[0]]}
        fed.fleet = all_there if away is None else tiny.fleet({number: noting(number) for number in there})
        asked.clear()
        evaluate(fed, engine)
        event = told("evaluated")[-1]
        panels.append([name for name in numbers if numbers[name] in asked])
        assert len(asked) == 2
        assert event["stale"] == ([] if away is None else [panel[0]])
        assert set(event["sites"]) == set(panels[-1]) | (set() if away is None else {panel[0]})
    assert panels[0] == panels[1] == panels[3] != panels[2]
    assert len(fed.metrics) == 3  # the control: the third site has figures, which count no more


def test_the_bytes_of_an_evaluation_are_those_that_enter_and_leave_the_sites(ready, nodes, engine, told):
    counts = {"down": 0, "up": 0, "frames": 0}

    def counted(answer):
        def node(frame: bytes) -> bytes:
            reply = answer(frame)
            counts["down"] += len(frame)
            counts["up"] += len(reply)
            counts["frames"] += 1
            return reply

        return node

    fed = ready({number: counted(answer) for number, answer in nodes.items()})
    fed.held.clear()  # so that all are sent the adapter whole
    counts |= dict.fromkeys(counts, 0)  # what came before, the offers
    evaluate(fed, engine)
    (event,) = told("evaluated")
    assert counts == {"down": event["bytes_down"], "up": event["bytes_up"], "frames": 3}
    assert event["bytes_down"] > 3 * adapter.encoded_size(engine.tensor_specs, dtype="float32")


def test_a_site_that_is_missing_counts_with_its_last_figures_and_is_named(ready, nodes, engine, told):
    fed = ready(nodes)
    first = evaluate(fed, engine)
    fed.fleet = tiny.fleet({1: nodes[1], 2: nodes[2]})
    assert evaluate(fed, engine, num_rounds=2) == pytest.approx(first)
    assert told("evaluated")[-1]["stale"] == ["west"]
    assert sorted(told("evaluated")[-1]["sites"]) == ["north", "south", "west"]


def test_control_without_its_last_figures_the_mean_would_move(ready, nodes, engine):
    fed = ready(nodes)
    first = evaluate(fed, engine)
    del fed.metrics["west"]
    fed.fleet = tiny.fleet({1: nodes[1], 2: nodes[2]})
    assert evaluate(fed, engine) != pytest.approx(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "south"},
        {"round_index": 0},
        {"run_sha256": "ab" * 32},
        {"num_answer_tokens": 0},
        {"nll_sum": -1.0},
        {"nll_sum": 1e300},
        {"num_exact": 5, "num_generated": 4},
        {"preference_loss_sum": 1.0, "num_preferred": 1},
        {"extra": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_figures_are_left_out_and_told(ready, nodes, engine, told, changes):
    fed = ready({**nodes, 3: tiny.spoilt(nodes[3], "evaluate", tiny.with_head(**changes))})
    evaluate(fed, engine)
    assert sorted(told("evaluated")[0]["sites"]) == ["north", "south"]
    assert [(event["site"], event["step"]) for event in told("site_failed")] == [("west", "evaluate")]


def preferring(site: str, loss_sum: float, num_rows: int, num_preferred: int) -> SiteMetrics:
    return SiteMetrics(site, "", 0, 50.0, 10, num_rows, 0, 0, 0.1, loss_sum, num_preferred)


def test_where_preferences_are_learnt_the_mean_is_over_rows_and_the_share_that_is_agreed_with_is_told():
    both = [preferring("a", 5.0, 10, 9), preferring("b", 21.0, 30, 11)]
    assert held_out.mean_loss(both, max_share=0.5) == 0.65
    assert held_out.accuracy(both) == 0.5
    assert both[0].loss == 0.5
    assert held_out.answer_loss(both) == 5.0
    assert held_out.accuracy([metrics("a", 1, 1)]) is None
    assert held_out.answer_loss([metrics("a", 1, 1)]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"preference_loss_sum": None, "num_preferred": None},
        {"num_preferred": None},
        {"num_preferred": 7},
        {"num_rows": 0, "num_preferred": 0},
        {"preference_loss_sum": -1.0},
    ],
    ids=str,
)
def test_wrong_figures_of_preferences_are_left_out_and_told(ready, engine, told, changes):
    sites = {
        number: tiny.make_agent(
            site, engine, data=SiteData(*([tiny.pair(place, site=site) for place in range(6)] for _ in range(2)))
        ).answer
        for number, site in enumerate(("north", "south", "west"), start=1)
    }
    spoilt = {**sites, 3: tiny.spoilt(sites[3], "evaluate", tiny.with_head(**changes))}
    evaluate(ready(spoilt, {"training.objective.kind": '"dpo"'}), engine)
    assert sorted(told("evaluated")[0]["sites"]) == ["north", "south"]
    assert told("evaluated")[0]["accuracy"] == 0.0
    assert [(event["site"], event["step"]) for event in told("site_failed")] == [("west", "evaluate")]


def test_control_right_figures_are_taken(ready, nodes, engine, told):
    fed = ready({**nodes, 3: tiny.spoilt(nodes[3], "evaluate", lambda frame: frame)})
    evaluate(fed, engine)
    assert sorted(told("evaluated")[0]["sites"]) == ["north", "south", "west"]


def test_a_site_that_never_answers_is_given_up_at_the_deadline(ready, nodes, engine, told):
    fed = ready({**nodes, 3: tiny.mute(nodes[3], "evaluate")}, {"federation.round_timeout_s": "60"})
    evaluate(fed, engine)
    assert fed.clock() - 1000 == pytest.approx(60, abs=1)
    assert "no answer within 60 s" in told("site_failed")[0]["reason"]


def test_an_evaluation_that_nobody_answers_is_an_error(ready, nodes, engine):
    fed = ready({number: tiny.spoilt(answer, "evaluate", lambda _: b"") for number, answer in nodes.items()})
    with pytest.raises(ProtocolError, match="no site answered"):
        evaluate(fed, engine)


def test_a_run_whose_sites_tell_no_held_out_figures_goes_on_and_asks_none(ready, nodes, engine, told):
    """They say so when they open; the coordinator's own rows are told all the same."""
    withheld = {node: tiny.spoilt(answer, "open", tiny.with_head(num_held_out=0)) for node, answer in nodes.items()}
    unasked = {node: tiny.mute(answer, "evaluate") for node, answer in withheld.items()}
    fed = ready(unasked)
    encoded, _ = base.encode(engine, tiny.rows(5, site="own"), fed.manifest.run.data)
    fed.own_rows = OwnRows(engine, encoded)
    assert evaluate(fed, engine) is None
    (event,) = told("not_evaluated")
    assert event["server_loss"] > 0
    assert not told("evaluated")
    assert not told("site_failed")
    some = ready({**unasked, 3: nodes[3]})
    assert evaluate(some, engine) > 0  # the control: one that tells is asked alone
    assert sorted(told("evaluated")[0]["sites"]) == ["west"]


def test_answers_are_generated_where_asked(ready, nodes, engine, told):
    fed = ready(nodes, {"evaluation.exact_match_rows": "2", "evaluation.max_new_tokens": "2"})
    evaluate(fed, engine, generate=True)
    assert told("evaluated")[0]["exact_match"] is not None


def test_the_coordinators_own_rows_are_a_figure_of_their_own(ready, nodes, engine, told):
    fed = ready(nodes)
    encoded, _ = base.encode(engine, tiny.rows(5, site="own"), fed.manifest.run.data)
    fed.own_rows = OwnRows(engine, encoded)
    loss = evaluate(fed, engine)
    (event,) = told("evaluated")
    assert event["server_loss"] > 0
    assert event["server_loss"] != loss
    fed.own_rows = None
    evaluate(fed, engine)
    assert told("evaluated")[-1]["server_loss"] is None
