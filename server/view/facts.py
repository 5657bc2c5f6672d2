"""When, with what and how a run was done, as names and values for its report; from its events alone."""

import datetime
from collections.abc import Iterator, Sequence

from common.event_kinds import Event


def of_run(log: Sequence[Event]) -> list[tuple[str, str]]:
    """Facts of a run, those of its last start; what an older run has not told is left out."""
    starts = [event for event in log if event["kind"] == "run_started"]
    return list(_facts(log, starts)) if starts else []


def _facts(log: Sequence[Event], starts: Sequence[Event]) -> Iterator[tuple[str, str]]:
    """See `of_run`."""
    plan, first = starts[-1], starts[0]
    yield from _times(log, first, num_starts=len(starts))
    for name, key in (("seed", "seed"), ("adapter", "adapter"), ("learning rate", "learning_rate")):
        if key in plan:
            yield name, f"{plan[key]:g}" if isinstance(plan[key], float) else str(plan[key])
    method = f"{plan['method']}, {plan['num_rounds']} rounds"
    yield "method", f"{method}, objective {plan['objective']}" if "objective" in plan else method
    yield "privacy", _privacy(plan)
    if "device" in plan:
        yield "device of the coordinator", plan["device"]
    for name, event in [
        ("versions", plan),
        *(("versions of the later stages", e) for e in log if e["kind"] == "derived"),
    ]:
        if "versions" in event:
            yield name, ", ".join(f"{package} {version}" for package, version in event["versions"].items())


def _times(log: Sequence[Event], first: Event, *, num_starts: int) -> Iterator[tuple[str, str]]:
    """Start, end and duration."""
    if "time" not in first:
        return
    yield "started", moment(first["time"])
    ended = [event for event in log if event["kind"] in ("run_finished", "run_failed")]
    is_over = ended and log.index(ended[-1]) > max(n for n, event in enumerate(log) if event["kind"] == "run_started")
    if added := [event for event in log if event["kind"] == "derived" and "time" in event]:
        yield "later stages started", moment(added[-1]["time"])
    yield "ended", moment(ended[-1]["time"]) if is_over else "not yet"
    if is_over:
        tries = f", in {num_starts} tries, pauses between them included" if num_starts > 1 else ""
        begun = added[-1] if added else first
        took = duration(ended[-1]["time"] - begun["time"])
        yield ("duration of the later stages", took) if added else ("duration", f"{took}{tries}")


def _privacy(plan: Event) -> str:
    """What is promised to whom, short."""
    if plan["privacy"] == "none":
        return "none"
    return f"for every {plan['privacy']}: epsilon {plan['epsilon_planned'][-1]:.3f} at delta {plan['dp_delta']:g}"


def moment(seconds: float) -> str:
    """Unix seconds as a date and time that mean the same everywhere.

    Example:
        >>> moment(1_800_000_000.0)
        '2027-01-15 08:00:00 UTC'
    """
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """A span of time for people.

    Example:
        >>> duration(3.25), duration(75), duration(7380), duration(90000)
        ('3.2 s', '1 min 15 s', '2 h 3 min', '25 h 0 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
