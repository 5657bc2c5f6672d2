"""A run as one self-contained page, drawn from its events; no script, nothing fetched."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from common import events, storage
from common.data import overlap
from common.event_kinds import Event
from common.frame import site_states
from server.folder import begun, lock
from server.report import symptoms, worth
from server.report.terminal import percent, size
from server.view import by_precision, export, facts, figures, gaps, gate, polish

REPORT_FILE: Final = "report.html"
EXAMPLES_FILE: Final = "examples.json"
TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 14, 52  # of the chart's picture around its curves
MAX_COLUMNS: Final = 3  # sites with a column in the table of rounds; more have a table of their own
NUM_TICKS: Final = 6
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")  # Okabe and Ito
MAX_COLOURED = 7
PLAY_ON: Final = "go on with silotune-server polish and this folder"


@dataclass(frozen=True)
class Line:
    """One curve of the chart: name, colour, and points as SVG writes them."""

    name: str
    colour: str
    points: str
    width: float


@dataclass(frozen=True)
class Chart:
    """Held-out loss by round: curves, and ticks as (position, label)."""

    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def write(folder: Path) -> Path:
    """Draw the report of a run folder; of one that says it runs, whether a process is at work on it.

    Returns:
        The page.

    Raises:
        DataError: The folder has no events.
        StorageError: The page cannot be written.
    """
    page = folder / REPORT_FILE
    log, damaged = events.read_damaged(folder / events.FILE)
    shown = _examples(folder)
    drawn = render(log, is_live=lock.is_live(folder), num_damaged=len(damaged), shown=shown)
    storage.write_atomic(page, drawn.encode())
    return page


def render(
    log: Sequence[Event],
    *,
    is_live: bool = True,
    num_damaged: int = 0,
    shown: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Events to a page; names and reasons come from sites, answers from a model, so all text is escaped.

    Args:
        log: The run's events.
        is_live: Whether a process is at work on it.
        num_damaged: Lines of the events that cannot be read.
        shown: Answers before and after, to prompts that may be shown (`server.evaluate.examples`).
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    comparison = _bars(_of(log, "compared"))
    plans, evaluated, rounds = _of(log, "run_started"), _of(log, "evaluated"), _rounds(log)
    last, derived = figures.last_at_sites(log), polish.derived(log)
    sites = sorted({event["site"] for event in _of(log, "site_trained")})
    return template.render(
        plan=plans[-1] if plans else None,
        status=status(log, is_live=is_live),
        joined=list({event["site"]: event for event in _of(log, "site_joined")}.values()),
        states=states(log),
        rounds=rounds,
        gap_table=gaps.table(rounds),
        spent=rounds[-1] if rounds and "epsilon" in rounds[-1] else None,
        num_damaged=num_damaged,
        num_large_gaps=sum((row["gap"] or 0.0) > plans[-1]["gap_warning"] for row in rounds if plans),
        sites=sites if len(sites) <= MAX_COLUMNS else [],
        many_sites=sites if len(sites) > MAX_COLUMNS else [],
        facts=facts.of_run(log),
        worth=worth.verdict(log) if last or comparison or figures.stages(log) else None,
        change=worth.change_at_sites(base, last) if last and (base := _base(evaluated)) else None,
        derived=polish.derived_in_words(derived) if derived else [],
        later=polish.later(log),
        examples=shown,
        percent_change=worth.percent,
        chart=chart(evaluated) if evaluated else None,
        comparison=comparison,
        last=last,
        overlap=overlap.sentence(found[-1]) if (found := _of(log, "overlap")) else "",
        is_overlapping=bool(found and overlap.num_same(found[-1])),
        stage_overlaps=polish.overlaps,
        task_overlaps=polish.task_overlaps(log),
        last_stage=figures.stage_at_sites(last) if last else "",
        evenness=figures.evenness(last) if last else "",
        worse=figures.worse(last) if last else "",
        precisions=by_precision.table(log),
        quantization=by_precision.quantization,
        measured=figures.table(log),
        polish=polish.stages(log),
        is_asked=bool(polish.at_sites(log)),
        polish_private=polish.PRIVATE,
        polish_own=polish.OWN_DATA,
        stage_kind=polish.kind,
        gated=[*gate.summary(log), *gate.later(log)],
        exported=export.summary(log),
        symptoms=symptoms.symptoms(log),
        troubles=[*_of(log, "site_failed"), *_refusals(log), *_flagged(log)],
        percent=percent,
        size=size,
    )


def status(log: Sequence[Event], *, is_live: bool = True, go_on: str = begun.GO_ON) -> str:
    """How a run stands: `finished`, `failed: why`, `running`, or `interrupted`.

    Args:
        log: Its events.
        is_live: Whether a process is at work on it: one that was killed leaves no event of its end.
        go_on: What to do about one that was interrupted.

    Example:
        >>> status([{"kind": "run_started", "num_rounds": 3}])
        'running, 0 of 3 rounds'
        >>> status([{"kind": "run_started", "num_rounds": 3}], is_live=False)
        'interrupted, 0 of 3 rounds; go on with the command that began it, --output its folder and --resume'
    """
    if not log:
        return "not started"
    starts = [index for index, event in enumerate(log) if event["kind"] == "run_started"]
    latest = log[starts[-1] :] if starts else log
    if _of(latest, "run_finished"):
        return "finished"
    failed = _of(latest, "run_failed")
    if failed and failed[-1].get("error") != events.INTERRUPTED:
        return f"failed: {failed[-1]['reason']}"
    done = max((event["round"] + 1 for event in _of(log, "round_finished")), default=0)
    planned = latest[0]["num_rounds"] if starts else "?"
    stages = _of(latest, "polish_started")
    stage = f", polish stage {stages[-1]['number']} of {stages[-1]['num_stages']}" if stages else ""
    go_on = PLAY_ON if _of(latest, "derived") else go_on
    if is_live and not failed:
        return f"running, {done} of {planned} rounds{stage}"
    return f"interrupted, {done} of {planned} rounds{stage}; {go_on}"


def states(log: Sequence[Event]) -> dict[str, list[str]]:
    """How each site stood last in the newest try: state to sites, in the order of their names.

    Example:
        >>> joined = {"kind": "site_joined", "node": 1, "site": "north"}
        >>> waits = {"kind": "site_refused", "node": 2, "state": "waits for approval", "reason": ""}
        >>> states([joined, waits])
        {'approved': ['north'], 'waits for approval': ['node 2']}
        >>> states([joined, {"kind": "round_started", "sites": ["north"]}, {"kind": "run_finished"}])
        {'finished': ['north']}
    """
    starts = [index for index, event in enumerate(log) if event["kind"] == "run_started"]
    names = {event["node"]: event["site"] for event in _of(log, "site_joined") if "node" in event}
    found: dict[str, str] = {}
    for event in log[starts[-1] :] if starts else log:
        kind = event["kind"]
        if kind == "site_refused":
            found[names.get(event["node"], _name(event))] = event.get("state", site_states.FAILED)
        elif kind == "site_joined":
            found[event["site"]] = site_states.APPROVED
        elif kind in ("site_trained", "site_skipped", "site_failed"):
            known = {"site_trained": site_states.TRAINING, "site_skipped": site_states.AWAY}
            found[event["site"]] = known.get(kind) or event.get("state", site_states.FAILED)
        elif kind == "round_started":
            found |= dict.fromkeys(event["sites"], site_states.TRAINING)
        elif kind == "run_finished":
            part = (site_states.APPROVED, site_states.TRAINING)
            found = {site: site_states.FINISHED if state in part else state for site, state in found.items()}
    return {state: sorted(site for site, own in found.items() if own == state) for state in sorted({*found.values()})}


def chart(evaluated: Sequence[Event]) -> Chart:
    """Curves of the held-out loss: all sites in black, each site in a colour (grey beyond seven)."""
    by_round = {event["num_rounds"]: event for event in evaluated}
    log = [by_round[number] for number in sorted(by_round)]
    sites = sorted({site for event in log for site in event["sites"]})
    curves = [
        (site, [(event["num_rounds"], event["sites"][site]["loss"]) for event in log if site in event["sites"]])
        for site in sites
    ]
    curves.append(("all sites", [(event["num_rounds"], event["loss"]) for event in log]))
    values = [loss for _, points in curves for _, loss in points]
    last = max(log[-1]["num_rounds"], 1)
    ticks = nice_ticks(min(values), max(values), most=NUM_TICKS)
    low, high = ticks[0], ticks[-1]

    def place(number: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * number / last
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1)

    lines = [
        Line(name, _colour(index, len(sites)), " ".join("{},{}".format(*place(*p)) for p in points), _line_width(name))
        for index, (name, points) in enumerate(curves)
    ]
    step = max(1, round(nice_step(last, most=10)))
    x_ticks = [(place(number, low)[0], str(number)) for number in range(0, last + 1, step)]
    num_digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    y_ticks = [(place(0, value)[1], f"{value:.{num_digits}f}") for value in ticks]
    return Chart(lines, x_ticks, y_ticks)


def nice_step(span: float, *, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that goes into a span at most so often.

    Example:
        >>> nice_step(30, most=10), nice_step(0.9, most=6)
        (5.0, 0.2)
    """
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(times * power for times in (1, 2, 5, 10, 20) if span / (times * power) <= most * (1 + 1e-9))


def nice_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Ticks at whole steps of `nice_step`, from below the lowest value to above the highest; two at least.

    Example:
        >>> nice_ticks(2.31, 4.07, most=6)
        [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    """
    step = nice_step(max(high - low, abs(high) * 1e-3, 1e-6), most=most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _examples(folder: Path) -> list[Mapping[str, Any]]:
    """The answers in a run's folder (`server.evaluate.examples`); none where there are none, or they cannot be read."""
    try:
        found = json.loads((folder / EXAMPLES_FILE).read_bytes())["examples"]
        return [{name: str(one[name]) for name in ("prompt", "base", "adapter")} for one in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _base(evaluated: Sequence[Event]) -> Event | None:
    """What the sites said of the base."""
    return next((event for event in reversed(evaluated) if event["num_rounds"] == 0), None)


def _rounds(log: Sequence[Event]) -> list[dict[str, Any]]:
    """One entry a round: its figures, its sites' training losses, and held-out loss and evenness after it."""
    losses = {event["num_rounds"]: event for event in _of(log, "evaluated")}
    rounds = []
    for event in {event["round"]: event for event in _of(log, "round_finished")}.values():
        trained = {t["site"]: t["train_loss"] for t in _of(log, "site_trained") if t["round"] == event["round"]}
        after = losses.get(event["round"] + 1)
        even = after["fairness"]["loss"] if after and len(after["sites"]) > 1 else None
        rounds.append({**event, "trained": trained, "loss": after["loss"] if after else None, "even": even})
        rounds[-1]["evaluation_down"] = after.get("bytes_down") if after else None
    return rounds


def _bars(compared: Sequence[Event]) -> list[dict[str, Any]]:
    """The comparison's arms, with the length of each bar in percent."""
    arms = compared[-1]["comparison"] if compared else {}
    worst = max((arm["held_out_loss"] for arm in arms.values()), default=0.0) or 1.0
    return [{"name": name, **arm, "length": 100 * arm["held_out_loss"] / worst} for name, arm in arms.items()]


def _of(log: Sequence[Event], kind: str) -> list[Event]:
    """Events of one kind."""
    return [event for event in log if event["kind"] == kind]


def _refusals(log: Sequence[Event]) -> list[dict[str, Any]]:
    """Refusals under the name of their site, once that is known; a site that took part later was no trouble."""
    names = {event["node"]: event["site"] for event in _of(log, "site_joined")}
    refused = [{**one, "site": names.get(one["node"], _name(one))} for one in _of(log, "site_refused")]
    return [one for one in refused if one.get("state") not in site_states.PENDING or one["node"] not in names]


def _name(event: Event) -> str:
    """Whom an event of a node is about."""
    return str(event.get("site", f"node {event['node']}"))


def _flagged(log: Sequence[Event]) -> list[dict[str, Any]]:
    """What screening found, as troubles of the sites."""
    troubles = []
    for event in _of(log, "screened"):
        for site, seen in event["sites"].items():
            did = "left out" if seen["is_left_out"] else "kept"
            reason = f"screening, round {event['round'] + 1}, {did}: {'; '.join(seen['reasons'])}"
            troubles += [{"kind": "site_failed", "site": site, "reason": reason}] if seen["reasons"] else []
    return troubles


def _colour(index: int, num_sites: int) -> str:
    """Of a curve; the last one is the mean."""
    if index == num_sites:
        return "currentColor"
    return COLOURS[index] if num_sites <= MAX_COLOURED else "#9a9a9a"


def _line_width(name: str) -> float:
    """The mean stands out."""
    return 3.0 if name == "all sites" else 1.5
