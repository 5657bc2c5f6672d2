"""Kinds `answers`, `number` and `json`: generated answers beside their references."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from common.data import overlap
from common.data.rows import Message, Row
from common.errors import DataError
from common.loss import evaluation as asking
from common.model import loading
from common.model.base import Engine
from common.run.schema.tasks import (
    LABEL_METRICS,
    AnswersTask,
    ComparedTask,
    EvaluationConfig,
    GeneratedTask,
    JsonTask,
    NumberTask,
)
from common.run.schema.training import DataConfig
from common.text import prompts
from server.evaluate.figures import json_answers, labels, likelihood, metrics
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks.task import Task, digest, file_hash

Answered = AnswersTask | NumberTask | JsonTask
Pairs = Sequence[tuple[str, str]]  # an answer and its reference
_METRICS: Final = {"number": ("number",), "json": ("valid_json", "json")}


def load(settings: Answered, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read rows, labels and schema.

    Raises:
        DataError: The rows, the schema or a baseline's examples are missing or unusable.
    """
    rows = loading.rows_of(settings.data, data)[: settings.max_rows or None]
    names = settings.metrics if isinstance(settings, AnswersTask) else _METRICS[settings.kind]
    scorers = {name: _scorer(name, settings, rows) for name in names}
    examples = examples_of(settings, data)
    generate = asker(settings, data, evaluation)
    schema_file = "" if isinstance(settings, NumberTask) else settings.json_schema
    schema = [file_hash(schema_file)] if schema_file else []

    def score(engine: Engine, shown: Sequence[Row] = rows) -> Mapping[str, Scores]:
        pairs = generate(engine, shown)
        return {name: scorer(pairs) for name, scorer in scorers.items()}

    def baseline(engine: Engine) -> Mapping[str, Scores]:
        return score(
            engine, [with_prompt(row, settings.baseline_prompt or data.system_prompt, examples) for row in rows]
        )

    sha256 = digest([content_of(row) for row in rows], [content_of(row) for row in examples], *schema)
    texts = tuple(map(overlap.text_of, rows))
    return Task(settings, sha256, score, baseline if settings.has_baseline else None, texts)


def asker(
    settings: GeneratedTask, data: DataConfig, evaluation: EvaluationConfig
) -> Callable[[Engine, Sequence[Row]], Pairs]:
    """What has a model answer the rows of a task, as its run asks for answers; see `answered`."""
    return partial(
        answered,
        what=f"task {settings.name}",
        max_new_tokens=settings.max_new_tokens or evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        system_prompt=data.system_prompt,
    )


def answered(
    engine: Engine, rows: Sequence[Row], *, what: str, max_new_tokens: int, batch_size: int, system_prompt: str
) -> Pairs:
    """Greedy answers and references.

    Raises:
        DataError: A prompt and its answer are longer than the model takes; nothing was asked then.
    """
    require_short(engine, rows, what=what, max_new_tokens=max_new_tokens, system_prompt=system_prompt)
    return asking.generate(
        engine, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, system_prompt=system_prompt
    )


def require_short(engine: Engine, rows: Sequence[Row], *, what: str, max_new_tokens: int, system_prompt: str) -> None:
    """Refuse rows that the model cannot answer, before anything is asked; arguments as for `answered`.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    limit = likelihood.max_length_tokens(engine)
    for row in rows:
        num_tokens = len(prompts.prompt_ids(row, engine.tokenizer, system_prompt=system_prompt)[0])
        if num_tokens + max_new_tokens > limit:
            raise DataError(
                f"{what}, {row.row_id}: a prompt of {num_tokens} tokens and {max_new_tokens} new ones, "
                f"and the model takes {limit}; lower max_new_tokens or baseline_examples, or shorten the row"
            )


def with_prompt(row: Row, prompt: str, examples: Sequence[Row]) -> Row:
    """A row after an instruction and answered examples; what system message it had comes after the instruction."""
    before = row.messages[0].content if row.messages[0].role == "system" else ""
    system = "\n\n".join(part for part in (prompt, before) if part)
    turns = [message for example in examples for message in example.messages if message.role != "system"]
    rest = [message for message in row.messages if message.role != "system"]
    first = [Message("system", system)] if system else []
    return dataclasses.replace(row, messages=(*first, *turns, *rest))


def examples_of(settings: ComparedTask, data: DataConfig) -> list[Row]:
    """The first rows of the baseline's own file.

    Raises:
        DataError: It is missing or unusable, or has too few rows.
    """
    rows = loading.rows_of(settings.baseline_data, data) if settings.baseline_data else []
    if len(rows) < settings.baseline_examples:
        raise DataError(
            f"{settings.baseline_data}: {len(rows)} rows, and task {settings.name} asks for baseline_examples = "
            f"{settings.baseline_examples}; lower it or add rows"
        )
    return rows[: settings.baseline_examples]


def _scorer(name: str, settings: Answered, rows: Sequence[Row]) -> Callable[[Pairs], Scores]:
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
    if isinstance(settings, AnswersTask) and name in LABEL_METRICS:
        known = labels.label_set(settings.labels, [row.messages[-1].content for row in rows])

        def label(pairs: Pairs) -> Scores:
            numbers = [[labels.number_of(text, known) for text in pair] for pair in pairs]
            if name == "macro_f1":
                return Scores(tuple((float(given), float(wanted)) for given, wanted in numbers), "macro_f1")
            return of_rows([given == wanted for given, wanted in numbers])

        return label
    if name == "json" and not isinstance(settings, NumberTask):
        check = json_answers.checker(Path(settings.json_schema).expanduser())
    else:
        check = metrics.PER_ROW.get(name, is_json)
    return lambda pairs: of_rows([check(*pair) for pair in pairs])


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
