"""Figures for people: what terminal, status, report and model card show of the same events. Loads no torch."""

import datetime
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Final

from common.event_kinds import BaseNoise, Evaluated, Measured, PolishEvaluated, RunStarted
from common.scores import Figure, Gain, Scores

BASE: Final = "base"  # labels of what stages are held against
PROMPT_ONLY: Final = "prompt-only"
MAX_STAGES: Final = 6
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units.

    Example:
        >>> size(1536)
        '1.5 kB'
    """
    power = 0
    while num_bytes >= 1000 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.0f} B" if not power else f"{num_bytes:.1f} {_UNITS[power]}"


def percent(share: float | None) -> str:
    """A share as a percentage; `-` if there is none.

    Example:
        >>> percent(0.314)
        '31.4 %'
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def signed_percent(share: float) -> str:
    """A change as a percentage with its sign.

    Example:
        >>> signed_percent(-0.12)
        '-12.0 %'
    """
    return f"{100 * share:+.1f} %"


def percent_of_base(share: float) -> str:
    """A part of a base's weights; never 100 % of less than all.

    Example:
        >>> percent_of_base(1.0), percent_of_base(0.9999), percent_of_base(0.126)
        ('100 %', '99.9 %', '12.6 %')
    """
    return "100 %" if share == 1 else f"{math.floor(1000 * share) / 10:g} %"


def number(value: float) -> str:
    """A figure, short.

    Example:
        >>> number(0.25), number(33926.17)
        ('0.250', '3.39e+04')
    """
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def moment(seconds: float) -> str:
    """Unix seconds as a date and time that mean the same everywhere.

    Example:
        >>> moment(1_800_000_000.0)
        '2027-01-15 08:00:00 UTC'
    """
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """A span of time.

    Example:
        >>> duration(3.25), duration(75), duration(7380), duration(90000)
        ('3.2 s', '1 min 15 s', '2 h 3 min', '25 h 0 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def rise(gain: Gain) -> str:
    """A difference with its interval.

    Example:
        >>> rise(Gain(mean=0.25, low=0.1, high=0.4))
        '+0.250 [+0.100, +0.400]'
    """
    return f"{_signed(gain.mean)} [{_signed(gain.low)}, {_signed(gain.high)}]"


def verdict(figure: Figure, gain: Gain) -> str:
    """`better` or `worse`; `unclear` where the interval holds 0."""
    if gain.low <= 0 <= gain.high:
        return "unclear"
    return "better" if (gain.mean > 0) == figure.higher_is_better else "worse"


def lines(event: Measured) -> Iterator[str]:
    """One stage for a terminal: a line a figure, and how far it is from base and prompt-only."""
    width = max((len(name) for name in event.figures), default=0)
    for name, figure in event.figures.items():
        gains = [
            f"{other} {_signed(found[name].mean)} {verdict(figure, found[name])}"
            for other, found in event.gains.items()
            if name in found
        ]
        interval = f"[{number(figure.low)}, {number(figure.high)}]"
        yield "  ".join([f"{name:<{width}}", f"{number(figure.value):>8} {interval}", *gains])


def table(measured: Mapping[str, Measured]) -> dict[str, Any] | None:
    """All stages side by side, and the newest against base and prompt-only; None where nothing was measured."""
    if not measured:
        return None
    last = list(measured.values())[-1]
    shown = [name for name in measured if name in (BASE, PROMPT_ONLY)]
    shown += [name for name in measured if name not in shown][-MAX_STAGES:]
    rows = []
    for name, figure in last.figures.items():
        values = [measured[stage].figures.get(name) for stage in shown]
        gains = [gain.get(name) for gain in last.gains.values()]
        rows.append(
            {
                "name": name,
                "num_rows": figure.num_rows,
                "values": [number(value.value) if value else "-" for value in values],
                "intervals": [f"{number(value.low)} to {number(value.high)}" if value else "" for value in values],
                "gains": [rise(gain) if gain else "-" for gain in gains],
                "verdicts": [verdict(figure, gain) if gain else "" for gain in gains],
                "lower": "" if figure.higher_is_better else "lower is better",
            }
        )
    return {
        "stages": shown,
        "last": last.stage,
        "references": list(last.gains),
        "num_hidden": len(measured) - len(shown),
        "rows": rows,
    }


def stage_at_sites(event: Evaluated | PolishEvaluated) -> str:
    """What was behind the adapter that the sites scored: rounds, or a stage."""
    return f"{event.num_rounds} rounds" if isinstance(event, Evaluated) else f"polish, stage {event.stage}"


def evenness(event: Scores) -> str:
    """How evenly the sites fare, in a line; empty for one site."""
    loss, exact = event.fairness.loss, event.fairness.exact_match
    if loss is None or len(event.sites) < 2:
        return ""
    text = (
        f"worst {loss.worst_site} {loss.worst:.3f}, mean {loss.mean:.3f}, std {loss.std:.3f}, "
        f"worst-best {loss.spread:.3f}"
    )
    if exact is None:
        return text
    return f"{text}; exact match: worst {exact.worst_site} {percent(exact.worst)}, mean {percent(exact.mean)}"


def worse(event: Scores) -> str:
    """The sites whose loss is above the base's there, with how far."""
    changes = {site: event.sites[site].change for site in event.worse_than_base}
    return ", ".join(f"{site} {change:+.3f}" for site, change in changes.items() if change is not None)


def in_brief(losses: Mapping[str, float | None]) -> str:
    """Many sites' losses in a line: best, median and worst; empty where none is known.

    Example:
        >>> in_brief({"alder": 2.0, "birch": 3.0, "cedar": 2.5, "dogwood": None})
        'best alder 2.000, median 2.500, worst birch 3.000'
    """
    known = {site: loss for site, loss in losses.items() if loss is not None}
    if not known:
        return ""
    best, worst = (pick(known, key=lambda site: (known[site], site)) for pick in (min, max))
    middle = statistics.median(known.values())
    return f"best {best} {known[best]:.3f}, median {middle:.3f}, worst {worst} {known[worst]:.3f}"


def quantization(plan: RunStarted) -> str:
    """The precision of a run's base, the sites that have another, and how much of the coordinator's body has it.

    Such as `nf4 (south = int8), 100 % of its body`.
    """
    others = ", ".join(f"{site} = {name}" for site, name in plan.site_quantization.items())
    stored = f"{plan.quantization} ({others})" if others else plan.quantization
    return f"{stored}, {percent_of_base(plan.quantised_share)} of its body" if plan.quantised_share else stored


def precisions(noise: BaseNoise | None, base: Evaluated | None, last: Evaluated | None) -> list[dict[str, Any]]:
    """A row for each precision: its sites, its noise, and the held-out loss of the untrained base and of the adapter.

    Empty for a run whose sites have one precision.
    """
    before = base.precisions if base and base.precisions else {}
    return [
        {
            "name": name,
            "sites": ", ".join(scored.sites),
            "error": noise.precisions[name].error,
            "targets": noise.precisions[name].targets,
            "base_loss": before[name].loss if name in before else None,
            "loss": scored.loss,
        }
        for name, scored in (last.precisions or {} if noise and last else {}).items()
        if noise
    ]


def precision_line(row: Mapping[str, Any]) -> str:
    """A row of `precisions` in words.

    Example:
        >>> row = {"name": "nf4", "sites": "north", "error": 0.093, "targets": {"q_proj": 0.092, "v_proj": 0.094}}
        >>> precision_line({**row, "base_loss": 3.25, "loss": 0.5})
        'nf4 (north): weights off by 9.30 % (q_proj 9.20 %, v_proj 9.40 %); untrained base 3.250, now 0.500'
    """
    targets = ", ".join(f"{name} {100 * error:.2f} %" for name, error in row["targets"].items())
    base = "-" if row["base_loss"] is None else f"{row['base_loss']:.3f}"
    off = f"weights off by {100 * row['error']:.2f} %" + f" ({targets})" * bool(row["error"])
    return f"{row['name']} ({row['sites']}): {off}; untrained base {base}, now {row['loss']:.3f}"


def _signed(value: float) -> str:
    """A difference, such as `+0.500`."""
    return f"{'+' if value >= 0 else ''}{number(value)}"
