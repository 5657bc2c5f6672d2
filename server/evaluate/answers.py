"""Generated answers to the coordinator's own rows, scored by `evaluation.metrics`."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from common import adapter, config, evaluation, storage, wire
from common.errors import DataError
from server.aggregate.method import State
from server.evaluate import json_answers, metrics
from server.federation import Federation

FOLDER: Final = "scores"


def score(federation: Federation, state: State, *, num_rounds: int, stage: str = "") -> None:
    """Answer every row of `evaluation.server_data`, keep each row's scores and log their means.

    Without `evaluation.metrics` nothing is done. After the last round the event holds how far each mean rose from the
    base's on the same rows, by the paired bootstrap. The texts are kept nowhere. `stage` names the polish stage that
    the adapter went through last.

    Raises:
        DataError: The base's scores on disk are not of these rows.
        StorageError: Disk full or not writable.
    """
    own, settings = federation.own_rows, federation.manifest.run
    if own is None or not settings.evaluation.metric_names:
        return
    adapter.write(own.engine.model, state)
    pairs = evaluation.generate(
        own.engine,
        own.rows,
        batch_size=settings.evaluation.batch_size,
        max_new_tokens=settings.evaluation.max_new_tokens,
        system_prompt=settings.data.system_prompt,
    )
    functions = chosen(settings.evaluation)
    found = {name: [function(*pair) for pair in pairs] for name, function in functions.items()}
    storage.write_atomic(_file(federation.folder, num_rounds, stage), wire.canonical_json(found))
    before = _stored(_file(federation.folder, 0)) if num_rounds else {}
    federation.log.append(
        "scored",
        num_rounds=num_rounds,
        stage=stage,
        num_rows=len(pairs),
        scores={name: sum(scores) / len(scores) for name, scores in found.items()},
        gains=gains(found, before),
    )


def chosen(settings: config.EvaluationConfig) -> dict[str, Callable[[str, str], float]]:
    """The functions that `metrics` names.

    Raises:
        DataError: `json_schema` is missing or no schema.
    """
    with_json = {"json": json_answers.checker(Path(settings.json_schema).expanduser())} if settings.json_schema else {}
    known = {**metrics.PER_ROW, **with_json}
    return {name: known[name] for name in settings.metric_names}


def gains(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How far each metric rose, with its interval; empty if there is nothing before.

    Raises:
        DataError: Other metrics, or another number of rows.
    """
    if before and {name: len(scores) for name, scores in after.items()} != {
        name: len(scores) for name, scores in before.items()
    }:
        raise DataError(f"{FOLDER}/00000.json is of other rows or metrics than this run's; begin the run anew")
    return {name: dataclasses.asdict(metrics.paired_bootstrap(after[name], scores)) for name, scores in before.items()}


def _file(folder: Path, num_rounds: int, stage: str = "") -> Path:
    """Scores of every row after so many rounds, or after a stage that follows them."""
    return folder / FOLDER / (f"{num_rounds:05d}-{stage}.json" if stage else f"{num_rounds:05d}.json")


def _stored(path: Path) -> dict[str, list[float]]:
    """The base's scores.

    Raises:
        DataError: They are not there, or unreadable.
    """
    try:
        found: dict[str, list[float]] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the base's scores cannot be read; begin the run anew") from error
    return found
