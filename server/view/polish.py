"""What people are told of a run's stages; drawn from its events."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from common.event_kinds import Event
from common.run.schema.polish import EXPERIMENTAL

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
_OF_STAGES: Final = ("polish_started", "polish_step", "polish_finished", "polish_evaluated")


def stages(log: Sequence[Event]) -> list[dict[str, Any]]:
    """The stages that finished, in their order, each with its figures as (name, before, after)."""
    done = {event["number"]: event for event in log if event["kind"] == "polish_finished"}
    asked, losses = at_sites(log), [event["loss"] for event in log if event["kind"] == "evaluated"][-1:]
    told = []
    for number in sorted(done):
        event, found = done[number], figures(done[number])
        if event["trainer"] != "reward":  # which leaves the adapter as it was
            before = losses[-1] if losses else None
            losses = [asked[number]["loss"]] if number in asked else []
            found += [(AT_SITES, before, loss) for loss in losses]
        told.append({**event, "figures": found})
    return told


def derived(log: Sequence[Event]) -> Event | None:
    """What the events tell of the run to which these stages were added after its end; None: they are a run's own."""
    found = [event for event in log if event["kind"] == "derived"]
    return found[-1] if found else None


def derived_in_words(event: Mapping[str, Any]) -> list[str]:
    """Which stages after the end of which run these are, in lines."""
    names = ", ".join(event["stages"])
    gate = "by rules of their own, fixed before they began" if event["has_own_gate"] else "as the run is"
    told = [
        f"Later stages {event['number']} ({names}) of the finished run {event['name']}, {event['run_sha256'][:12]}, "
        f"after its {event['start_stage']}; addendum {event['addendum_sha256']}",
        f"Judged {gate}. {NOT_ASKED}",
    ]
    refused = "; ".join(event["refused"])
    return [*told, f"The run's own gate refused {event['start_stage']}: {refused}"] if refused else told


def later(log: Sequence[Event]) -> list[str]:
    """What was added to a run after its end, a line each, with what came of it."""
    done = {event["addendum_sha256"]: event for event in log if event["kind"] == "later_finished"}
    told = []
    for event in log:
        if event["kind"] == "later_started":
            end = done.get(event["addendum_sha256"])
            how = f"finished with {end['stage']}, adapter {end['adapter_sha256'][:12]}" if end else "not finished"
            told.append(f"{event['folder']} ({', '.join(event['stages'])}) after {event['start_stage']}: {how}")
    return told


def at_sites(log: Sequence[Event]) -> dict[int, Event]:
    """What the sites said of the adapter after a stage, by the stage's number."""
    return {event["number"]: event for event in log if event["kind"] == "polish_evaluated"}


def label(number: int, name: str) -> str:
    """What the coordinator's evaluation after a stage is called.

    Example:
        >>> label(1, "align")
        'polish-01-align'
    """
    return f"{LABEL}{number:02d}-{name}"[:63]


def figures(event: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """A stage's figures before and after.

    Example:
        >>> figures({"before": {"margin": 0.0}, "after": {"margin": 1.5}})
        [('margin', 0.0, 1.5)]
    """
    before, after = event["before"], event["after"]
    return [(name, before.get(name), after.get(name)) for name in _ORDER if name in before or name in after]


def line(event: Mapping[str, Any]) -> str:
    """A finished stage on one line.

    Example:
        >>> line({"stage": "align", "trainer": "dpo", "before": {"margin": 0.0}, "after": {"margin": 1.5}})
        'align (dpo): margin 0.000 to 1.500'
    """
    found = event.get("figures") or figures(event)
    parts = [f"{name} {_figure(before)} to {_figure(after)}" for name, before, after in found]
    return f"{event['stage']} ({kind(event)}): {', '.join(parts)}"


def left_out(event: Mapping[str, Any]) -> str:
    """Rows that a stage's data have and it does not use, at the end of a line.

    Example:
        >>> left_out({"num_dropped": 2, "num_equal": 0, "num_overlapping": 16})
        ', 2 dropped as too long, 16 left out as the result is judged on them'
    """
    said = {
        "num_truncated": "cut",
        "num_dropped": "dropped as too long",
        "num_equal": "dropped as both answers are the same after the cut",
        "num_overlapping": "left out as the result is judged on them",
    }
    return "".join(f", {event[name]:,} {what}" for name, what in said.items() if event.get(name))


def overlaps(event: Mapping[str, Any]) -> list[str]:
    """What a finished stage has trained on that its result is judged on: a line a table."""
    return [f"trained on {sentence(*found)}" for found in event.get("overlaps", {}).items()]


def sentence(name: str, counts: Mapping[str, int]) -> str:
    """How much of a table is trained on.

    Example:
        >>> sentence("task notes (test.jsonl)", {"num_rows": 32, "num_exact": 12, "num_near": 4})
        '16 of 32 rows of task notes (test.jsonl) (12 word for word, 4 nearly)'
    """
    num_same = counts["num_exact"] + counts["num_near"]
    kinds = f"{counts['num_exact']} word for word, {counts['num_near']} nearly"
    return f"{num_same} of {counts['num_rows']} rows of {name} ({kinds})"


def task_overlaps(log: Sequence[Event]) -> list[str]:
    """Tasks whose rows the sites train on."""
    found = [event["reasons"] for event in log if event["kind"] == "tasks_overlap"]
    return list(found[-1]) if found else []


def kind(event: Mapping[str, Any]) -> str:
    """A stage's kind, and whether TRL calls it experimental."""
    return f"{event['trainer']}, experimental" if event["trainer"] in EXPERIMENTAL else str(event["trainer"])


def of_export(log: Sequence[Event], names: Collection[str]) -> list[Event]:
    """The events that belong to an adapter that went through these stages and no others."""
    measured = {label(event["number"], event["stage"]) for event in log if event["kind"] == "polish_started"}
    kept = {label(number, name) for number, name in enumerate(names, start=1)}
    return [event for event in log if not _is_left_out(event, names, measured - kept)]


def _is_left_out(event: Event, names: Collection[str], measured: Collection[str]) -> bool:
    """Whether an event tells of another stage, or of figures after one."""
    if event["kind"] in _OF_STAGES:
        return event["stage"] not in names
    return event["kind"] == "measured" and event["stage"] in measured


def _figure(value: float | None) -> str:
    """A figure, if there is one."""
    return "-" if value is None else f"{value:.3f}"
