"""A run's figures for programs, from the same rows that the terminal draws."""

import re
from pathlib import Path

import pytest

from common.events import EventLog, Tail
from server.report import status
from server.report.progress import Progress
from server.view.run_view import RunView
from tests.samples.events import LOG, PLAN, evaluated, finished, joined, trained, view, whole

PAGE = Path(__file__).parents[4] / "docs" / "operations.md"
PRIVATE = {"privacy": "unit", "epsilon_planned": [4.82, 8.0], "dp_delta": 1e-6, "noise_multiplier": 0.7}
SECOND = [
    {"kind": "round_started", "round": 1, "sites": ["north", "south"]},
    trained("north", 1, 2.0),
    {**finished(1), "train_loss": 2.0},
    {**evaluated(2, 3.0, north=3.5, south=2.5), "bytes_down": 500, "bytes_up": 10, "exact_match": 0.25},
]


def test_figures_are_sums_and_last_values_of_the_rows():
    gate = {"kind": "gated", "stage": "round 2", "is_passed": True, "verdicts": [], "num_rounds": 2}
    told = status.totals(view([PLAN | PRIVATE, *LOG[1:], *SECOND, gate]))
    rounds = told.pop("rounds")
    assert told == {
        "run_sha256": "ab" * 32,
        "num_rounds": 2,
        "base_held_out_loss": 6.0,
        "held_out_loss": 3.0,
        "train_loss": 2.0,
        "gap": 0.25,
        "epsilon": 8.0,
        "dp_delta": 1e-6,
        "bytes_down": 8000 + 8000 + 500,
        "bytes_up": 4000 + 4000 + 10,
        "seconds": 2.5,
        "gate": {"stage": "round 2", "is_passed": True, "verdicts": []},
    }
    assert [row["num_rounds"] for row in rounds] == [0, 1, 2]
    assert rounds[1]["train_losses"] == {"north": 2.5, "south": 3.5}
    assert [row["epsilon"] for row in rounds] == [None, 4.82, 8.0]


def test_a_round_that_was_played_again_counts_once():
    again = [PLAN, joined("north"), *LOG[4:], *SECOND]
    told = status.totals(view([*LOG, *LOG[4:7], *again]))
    assert (told["bytes_down"], told["num_rounds"]) == (16500, 2)
    resumed = status.totals(view([*LOG, PLAN, evaluated(1, 3.5, north=3.5)]))
    assert (resumed["rounds"][1]["bytes_down"], resumed["rounds"][1]["held_out_loss"]) == (8000, 3.5)


def test_a_run_that_has_not_begun_has_no_figures():
    told = status.totals(view([]))
    assert (told["held_out_loss"], told["bytes_down"], told["gate"], told["rounds"]) == (None, 0, None, [])


def test_every_key_is_documented():
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("What `--json` prints") :]
    documented = set(re.findall(r"`(\w+)`", "".join(line for line in section.splitlines() if line.startswith("| `"))))
    told = status.totals(view([*LOG]))
    assert documented >= {*told, *told["rounds"][0]}


@pytest.fixture
def progress():
    """A run of two rounds and two sites, seen at second 100."""
    seen = Progress(RunView(), clock=lambda: 100.0)
    for event in (PLAN, joined("north"), {**joined("south"), "num_steps": 9}):
        follow(seen, {"time": 0.0, **event})
    return seen


def follow(progress: Progress, line: dict) -> None:
    """Take an event as the terminal does."""
    event = whole(line)
    progress.view.take(event)
    progress.take(event)


def test_progress_counts_steps_and_estimates_what_is_left(progress):
    assert (progress.title(), progress.share(), progress.left_s()) == ("round 1/2", 0.0, None)
    follow(progress, {"kind": "round_started", "round": 0, "sites": ["north", "south"], "time": 40.0})
    follow(progress, {"kind": "site_step", "site": "south", "step": 6, "num_steps": 9, "time": 100.0})
    assert progress.share() == pytest.approx(6 / 24)
    assert progress.left_s() == pytest.approx(60 * 3)
    assert progress.lines(80)[1] == "training: 0 of 2 sites done; at work: south step 6/9"
    follow(progress, {"kind": "site_trained", "site": "south", "time": 100.0})
    assert progress.share() == pytest.approx(9 / 24)
    assert progress.lines(80)[1] == "training: 1 of 2 sites done; at work: north"
    follow(progress, {"kind": "round_finished", "round": 0, "epsilon": 2.5, "time": 100.0})
    follow(progress, {**evaluated(1, 4.0, north=4.0), "time": 100.0})
    assert progress.lines(80)[0] == "50 %  1:00 left  held-out 4.000  epsilon 2.50"
    follow(progress, {"kind": "evaluation_started", "sites": ["north", "south"], "time": 100.0})
    follow(progress, {"kind": "site_evaluated", "site": "south", "time": 100.0})
    assert progress.lines(80)[1] == "evaluating: 1 of 2 sites done; at work: north"


def test_progress_of_a_resumed_run_begins_at_its_first_round(progress):
    follow(progress, {**PLAN, "first_round": 1, "time": 0.0})
    follow(progress, {"kind": "round_started", "round": 1, "sites": ["north"], "time": 90.0})
    follow(progress, {"kind": "site_step", "site": "north", "step": 1, "num_steps": 2, "time": 100.0})
    assert (progress.title(), progress.share(), progress.left_s()) == ("round 2/2", 0.5, 10.0)


@pytest.mark.parametrize("count", [2, 9, 300])
def test_progress_is_never_wider_than_the_terminal(progress, count):
    sites = [f"general-hospital-{number}" for number in range(count)]
    follow(progress, {"kind": "round_started", "round": 0, "sites": sites, "time": 40.0})
    assert max(map(len, progress.lines(60))) <= 60
    assert f"of {count} sites done" in progress.lines(60)[1]


def test_a_view_that_follows_a_growing_log_is_that_of_the_whole(tmp_path):
    log, followed = EventLog(tmp_path / "events.jsonl"), RunView()
    tail = Tail(log.path)
    for line in [PLAN | PRIVATE, *LOG[1:], *SECOND, {"kind": "run_finished"}]:
        log.append(whole(line))
        for event in tail.look():
            followed.take(event)
    assert (followed, tail.num_starts) == (RunView.read(log.path), 1)
    assert (sorted(followed.rows), followed.finished is not None) == ([0, 1, 2], True)
    assert RunView.of(LOG[:0]) != followed  # control
