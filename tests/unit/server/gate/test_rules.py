"""The gate's rules on figures made by hand: each is met and broken, and what is missing is never in its favour."""

import dataclasses
import json

import pytest

from common.run.schema import shape
from common.run.schema.gate import FigureRule, GateConfig
from common.scores import Arm, Figure, Gain, SiteScore
from server.gate import rules, stopping
from server.gate.figures import Audit, Figures, gather, read_audit
from server.view import gate
from tests import tiny
from tests.samples.events import PLAN, evaluated, event, view


def figure(value, *, kind="answers", num_rows=100, low=None, high=None, higher_is_better=True):
    low, high = value if low is None else low, value if high is None else high
    told = {"value": value, "low": low, "high": high, "num_rows": num_rows, "kind": kind}
    return Figure(**told, higher_is_better=higher_is_better)


def gain(mean, low=None, high=None):
    return Gain(mean=mean, low=mean if low is None else low, high=mean if high is None else high)


def asked(loss, trimmed=None):
    return event("evaluated", loss=loss, trimmed_loss=trimmed)


def sites(**changes):
    told = {
        site: {"loss": 1.0, "num_rows": 9, "exact_match": None, "change": change} for site, change in changes.items()
    }
    return event("evaluated", loss=1.0, sites=told)


def verdict(kind: str, figures: Figures, *, limits: dict | None = None, **settings):
    limits = {"file": "audit.json"} if kind == "audit" else limits or {}
    (found,) = rules.judge(GateConfig(rules=[{"kind": kind, **limits}], **settings), figures)
    return found


def of_probe(mean, **more):
    told = figure(0.5, kind="probe", **more)
    return Figures("final", {"arc.acc": told}, {"base": {"arc.acc": gain(mean, mean - 0.02, mean + 0.02)}})


CLAIM = Audit(8.0, 3.0, 6.0, 1e-5, "ab" * 32)
CASES = [  # rule, figures that meet it, figures that break it, the margin of the breach
    ("probes", of_probe(-0.01), of_probe(-0.05), -0.04),
    ("probes", of_probe(0.5, higher_is_better=True), of_probe(0.5, higher_is_better=False), -0.49),
    (
        "baseline",
        Figures("final", {"a.f1": figure(0.6)}, {"prompt-only": {"a.f1": gain(0.1)}}),
        Figures("final", {"a.f1": figure(0.6)}, {"prompt-only": {"a.f1": gain(0.0)}}),
        0.0,
    ),
    ("sites", Figures("final", evaluated=sites(north=0.0)), Figures("final", evaluated=sites(north=0.25)), -0.25),
    (
        "loss",
        Figures("final", evaluated=asked(1.0), base=asked(1.5)),
        Figures("final", evaluated=asked(1.5), base=asked(1.0)),
        -0.5,
    ),
    (
        "schema",
        Figures("final", {"j.json": figure(1.0)}),
        Figures("final", {"j.json": figure(0.99)}),
        0.0,
    ),
    (
        "exposure",
        Figures("final", {"c/exposure": figure(1.5), "c/exposure_ceiling": figure(10.0)}),
        Figures("final", {"c/exposure": figure(9.0), "c/exposure_ceiling": figure(10.0)}),
        -4.0,
    ),
    (
        "extraction",
        Figures("final", {"c/extracted": figure(0.0)}),
        Figures("final", {"c/extracted": figure(0.5)}),
        -0.5,
    ),
    ("pii", Figures("final", {"p.emission": figure(0.0)}), Figures("final", {"p.emission": figure(0.25)}), -0.25),
    (
        "audit",
        Figures("final", claimed_epsilon=8.0, dp_delta=1e-5, audit=CLAIM),
        Figures("final", claimed_epsilon=8.0, dp_delta=1e-5, audit=Audit(8.0, 9.0, None, 1e-5, "ab" * 32)),
        -1.0,
    ),
]


@pytest.mark.parametrize(("rule", "good", "bad", "margin"), CASES)
def test_a_rule_is_met_and_broken_by_how_much(rule, good, bad, margin):
    assert verdict(rule, good).is_met
    found = verdict(rule, bad)
    assert not found.is_met
    assert found.margin == pytest.approx(margin, abs=1e-12)
    assert found.name == rule


@pytest.mark.parametrize("rule", rules.RULES.keys() - {"figure"})
def test_a_rule_whose_figure_is_missing_is_not_met_and_says_which(rule):
    found = verdict(rule, Figures("final"))
    assert (found.is_met, found.value, found.margin) == (False, None, None)
    assert found.reason
    assert f"{rule} not met: " in gate.line(found)


def test_every_rule_of_the_run_file_is_here_and_is_tried_both_ways():
    kinds = shape.tables_of(GateConfig)["rules"].variants
    assert set(rules.RULES) == set(kinds) == {case[0] for case in CASES} | {"figure"}
    assert set(rules.RULES) >= rules.HARMS


def test_the_worst_of_several_figures_decides():
    told = Figures("final", evaluated=sites(north=-0.5, south=0.25, west=0.1))
    assert "south" in verdict("sites", told).reason
    missing = Figures("final", evaluated=sites(north=-0.5, south=None))
    assert verdict("sites", missing).value is None
    stale = Figures("final", evaluated=dataclasses.replace(sites(north=-0.5), stale=["north"]))
    assert not verdict("sites", stale).is_met
    one_stale = Figures("final", evaluated=dataclasses.replace(asked(1.0), stale=["north"]), base=asked(1.5))
    assert "no figure of this adapter from north" in verdict("loss", one_stale).reason


def test_too_few_rows_show_nothing():
    few = Figures("final", {"p.emission": figure(0.0, num_rows=29)})
    assert verdict("pii", few).value is None
    assert "29 rows" in verdict("pii", few).reason
    assert verdict("pii", few, min_rows=29).is_met


def test_evidence_may_be_the_worse_end_of_the_interval():
    assert verdict("probes", of_probe(0.0)).is_met
    assert verdict("probes", of_probe(0.0), evidence="interval").value == pytest.approx(-0.02)
    assert not verdict("probes", of_probe(0.0), evidence="interval").is_met
    assert verdict("probes", of_probe(0.02), evidence="interval").is_met
    told = Figures("final", {"p.emission": figure(0.0, high=0.1)})
    assert verdict("pii", told).is_met
    assert not verdict("pii", told, evidence="interval").is_met


def test_an_exposure_that_could_not_have_been_higher_shows_nothing():
    told = {"c.exposure": figure(1.0), "c.exposure_ceiling": figure(3.0)}
    assert "cannot pass 3.00" in verdict("exposure", Figures("final", told)).reason
    assert not verdict("exposure", Figures("final", {"c.exposure": figure(1.0)})).is_met
    assert verdict("exposure", Figures("final", told), limits={"max_exposure": 2.0}).is_met


def test_a_baseline_is_beaten_by_a_task_and_not_by_each_figure():
    names = {"a.f1": figure(0.6), "a.json": figure(1.0), "b.f1": figure(0.5)}
    beats = {"a.f1": gain(0.1), "a.json": gain(0.0), "b.f1": gain(0.2)}
    assert verdict("baseline", Figures("final", names, {"prompt-only": beats})).is_met
    assert not verdict("baseline", Figures("final", names, {"prompt-only": {**beats, "b.f1": gain(0.0)}})).is_met
    assert not verdict("baseline", Figures("final", names, {"prompt-only": {**beats, "a.json": gain(-0.1)}})).is_met


def test_a_site_may_not_be_worse_than_alone_where_that_was_compared():
    def arm(loss):
        score = SiteScore(held_out_loss=loss, exact_match=None)
        return Arm(held_out_loss=loss, exact_match=None, sites={"north": score}, rows_used=0)

    told = {"federated": arm(1.0), "site-north": arm(1.5)}
    assert verdict("sites", Figures("final", evaluated=sites(north=-1.0), compared=told)).is_met
    told = {"federated": arm(1.5), "site-north": arm(1.0)}
    found = verdict("sites", Figures("final", evaluated=sites(north=-1.0), compared=told))
    assert (found.is_met, found.margin) == (False, -0.5)
    assert "alone" in found.reason


def test_any_figure_may_have_limits():
    limits = (
        FigureRule(kind="figure", figure="a.f1", bound="min", limit=0.5),
        FigureRule(kind="figure", figure="a.f1", bound="max", limit=0.5),
        FigureRule(kind="figure", figure="a.gone", bound="max", limit=0.5),
    )
    found = rules.judge(GateConfig(rules=limits), Figures("final", {"a.f1": figure(0.6)}))
    assert [one.is_met for one in found] == [True, False, False]
    assert "a.gone" in found[2].reason


def test_an_audit_is_read_with_its_hash_and_must_be_of_this_claim(tmp_path):
    told = {"claimed_epsilon": 8.0, "audited_epsilon": 3.0, "ceiling": 6.0, "dp_delta": 1e-5}
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(told))
    found = read_audit(str(path))
    assert found.sha256 in verdict("audit", Figures("final", claimed_epsilon=8.0, dp_delta=1e-5, audit=found)).reason
    other = verdict("audit", Figures("final", claimed_epsilon=4.0, dp_delta=1e-5, audit=found))
    assert not other.is_met
    assert "the run claims 4.000" in other.reason
    assert "cannot be read" in read_audit(str(tmp_path / "gone.json"))
    for wrong in ({**told, "audited_epsilon": "much"}, {**told, "audited_epsilon": -1}, [], {"claimed_epsilon": 8}):
        path.write_text(json.dumps(wrong))
        assert "not what silotune-sim audit" in read_audit(str(path))


def test_an_audit_that_refutes_every_claim_is_a_verdict_that_an_event_can_hold(tmp_path):
    path = tmp_path / "audit.json"
    path.write_text('{"claimed_epsilon": 8.0, "audited_epsilon": "infinite", "ceiling": null, "dp_delta": 1e-5}')
    told = Figures("final", claimed_epsilon=8.0, dp_delta=1e-5, audit=read_audit(str(path)))
    assert not verdict("audit", told).is_met
    assert json.dumps(vars(verdict("audit", told)), allow_nan=False)


def test_what_an_audit_writes_is_what_the_gate_reads(tmp_path):
    from simulations.audit.finding import Finding

    told = Finding("mechanism", 4.0, 4.5, float("inf"), 1000, 1e-5, {})
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(told.as_dict()))
    found = read_audit(str(path))
    assert (found.claimed_epsilon, found.audited_epsilon, found.ceiling) == (4.0, 4.5, float("inf"))
    assert not verdict("audit", Figures("final", claimed_epsilon=4.0, dp_delta=1e-5, audit=found)).is_met


def stop_run(**changes):
    return tiny.settings("base", {"federation.num_rounds": "9", "gate.stop_after": "2", **changes})


def losses(*values):
    return [PLAN, *(evaluated(number, value, north=value) for number, value in enumerate(values))]


def test_rounds_end_after_so_many_evaluations_without_a_lower_loss():
    assert len(stopping.bad_in_a_row(stop_run(), view(losses(6.0, 5.0, 5.5, 5.2)), num_rounds=3)) == 2
    assert stopping.bad_in_a_row(stop_run(), view(losses(6.0, 5.0, 5.5, 4.9)), num_rounds=3) == []  # control
    assert len(stopping.bad_in_a_row(stop_run(), view(losses(6.0, 5.0, 5.5, 5.2)), num_rounds=2)) == 1


def test_rounds_end_by_rules_of_harm_though_the_loss_falls():
    run = stop_run(**{"gate.rules": "[{kind = 'sites'}, {kind = 'loss', min_gain = 5.0}]"})
    log = losses(6.0, 5.0, 4.0, 3.0)
    assert (
        stopping.bad_in_a_row(run, view(log), num_rounds=3) == []
    )  # nobody is worse; the goal of the loss ends nothing
    for line in log[2:]:
        line["sites"]["north"]["change"] = 0.5
    assert len(stopping.bad_in_a_row(run, view(log), num_rounds=3)) == 3


def test_evaluations_that_a_resumed_run_has_more_do_not_count():
    run = stop_run(**{"evaluation.every_rounds": "2"})
    assert len(stopping.bad_in_a_row(run, view(losses(6.0, 7.0, 7.0, 7.0)), num_rounds=3)) == 1


def test_figures_are_those_of_their_own_stage():
    run = tiny.settings("base", {"gate.rules": "[{kind = 'loss'}]"})
    after = [{"kind": "run_finished", "stage": "round-00001"}, {"kind": "compared", "comparison": {"federated": {}}}]
    for stage, arms in (("round-00001", {"federated": {}}), ("final", {})):
        assert (
            gather(run, view([*losses(6.0, 5.0, 4.0), *after]), stage=stage, num_rounds=1).compared.keys()
            == arms.keys()
        )
    told = gather(run, view(losses(6.0, 5.0, 4.0)), stage="round-00001", num_rounds=1)
    assert (told.evaluated.loss, told.base.loss, told.measured) == (5.0, 6.0, {})
