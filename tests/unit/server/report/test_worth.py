"""What the report says a run was worth, its facts, its axis, and its page's shape."""

import math
import re

import pytest
from scipy import stats

from server.evaluate.figures import intervals
from server.report import report, worth
from tests.samples.events import HOSTILE, LOG, PLAN, evaluated, finished, joined, measured, trained, view, whole

TOLD = {
    "seed": 7,
    "adapter": "LoRA r = 16, alpha = 32.0, q_proj, v_proj",
    "learning_rate": 2e-4,
    "objective": "sft",
    "device": "cuda:0",
    "versions": {"silotune": "1.2.3", "torch": "2.9.0", "transformers": "4.57", "peft": "0.18", "flwr": "1.41"},
    "time": 1_800_000_000.0,
}
END = {"kind": "run_finished", "adapter": "adapter", "num_rounds": 1, "stage": "final", "time": 1_800_007_380.0}
SITES = ("north", "south", "west", "east")


def after(*shares: float, worse: tuple[str, ...] = (), **end) -> list[dict]:
    """A run of one round whose sites moved by these shares of the base's loss."""
    base = dict(zip(SITES, (2.0, 2.5, 3.0, 4.0), strict=True))
    last = {site: base[site] * (1 + share) for site, share in zip(SITES, shares, strict=False)}
    first = {site: base[site] for site in last}
    told = evaluated(1, sum(last.values()) / len(last), **last)
    for site in last:
        told["sites"][site]["change"] = last[site] - base[site]
    told["worse_than_base"] = list(worse)
    return [{**PLAN, **TOLD}, evaluated(0, sum(first.values()) / len(first), **first), told, {**END, **end}]


def compared(federated: float, **alone: float) -> dict:
    arms = {"base": 6.0, "federated": federated, **{f"site-{name}": loss for name, loss in alone.items()}}
    told = {name: {"held_out_loss": loss, "exact_match": None} for name, loss in arms.items()}
    return {"kind": "compared", "comparison": told}


def gains(low: float, mean: float, high: float) -> dict:
    return {"base": {"notes.f1": {"mean": mean, "low": low, "high": high}}}


def of_rows(event: dict, num_rows: int = 40, kind: str = "answers") -> dict:
    figures = {name: {**told, "num_rows": num_rows, "kind": kind} for name, told in event["figures"].items()}
    return {**event, "figures": figures}


REFUSED = {"kind": "run_failed", "error": "GateRefused", "reason": "the gate refuses final", "time": 1.0}
BETTER = of_rows(measured("final", {"notes.f1": 0.5}, gains(0.1, 0.2, 0.3)))
CHANCE = of_rows(measured("final", {"notes.f1": 0.5}, gains(-0.1, 0.1, 0.3)))
HARM = of_rows(measured("final", {"notes.f1": 0.5}, gains(-0.3, -0.2, -0.1)))
FEW, GUARD = of_rows(BETTER, 29), of_rows(BETTER, kind="probe")
PASSED = {"kind": "gated", "stage": "final", "adapter_sha256": "a", "is_passed": True, "verdicts": []}


@pytest.mark.parametrize(
    ("log", "answer", "parts"),
    [
        (after(-0.10, -0.12, -0.14), "yes", ["fell 12.0 % at the mean site (95 % interval -17.0 % to -7.0 %, over 3"]),
        ([*after(-0.1, -0.12, -0.14), compared(1.0, north=2.0, south=3.0)], "yes", ["better than every site alone"]),
        ([*after(-0.1, -0.12, -0.14), compared(2.5, north=2.0, south=3.0)], "partly", ["2.500 against site-north 2.0"]),
        (after(0.10, 0.12, 0.14), "no", ["rose 12.0 %"]),
        (after(-0.30, 0.10, 0.02), "undecided", ["unclear: held-out loss fell 6.0 %"]),
        (after(-0.30, 0.10, 0.02, worse=("south",)), "no", ["worse than the base at south +0.250 nats"]),
        (after(-0.20), "undecided", ["fell 20.0 %, and one site gives no interval"]),
        ([*after(-0.20), BETTER], "yes", ["better: notes.f1 +0.200 [+0.100, +0.300]"]),
        ([*after(-0.20), GUARD], "undecided", ["one site gives no interval"]),
        ([*after(-0.20), FEW], "undecided", ["unclear: held-out", "notes.f1 +0.200 [+0.100, +0.300], of 29 rows"]),
        ([*after(-0.20), CHANCE], "undecided", ["unclear: notes.f1 +0.100 [-0.100, +0.300]"]),
        ([*after(-0.10, -0.12, -0.14), HARM], "partly", ["Partly: worse: notes.f1 -0.200"]),
        ([*after(-0.1, -0.12, -0.14)[:-1], PASSED, END], "yes", ["the gate passed"]),
        ([*after(-0.1, -0.12, -0.14)[:-1], REFUSED], "no", ["the gate refuses all that was trained"]),
        (
            [*after(-0.1, -0.12, -0.14)[:-1], {"kind": "run_failed", "reason": "disk", "time": 1.0}],
            "undecided",
            ["run failed"],
        ),
        (after(-0.1, -0.12, -0.14)[:-1], "undecided", ["has not come to its end"]),
        (
            after(-0.1, -0.12, -0.14, stage="polish-01-align"),
            "undecided",
            ["what polish did to the sites' loss", "before it held-out loss fell 12.0 %"],
        ),
        ([{**PLAN, **TOLD}, END], "undecided", ["did not score both"]),
    ],
)
def test_the_verdict_follows_intervals_gate_and_comparison(log, answer, parts):
    found = worth.verdict(view(log))
    assert found.answer == answer
    assert found.sentence.startswith(f"{answer.capitalize()}: ")
    assert all(part in found.sentence for part in parts), found.sentence
    page = report.render(view(log))
    assert (found.sentence.replace("'", "&#39;") in page) == any(
        event["kind"] in ("evaluated", "measured") for event in log
    )


def test_a_silent_site_s_old_figure_is_in_no_interval():
    log = after(-0.10, -0.12, -0.14)
    change = worth.change_at_sites(whole(log[1]), whole({**log[2], "stale": ["west"]}))
    assert math.isclose(change.value, -0.11, rel_tol=1e-9)
    assert worth.change_at_sites(whole(log[1]), whole({**log[2], "stale": ["west", "south"]})) is None


@pytest.mark.parametrize("num_free", [1, 2, 3, 7, 30, 31, 40, 1000])
def test_student_s_quantile_is_scipy_s(num_free):
    assert intervals.t_95(num_free) == pytest.approx(stats.t.ppf(0.975, num_free), abs=6e-5)


def test_an_interval_of_a_mean_is_scipy_s():
    values = [0.3, 0.1, 0.4, 0.1, 0.5]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 5, scale=stats.sem(values))
    found = intervals.mean_of_few(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)
    with pytest.raises(ValueError, match="no spread"):
        intervals.t_95(0)


def test_every_fact_is_told_with_its_value():
    told = dict(report.facts(view(after(-0.1, -0.1))))
    assert told == {
        "started": "2027-01-15 08:00:00 UTC",
        "ended": "2027-01-15 10:03:00 UTC",
        "duration": "2 h 3 min",
        "seed": "7",
        "adapter": "LoRA r = 16, alpha = 32.0, q_proj, v_proj",
        "learning rate": "0.0002",
        "method": "fedavg, 2 rounds, objective sft",
        "privacy": "none",
        "device of the coordinator": "cuda:0",
        "versions": "silotune 1.2.3, torch 2.9.0, transformers 4.57, peft 0.18, flwr 1.41",
    }
    page = report.render(view(after(-0.1, -0.1)))
    assert all(f"<tr><td>{name}</td><td>{value}</td></tr>" in page for name, value in told.items())
    private = {**PLAN, "privacy": "unit", "epsilon_planned": [4.0, 7.9], "dp_delta": 1e-5}
    assert dict(report.facts(view([private])))["privacy"] == "for every unit: epsilon 7.900 at delta 1e-05"


def test_a_run_that_goes_on_has_not_ended_and_tells_its_tries():
    first = after(-0.1, -0.1)
    again = {**PLAN, **TOLD, "time": 1_800_010_000.0}
    assert dict(report.facts(view([*first, again])))["ended"] == "not yet"
    told = dict(report.facts(view([*first, again, {**END, "time": 1_800_010_100.0}])))
    assert told["duration"] == "2 h 48 min, in 2 tries, pauses between them included"
    assert not list(report.facts(view([])))


@pytest.mark.parametrize(
    ("low", "high"), [(2.31, 4.07), (0.0, 0.0), (3.0, 3.0), (1e-4, 9e-4), (5.5, 6.5), (-0.2, 31.0), (1234.0, 1260.0)]
)
def test_ticks_are_whole_steps_of_one_two_or_five_around_all_values(low, high):
    ticks = report.nice_ticks(low, high, most=report.NUM_TICKS)
    step = ticks[1] - ticks[0]
    digit = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert round(digit, 6) in (1, 2, 5)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= report.NUM_TICKS + 2
    assert all(abs(tick / step - round(tick / step)) < 1e-6 for tick in ticks)


@pytest.mark.parametrize("last", [1, 3, 10, 11, 30, 47, 200])
def test_rounds_are_counted_in_steps_of_one_two_or_five(last):
    ticks = [
        int(label)
        for _, label in report.chart(view([evaluated(0, 3.0, a=3.0), evaluated(last, 2.0, a=2.0)]).evaluated).x_ticks
    ]
    assert len(ticks) <= 11
    assert ticks[1] in (1, 2, 5, 10, 20, 50)
    labels = [
        label
        for _, label in report.chart(view([evaluated(0, 3.07, a=3.07), evaluated(1, 2.0, a=2.0)]).evaluated).y_ticks
    ]
    assert labels == ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0", "3.2"]


def full_page(num_sites: int) -> str:
    names = [f"hospital-of-the-university-number-{number}" for number in range(num_sites)]
    log = [{**PLAN, **TOLD}, *map(joined, names), evaluated(0, 3.0, **dict.fromkeys(names, 3.0))]
    log += [trained(name, 0) for name in names]
    log += [finished(0, up=0.5), evaluated(1, 2.0, **dict.fromkeys(names, 2.0)), BETTER, compared(2.0, north=3.0), END]
    return report.render(view(log), shown=[{"prompt": HOSTILE, "base": f"a {HOSTILE}", "adapter": "b\n" * 3}])


@pytest.mark.parametrize("num_sites", [2, 9])
def test_nothing_on_the_page_is_wider_than_a_telephone(num_sites):
    page = full_page(num_sites)
    style = page[page.index("<style>") : page.index("</style>")]
    wide = [float(size) for size in re.findall(r"(?<!max-)width: ([\d.]+)px", style + page)]
    wide += [16 * float(size) for size in re.findall(r"(?<!max-)width: ([\d.]+)rem", style)]
    assert max(wide, default=0) <= 180
    assert "viewport" in page
    assert not re.search(r"<svg[^>]*\s(width|height)=", page)  # it fits its place by its viewBox
    plain = re.findall(r'(<div class="table">)?<table(?: class="(\w+)")?>', page)
    assert all(place or kind == "plan" for place, kind in plain)  # what cannot fold scrolls in a place of its own
    assert re.search(r'<tr class="under"><td colspan="4"><div class="bar" style="width: \d', page)  # below its arm
    assert ("Training loss of each site" in page) == (num_sites > report.MAX_COLUMNS)
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;") == 2
    assert "<h2>Examples</h2>" not in report.render(view(LOG))


def test_a_figure_has_its_interval_below_it():
    page = full_page(2)
    assert "<td>0.500<br><small>0.400 to 0.600</small></td>" in page
