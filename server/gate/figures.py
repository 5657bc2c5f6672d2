"""What a run's events say of one adapter, gathered for the gate's rules."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from common.privacy import cost
from common.run import config
from common.run.schema.gate import AuditRule
from common.scores import Arm, Figure, Gain, Scores
from server.view.run_view import RunView

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
        evaluated: What the sites scored; None if they were not asked.
        base: What they scored of the base; None likewise.
        compared: Arms of a comparison with each site alone; empty where there is none.
        claimed_epsilon: What the run promises; infinite where no rule asks.
        dp_delta: Of the claim.
        audit: What was audited; a text says why there is nothing.
    """

    stage: str
    measured: Mapping[str, Figure] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, Gain]] = field(default_factory=dict)
    evaluated: Scores | None = None
    base: Scores | None = None
    compared: Mapping[str, Arm] = field(default_factory=dict)
    claimed_epsilon: float = math.inf
    dp_delta: float = 0.0
    audit: Audit | str = NO_AUDIT


def gather(run: config.RunConfig, view: RunView, *, stage: str, num_rounds: int, polished: str = "") -> Figures:
    """Figures of one adapter of a run.

    Args:
        run: The run file.
        view: The run.
        stage: Label of the adapter's figures.
        num_rounds: Rounds behind it.
        polished: Its hash, if there are stages of polish behind it too.
    """
    measured = view.measured.get(stage)
    after: Scores | None = view.evaluated.get(num_rounds)
    if polished:
        after = {event.adapter_sha256: event for event in view.polish_evaluated.values()}.get(polished)
    is_compared = view.compared and view.exported_stage == stage  # the federation's arm is what the run exported
    audits = [rule.file for rule in run.gate.rules if isinstance(rule, AuditRule)]
    return Figures(
        stage=stage,
        measured=measured.figures if measured else {},
        gains=measured.gains if measured else {},
        evaluated=after,
        base=view.evaluated.get(0),
        compared=view.compared.comparison if view.compared and is_compared else {},
        claimed_epsilon=cost.epsilon(cost.resolve(run)) if audits else math.inf,
        dp_delta=run.privacy.dp_delta if audits and run.privacy.mode != "none" else 0.0,
        audit=read_audit(audits[0]) if audits else NO_AUDIT,
    )


def read_audit(path: str) -> Audit | str:
    """What `silotune-sim audit ... --json` wrote, or why it cannot be used; never an error, since a rule tells it."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    try:
        fields = json.loads(data)
        claimed, audited, ceiling = (_number(fields[f"{name}"]) for name in _NAMES)
        dp_delta = float(fields["dp_delta"])
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
