"""All tasks of a run, read and hashed before training begins."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import DataError
from common.events import EventLog
from common.frame import wire
from common.model.base import Engine
from common.run.config import RunConfig
from common.run.schema.gate import GateConfig
from common.run.schema.tasks import EvaluationConfig
from common.run.schema.training import DataConfig
from server.evaluate.tasks import answers, choice, harness, judge, memorisation, perplexity, pii, probe
from server.evaluate.tasks.task import Task

# To add a kind: a file with such a function, a line here, and a table of its settings in `common.run.schema.tasks`.
LOADERS: Final[Mapping[str, Callable[[Any, DataConfig, EvaluationConfig], Task]]] = {
    "answers": answers.load,
    "number": answers.load,
    "json": answers.load,
    "choice": choice.load,
    "perplexity": perplexity.load,
    "probe": probe.load,
    "harness": harness.load,
    "memorisation": memorisation.load,
    "pii": pii.load,
    "judge": judge.load,
}
_PATHS: Final = frozenset(
    {"data", "json_schema", "baseline_data", "members_data", "non_members_data", "names_file", "calibration_data",
     "judge_base", "judge_url", "judge_key_file", "allow_remote"}
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What `measure` needs, and no federation.

    Attributes:
        engine: The base that adapters are put into.
        tasks: In the order of the run file.
        folder: The run's folder; scores go to `scores/` in it.
        sha256: What the tasks and the gate are, rows included and paths not; empty without either.
    """

    engine: Engine
    tasks: tuple[Task, ...]
    folder: Path
    log: EventLog
    sha256: str


def open_suite(run: RunConfig, *, engine: Engine, folder: Path, log: EventLog) -> Suite:
    """Read all that will be measured; nothing is read again later.

    Raises:
        ConfigError: A task needs what is not installed.
        DataError: Rows, schemas or tasks are missing or unusable.
    """
    tasks, sha256 = read(run.data, run.evaluation, run.gate)
    judge.tell_where_rows_go(run.evaluation.tasks)
    return Suite(engine, tasks, folder, log, sha256)


def read(data: DataConfig, evaluation: EvaluationConfig, gate: GateConfig) -> tuple[tuple[Task, ...], str]:
    """The tasks, and SHA-256 of what is measured: metrics and rows, how answers are asked for, and the gate; no paths.

    The hash is empty where nothing is measured and there is no gate. Two runs with the same hash have comparable
    figures, if the base's tokenizer and template are the same too.

    Raises:
        ConfigError: A task needs what is not installed.
        DataError: Rows, schemas or tasks are missing or unusable.
    """
    tasks = tuple(LOADERS[task.kind](task, data, evaluation) for task in evaluation.tasks)
    has_gate = gate != GateConfig()
    if not tasks and not has_gate:
        return tasks, ""
    content: dict[str, object] = {
        # A task without its paths: the hash of its rows stands for them.
        "tasks": [
            {**task.settings.model_dump(mode="json", exclude=set(_PATHS)), "sha256": task.sha256} for task in tasks
        ],
        "max_new_tokens": evaluation.max_new_tokens,
        "system_prompt": data.system_prompt,
    }
    if has_gate:
        content["gate"] = gate.model_dump(mode="json", exclude={"rules": {"__all__": {"file"}}})
    return tasks, hashlib.sha256(wire.canonical_json(content)).hexdigest()


def require_same(sha256: str, frozen: str) -> None:
    """Refuse to go on with another evaluation than the one that was fixed before training.

    Raises:
        DataError: They differ.
    """
    if sha256 != frozen:
        raise DataError(
            "the evaluation was fixed before training, and now its tasks, the rows in their files or the gate are "
            "others; restore them, or begin a run under another name"
        )
