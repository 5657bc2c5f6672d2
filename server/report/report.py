"""A run as one self-contained page, drawn from its events; no script, nothing fetched."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from common import events, storage
from common.data import overlap
from common.event_kinds import Evaluated, RoundFinished
from server.folder import begun, lock
from server.report import symptoms, worth
from server.view import export, figures, gate, polish
from server.view.run_view import RunView, short

REPORT_FILE: Final = "report.html"
EXAMPLES_FILE: Final = "examples.json"
TEMPLATE: Final = Path(__file__).with_name("report.html.j2")
WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 14, 52  # of the chart's picture around its curves
MAX_COLUMNS: Final = 3  # sites with a column in the table of rounds; more have a table of their own
NUM_TICKS: Final = 6
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")  # Okabe and Ito
MAX_COLOURED = 7
MAX_ROUNDS: Final = 12  # in the table of gaps
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
    log, damaged = events.read_damaged(folder / events.FILE)
    page = render(RunView.of(log), is_live=lock.is_live(folder), num_damaged=len(damaged), shown=_examples(folder))
    storage.write_atomic(folder / REPORT_FILE, page.encode())
    return folder / REPORT_FILE


def render(
    view: RunView,
    *,
    is_live: bool = True,
    num_damaged: int = 0,
    shown: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A page; names and reasons come from sites, answers from a model, so all text is escaped.

    Args:
        view: The run.
        is_live: Whether a process is at work on it.
        num_damaged: Lines of the events that cannot be read.
        shown: Answers before and after, to prompts that may be shown (`server.evaluate.examples`).
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rounds = [view.rounds[number] for number in sorted(view.rounds)]
    arms = view.compared.comparison if view.compared else {}
    longest = max((arm.held_out_loss for arm in arms.values()), default=0.0) or 1.0
    last, base = view.at_sites, view.evaluated.get(0)
    sites = sorted({site for trained in view.trained.values() for site in trained})
    return template.render(
        view=view,
        plan=view.plan,
        status=status(view, is_live=is_live),
        rounds=rounds,
        after={number - 1: event for number, event in view.evaluated.items()},
        trained={
            number: {site: event.train_loss for site, event in found.items()} for number, found in view.trained.items()
        },
        gap_table=gap_table(rounds),
        spent=rounds[-1] if rounds and rounds[-1].epsilon is not None else None,
        num_damaged=num_damaged,
        num_large_gaps=sum((event.gap or 0.0) > view.plan.gap_warning for event in rounds) if view.plan else 0,
        sites=sites if len(sites) <= MAX_COLUMNS else [],
        many_sites=sites if len(sites) > MAX_COLUMNS else [],
        facts=list(facts(view)),
        worth=worth.verdict(view) if last or arms or view.measured else None,
        change=worth.change_at_sites(base, last) if base and last else None,
        derived=polish.derived_in_words(view.derived),
        later=polish.later(view),
        examples=shown,
        percent_change=figures.signed_percent,
        chart=chart(view.evaluated) if view.evaluated else None,
        comparison=[(name, arm, 100 * arm.held_out_loss / longest) for name, arm in arms.items()],
        last=last,
        overlap=overlap.sentence(vars(view.overlap)) if view.overlap else "",
        is_overlapping=bool(view.overlap and overlap.num_same(vars(view.overlap))),
        stage_overlaps=polish.overlaps,
        task_overlaps=view.tasks_overlap.reasons if view.tasks_overlap else [],
        last_stage=figures.stage_at_sites(last) if last else "",
        evenness=figures.evenness(last) if last else "",
        worse=figures.worse(last) if last else "",
        precisions=figures.precisions(view.base_noise, base, view.last_evaluated),
        quantization=figures.quantization,
        measured=figures.table(view.measured),
        polish=polish.stages(view),
        polish_private=polish.PRIVATE,
        polish_own=polish.OWN_DATA,
        stage_kind=polish.kind,
        gated=[*gate.summary(list(view.gated.values()), view.stopped), *gate.later(view.gated_later)],
        exported=export.summary(view.exported),
        symptoms=symptoms.symptoms(view),
        percent=figures.percent,
        size=figures.size,
    )


def status(view: RunView, *, is_live: bool = True, go_on: str = begun.GO_ON) -> str:
    """A run's status: `finished`, `failed: why`, `running`, or `interrupted`.

    Args:
        view: The run.
        is_live: Whether a process is at work on it: one that was killed leaves no event of its end.
        go_on: What to do about one that was interrupted.

    Example:
        >>> status(RunView())
        'not started'
    """
    if view.last is None:
        return "not started"
    if view.finished:
        return "finished"
    if view.failed and view.failed.error != events.INTERRUPTED:
        return f"failed: {view.failed.reason}"
    planned = view.plan.num_rounds if view.plan else "?"
    stage = f", polish stage {view.stage.number} of {view.stage.num_stages}" if view.stage else ""
    progress = f"{view.num_released} of {planned} rounds{stage}"
    if is_live and not view.failed:
        return f"running, {progress}"
    return f"interrupted, {progress}; {PLAY_ON if view.derived else go_on}"


def facts(view: RunView) -> Iterator[tuple[str, str]]:
    """When, with what and how the newest try of a run was done, as names and values."""
    plan, first = view.plan, view.first
    if plan is None or first is None:
        return
    yield "started", figures.moment(first.time)
    if view.derived:
        yield "later stages started", figures.moment(view.derived.time)
    yield "ended", figures.moment(view.end.time) if view.end else "not yet"
    if view.end:
        tries = f", in {view.num_tries} tries, pauses between them included" if view.num_tries > 1 else ""
        took = figures.duration(view.end.time - (view.derived or first).time)
        yield ("duration of the later stages", took) if view.derived else ("duration", f"{took}{tries}")
    yield "seed", str(plan.seed)
    yield "adapter", plan.adapter
    yield "learning rate", f"{plan.learning_rate:g}"
    yield "method", f"{plan.method}, {plan.num_rounds} rounds, objective {plan.objective}"
    promise = "none"
    if plan.privacy != "none":
        promise = f"for every {plan.privacy}: epsilon {plan.epsilon_planned[-1]:.3f} at delta {plan.dp_delta:g}"
    yield "privacy", promise
    yield "device of the coordinator", plan.device
    yield "versions", ", ".join(f"{package} {version}" for package, version in plan.versions.items())
    if view.derived:
        versions = ", ".join(f"{package} {version}" for package, version in view.derived.versions.items())
        yield "versions of the later stages", versions


def gap_table(rounds: Sequence[RoundFinished]) -> dict[str, Any] | None:
    """Aggregation gaps of every module in the newest rounds, the module with the largest last one first; None without.

    Args:
        rounds: Ascending.
    """
    measured = [event for event in rounds if event.gap_modules]
    shown = measured[-MAX_ROUNDS:]
    if not any(any(event.gap_modules.values()) for event in shown):
        return None
    newest = shown[-1].gap_modules
    names = sorted(newest, key=lambda name: (-newest[name], name))
    return {
        "rounds": [event.round + 1 for event in shown],
        "num_hidden": len(measured) - len(shown),
        "largest_error": max(shown[-1].gap_module_errors.values(), default=0.0),
        "modules": [(short(name), [event.gap_modules.get(name) for event in shown]) for name in names],
    }


def chart(evaluated: Mapping[int, Evaluated]) -> Chart:
    """Curves of the held-out loss by round: all sites in black, each site in a colour (grey beyond seven)."""
    log = [evaluated[number] for number in sorted(evaluated)]
    sites = sorted({site for event in log for site in event.sites})
    curves = [
        (site, [(event.num_rounds, event.sites[site].loss) for event in log if site in event.sites]) for site in sites
    ]
    curves.append(("all sites", [(event.num_rounds, event.loss) for event in log]))
    values = [loss for _, points in curves for _, loss in points]
    last = max(log[-1].num_rounds, 1)
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
        examples = json.loads((folder / EXAMPLES_FILE).read_bytes())["examples"]
        return [{name: str(example[name]) for name in ("prompt", "base", "adapter")} for example in examples]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _colour(index: int, num_sites: int) -> str:
    """Of a curve; the last one is the mean."""
    if index == num_sites:
        return "currentColor"
    return COLOURS[index] if num_sites <= MAX_COLOURED else "#9a9a9a"


def _line_width(name: str) -> float:
    """The mean stands out."""
    return 3.0 if name == "all sites" else 1.5
