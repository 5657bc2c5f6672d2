"""What a run's events say of one adapter, gathered for the gate's rules."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common.event_kinds import Event
from common.privacy import cost
from common.run import config
from common.run.schema.gate import AuditRule
from server.evaluate import measure
from server.view import figures

NO_AUDIT: Final = "no audit is named"
INFINITE: Final = "infinite"  # as `silotune-sim audit --json` writes what JSON has no number for


@dataclass(frozen=True)
class Audit:
    """What an audit wrote, and the file's hash.

    Attributes:
        claimed_epsilon: What was held against; infinite where nothing was claimed.
        audited_epsilon: Lower bound; None where the audit gives none.
        ceiling: The largest bound that it could have given; None where it has none.
        dp_delta: Of both.
        sha256: Of the file.
    """

    claimed_epsilon: float
    audited_epsilon: float | None
    ceiling: float | None
    dp_delta: float
    sha256: str


@dataclass(frozen=True)
class Figures:
    """All that is known of one adapter.

    Attributes:
        stage: Its label.
        measured: The coordinator's figures, by name; empty if it was not measured.
        gains: Over `base` and `prompt-only`, by name of the figure.
        evaluated: The sites' event; empty if they were not asked.
        base: The sites' event of the base; empty likewise.
        compared: Arms of a comparison with each site alone; empty where there is none.
        claimed_epsilon: What the run promises; infinite where no rule asks.
        dp_delta: Of the claim.
        audit: What was audited; a text says why there is nothing.
    """

    stage: str
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    evaluated: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    compared: Mapping[str, Any] = field(default_factory=dict)
    claimed_epsilon: float = math.inf
    dp_delta: float = 0.0
    audit: Audit | str = NO_AUDIT


def gather(run: config.RunConfig, log: Sequence[Event], *, stage: str, num_rounds: int, polished: str = "") -> Figures:
    """Figures of one adapter of a run.

    Args:
        run: The run file.
        log: The run's events.
        stage: Label of the adapter's figures.
        num_rounds: Rounds behind it.
        polished: Its hash, if there are stages of polish behind it too.
    """
    measured: Mapping[str, Any] = figures.stages(log).get(stage, {})
    sites = rounds_at_sites(log)
    exported = [event.get("stage", measure.FINAL) for event in log if event["kind"] == "run_finished"]
    is_compared = exported[-1:] == [stage]  # the federation's arm is what the run exported
    compared = [event["comparison"] for event in log if event["kind"] == "compared"] if is_compared else []
    audits = [rule.file for rule in run.gate.rules if isinstance(rule, AuditRule)]
    return Figures(
        stage=stage,
        measured=measured.get("figures", {}),
        gains=measured.get("gains", {}),
        evaluated=polished_at_sites(log).get(polished, {}) if polished else sites.get(num_rounds, {}),
        base=sites.get(0, {}),
        compared=compared[-1] if compared else {},
        claimed_epsilon=cost.epsilon(cost.resolve(run)) if audits else math.inf,
        dp_delta=run.privacy.dp_delta if audits and run.privacy.mode != "none" else 0.0,
        audit=read_audit(audits[0]) if audits else NO_AUDIT,
    )


def rounds_at_sites(log: Sequence[Event]) -> dict[int, Event]:
    """What the sites said of the adapter after each number of rounds."""
    return {event["num_rounds"]: event for event in log if event["kind"] == "evaluated"}


def polished_at_sites(log: Sequence[Event]) -> dict[str, Event]:
    """What the sites said of each polished adapter, by its hash."""
    return {event["adapter_sha256"]: event for event in log if event["kind"] == "polish_evaluated"}


def read_audit(path: str) -> Audit | str:
    """What `silotune-sim audit ... --json` wrote, or why it cannot be used; never an error, since a rule tells it."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    try:
        told = json.loads(data)
        claimed, audited, ceiling = (_number(told[f"{name}"]) for name in _NAMES)
        dp_delta = float(told["dp_delta"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{path}: is not what silotune-sim audit --json writes"
    if claimed is None:
        return f"{path}: claims no epsilon"
    return Audit(claimed, audited, ceiling, dp_delta, hashlib.sha256(data).hexdigest())


_NAMES: Final = ("claimed_epsilon", "audited_epsilon", "ceiling")


def _number(value: object) -> float | None:
    """A number of the file; ValueError if it is none."""
    if value is None:
        return None
    if value == INFINITE:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError("not a number of an audit")
    return float(value)
