"""Kind `probe`: general knowledge and obedience that a fine-tuned model must not have forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.data import overlap
from common.data.overlap import Text
from common.data.rows import Message, Row
from common.errors import DataError
from common.model.base import Engine
from common.run.config import RunConfig
from common.run.schema.tasks import TaskConfig
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import answers as task_answers
from server.evaluate.tasks import choice, constraints
from server.evaluate.tasks.task import Task, digest, table_of, text_of

Constraints = Sequence[Mapping[str, Any]]


def load(settings: TaskConfig, run: RunConfig) -> Task:
    """Read rows of multiple choice (`choices`), or instructions with `constraints`, whichever they are.

    Raises:
        DataError: The rows are missing, unusable, or of neither shape.
    """
    table = table_of(settings)
    if "choices" in table[0]:
        return choice.of_table(settings, table, run)
    if "constraints" in table[0]:
        return _of_instructions(settings, table, run)
    raise DataError(
        f"{settings.data}: a probe has columns question, choices and answer, or instruction and constraints; "
        "this file has neither"
    )


def _of_instructions(settings: TaskConfig, table: Sequence[Mapping[str, Any]], run: RunConfig) -> Task:
    """Instructions with constraints that a program checks."""
    if settings.baseline_examples:
        raise DataError(f"task {settings.name}: instructions have no reference; remove baseline_examples")
    rows = [_row(fields, where=f"{settings.name}, row {number}") for number, fields in enumerate(table, start=1)]
    asked = [row for row, _ in rows]

    def score(engine: Engine, shown: Sequence[Row] = asked) -> Mapping[str, Scores]:
        answers = task_answers.generate(engine, shown, settings, run)
        return scores([text for text, _ in answers], [wanted for _, wanted in rows])

    def baseline(engine: Engine) -> Mapping[str, Scores]:
        return score(engine, [task_answers.with_prompt(row, settings.baseline_prompt, ()) for row in asked])

    sha256 = digest([[row.messages[0].content, wanted] for row, wanted in rows])
    texts = tuple(Text(overlap.text_of(row).asked) for row in asked)  # which have no right answer
    return Task(settings, sha256, score, baseline if settings.has_baseline else None, texts)


def scores(answers: Sequence[str], wanted: Sequence[Constraints]) -> Mapping[str, Scores]:
    """Share of answers that meet all their constraints (`followed`), and of constraints met (`constraints`)."""
    met = [[constraints.is_met(text, one) for one in of_row] for text, of_row in zip(answers, wanted, strict=True)]
    counted = tuple((float(sum(of_row)), float(len(of_row))) for of_row in met)
    return {"followed": of_rows([all(of_row) for of_row in met]), "constraints": Scores(counted, "ratio")}


def _row(fields: Mapping[str, Any], *, where: str) -> tuple[Row, Constraints]:
    """One instruction and what is asked of its answer."""
    question = text_of(fields, "instruction", where=where)
    given = fields.get("constraints")
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: column constraints must hold a list of at least one")
    messages = (Message("user", question), Message("assistant", ""))
    return Row(messages, unit="", row_id=where), [constraints.check(one, where=where) for one in given]
