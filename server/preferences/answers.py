"""A rater's answers: one line each, on the disk before the next task is shown; a file that broke off is continued."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, get_args

from common.errors import ConfigError, DataError
from common.journal import Journal
from server.preferences import blind
from server.preferences.blind import Task

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)
UNDO: Final = "undo"
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Answers:
    """What one rater answered.

    Attributes:
        tasks_sha256: Of the tasks file that was answered.
        choices: By task number; a task that was undone is not there.
    """

    rater: str
    tasks_sha256: str
    choices: dict[int, Choice]


class Session:
    """One rater at one file of answers; use it as a context, which holds the file for itself.

    Attributes:
        tasks: All tasks, in order.
        answers: What was answered until now.
    """

    def __init__(self, tasks_file: Path, answers_file: Path, *, rater: str) -> None:
        """Open tasks and answers, and go on where the answers end.

        Raises:
            ConfigError: The rater's name is unfit, or is not the one in the file.
            DataError: A file is unreadable, or the answers are of other tasks.
            StorageError: The answers cannot be written, or another session holds them.
        """
        if not _NAME.fullmatch(rater):
            raise ConfigError("--rater must be a name of letters, digits, dot, dash and underscore, at most 64")
        self.tasks, digest = blind.read_tasks(tasks_file), blind.digest(tasks_file)
        self._journal = Journal(answers_file, lock="refuse")
        try:
            self._journal.cut()
            if not self._journal.size_bytes:
                self._append({"rater": rater, "tasks_sha256": digest})
            self.answers = read(answers_file)
            if self.answers.tasks_sha256 != digest:
                raise DataError(f"{answers_file}: answers other tasks than {tasks_file.name}: name another --answers")
            if self.answers.rater != rater:
                raise ConfigError(f"{answers_file}: is another rater's: give each rater a file of their own")
        except BaseException:
            self.close()
            raise

    @property
    def current(self) -> Task | None:
        """The first task without an answer; None if there is none."""
        return next((task for task in self.tasks if task.number not in self.answers.choices), None)

    @property
    def num_done(self) -> int:
        """Tasks that have an answer, a skip included."""
        return len(self.answers.choices)

    @property
    def last(self) -> int | None:
        """Number of the task that was answered last; None before the first answer."""
        return next(reversed(self.answers.choices), None)

    def answer(self, number: int, choice: Choice) -> None:
        """Record an answer to the current task; it is on the disk when this returns.

        Raises:
            ValueError: Another task is the current one, or there is no such choice.
            StorageError: It could not be written.
        """
        task = self.current
        if task is None or task.number != number or choice not in CHOICES:
            raise ValueError("not an answer to the current task")
        self._append({"task": number, "answer": choice})
        self.answers.choices[number] = choice

    def undo(self) -> None:
        """Take the last answer back; its task is the current one again.

        Raises:
            ValueError: There is nothing to take back.
            StorageError: It could not be written.
        """
        number = self.last
        if number is None:
            raise ValueError("there is no answer to take back")
        self._append({"task": number, "answer": UNDO})
        del self.answers.choices[number]

    def close(self) -> None:
        """Let the file go."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _append(self, fields: dict[str, Any]) -> None:
        """Write a line and wait until it is on the disk."""
        self._journal.append(json.dumps(fields).encode() + b"\n")


def read(path: Path) -> Answers:
    """Read a file of answers; a last line that broke off is not counted.

    Raises:
        DataError: It is missing or not what a session writes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
    choices: dict[int, Choice] = {}
    number = 1
    try:
        head, *events = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        rater, digest = str(head["rater"]), str(head["tasks_sha256"])
        for event in events:
            number += 1
            task, choice = event["task"], event["answer"]
            if type(task) is not int or choice not in (*CHOICES, UNDO) or (choice == UNDO) != (task in choices):
                raise ValueError("no answer")
            if choice == UNDO:
                del choices[task]
            else:
                choices[task] = choice
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path.name} line {number}: is not a rater's answer; restore the file from a copy") from None
    return Answers(rater, digest, choices)


def of_same_tasks(answered: Sequence[Answers]) -> str:
    """The hash of the tasks that all of them answered.

    Raises:
        DataError: They answered different tasks, or two files are of one rater.
    """
    if len({answers.tasks_sha256 for answers in answered}) != 1:
        raise DataError("the raters answered different tasks; name files of answers to one tasks file")
    if len({answers.rater for answers in answered}) < len(answered):
        raise DataError("two files are of the same rater; name one file a rater")
    return answered[0].tasks_sha256
