"""The stages of a run for people, drawn from its events."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from common.event_kinds import (
    Derived,
    Event,
    Measured,
    PolishEvaluated,
    PolishFinished,
    PolishStarted,
    PolishStep,
)
from common.run.schema.polish import EXPERIMENTAL
from server.view.run_view import RunView

LABEL: Final = "polish-"  # how labels of stages after the rounds begin
PRIVATE: Final = (
    "Polish is post-processing of an adapter that is private already: it costs the sites' units nothing, as long as "
    "the coordinator's data were not taken from the sites'."
)
OWN_DATA: Final = (
    "What the coordinator trained on is not covered by any privacy guarantee: the adapter may have memorised it."
)
NOT_ASKED: Final = (
    "No site was asked after these stages: a new score would be one more release of a site's figures. What is told of "
    "sites is from before them, and what the stages have left is judged on the coordinator's own rows alone."
)
AT_SITES: Final = "held-out loss at the sites"
_ORDER: Final = ("loss", "margin", "accuracy", "logp_chosen", "logp_rejected", "reward", "length", "repetition")

Figures = list[tuple[str, float | None, float | None]]  # name, before, after


def stages(view: RunView) -> list[tuple[PolishFinished, Figures]]:
    """The stages that finished, in their order, each with its figures and the held-out loss at the sites."""
    before = view.last_evaluated.loss if view.last_evaluated else None
    found = []
    for number, event in sorted(view.polish_finished.items()):
        shown = figures(event)
        if event.trainer != "reward":  # which leaves the adapter as it was
            scored = view.polish_evaluated.get(number)
            shown += [(AT_SITES, before, scored.loss)] if scored else []
            before = scored.loss if scored else None
        found.append((event, shown))
    return found


def derived_in_words(event: Derived | None) -> list[str]:
    """Which stages after the end of which run these are, in lines; none for a run's own."""
    if event is None:
        return []
    gate = "by rules of their own, fixed before they began" if event.has_own_gate else "as the run is"
    text = [
        f"Later stages {event.number} ({', '.join(event.stages)}) of the finished run {event.name}, "
        f"{event.run_sha256[:12]}, after its {event.start_stage}; addendum {event.addendum_sha256}",
        f"Judged {gate}. {NOT_ASKED}",
    ]
    refused = "; ".join(event.refused)
    return [*text, f"The run's own gate refused {event.start_stage}: {refused}"] if refused else text


def later(view: RunView) -> list[str]:
    """What was added to a run after its end, a line each, with what came of it."""
    text = []
    for event in view.later_started:
        end = view.later_finished.get(event.addendum_sha256)
        outcome = f"finished with {end.stage}, adapter {end.adapter_sha256[:12]}" if end else "not finished"
        text.append(f"{event.folder} ({', '.join(event.stages)}) after {event.start_stage}: {outcome}")
    return text


def label(number: int, name: str) -> str:
    """What the coordinator's evaluation after a stage is called.

    Example:
        >>> label(1, "align")
        'polish-01-align'
    """
    return f"{LABEL}{number:02d}-{name}"[:63]


def figures(event: PolishFinished) -> Figures:
    """A stage's own figures before and after."""
    before, after = event.before, event.after
    return [(name, before.get(name), after.get(name)) for name in _ORDER if name in before or name in after]


def line(event: PolishFinished, shown: Figures | None = None) -> str:
    """A finished stage on one line, such as `align (dpo): margin 0.000 to 1.500`; by default with its own figures."""
    parts = [
        f"{name} {'-' if before is None else f'{before:.3f}'} to {'-' if after is None else f'{after:.3f}'}"
        for name, before, after in (figures(event) if shown is None else shown)
    ]
    return f"{event.stage} ({kind(event)}): {', '.join(parts)}"


def left_out(event: PolishStarted) -> str:
    """Rows that a stage's data have and it does not use, at the end of a line; empty if it uses all."""
    counts = {
        "cut": event.num_truncated,
        "dropped as too long": event.num_dropped,
        "dropped as both answers are the same after the cut": event.num_equal,
        "left out as the result is judged on them": event.num_overlapping,
    }
    return "".join(f", {count:,} {reason}" for reason, count in counts.items() if count)


def overlaps(event: PolishFinished) -> list[str]:
    """What a finished stage has trained on that its result is judged on: a line a table."""
    return [f"trained on {sentence(*found)}" for found in event.overlaps.items()]


def sentence(name: str, counts: Mapping[str, int]) -> str:
    """How much of a table is trained on.

    Example:
        >>> sentence("task notes (test.jsonl)", {"num_rows": 32, "num_exact": 12, "num_near": 4})
        '16 of 32 rows of task notes (test.jsonl) (12 word for word, 4 nearly)'
    """
    num_same = counts["num_exact"] + counts["num_near"]
    kinds = f"{counts['num_exact']} word for word, {counts['num_near']} nearly"
    return f"{num_same} of {counts['num_rows']} rows of {name} ({kinds})"


def kind(event: PolishStarted | PolishFinished) -> str:
    """A stage's kind, and whether TRL calls it experimental."""
    return f"{event.trainer}, experimental" if event.trainer in EXPERIMENTAL else event.trainer


def of_export(log: Sequence[Event], names: Collection[str]) -> list[Event]:
    """The events that belong to an adapter that went through these stages and no others."""
    started = {label(event.number, event.stage) for event in log if isinstance(event, PolishStarted)}
    others = started - {label(number, name) for number, name in enumerate(names, start=1)}
    of_stages = (PolishStarted, PolishStep, PolishFinished, PolishEvaluated)
    return [
        event
        for event in log
        if not (isinstance(event, of_stages) and event.stage not in names)
        and not (isinstance(event, Measured) and event.stage in others)
    ]
