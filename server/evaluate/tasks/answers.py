"""Kinds `answers`, `number` and `json`: generated answers beside their references."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from common.data import overlap
from common.data.rows import Message, Row
from common.errors import DataError
from common.loss import evaluation
from common.model import loading
from common.model.base import Engine
from common.run.config import RunConfig
from common.run.schema.tasks import TaskConfig
from common.text import prompts
from server.evaluate.figures import json_answers, labels, likelihood, metrics
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks.task import Task, digest, file_hash

Pairs = Sequence[tuple[str, str]]  # an answer and its reference
_METRICS: Final = {"number": ("number",), "json": ("valid_json", "json")}


def load(settings: TaskConfig, run: RunConfig) -> Task:
    """Read rows, labels and schema.

    Raises:
        DataError: The rows, the schema or a baseline's examples are missing or unusable.
    """
    rows = loading.rows_of(settings.data, run)[: settings.max_rows or None]
    names = _METRICS.get(settings.kind, settings.metric_names)
    scorers = {name: _scorer(name, settings, rows) for name in names}
    examples = examples_of(settings, run)
    schema = [file_hash(settings.json_schema)] if settings.json_schema else []

    def score(engine: Engine, shown: Sequence[Row] = rows) -> Mapping[str, Scores]:
        pairs = generate(engine, shown, settings, run)
        return {name: scorer(pairs) for name, scorer in scorers.items()}

    def baseline(engine: Engine) -> Mapping[str, Scores]:
        return score(
            engine, [with_prompt(row, settings.baseline_prompt or run.data.system_prompt, examples) for row in rows]
        )

    sha256 = digest([content_of(row) for row in rows], [content_of(row) for row in examples], *schema)
    texts = tuple(map(overlap.text_of, rows))
    return Task(settings, sha256, score, baseline if settings.has_baseline else None, texts)


def generate(engine: Engine, rows: Sequence[Row], settings: TaskConfig, run: RunConfig) -> Pairs:
    """Greedy answers and references.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    return answered(engine, rows, run, what=f"task {settings.name}", max_new_tokens=settings.max_new_tokens)


def answered(engine: Engine, rows: Sequence[Row], run: RunConfig, *, what: str, max_new_tokens: int = 0) -> Pairs:
    """Greedy answers and references, as the run asks for answers.

    Args:
        engine: The model.
        rows: What to ask.
        run: Its settings.
        what: What messages call it.
        max_new_tokens: 0: the run's.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    max_new_tokens = max_new_tokens or run.evaluation.max_new_tokens
    require_short(engine, rows, run, what=what, max_new_tokens=max_new_tokens)
    return evaluation.generate(
        engine,
        rows,
        batch_size=run.evaluation.batch_size,
        max_new_tokens=max_new_tokens,
        system_prompt=run.data.system_prompt,
    )


def require_short(engine: Engine, rows: Sequence[Row], run: RunConfig, *, what: str, max_new_tokens: int) -> None:
    """Refuse rows that the model cannot answer, before anything is asked.

    Args:
        engine: The model.
        rows: What will be asked.
        run: Its settings.
        what: What messages call it.
        max_new_tokens: Longest answer.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    limit = likelihood.max_length_tokens(engine)
    for row in rows:
        num_tokens = len(prompts.prompt_ids(row, engine.tokenizer, system_prompt=run.data.system_prompt)[0])
        if num_tokens + max_new_tokens > limit:
            raise DataError(
                f"{what}, {row.row_id}: a prompt of {num_tokens} tokens and {max_new_tokens} new ones, "
                f"and the model takes {limit}; lower max_new_tokens or baseline_examples, or shorten the row"
            )


def with_prompt(row: Row, prompt: str, examples: Sequence[Row]) -> Row:
    """A row after an instruction and answered examples; what system message it had comes after the instruction."""
    own = row.messages[0].content if row.messages[0].role == "system" else ""
    system = "\n\n".join(part for part in (prompt, own) if part)
    turns = [message for example in examples for message in example.messages if message.role != "system"]
    rest = [message for message in row.messages if message.role != "system"]
    first = [Message("system", system)] if system else []
    return dataclasses.replace(row, messages=(*first, *turns, *rest))


def examples_of(settings: TaskConfig, run: RunConfig) -> list[Row]:
    """The first rows of the baseline's own file.

    Raises:
        DataError: It is missing or unusable, or has too few rows.
    """
    found = loading.rows_of(settings.baseline_data, run) if settings.baseline_data else []
    if len(found) < settings.baseline_examples:
        raise DataError(
            f"{settings.baseline_data}: {len(found)} rows, and task {settings.name} asks for baseline_examples = "
            f"{settings.baseline_examples}; lower it or add rows"
        )
    return found[: settings.baseline_examples]


def _scorer(name: str, settings: TaskConfig, rows: Sequence[Row]) -> Callable[[Pairs], Scores]:
    """How one metric makes scores of answers.

    Raises:
        DataError: A reference without a word, where words are counted; or as `labels.label_set`.
    """
    wordless = [row.row_id for row in rows if not metrics.has_words(row.messages[-1].content)]
    if name in ("rouge1", "rouge2", "rougeL") and wordless:
        raise DataError(
            f"task {settings.name}: the reference of {wordless[0]} (so of {len(wordless)} rows) has no word, so "
            f"{name} would be 0 whatever is answered; mend the rows or choose another metric"
        )
    if name in ("label_accuracy", "macro_f1"):
        known = labels.label_set(settings.labels, [row.messages[-1].content for row in rows])
        return lambda pairs: _labelled(name, [tuple(labels.number_of(t, known) for t in pair) for pair in pairs])
    if name == "json":
        check = json_answers.checker(Path(settings.json_schema).expanduser())
    else:
        check = metrics.PER_ROW.get(name, is_json)
    return lambda pairs: of_rows([check(*pair) for pair in pairs])


def _labelled(name: str, numbers: Sequence[tuple[int, ...]]) -> Scores:
    """Numbers of the labels given and wanted, as one of the two metrics of labels."""
    if name == "macro_f1":
        return Scores(tuple((float(given), float(wanted)) for given, wanted in numbers), "macro_f1")
    return of_rows([given == wanted for given, wanted in numbers])


def is_json(given: str, wanted: str) -> float:
    """Whether the answer is one JSON value of any kind.

    Example:
        >>> is_json('{"a": 1}', ""), is_json("a: 1", "")
        (1.0, 0.0)
    """
    try:
        json.loads(given, parse_constant=json_answers.refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def shown(row: Row) -> str:
    """What is asked in a row, for a reader: the question alone, or all turns with their roles."""
    asked = [message for message in row.messages[:-1] if message.role != "system"]
    if len(asked) == 1:
        return asked[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in asked)


def content_of(row: Row) -> list[list[str]]:
    """What a row says, without where it was read."""
    return [[message.role, message.content] for message in row.messages]
