"""Kind `probe`: general knowledge and obedience that a fine-tuned model must not have forgotten."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.data import overlap
from common.data.overlap import Text
from common.data.rows import Message, Row
from common.errors import DataError
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig, ProbeTask
from common.run.schema.training import DataConfig
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import answers as task_answers
from server.evaluate.tasks import choice, constraints
from server.evaluate.tasks.task import Task, digest, table_of, text_of

Constraints = Sequence[Mapping[str, Any]]


def load(settings: ProbeTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read rows of multiple choice (`choices`), or instructions with `constraints`, whichever they are.

    Raises:
        DataError: The rows are missing, unusable, or of neither shape.
    """
    table = table_of(settings)
    if "choices" in table[0]:
        return choice.of_table(settings, table, batch_size=evaluation.batch_size)
    if "constraints" not in table[0]:
        raise DataError(
            f"{settings.data}: a probe has columns question, choices and answer, or instruction and constraints; "
            "this file has neither"
        )
    if settings.baseline_examples:
        raise DataError(f"task {settings.name}: instructions have no reference; remove baseline_examples")
    asked: list[Row] = []
    wanted: list[Constraints] = []
    for number, fields in enumerate(table, start=1):
        where = f"{settings.name}, row {number}"
        question, listed = text_of(fields, "instruction", where=where), fields.get("constraints")
        if not isinstance(listed, list) or not listed:
            raise DataError(f"{where}: column constraints must hold a list of at least one")
        asked.append(Row((Message("user", question), Message("assistant", "")), unit="", row_id=where))
        wanted.append([constraints.check(item, where=where) for item in listed])
    generate = task_answers.asker(settings, data, evaluation)

    def score(engine: Engine, shown: Sequence[Row] = asked) -> Mapping[str, Scores]:
        return scores([text for text, _ in generate(engine, shown)], wanted)

    def baseline(engine: Engine) -> Mapping[str, Scores]:
        return score(engine, [task_answers.with_prompt(row, settings.baseline_prompt, ()) for row in asked])

    sha256 = digest([[row.messages[0].content, listed] for row, listed in zip(asked, wanted, strict=True)])
    texts = tuple(Text(overlap.text_of(row).asked) for row in asked)  # which have no right answer
    return Task(settings, sha256, score, baseline if settings.has_baseline else None, texts)


def scores(answers: Sequence[str], wanted: Sequence[Constraints]) -> Mapping[str, Scores]:
    """Share of answers that meet all their constraints (`followed`), and of constraints met (`constraints`)."""
    met = [
        [constraints.is_met(text, constraint) for constraint in of_row]
        for text, of_row in zip(answers, wanted, strict=True)
    ]
    counted = tuple((float(sum(of_row)), float(len(of_row))) for of_row in met)
    return {"followed": of_rows([all(of_row) for of_row in met]), "constraints": Scores(counted, "ratio")}
