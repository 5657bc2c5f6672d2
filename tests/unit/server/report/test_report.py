import re

import pytest

from common import events
from common.errors import DataError
from common.events import EventLog
from server.report import report, status
from tests.samples.events import HOSTILE, LOG, PLAN, evaluated, finished, joined, measured, trained, view, whole


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))


def test_a_report_shows_plan_rounds_and_losses():
    page = text_of(report.render(view(LOG)))
    for told in ("tiny", "org/base", "1,024", "north (1,200 rows, 30 held out)", "25.0 %", "8.0 kB", "4.000", "2.500"):
        assert told in page
    assert "running, 1 of 2 rounds" in page
    assert "left the sites unprotected" in page


def test_a_report_of_nothing_is_a_page():
    assert "not started" in report.render(view([]))


def test_a_report_needs_nothing_from_elsewhere_and_runs_nothing():
    compared = {"kind": "compared", "comparison": {"base": {"held_out_loss": 6.0, "exact_match": None}}}
    page = report.render(view([*LOG, compared, {"kind": "run_finished"}]))
    assert not re.search(r"(https?:)?//", page)
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\(|\son\w+=", page)
    assert "default-src 'none'" in page


def test_text_from_sites_is_escaped():
    hostile = [
        joined(HOSTILE),
        trained(HOSTILE, 0),
        finished(0),
        evaluated(1, 1.0, **{HOSTILE: 1.0}),
        {"kind": "site_failed", "site": HOSTILE, "step": "train", "reason": f"'\"{HOSTILE}&"},
        {"kind": "site_refused", "node": 4, "site": "node 4", "reason": HOSTILE},
        {"kind": "compared", "comparison": {HOSTILE: {"held_out_loss": 1.0, "exact_match": 0.5}}},
        {"kind": "run_failed", "reason": HOSTILE},
    ]
    page = report.render(view([{**PLAN, "base": HOSTILE}, *hostile]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7


def test_troubles_are_told_with_site_or_node():
    failed = {"kind": "site_failed", "site": "west", "step": "train", "reason": "no answer within 60 s"}
    page = text_of(
        report.render(
            view([*LOG, failed, {"kind": "site_refused", "node": 4, "site": "node 4", "reason": "DataError"}])
        )
    )
    assert "west no answer within 60 s" in page
    assert "node 4 DataError" in page


def test_a_comparison_is_drawn_with_the_longest_bar_for_the_worst_arm():
    arms = {
        "base": {"held_out_loss": 6.0, "exact_match": 0.0},
        "federated": {"held_out_loss": 3.0, "exact_match": 0.5, "rows_used": 1234},
    }
    page = report.render(view([*LOG, {"kind": "compared", "comparison": arms}]))
    assert page.count("<td>1,234</td>") == 1
    assert "width: 100.0%" in page
    assert "width: 50.0%" in page
    assert '<tr class="federated">' in page
    assert "50.0 %" in text_of(page)


def test_a_comparison_of_losses_of_zero_is_drawn():
    arms = {"base": {"held_out_loss": 0.0, "exact_match": None}}
    assert "width: 0.0%" in report.render(view([*LOG, {"kind": "compared", "comparison": arms}]))


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ([], "not started"),
        ([PLAN], "running, 0 of 2 rounds"),
        (LOG, "running, 1 of 2 rounds"),
        ([*LOG, {"kind": "run_failed", "reason": "disk full"}], "failed: disk full"),
        ([*LOG, {"kind": "run_failed", "reason": "x"}, PLAN], "running, 1 of 2 rounds"),
        ([*LOG, {"kind": "run_finished"}], "finished"),
        ([*LOG, {"kind": "run_finished"}, {"kind": "arm_started", "arm": "centralised"}], "finished"),
        ([*LOG, {"kind": "run_finished"}, PLAN, {"kind": "run_failed", "reason": "x"}], "failed: x"),
    ],
)
def test_how_a_run_stands(log, expected):
    assert report.status(view(log)) == expected


def test_a_large_gap_names_a_method_without_it():
    page = text_of(report.render(view([*LOG, finished(0, gap=0.5)])))
    assert "It passed 10.0 % in 1 of the rounds" in page
    assert "aggregation.method = 'rolora' has none" in page
    assert "It passed" not in text_of(report.render(view([*LOG, finished(0, gap=None)])))


def test_the_gap_of_every_module_is_told_for_each_round_and_the_largest_last_one_first():
    log = [*LOG[:-2], finished(0, up=0.5, down=0.125), finished(1, up=0.0625, down=0.25)]
    page = text_of(report.render(view(log)))
    assert "The gap of each module module round 1 round 2 down 12.5 % 25.0 % up 50.0 % 6.2 %" in page
    assert "earlier rounds" not in page
    assert "The gap of each module" not in report.render(view([*LOG[:-2], finished(0, up=0.0)]))  # the controls
    assert "The gap of each module" not in report.render(view(LOG))
    many = [finished(number, up=0.5) for number in range(15)]
    assert "3 earlier rounds are in events.jsonl" in text_of(report.render(view([PLAN, *many])))


def test_what_evaluations_bring_down_is_told_beside_the_rounds_own_bytes():
    log = [*LOG[:-1], {**evaluated(1, 4.0, north=4.5, south=3.5), "bytes_down": 16000, "bytes_up": 300}]
    assert "8.0 kB 4.0 kB 16.0 kB 1.2 s" in text_of(report.render(view(log)))
    assert "8.0 kB 4.0 kB - 1.2 s" in text_of(report.render(view(LOG)))  # a log from before it was counted


def test_how_evenly_sites_fare_is_told_for_each_round():
    log = [*LOG, finished(1), evaluated(2, 3.0, north=2.0, south=4.0)]
    page = text_of(report.render(view(log)))
    assert "1 4.000 north 4.500 4.000 1.000 2.500 3.500" in page
    assert "2 3.000 south 4.000 3.000 2.000 - -" in page
    alone = text_of(report.render(view([*LOG[:-1], evaluated(1, 4.0, north=4.0)])))
    assert "1 4.000 - - - 2.500 3.500" in alone


def test_a_resumed_round_is_shown_once_with_its_last_figures():
    log = [*LOG, PLAN, evaluated(1, 3.75, north=4.125, south=3.5), finished(0, gap=0.5)]
    page = text_of(report.render(view(log)))
    assert "3.750" in page
    assert "4.000" not in page
    assert "50.0 %" in page
    assert "25.0 %" not in page


def test_curves_lie_within_the_picture():
    log = [evaluated(number, 6.0 / (number + 1), north=7.0, south=1.0) for number in range(30)]
    drawn = report.chart(view(log).evaluated)
    points = [tuple(map(float, point.split(","))) for line in drawn.lines for point in line.points.split()]
    assert all(0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT for x, y in points)
    assert [line.name for line in drawn.lines] == ["north", "south", "all sites"]
    assert len(drawn.x_ticks) <= 11


def test_a_lower_loss_is_drawn_lower():
    drawn = report.chart(view([evaluated(0, 6.0, north=6.0), evaluated(1, 2.0, north=2.0)]).evaluated)
    (first, second) = [float(point.split(",")[1]) for point in drawn.lines[0].points.split()]
    assert first < second  # SVG counts from the top


def test_a_single_flat_evaluation_is_drawn():
    assert report.chart(view([evaluated(0, 3.0, north=3.0)]).evaluated).lines


def test_many_sites_share_one_colour():
    few = report.chart(view([evaluated(0, 3.0, **{f"s{k}": 3.0 for k in range(7)})]).evaluated)
    many = report.chart(view([evaluated(0, 3.0, **{f"s{k}": 3.0 for k in range(8)})]).evaluated)
    assert len({line.colour for line in few.lines}) == 8
    assert len({line.colour for line in many.lines}) == 2


def test_a_report_is_written_beside_the_events(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for event in LOG:
        log.append(whole(event))
    page = report.write(tmp_path)
    assert page.name == "report.html"
    assert page.read_text() == report.render(view(events.read(log.path)), is_live=False)


def test_a_folder_without_events_has_no_report(tmp_path):
    with pytest.raises(DataError):
        report.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_status_tells_the_last_figures(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for event in [*LOG, evaluated(2, 3.0, ["south"], north=3.0, south=3.5)]:
        log.append(whole(event))
    found = status.read(tmp_path)
    assert (found["held_out_loss"], found["stale"], found["finished_rounds"]) == (3.0, ["south"], [])
    assert status.render(found).row_count == 8
    assert found["states"] == {"training": ["north", "south"]}
    assert found["fairness"]["loss"]["worst_site"] == "south"


def test_status_tells_tasks_and_sites_that_got_worse(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    worse = {**evaluated(2, 3.0, north=3.0, south=3.5), "worse_than_base": ["south"]}
    worse["sites"]["south"]["change"] = 0.5
    for event in [*LOG, measured("base", {"notes.f1": 0.25}), worse, measured("final", {"notes.f1": 0.5}, GAINS)]:
        log.append(whole(event))
    found = status.read(tmp_path)
    assert found["in_words"]["worse than base"] == ["south +0.500"]
    assert list(found["in_words"])[-1] == "tasks, final"
    assert found["measured"]["final"]["notes.f1"]["value"] == 0.5


GAINS = {"base": {"notes.f1": {"mean": 0.25, "low": 0.125, "high": 0.375}}, "prompt-only": {}}


def test_tasks_stand_side_by_side_and_against_the_base():
    between = [measured(f"round-{number:05d}", {"notes.f1": 0.3}) for number in range(1, 9)]
    first = measured("base", {"notes.f1": 0.25})
    page = text_of(report.render(view([*LOG, first, *between, measured("final", {"notes.f1": 0.5}, GAINS)])))
    assert "figure rows base round-00004" in page
    assert "3 earlier stages" in page
    assert "final over base over prompt-only notes.f1 +0.250 [+0.125, +0.375] better -" in page
    assert "coordinator's tasks" not in text_of(report.render(view(LOG)))  # control
    hostile = measured("final", {f"notes.{HOSTILE}": 0.5})
    assert HOSTILE not in report.render(view([*LOG, hostile]))


def test_sites_that_got_worse_are_named():
    worse = {**evaluated(2, 3.0, north=3.0, south=3.5), "worse_than_base": ["south"]}
    worse["sites"]["south"]["change"] = 0.5
    assert "Worse than the base on their own rows: south +0.500" in text_of(report.render(view([*LOG, worse])))
    assert "Worse than the base" not in text_of(report.render(view(LOG)))  # control


def test_rows_that_are_held_out_and_trained_on_stand_beside_the_figures():
    compared = {"kind": "compared", "comparison": {"base": {"held_out_loss": 6.0, "exact_match": None}}}
    found = {"kind": "overlap", "num_held_out": 30, "num_exact": 2, "num_near": 1}
    page = report.render(view([*LOG, compared, found]))
    told = "3 of 30 held-out rows stand in rows that are trained on (2 word for word, 1 nearly): figures are too good."
    assert text_of(page).count(told) == 2  # beside the comparison and the sites' losses
    assert page.count('<p class="warn">Held-out rows') == 2
    clean = report.render(view([*LOG, compared, {**found, "num_exact": 0, "num_near": 0}]))
    assert "none of 30 held-out rows stands" in text_of(clean)
    assert '<p class="warn">Held-out rows' not in clean
    assert "Held-out rows:" not in text_of(report.render(view(LOG)))  # at real sites nobody can tell


def test_a_site_that_approved_later_is_no_trouble_and_one_that_did_not_has_its_name():
    waits = {"kind": "site_refused", "site": "node 1", "state": "waits for approval", "reason": "waits for approval"}
    page = report.render(view([PLAN, {**waits, "node": 1}, *LOG[1:]]))
    assert "What went wrong" not in page
    away = {**waits, "node": 7, "site": "node 7"}
    page = text_of(report.render(view([PLAN, away, *LOG[1:]])))  # control: node 7 never joined
    assert "What went wrong" in page
    assert "node 7 waits for approval" in " ".join(page.split())
    registered = text_of(report.render(view([PLAN, {**away, "site": "west"}, *LOG[1:]])))
    assert "west waits for approval" in " ".join(registered.split())
    refused = {**waits, "node": 1, "state": "refused by rule", "reason": "refused by rule (PolicyRefusedError)"}
    assert "south refused by rule (PolicyRefusedError)" in " ".join(
        text_of(report.render(view([*LOG, refused]))).split()
    )
