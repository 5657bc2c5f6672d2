"""Kind `choice`: which of several answers a model holds to be the likeliest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.overlap import Text
from common.errors import DataError
from common.model.base import Engine
from common.run.schema.tasks import ChoiceTask, ComparedTask, EvaluationConfig
from common.run.schema.training import DataConfig
from server.evaluate.figures import likelihood
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks.task import Task, digest, examples_of, table_of, text_of


@dataclass(frozen=True)
class Choice:
    """A question with answers to choose from.

    Attributes:
        context: What stands before an answer.
        answer: Which one is right, from 0.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


def load(settings: ChoiceTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read the columns `question`, `choices` (a list) and `answer` (its index, from 0).

    Raises:
        DataError: The rows, or a baseline's examples, are missing or unusable.
    """
    return of_table(settings, table_of(settings), batch_size=evaluation.batch_size)


def of_table(settings: ComparedTask, table: Sequence[Mapping[str, Any]], *, batch_size: int) -> Task:
    """The task on rows that were read; `batch_size` answers are in memory at once."""
    rows = [choice_of(fields, where=f"{settings.name}, row {number}") for number, fields in enumerate(table, start=1)]
    examples = [
        choice_of(fields, where=f"{settings.name}, example {number}")
        for number, fields in enumerate(examples_of(settings), start=1)
    ]
    before = "\n\n".join([*filter(None, [settings.baseline_prompt]), *(solved(example) for example in examples), ""])

    def baseline(engine: Engine) -> Mapping[str, Scores]:
        return score(engine, rows, before=before, batch_size=batch_size)

    return Task(
        settings,
        digest([vars(row) for row in rows], [vars(example) for example in examples]),
        lambda engine: score(engine, rows, batch_size=batch_size),
        baseline if settings.has_baseline else None,
        tuple(Text(row.context, row.choices[row.answer]) for row in rows),
    )


def score(engine: Engine, rows: Sequence[Choice], *, batch_size: int, before: str = "") -> Mapping[str, Scores]:
    """Accuracy of the likeliest answer (`acc`), and of the likeliest a character (`acc_norm`).

    Raises:
        DataError: A question and its answer are longer than the model takes.

    Source: lm-evaluation-harness 0.4.13, output type multiple_choice; ties go to the first.
    """
    pairs = [likelihood.encode_pair(engine, before + row.context, f" {text}") for row in rows for text in row.choices]
    totals = iter(likelihood.log_likelihoods(engine, pairs, batch_size=batch_size))
    sums = [[next(totals)[0] for _ in row.choices] for row in rows]
    return {
        "acc": of_rows([best(values) == row.answer for row, values in zip(rows, sums, strict=True)]),
        "acc_norm": of_rows(
            [
                best([value / len(text) for value, text in zip(values, row.choices, strict=True)]) == row.answer
                for row, values in zip(rows, sums, strict=True)
            ]
        ),
    }


def best(values: Sequence[float]) -> int:
    """Place of the largest; the first of equals.

    Example:
        >>> best([-2.0, -1.0, -1.0])
        1
    """
    return max(range(len(values)), key=values.__getitem__)


def choice_of(fields: Mapping[str, Any], *, where: str) -> Choice:
    """One row of a file.

    Raises:
        DataError: A column is missing or of another type.
    """
    question = text_of(fields, "question", where=where)
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: column choices must hold a list of at least two texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: column answer must hold the number of a choice, from 0 to {len(choices) - 1}")
    return Choice(f"Question: {question}\nAnswer:", tuple(choices), answer)


def solved(example: Choice) -> str:
    """A question with its right answer."""
    return f"{example.context} {example.choices[example.answer]}"
