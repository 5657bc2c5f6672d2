"""The one way to measure an adapter on the coordinator's tasks.

A stage is a label: `base`, `prompt-only`, `round-00003`, `final`, and whatever comes after the rounds, such as
`polish-01-dpo`. `docs/evaluation.md` describes the event.
"""

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from common import events, storage
from common.adapter import adapter
from common.errors import DataError
from common.event_kinds import Measured
from common.frame import wire
from common.scores import Figure, Gain
from server.aggregate.method import State
from server.evaluate.figures import bootstrap
from server.evaluate.figures.bootstrap import Scores
from server.evaluate.suite import Suite
from server.view import figures as view
from server.view import polish

FOLDER: Final = "scores"
FINAL: Final = "final"
PREVIOUS: Final = "previous"
_REFERENCES: Final = (view.BASE, view.PROMPT_ONLY)
_STAGE: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
Figures = Mapping[str, Scores]


def stage_of(num_rounds: int, *, last: int) -> str:
    """The label of the adapter after so many of `last` rounds.

    Example:
        >>> stage_of(0, last=3), stage_of(2, last=3), stage_of(3, last=3)
        ('base', 'round-00002', 'final')
    """
    if not num_rounds:
        return view.BASE
    return FINAL if num_rounds == last else f"round-{num_rounds:05d}"


def measure(suite: Suite, state: State, *, stage: str) -> Mapping[str, Any]:
    """Run every task on an adapter, keep each row's scores and log one event `measured`.

    The base is also measured with the prompts of those tasks that have a baseline, as the stage `prompt-only`. Every
    later stage is compared to both on the same rows, by the paired bootstrap, and a stage of polish to the one before
    it as well. Texts are kept nowhere.

    Args:
        state: The adapter, as `common.adapter.adapter` names its tensors.

    Returns:
        The event; empty without tasks.

    Raises:
        DataError: A text is too long, or scores on disk are of other tasks or rows.
        ModelError: The adapter has diverged.
        StorageError: Disk full or not writable.
        ValueError: The label is none of a-z, 0-9 and -.
    """
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"stage {stage!r} is no label of a-z, 0-9 and -")
    if not suite.tasks:
        return {}
    adapter.write(suite.engine.model, state)
    digest = adapter.digest(state)
    event = _measure(suite, stage, digest)
    if stage == view.BASE and any(task.score_baseline for task in suite.tasks):
        _measure(suite, view.PROMPT_ONLY, digest)
    return event


def _measure(suite: Suite, stage: str, adapter_sha256: str) -> Mapping[str, Any]:
    """One stage: scores to disk, figures to the log."""
    started = time.monotonic()
    scores: dict[str, Scores] = {}
    kinds = {}
    for task in suite.tasks:  # in the stage prompt-only those without a baseline have no figures
        score = task.score_baseline if stage == view.PROMPT_ONLY else task.score
        for metric, rows in score(suite.engine).items() if score else ():
            scores[f"{task.name}.{metric}"], kinds[f"{task.name}.{metric}"] = rows, task.settings.kind
    content = {"definition_sha256": suite.sha256, "scores": {name: vars(rows) for name, rows in scores.items()}}
    storage.write_atomic(_file(suite.folder, stage), wire.canonical_json(content))
    references = {}
    if stage != view.BASE:
        labels = {name: name for name in _REFERENCES if name != stage} | {PREVIOUS: _before(suite, stage)}
        paths = {name: _file(suite.folder, label) for name, label in labels.items() if label}
        references = {name: _stored(path, suite.sha256) for name, path in paths.items() if path.exists()}
    figures = {}
    for name, rows in scores.items():
        interval = bootstrap.interval(rows)
        figures[name] = Figure(
            value=interval.mean,
            low=interval.low,
            high=interval.high,
            num_rows=len(rows.rows),
            higher_is_better=rows.higher_is_better,
            kind=kinds[name],
        )
    return suite.log.append(
        Measured(
            stage=stage,
            definition_sha256=suite.sha256,
            adapter_sha256=adapter_sha256,
            figures=figures,
            gains={name: gains(scores, before) for name, before in references.items()},
            seconds=round(time.monotonic() - started, 3),
        )
    )


def gains(after: Figures, before: Figures) -> dict[str, Gain]:
    """How far each figure rose that both have, with its interval.

    Raises:
        DataError: Another number of rows.
    """
    try:
        return {
            name: Gain(**dataclasses.asdict(bootstrap.gain(scores, before[name])))
            for name, scores in after.items()
            if name in before
        }
    except ValueError as error:
        raise DataError(f"{FOLDER}/ holds scores of other rows ({error}); begin the run anew") from error


def _before(suite: Suite, stage: str) -> str:
    """The stage that was measured before one of polish: the one before it, or the last round; empty if there is none.

    Labels of polish begin with a number of two digits, so those before a stage sort before it.
    """
    if not stage.startswith(polish.LABEL):
        return ""
    log = events.read(suite.log.path) if suite.log.path.is_file() else []
    measured: list[str] = [
        event.stage for event in log if isinstance(event, Measured) and event.stage not in _REFERENCES
    ]
    earlier = [label for label in measured if not label.startswith(polish.LABEL) or label < stage]
    polished = sorted(label for label in earlier if label.startswith(polish.LABEL))
    return (polished or earlier or [""])[-1]


def _file(folder: Path, stage: str) -> Path:
    """Scores of every row at a stage."""
    return folder / FOLDER / f"{stage}.json"


def _stored(path: Path, definition_sha256: str) -> dict[str, Scores]:
    """The scores of an earlier stage; those of other tasks or rows are refused."""
    try:
        content = json.loads(path.read_bytes())
        scores = {
            name: Scores(tuple(map(tuple, fields["rows"])), fields["statistic"], fields["higher_is_better"])
            for name, fields in content["scores"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the scores cannot be read; begin the run anew") from error
    if content["definition_sha256"] != definition_sha256:
        raise DataError(f"{path}: the scores are of other tasks or rows; begin the run anew")
    return scores
