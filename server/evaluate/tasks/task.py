"""A task of the evaluation suite: rows that were read once, and a function that scores them."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import storage
from common.adapter import adapter
from common.data import read
from common.data.overlap import Text
from common.errors import DataError
from common.model.base import Engine
from common.run.schema.tasks import ComparedTask, TaskConfig
from server.evaluate.figures.bootstrap import Scores

Score = Callable[[Engine], Mapping[str, Scores]]


@dataclass(frozen=True)
class Task:
    """What is measured, with everything that it needs in memory.

    Attributes:
        settings: Its table in the run file.
        sha256: Hash of all rows and files that it uses; no path is in it.
        score: Gives the scores of the adapter that is in the engine, by metric.
        score_baseline: The same for the base with the task's prompt; None without one.
        texts: What its rows say, so that nothing is trained on them; empty where rows are not ours to read.
    """

    settings: TaskConfig
    sha256: str
    score: Score
    score_baseline: Score | None = None
    texts: tuple[Text, ...] = ()

    @property
    def name(self) -> str:
        """The task's name."""
        return self.settings.name


def table_of(settings: TaskConfig) -> list[dict[str, Any]]:
    """The task's rows with all their columns.

    Raises:
        DataError: The file is missing or unusable.
    """
    table = read.read_table(settings.data)
    return table[: settings.max_rows or None]


def digest(*parts: object) -> str:
    """SHA-256 of rows and files: each row is hashed by itself first.

    Example:
        >>> digest([{"text": "a"}]) == digest([{"text": "b"}])
        False
    """
    rows = [[_row_hash(row) for row in part] if isinstance(part, list) else _row_hash(part) for part in parts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def file_hash(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return storage.sha256(Path(path).expanduser())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend the path in the run file") from error


def text_of(fields: Mapping[str, Any], column: str, *, where: str) -> str:
    """A column that must hold text.

    Raises:
        DataError: It does not.
    """
    text = fields.get(column)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: column {column} must hold text that is not empty")
    return text


@contextlib.contextmanager
def as_base(engine: Engine) -> Iterator[None]:
    """The base in the engine: the adapter as it was attached; afterwards the one that was there again."""
    trained = adapter.read(engine.model)
    adapter.write(engine.model, engine.initial)
    try:
        yield
    finally:
        adapter.write(engine.model, trained)


def _row_hash(row: object) -> str:
    """SHA-256 of one row as JSON; what JSON does not know, such as a date, counts as its text."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def examples_of(settings: ComparedTask) -> Sequence[dict[str, Any]]:
    """The answered examples of a baseline.

    Raises:
        DataError: The file is missing or unusable, or has too few rows.
    """
    if not settings.baseline_data:
        return []
    table = read.read_table(settings.baseline_data)
    if len(table) < settings.baseline_examples:
        raise DataError(
            f"{settings.baseline_data}: {len(table)} rows, and task {settings.name} asks for baseline_examples = "
            f"{settings.baseline_examples}; lower it or add rows"
        )
    return table[: settings.baseline_examples]
