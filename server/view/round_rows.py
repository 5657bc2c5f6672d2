"""A run's rounds as rows of figures: what the terminal draws, and what `--json` prints, of the same events."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.event_kinds import Event, RunFinished
from server.view import figures, gaps, gate


@dataclass(frozen=True)
class Row:
    """One round, or the base. None: not known, not told, or not applicable.

    Attributes:
        num_rounds: Finished by then; 0 is the base.
        held_out_loss: Over all sites' held-out rows, nats per answer token; under preferences the loss that is learnt.
        exact_match: Share of generated answers equal to their reference.
        train_loss: Mean of the sites' training losses by their weights, likewise nats.
        train_losses: Of each site that trained; None where it does not tell it.
        gap: Aggregation gap as a share of the step.
        gap_error: Standard error of the gap, where it is an estimate.
        gap_most: The module with the largest gap, that gap, and its standard error.
        epsilon: Of all rounds so far: what a unit was promised, or under noise for whole sites what was spent.
        bytes_down: To all sites for training.
        bytes_up: From them.
        evaluation_bytes_down: To all sites for the evaluation after the round.
        evaluation_bytes_up: From them.
        seconds: Of the round without its evaluation.
    """

    num_rounds: int
    held_out_loss: float | None = None
    exact_match: float | None = None
    train_loss: float | None = None
    train_losses: Mapping[str, float | None] = field(default_factory=dict)
    gap: float | None = None
    gap_error: float | None = None
    gap_most: tuple[str, float, float | None] | None = None
    epsilon: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    evaluation_bytes_down: int | None = None
    evaluation_bytes_up: int | None = None
    seconds: float | None = None


class Rows:
    """Makes rows from events as they come: one is whole with its evaluation, or when the next round begins without."""

    def __init__(self) -> None:
        self._curve: Sequence[float] = ()
        self._losses: dict[str, float | None] = {}
        self._pending: Row | None = None

    def take(self, event: Event) -> Row | None:
        """The row that this event completes, if any."""
        kind, whole = event["kind"], None
        if kind in ("run_started", "round_started", "run_finished"):
            whole, self._pending = self._pending, None
            self._losses = {}
            self._curve = event.get("epsilon_planned", ()) if kind == "run_started" else self._curve
        elif kind == "site_trained":
            self._losses[event["site"]] = event["train_loss"]
        elif kind == "round_finished":
            self._pending = self._of_round(event)
        elif kind == "evaluated":
            pending, self._pending = self._pending, None
            if pending is None or pending.num_rounds != event["num_rounds"]:
                pending = Row(event["num_rounds"])
            whole = dataclasses.replace(
                pending,
                held_out_loss=event["loss"],
                exact_match=event["exact_match"],
                evaluation_bytes_down=event.get("bytes_down"),
                evaluation_bytes_up=event.get("bytes_up"),
            )
        return whole

    def _of_round(self, event: Event) -> Row:
        """A round's own figures."""
        place = event["round"]
        planned = self._curve[place] if place < len(self._curve) else None
        return Row(
            place + 1,
            train_loss=event.get("train_loss"),
            train_losses=dict(self._losses),
            gap=event["gap"],
            gap_error=event.get("gap_error"),
            gap_most=gaps.largest(event),
            epsilon=event.get("epsilon", planned),
            bytes_down=event["bytes_down"],
            bytes_up=event["bytes_up"],
            seconds=event["seconds"],
        )


def of_log(log: Sequence[Event]) -> list[Row]:
    """All rows of a run, ascending; of a round that was played again, the newest."""
    rows, found = Rows(), dict[int, Row]()
    for event in [*log, RunFinished(adapter="", num_rounds=0, stage="")]:
        if row := rows.take(event):
            before = found.get(row.num_rounds)
            if before and before.bytes_down is not None and row.bytes_down is None:  # resumed: evaluated anew only
                row = dataclasses.replace(before, held_out_loss=row.held_out_loss, exact_match=row.exact_match)
            found[row.num_rounds] = row
    return [found[number] for number in sorted(found)]


def as_dict(log: Sequence[Event]) -> dict[str, Any]:
    """What a run came to, in numbers, for programs; `docs/operations.md` lists the keys.

    Args:
        log: Its events.
    """
    rows = of_log(log)
    plans = [event for event in log if event["kind"] == "run_started"]
    plan = plans[-1] if plans else {}
    played = [row for row in rows if row.num_rounds]
    last = played[-1] if played else Row(0)
    base = rows[0] if rows and not rows[0].num_rounds else Row(0)
    judged = gate.of_log(log)
    final: Mapping[str, Any] = figures.last_at_sites(log) or {}
    return {
        "run_sha256": plan.get("run_sha256", ""),
        "num_rounds": last.num_rounds,
        "base_held_out_loss": base.held_out_loss,
        "held_out_loss": final.get("loss"),
        "train_loss": last.train_loss,
        "gap": last.gap,
        "epsilon": last.epsilon,
        "dp_delta": plan.get("dp_delta"),
        "bytes_down": sum((row.bytes_down or 0) + (row.evaluation_bytes_down or 0) for row in rows),
        "bytes_up": sum((row.bytes_up or 0) + (row.evaluation_bytes_up or 0) for row in rows),
        "seconds": round(sum(row.seconds or 0.0 for row in rows), 3),
        "gate": {key: judged[-1][key] for key in ("stage", "is_passed", "verdicts")} if judged else None,
        "rounds": [dataclasses.asdict(row) for row in rows],
    }


def in_brief(losses: Mapping[str, float | None]) -> str:
    """Many sites' losses in a line: best, median and worst; empty where none is told.

    Example:
        >>> in_brief({"alder": 2.0, "birch": 3.0, "cedar": 2.5, "dogwood": None})
        'best alder 2.000, median 2.500, worst birch 3.000'
    """
    told = {site: loss for site, loss in losses.items() if loss is not None}
    if not told:
        return ""
    best, worst = (pick(told, key=lambda site: (told[site], site)) for pick in (min, max))
    middle = statistics.median(told.values())
    return f"best {best} {told[best]:.3f}, median {middle:.3f}, worst {worst} {told[worst]:.3f}"
