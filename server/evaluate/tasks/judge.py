"""Kind `judge`: a model compares the adapter's answers with those of the base, or of the base with a prompt.

Every pair is judged in both orders. Only what wins in both has won; verdicts that differ are a tie, so a judge that
prefers a place prefers no model.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from common.data import overlap, read
from common.data.overlap import Text
from common.errors import DataError
from common.model import base, loading, store
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig, JudgeTask, TaskConfig
from common.run.schema.training import DataConfig
from server.evaluate.figures.bootstrap import Scores, of_rows
from server.evaluate.tasks import answers, judge_ask
from server.evaluate.tasks.judge_ask import Ask
from server.evaluate.tasks.task import Task, as_base, digest, text_of

_LABELS: Final = {"a": 1, "b": -1, "tie": 0}  # how much better the first answer is
_SIGNS: Final = {"A": 1, "B": -1, "TIE": 0}
QUESTION: Final = """Two assistants were asked the same. Compare their answers: which is more correct, complete and \
useful to the person who asked? Their order and length do not count.

[What was asked]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with exactly one word: A if answer A is better, B if answer B is better, TIE if neither is.
Verdict:"""
Pair = tuple[str, str, str]  # what was asked, and two answers


def load(settings: JudgeTask, data: DataConfig, evaluation: EvaluationConfig) -> Task:
    """Read rows in the run's columns, whose references do not count, and the pairs that people judged.

    Raises:
        DataError: Rows or pairs are missing or unusable.
        ConfigError: The key file cannot be used.
        ModelError: The judge's folder is not on this machine.
    """
    rows = loading.rows_of(settings.data, data)[: settings.max_rows or None]
    examples = answers.examples_of(settings, data)
    generate = answers.asker(settings, data, evaluation)
    human: list[tuple[str, str, str, str]] = []  # pairs with people's verdicts
    table = read.read_table(settings.calibration_data) if settings.calibration_data else []
    for number, fields in enumerate(table, start=1):
        where = f"{settings.calibration_data}, row {number}"
        prompt, first, second, label = (
            text_of(fields, name, where=where) for name in ("prompt", "a", "b", "preferred")
        )
        if label not in _LABELS:
            raise DataError(f"{where}: column preferred must hold a, b or tie")
        human.append((prompt, first, second, label))
    server = judge_ask.of_server(settings) if settings.judge_url else None
    folder = store.resolve(settings.judge_base) if settings.judge_base else Path()
    sha256 = "" if server else base.hash_base(folder)
    calibrated: list[Mapping[str, Scores]] = []  # the judge does not change from stage to stage

    def score(engine: Engine) -> Mapping[str, Scores]:
        ours, asked = generate(engine, rows), rows
        if settings.against == "prompt-only":
            instruction = settings.baseline_prompt or data.system_prompt
            asked = [answers.with_prompt(row, instruction, examples) for row in rows]
        with as_base(engine):
            theirs = generate(engine, asked)
        pairs = [
            (answers.shown(row), text, other) for row, (text, _), (other, _) in zip(rows, ours, theirs, strict=True)
        ]
        here = judge_ask.of_model(folder, engine, sha256=sha256, batch_size=evaluation.batch_size)
        with contextlib.nullcontext(server) if server else here as ask:
            if not calibrated:
                calibrated.append(calibration(ask, human, min_agreement=settings.min_agreement))
            return {**preferred(judge(ask, pairs)), **calibrated[0]}

    read_rows = [answers.content_of(row)[:-1] for row in rows], [answers.content_of(row) for row in examples]
    texts = tuple(Text(overlap.text_of(row).asked) for row in rows)
    return Task(settings, digest(*read_rows, human, QUESTION, sha256), score, texts=texts)


def tell_where_rows_go(tasks: Sequence[TaskConfig]) -> None:
    """Say on stderr, for each judge on another machine, that rows will leave this one."""
    for task in tasks:
        if isinstance(task, JudgeTask) and task.allow_remote:
            host = urlsplit(task.judge_url).hostname
            print(
                f"WARNING: task {task.name} sends its rows and all answers to {host}, another machine, since "
                "allow_remote = true; remove the task or let a model here judge (judge_base) if they may not leave",
                file=sys.stderr,
            )


def judge(ask: Ask, pairs: Sequence[Pair]) -> list[tuple[int | None, int | None]]:
    """For each pair how much better its first answer is (1, 0 or -1), as it stands and turned round; None: unreadable.

    Equal answers are a tie, and nobody is asked.
    """
    differing = [pair for pair in pairs if pair[1].strip() != pair[2].strip()]
    questions = [QUESTION.format(prompt=text, first=a, second=b) for text, a, b in differing]
    questions += [QUESTION.format(prompt=text, first=b, second=a) for text, a, b in differing]
    signs = [None if word is None else _SIGNS[word] for word in (ask(questions) if questions else [])]
    straight, turned = signs[: len(differing)], signs[len(differing) :]
    verdicts = iter(zip(straight, (None if sign is None else -sign for sign in turned), strict=True))
    return [next(verdicts) if pair[1].strip() != pair[2].strip() else (0, 0) for pair in pairs]


def verdict(both: tuple[int | None, int | None]) -> int:
    """What both orders say together: 1, 0 or -1.

    Example:
        >>> verdict((1, 1)), verdict((1, -1)), verdict((-1, 0)), verdict((None, 1))
        (1, 0, 0, 0)
    """
    return both[0] if both[0] is not None and both[0] == both[1] else 0


def preferred(verdicts: Sequence[tuple[int | None, int | None]]) -> dict[str, Scores]:
    """Figures of verdicts about (adapter's answer, other answer).

    `win_rate`: wins and half of the ties; 0.5 is no preference. `consistent`: pairs with the same verdict in both
    orders. `unparsable`: pairs with a reply in which there is no verdict; they count as ties.
    """
    return {
        "win_rate": of_rows([(1 + verdict(both)) / 2 for both in verdicts]),
        "consistent": of_rows([both[0] is not None and both[0] == both[1] for both in verdicts]),
        "unparsable": of_rows([None in both for both in verdicts], higher_is_better=False),
    }


def calibration(ask: Ask, human: Sequence[tuple[str, str, str, str]], *, min_agreement: float) -> dict[str, Scores]:
    """How the judge does on pairs that people judged, asked in the same way.

    `agreement` is the share of equal verdicts, `kappa` Cohen's, `reliable` 1 if the agreement is not below the limit;
    without such pairs `reliable` is 0.
    """
    if not human:
        return {"reliable": of_rows([0.0])}
    verdicts = [verdict(both) for both in judge(ask, [(text, a, b) for text, a, b, _ in human])]
    both_raters = list(zip(verdicts, [_LABELS[label] for *_, label in human], strict=True))
    agreement = of_rows([given == wanted for given, wanted in both_raters])
    codes = tuple((given + 1.0, wanted + 1.0) for given, wanted in both_raters)
    return {
        "agreement": agreement,
        "kappa": Scores(codes, "kappa"),
        "reliable": of_rows([float(agreement.value >= min_agreement)]),
    }
