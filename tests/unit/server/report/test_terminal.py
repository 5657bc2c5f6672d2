import io
import re

import pytest
from rich.console import Console

from common.privacy import cost as privacy_cost
from server.report.terminal import Screen
from server.view.figures import percent, size
from tests.samples.events import HOSTILE, LOG, PLAN, evaluated, finished, joined, measured, trained, whole

ENDED = {"kind": "run_finished"}
FAILED = {"kind": "site_failed", "site": "west", "step": "train", "reason": "no answer within 60 s"}


REFUSED = {"kind": "site_refused", "node": 4, "site": "west"}


def drawn(events, *, terminal: bool = False, width: int = 80) -> str:
    """What a run's events look like."""
    out = io.StringIO()
    screen = Screen(Console(file=out, width=width, force_terminal=terminal, color_system=None))
    for event in events:
        screen(whole({"time": 0.0, **event}))
    return out.getvalue()


def test_the_plan_comes_first():
    lines = drawn(LOG).splitlines()
    assert lines[0].startswith("tiny  2 rounds, fedavg, run abababababab")
    assert "39,072 parameters, nf4" in lines[1]
    assert "1,024 parameters trained (2.6 %)" in lines[2]
    assert "4.1 kB down and 2.0 kB up" in lines[3]
    assert "none: updates leave the sites unprotected" in lines[4]


def test_sites_are_shown_once_with_what_was_cut():
    shown = drawn([PLAN, joined("north"), joined("north")])
    assert shown.count("site      north: 1,200 rows to train, 30 held out, 1 cut, 0 dropped as too long") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_many_sites_are_counted_as_they_join_and_told_in_one_line(terminal):
    sites = [f"site-{number:03}" for number in range(200)]
    refused = {"kind": "site_refused", "node": 4, "site": "node 4", "reason": "DataError"}
    shown = drawn(
        [PLAN, *map(joined, sites[:150]), refused, *map(joined, sites[150:]), evaluated(0, 6.0), ENDED],
        terminal=terminal,
        width=120,
    )
    assert re.findall(r"site-\d+", shown) == sites[:12]
    assert shown.count("site      site-") == 12
    assert shown.count("joined    ") == 1
    told = "joined 200 sites: 240,000 rows to train, 6,000 held out, 200 cut, 0 dropped as too long"
    assert told in " ".join(shown.split())
    assert ("joined: 200 sites" in shown) is terminal  # the moving line


def test_a_refusal_is_told_once_for_all_rounds_and_another_reason_anew():
    refused = {"kind": "site_refused", "node": 4, "site": "west", "state": "failed", "reason": "failed: no rows"}
    shown = drawn([PLAN, refused, refused, {**refused, "reason": "failed: no base"}, {**refused, "site": "east"}])
    assert re.findall(r"site      (.*)", shown) == [
        "west: failed: no rows",
        "west: failed: no base",
        "east: failed: no rows",
    ]


def test_as_many_sites_as_have_a_line_each_are_not_counted():
    sites = [f"site-{number:03}" for number in range(13)]
    few, many = (drawn([PLAN, *map(joined, some), evaluated(0, 6.0)]) for some in (sites[:12], sites))
    assert [shown.count("  joined    ") for shown in (few, many)] == [0, 1]


def test_sites_that_come_later_are_counted_with_those_before():
    sites = [f"site-{number:03}" for number in range(15)]
    log = [PLAN, *map(joined, sites[:14]), evaluated(0, 6.0), *map(joined, sites), evaluated(1, 5.0)]
    assert re.findall(r"  joined    (\d+) sites", drawn(log)) == ["14", "15"]


def names(count: int) -> list[str]:
    return [f"site-{number:02}" for number in range(count)]


def round_of(sites, number: int = 0, *, start: float = 1.0) -> list[dict]:
    """The events of one round, in which each site is worse than the one before."""
    losses = {site: start + place / 10 for place, site in enumerate(sites)}
    began = {"kind": "round_started", "round": number, "sites": list(sites)}
    done = [trained(site, number, loss) for site, loss in losses.items()]
    return [began, *done, finished(number), evaluated(number + 1, 4.0, **losses)]


@pytest.mark.parametrize("count", [3, 9, 20])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_rounds_fit_80_columns_however_many_sites(count, terminal, private):
    told = {"privacy": "unit", "epsilon_planned": [4.82, 8.0], "dp_delta": 1e-6, "noise_multiplier": 0.7}
    plan = PLAN | (told | {"privacy_wording": privacy_cost.FIXED_WORDING} if private else {})
    sites = names(count)
    log = [plan, *map(joined, sites), evaluated(0, 6.0, **dict.fromkeys(sites, 6.0)), *round_of(sites)]
    lines = drawn(log, terminal=terminal).splitlines()
    table = lines[next(place for place, line in enumerate(lines) if "held-out " in line and "round" in line) :]
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rpartition("\r")[2]) for line in table) <= 80
    assert "\x1b" not in "".join(lines) or terminal


def test_few_sites_have_columns_and_of_many_the_best_and_the_worst_are_named():
    told = {count: drawn([PLAN, *map(joined, names(count)), *round_of(names(count))]) for count in (2, 4, 20)}
    assert re.search(r"round +held-out +site-00 +site-01 +gap", told[2])
    assert "train site-00 1.000, site-01 1.100, site-02 1.200, site-03 1.300" in told[4]
    assert "train best site-00 1.000, median 1.950, worst site-19 2.900" in told[20]
    wide = drawn([PLAN, *map(joined, names(5)), *round_of(names(5))], width=120)
    assert re.search(r"site-00 +site-01 +site-02 +site-03 +site-04 +gap", wide)


def test_a_round_without_an_evaluation_has_its_row_too():
    log = [PLAN, joined("north"), *round_of(["north"])[:-1], *round_of(["north"], 1)]
    table = [line.split()[:3] for line in drawn(log).splitlines() if re.match(r" +\d+ ", line)]
    assert table == [["1", "-", "1.000"], ["2", "4.000", "1.000"]]


def test_each_evaluation_is_one_line_under_the_right_columns():
    table = [line.split() for line in drawn(LOG).splitlines() if re.match(r" +(round|\d+) ", line)]
    assert table[0] == ["round", "held-out", "north", "south", "gap", "down", "up", "time"]
    assert table[1] == ["0", "6.000", "-", "-", "-", "-", "-", "-"]
    assert table[2][:4] == ["1", "4.000", "2.500", "3.500"]
    assert " ".join(table[2][4:12]) == "25.0 % 8.0 kB 4.0 kB 1.2 s"


def test_a_site_that_did_not_train_has_a_dash():
    log = [PLAN, joined("north"), joined("south"), {"kind": "round_started", "round": 0, "sites": ["north"]}]
    shown = drawn([*log, trained("north", 0), finished(0), evaluated(1, 4.0, north=4.0)])
    assert re.findall(r"^ +1 .*", shown, re.MULTILINE)[0].split()[2:4] == ["2.500", "-"]


def test_lines_are_whole_in_a_file_and_broken_at_words_on_a_terminal():
    warned = {"kind": "warned", "reason": "one two three " * 20 + "/a/path/" + "b" * 90}
    assert max(map(len, drawn([PLAN, warned]).splitlines())) > 300
    lines = drawn([PLAN, warned], terminal=True).splitlines()
    assert sorted(map(len, lines))[-2] <= 80
    assert f"            /a/path/{'b' * 90}" in lines, "what is to be copied is in one piece"


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([*LOG, finished(1, gap=0.5), evaluated(2, 3.0, north=3.0)], "large gap"),
        ([*LOG, evaluated(1, 3.0, ["south"], north=3.0)], "stale: south"),
        ([*LOG, {**evaluated(1, 3.0, north=3.0), "bytes_down": 16000}], "evaluation 16.0 kB down"),
        ([PLAN, joined("west"), FAILED], "west train: no answer within 60 s"),
        ([PLAN, joined("west"), {**FAILED, "state": "away"}], "west train: away: no answer within 60 s"),
        ([PLAN, {"kind": "site_refused", "node": 4, "site": "node 4", "reason": "DataError"}], "node 4: DataError"),
        (
            [PLAN, {**REFUSED, "state": "waits for approval", "reason": "waits for approval"}],
            "site      west: waits for approval\n",
        ),
        ([PLAN, {**REFUSED, "state": "failed", "reason": "WireError: so"}], "site      west: failed: WireError: so\n"),
        ([PLAN, {**REFUSED, "state": "denied", "reason": "denied (X); so"}], "site      west: denied (X); so\n"),
        ([PLAN, {"kind": "site_skipped", "site": "west", "reason": "silent"}], "west away: silent"),
        ([PLAN, {"kind": "not_evaluated", "num_rounds": 1, "reason": "late"}], "no figures after 1 rounds: late"),
        ([*LOG, {**evaluated(1, 3.0, north=3.0), "server_loss": 2.125}], "coordinator's rows 2.125"),
        (
            [*LOG, {**evaluated(1, 0.5, north=0.5), "accuracy": 0.75, "answer_loss": 4.5}],
            "agrees with 75.0 %, answers 4.500",
        ),
    ],
)
def test_what_a_reader_should_not_miss(events, told):
    assert told in drawn(events)


def test_control_a_quiet_run_has_no_notes():
    shown = drawn([{**PLAN, "gap_warning": 1.0}, *LOG[1:]])
    assert "gap passed" not in shown
    assert "large gap" not in shown
    assert "stale" not in shown


def test_a_large_gap_names_a_method_without_it():
    log = [*LOG, finished(1, gap=0.5), evaluated(2, 3.0, north=3.0), {"kind": "run_finished"}]
    assert "aggregation.method = 'rolora' has none" in drawn(log)
    assert "has none" not in drawn([{**PLAN, "without_gap": ""}, *log[1:]])
    assert "Fewer local steps" in drawn([{**PLAN, "without_gap": ""}, *log[1:]])


def test_the_module_with_a_rounds_largest_gap_is_named():
    gaps = {"base_model.model.model.layers.0.mlp.up_proj": 0.5, "base_model.model.model.layers.1.mlp.up_proj": 0.25}
    shown = drawn([*LOG, finished(1, **gaps), evaluated(2, 3.0, north=3.0)])
    assert "gap mostly in layers.0.mlp.up_proj, 50.0 %" in shown
    assert "mostly in" not in drawn([*LOG, finished(1, **dict.fromkeys(gaps, 0.0)), evaluated(2, 3.0, north=3.0)])


def test_a_gap_that_is_an_estimate_is_shown_with_its_standard_errors():
    modules = {"base_model.model.model.layers.0.mlp.up_proj": 0.5}
    errors = {"gap_error": 0.012, "gap_module_errors": dict.fromkeys(modules, 0.034)}
    shown = drawn([*LOG, {**finished(1, **modules), **errors}, evaluated(2, 3.0, north=3.0)])
    assert "gap ± 1.2 %\n" in shown
    assert "gap mostly in layers.0.mlp.up_proj, 50.0 % ± 3.4 %" in shown
    assert "±" not in drawn([*LOG, finished(1, **modules), evaluated(2, 3.0, north=3.0)])  # the control


def test_a_round_without_a_gap_is_shown_with_a_dash():
    assert " - " in drawn([*LOG, finished(1, gap=None), evaluated(2, 3.0, north=3.0)]).splitlines()[-1]


def test_tasks_are_shown_with_how_far_they_are_from_the_base():
    gain = {"mean": 0.25, "low": 0.1, "high": 0.4}
    gains = {"base": {"notes.f1": gain}, "prompt-only": {"notes.f1": {**gain, "low": -0.1}}}
    shown = drawn([measured("base", {"notes.f1": 0.25}), measured("final", {"notes.f1": 0.5}, gains)]).splitlines()
    assert [line.strip() for line in shown] == [
        "base",
        "notes.f1     0.250 [0.150, 0.350]",
        "final",
        "notes.f1     0.500 [0.400, 0.600]  base +0.250 better  prompt-only +0.250 unclear",
    ]
    lower = drawn([measured("final", {"notes.f1": 0.5}, gains, higher_is_better=False)])
    assert "base +0.250 worse" in lower


def test_sites_that_got_worse_are_named_at_the_end():
    last = evaluated(2, 3.0, north=4.5, south=1.5)
    last["sites"]["north"]["change"] = 0.25
    shown = drawn([*LOG, finished(1), {**last, "worse_than_base": ["north"]}])
    assert "worst north 4.500, mean 3.000, std 1.500, worst-best 3.000" in shown
    assert "worse than the base: north +0.250" in shown
    assert "worse than the base" not in drawn([*LOG, finished(1), last])  # control


def test_text_from_elsewhere_is_not_markup():
    shown = drawn([{**PLAN, "base": "[red]x[/red]"}, {**FAILED, "reason": "[/] " + HOSTILE, "site": "[bold]w"}])
    assert "[red]x[/red]" in shown
    assert "[bold]w train: [/] <script>" in shown


def test_kinds_that_are_not_known_are_passed_over():
    assert drawn([{"kind": "arm_started", "arm": "x"}, {"kind": "new in a later release"}]) == ""


def test_a_resumed_run_is_shown_from_where_it_goes_on():
    log = [PLAN, joined("north"), evaluated(1, 4.0, north=4.0), finished(1), evaluated(2, 3.0, north=3.0)]
    table = [line.split()[:2] for line in drawn(log).splitlines() if re.match(r" +\d+ ", line)]
    assert table == [["1", "4.000"], ["2", "3.000"]]


@pytest.mark.parametrize("last", ["run_finished", "run_failed"])
def test_on_a_terminal_the_cursor_is_given_back(last):
    log = [*LOG, {"kind": "round_started", "round": 1, "sites": ["north"]}, {"kind": last, "reason": "x"}]
    shown = drawn(log, terminal=True)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def test_sizes_and_shares():
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 10**15)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "1000.0 TB"]
    assert [percent(share) for share in (None, 0.0, 0.5, 1.0)] == ["-", "0.0 %", "50.0 %", "100.0 %"]


def test_a_private_run_tells_what_it_has_cost_after_each_round_as_planned():
    private = {"privacy": "unit", "epsilon_planned": [4.82, 8.0], "dp_delta": 1e-6, "noise_multiplier": 0.7}
    private["privacy_wording"] = privacy_cost.FIXED_WORDING
    shown = drawn([PLAN | private, *LOG[1:]])
    assert "epsilon 8.00 at delta 1e-06 after the last round, 4.82 after the first" in shown
    assert "A patient of two sites loses the sum" in " ".join(shown.split())
    assert re.findall(r" s +(\d\.\d\d)$", shown, re.MULTILINE) == ["4.82"]


@pytest.mark.parametrize(
    ("num_exact", "shown"), [(2, "3 of 30 held-out rows stand"), (0, "1 of 30 held-out rows stands")]
)
def test_held_out_rows_that_are_trained_on_are_told_before_and_beside_every_figure(num_exact, shown):
    found = {"kind": "overlap", "num_held_out": 30, "num_exact": num_exact, "num_near": 1}
    text = drawn(
        [PLAN, found, joined("north"), evaluated(0, 6.0, north=6.0), finished(0), evaluated(2, 2.5, north=2.5)]
    )
    assert text.count(shown) == 2
    assert text.count(f"{num_exact + 1} held-out rows are trained on") == 2
    clean = {**found, "num_exact": 0, "num_near": 0}
    text = drawn([PLAN, clean, joined("north"), evaluated(0, 6.0, north=6.0)])
    assert "none of 30 held-out rows stands in rows that are trained on" in text
    assert "held-out rows are trained on" not in text


def test_tasks_and_stages_that_train_on_what_they_are_judged_on_say_so():
    counts = {"num_rows": 32, "num_exact": 12, "num_near": 4}
    stage = {"stage": "align", "trainer": "dpo", "before": {}, "after": {}, "num_steps": 1, "seconds": 1.0}
    text = drawn(
        [
            PLAN,
            {"kind": "tasks_overlap", "reasons": ["2 of 9 rows of task a [x.jsonl]"]},
            {"kind": "polish_finished", **stage, "overlaps": {"task notes": counts}},
        ]
    )
    assert "warning   2 of 9 rows of task a [x.jsonl]" in text
    assert "trained on 16 of 32 rows of task notes (12 word for word, 4 nearly)" in text
