"""Whether a run was worth it, in one sentence: from its gate, from intervals, and from what was compared.

Nothing is called better because it is larger: a figure speaks where its interval of 95 % does not hold 0. What no
interval tells is said to be open, and a run of which nothing else can be said is undecided.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from common.errors import GateRefused
from common.event_kinds import Event
from server.evaluate.figures import intervals
from server.evaluate.figures.intervals import Estimate
from server.view import figures, gate, polish

MIN_ROWS: Final = 30  # of fewer, the bootstrap's interval is too narrow
MAX_NAMED: Final = 4  # figures of tasks that are named; more are counted
GUARDING: Final = ("probe", "memorisation", "pii")  # kinds of tasks that guard what was there; no gain is a use
Answer = Literal["yes", "no", "partly", "undecided"]


@dataclass
class Evidence:
    """What speaks for an adapter, against it, and for neither; and whether an interval stands behind the first."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    is_shown: bool = False


@dataclass(frozen=True)
class Worth:
    """The verdict.

    Attributes:
        answer: In a word.
        sentence: With the figures behind it.
    """

    answer: Answer
    sentence: str


def verdict(log: Sequence[Event]) -> Worth:
    """Say whether the adapter that a run exports is better than its base, and than what each site had alone."""
    starts = [place for place, event in enumerate(log) if event["kind"] in ("run_started", "derived")]
    latest = log[starts[-1] :] if starts else log
    ended = next((event for event in reversed(latest) if event["kind"] in ("run_finished", "run_failed")), None)
    if ended is None:
        return Worth("undecided", "Undecided: the run has not come to its end.")
    if ended["kind"] == "run_failed":
        is_refused = ended.get("error") == GateRefused.__name__
        why = "the gate refuses all that was trained" if is_refused else "the run failed before its end"
        return Worth("no" if is_refused else "undecided", f"{'No' if is_refused else 'Undecided'}: {why}.")
    found, stage = Evidence(), ended.get("stage", "final")
    _sites(found, log, stage, num_rounds=ended.get("num_rounds"))
    _tasks(found, log, stage)
    _arms(found, log)
    passed = [event for event in gate.of_log(log) if event["stage"] == stage and event["is_passed"]]
    return _sentence(found, is_passed=bool(passed))


def change_at_sites(before: Event, after: Event) -> Estimate | None:
    """How far held-out loss moved, as a share of the base's, at the mean site, with Student's interval over sites.

    Each site counts the same. None for fewer than two sites that told both.
    """
    sites = [site for site in after["sites"] if site in before["sites"] and site not in after["stale"]]
    pairs = [(before["sites"][site]["loss"], after["sites"][site]["loss"]) for site in sites]
    shares = [late / early - 1 for early, late in pairs if early > 0]
    return intervals.mean_of_few(shares) if len(shares) > 1 else None


def _sites(found: Evidence, log: Sequence[Event], stage: str, *, num_rounds: int | None) -> None:
    """The sites' held-out loss against the base's."""
    asked = {event["num_rounds"]: event for event in log if event["kind"] == "evaluated"}
    last = asked.get(num_rounds if num_rounds is not None else max(asked, default=0))
    before, after, is_before_polish = asked.get(0), last, False
    if stage.startswith(polish.LABEL):
        scored = {polish.label(event["number"], event["stage"]): event for event in polish.at_sites(log).values()}
        after, is_before_polish = scored.get(stage, last), stage not in scored
    if before is None or after is None or after is before:
        found.open.append("the sites' loss, as they did not score both the base and this adapter")
        return
    change = change_at_sites(before, after)
    if change is None:
        share = after["loss"] / before["loss"] - 1 if before["loss"] else 0.0
        found.open.append(f"held-out loss {_moved(share)}, and one site gives no interval")
        return
    what = (
        f"held-out loss {_moved(change.value)} at the mean site (95 % interval {percent(change.low)} to "
        f"{percent(change.high)}, over {len(after['sites'])} sites)"
    )
    if is_before_polish:
        found.open.append(f"what polish did to the sites' loss, as they did not score it; before it {what}")
        return
    side = found.open if change.low <= 0 <= change.high else found.good if change.high < 0 else found.bad
    side.append(what)
    found.is_shown |= side is found.good
    if after["worse_than_base"]:
        found.bad.append(f"worse than the base at {figures.worse(after)} nats")


def _tasks(found: Evidence, log: Sequence[Event], stage: str) -> None:
    """The coordinator's tasks against the base, by the paired bootstrap."""
    measured: Mapping[str, Any] = figures.stages(log).get(stage, {})
    gains = measured.get("gains", {}).get(figures.BASE, {})
    told_of: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for name, gain in gains.items():
        figure = measured["figures"][name]
        how = figures.verdict(figure, gain)
        if figure["num_rows"] < MIN_ROWS:
            found.open.append(f"{name} {figures.rise(gain)}, of {figure['num_rows']} rows")
            continue
        if how != "better" or figure["kind"] not in GUARDING:
            told_of[how].append(f"{name} {figures.rise(gain)}")
    found.is_shown |= bool(told_of["better"])
    for how, side in (("better", found.good), ("worse", found.bad), ("unclear", found.open)):
        if names := told_of[how]:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            side.append(f"{f'{how}: ' if side is not found.open else ''}{', '.join(names[:MAX_NAMED])}{more}")


def _arms(found: Evidence, log: Sequence[Event]) -> None:
    """What each site had alone, where it was compared."""
    compared = [event["comparison"] for event in log if event["kind"] == "compared"]
    arms: Mapping[str, Mapping[str, Any]] = compared[-1] if compared else {}
    alone = {name: arm for name, arm in arms.items() if name.startswith("site-")}
    if "federated" not in arms or not alone:
        return
    own = arms["federated"]["held_out_loss"]
    better = [f"{name} {arm['held_out_loss']:.3f}" for name, arm in alone.items() if arm["held_out_loss"] <= own]
    if better:
        found.bad.append(f"not better than what a site trained alone: {own:.3f} against {', '.join(better)}")
    else:
        least = min(arm["held_out_loss"] for arm in alone.values())
        found.good.append(f"better than every site alone ({own:.3f} against {least:.3f} at best)")


def _sentence(found: Evidence, *, is_passed: bool) -> Worth:
    """The verdict; that a figure is below another one decides nothing without an interval beside it."""
    told_of = "; ".join(_parts(found, is_passed=is_passed))
    answers: tuple[Answer, Answer] = ("no", "partly") if found.bad else ("undecided", "yes")
    answer = answers[found.is_shown]
    return Worth(answer, f"{answer.capitalize()}: {told_of}.")


def _parts(found: Evidence, *, is_passed: bool) -> Iterator[str]:
    """The figures, what speaks against first where something does."""
    yield from found.bad
    yield from found.good
    if is_passed:
        yield "the gate passed"
    yield from (f"unclear: {one}" for one in found.open)


def _moved(share: float) -> str:
    """A change of a loss in words.

    Example:
        >>> _moved(-0.12)
        'fell 12.0 %'
    """
    return f"{'fell' if share < 0 else 'rose'} {100 * abs(share):.1f} %"


def percent(share: float) -> str:
    """A change as a percentage with its sign.

    Example:
        >>> percent(-0.12)
        '-12.0 %'
    """
    return f"{100 * share:+.1f} %"
