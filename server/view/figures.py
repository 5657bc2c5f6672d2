"""Figures of tasks and sites for people: what terminal, status, report and model card show of the same events."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from common.event_kinds import Event

BASE: Final = "base"  # labels of what stages are held against
PROMPT_ONLY: Final = "prompt-only"
MAX_STAGES: Final = 6


def number(value: float) -> str:
    """A figure, short.

    Example:
        >>> number(0.25), number(33926.17)
        ('0.250', '3.39e+04')
    """
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def rise(gain: Mapping[str, float]) -> str:
    """A difference with its interval.

    Example:
        >>> rise({"mean": 0.25, "low": 0.1, "high": 0.4})
        '+0.250 [+0.100, +0.400]'
    """
    mean, low, high = (_signed(gain[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def verdict(figure: Mapping[str, Any], gain: Mapping[str, float]) -> str:
    """Whether an interval holds 0, and if not whether the change is one for the better.

    Example:
        >>> verdict({"higher_is_better": False}, {"mean": 0.25, "low": 0.1, "high": 0.4})
        'worse'
    """
    if gain["low"] <= 0 <= gain["high"]:
        return "unclear"
    return "better" if (gain["mean"] > 0) == figure["higher_is_better"] else "worse"


def stages(log: Sequence[Event]) -> dict[str, Event]:
    """The last event `measured` of each stage, in the order of their first; of a run begun anew only the newest."""
    found: dict[str, Event] = {}
    for event in log:
        if event["kind"] == "measured":
            found = {} if event["stage"] == "base" else found
            found[event["stage"]] = event
    return found


def lines(event: Event) -> Iterator[str]:
    """One stage for a terminal: a line a figure, and how far it is from base and prompt-only."""
    width = max((len(name) for name in event["figures"]), default=0)
    for name, figure in event["figures"].items():
        gains = [
            f"{other} {_signed(found[name]['mean'])} {verdict(figure, found[name])}"
            for other, found in event["gains"].items()
            if name in found
        ]
        interval = f"[{number(figure['low'])}, {number(figure['high'])}]"
        yield "  ".join([f"{name:<{width}}", f"{number(figure['value']):>8} {interval}", *gains])


def table(log: Sequence[Event]) -> dict[str, Any] | None:
    """All stages side by side, and the newest against base and prompt-only; None where nothing was measured."""
    found = stages(log)
    if not found:
        return None
    last = next(reversed(found.values()))
    shown = [name for name in found if name in ("base", "prompt-only")]
    shown += [name for name in found if name not in shown][-MAX_STAGES:]
    return {
        "stages": shown,
        "last": last["stage"],
        "references": list(last["gains"]),
        "num_hidden": len(found) - len(shown),
        "rows": [_row(name, found, shown, last) for name in last["figures"]],
    }


def _row(name: str, found: Mapping[str, Event], shown: list[str], last: Event) -> dict[str, Any]:
    """One figure at all stages."""
    figure = last["figures"][name]
    values = [found[stage]["figures"].get(name) for stage in shown]
    gains = [gain.get(name) for gain in last["gains"].values()]
    return {
        "name": name,
        "num_rows": figure["num_rows"],
        "values": ["-" if value is None else number(value["value"]) for value in values],
        "intervals": [
            "" if value is None else f"{number(value['low'])} to {number(value['high'])}" for value in values
        ],
        "gains": ["-" if gain is None else rise(gain) for gain in gains],
        "verdicts": ["" if gain is None else verdict(figure, gain) for gain in gains],
        "lower": "" if figure["higher_is_better"] else "lower is better",
    }


def last_at_sites(log: Sequence[Event]) -> Event | None:
    """What the sites said last: after a round, or of a polished adapter."""
    found = [event for event in log if event["kind"] in ("evaluated", "polish_evaluated")]
    return found[-1] if found else None


def stage_at_sites(event: Mapping[str, Any]) -> str:
    """After what the sites said it.

    Example:
        >>> stage_at_sites({"kind": "evaluated", "num_rounds": 3})
        '3 rounds'
        >>> stage_at_sites({"kind": "polish_evaluated", "stage": "align"})
        'polish, stage align'
    """
    return f"{event['num_rounds']} rounds" if event["kind"] == "evaluated" else f"polish, stage {event['stage']}"


def evenness(event: Mapping[str, Any]) -> str:
    """How evenly the sites fare, in a line; empty for one site."""
    found = event["fairness"]["loss"]
    if found is None or len(event["sites"]) < 2:
        return ""
    text = (
        f"worst {found['worst_site']} {found['worst']:.3f}, mean {found['mean']:.3f}, std {found['std']:.3f}, "
        f"worst-best {found['spread']:.3f}"
    )
    exact = event["fairness"]["exact_match"]
    if exact is None:
        return text
    worst, mean = f"{100 * exact['worst']:.1f} %", f"{100 * exact['mean']:.1f} %"
    return f"{text}; exact match: worst {exact['worst_site']} {worst}, mean {mean}"


def worse(event: Mapping[str, Any]) -> str:
    """The sites whose loss is above the base's there, with how far.

    Example:
        >>> worse({"worse_than_base": ["north"], "sites": {"north": {"change": 0.25}}})
        'north +0.250'
    """
    return ", ".join(f"{site} {event['sites'][site]['change']:+.3f}" for site in event["worse_than_base"])


def _signed(value: float) -> str:
    """A difference.

    Example:
        >>> _signed(0.5), _signed(-2.0)
        ('+0.500', '-2.000')
    """
    return f"{'+' if value >= 0 else ''}{number(value)}"
