"""A coordinator that asks a site for more than its policy says of preferences."""

import pytest

from client.agent.agent import SiteData
from tests import tiny

POLICY = "PolicyRefusedError"
COLUMNS = '["instruction", "input", "output", "patient_id", "prompt", "chosen", "rejected"]'
FIGURES = "[0, 1e6]\npreference_loss_sum = [0, 1e6]\nnum_preferred = [0, 1e6]"
ALLOWED = {"max_rounds": '4\nobjectives = ["sft", "dpo"]', "columns": COLUMNS, "num_exact": FIGURES}
DPO = {"training__objective__kind": '"dpo"'}


@pytest.fixture
def open_preferences(make):
    """A site with pairs whose policy allows them; other lines of it may be changed."""

    def build(**changes):
        site = make(**{**ALLOWED, **changes})
        table = [tiny.pair(number) for number in range(12)]
        site.data = SiteData(table[:9], table[9:])
        return site

    return build


def test_a_policy_that_names_no_objective_allows_answers_only(make):
    site = make()
    assert site.refused(site.open(site.manifest(**DPO))) == (POLICY, "train.objectives")
    assert site.num_reads == 0
    assert site.open().kind == "opened"  # the control


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"columns": '["instruction", "input", "output", "patient_id", "prompt"]'}, "data.datasets.columns"),
        ({"num_exact": "[0, 1e6]"}, "egress.metrics"),
    ],
)
def test_columns_and_figures_of_preferences_need_lines_of_their_own(open_preferences, change, rule):
    site = open_preferences(**change)
    assert site.refused(site.open(site.manifest(**DPO))) == (POLICY, rule)
    assert site.num_reads == 0


def test_figures_of_preferences_leave_rounded_and_only_where_they_are_declared(open_preferences):
    site = open_preferences(min_slice="3\nround_metrics_to = 1")
    run = site.manifest(**DPO)
    assert site.open(run).kind == "opened"
    assert [site.step(kind, run).kind for kind in ("evaluate", "train")] == ["metrics", "update"]
    moved = {name: tensor + 0.05 for name, tensor in site.engine.initial.items()}
    head = site.step("evaluate", run, moved, round_index=1).head
    assert head["num_rows"] == 3
    mean = head["preference_loss_sum"] / 3
    assert mean == pytest.approx(round(mean, 1), abs=0.02)
    assert 0 <= head["num_preferred"] <= 3
    plain = open_preferences()
    assert plain.open().kind == "opened"
    head = plain.step("evaluate").head
    assert (head["preference_loss_sum"], head["num_preferred"]) == (None, None)


def test_the_reference_is_the_runs_start_whatever_adapter_is_sent_first(open_preferences):
    """Else a coordinator could set the reference, and with it what is learnt, by the first adapter that it sends."""
    found = []
    for shift in (0.0, 0.1):
        site = open_preferences()
        run = site.manifest(**DPO)
        site.open(run)
        site.step("evaluate", run, {name: tensor + shift for name, tensor in site.engine.initial.items()})
        found.append([pair.reference for pair in site.agent._run.held_out_preferences])
    assert found[0] == found[1]
    assert all(len(reference) == 2 for reference in found[0])
