"""Answers and key together: which candidate won, and the preference file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import DataError
from server.evaluate.figures import intervals
from server.evaluate.figures.intervals import Estimate
from server.preferences import agreement, answers, blind
from server.preferences.answers import Answers, Choice
from server.preferences.blind import Key, Task
from server.preferences.build import Built
from server.preferences.files import Pair

MIN_DECIDED: Final = 30


@dataclass(frozen=True)
class Verdicts:
    """How often each candidate was preferred.

    Attributes:
        num_first: Tasks in which the first candidate was.
        num_second: Tasks in which the second was.
        num_ties: Tasks in which neither was.
        num_skipped: Tasks that were skipped or not reached.
    """

    num_first: int
    num_second: int
    num_ties: int
    num_skipped: int

    @property
    def win_rate(self) -> Estimate | None:
        """Share of the second candidate among decided tasks, with Wilson's interval; None without any."""
        decided = self.num_first + self.num_second
        return intervals.share(self.num_second, decided) if decided else None

    def as_dict(self) -> dict[str, Any]:
        """Give the counts as JSON types."""
        rate = self.win_rate
        return {**vars(self), "win_rate": vars(rate) if rate else None}


@dataclass(frozen=True)
class Outcome:
    """The result of a blind comparison.

    Attributes:
        names: The candidates, first and second.
        all_raters: By the majority of raters, task by task.
        left_right: How often left and right were preferred, over all raters.
        num_identical: Rows that no rater was shown, since both candidates answered the same.
        built: Pairs of the tasks that were decided.
    """

    names: tuple[str, str]
    all_raters: Verdicts
    by_rater: dict[str, Verdicts]
    agreements: list[dict[str, Any]]
    left_right: tuple[int, int]
    num_identical: int
    built: Built

    def as_dict(self) -> dict[str, Any]:
        """Give the result as JSON types."""
        return {
            "names": list(self.names),
            **self.all_raters.as_dict(),
            "num_left": self.left_right[0],
            "num_right": self.left_right[1],
            "num_identical": self.num_identical,
            "raters": {rater: verdicts.as_dict() for rater, verdicts in self.by_rater.items()},
            "agreements": self.agreements,
            **self.built.as_dict(),
        }


def unblind(tasks_file: Path, *, key_file: Path, answer_files: Sequence[Path]) -> Outcome:
    """Put raters' answers and the key together.

    Where several raters judged a task, the majority of those who preferred a side decides; as many votes for both is a
    tie. So each task counts once, however many raters there are.

    Raises:
        DataError: A file is unreadable, belongs to other tasks, or answers tasks that are not there.
    """
    key, tasks = blind.read_key(key_file, tasks_file), blind.read_tasks(tasks_file)
    answered = [answers.read(path) for path in answer_files]
    if answers.of_same_tasks(answered) != key.tasks_sha256:
        raise DataError(f"{tasks_file}: is not what the raters answered; name the tasks file that they were given")
    if any(number > len(tasks) or number < 1 for rater in answered for number in rater.choices):
        raise DataError(f"{tasks_file}: a rater answered a task that it does not have; restore the answers from a copy")
    by_rater = {rater.rater: _verdicts(_majority([rater], key), tasks) for rater in answered}
    winners = _majority(answered, key)
    sides = Counter(choice for rater in answered for choice in rater.choices.values())
    agreements = agreement.compare(answered) if len(answered) > 1 else []
    verdicts = _verdicts(winners, tasks)
    decided = []  # the preferred answer and the other
    for task in [task for task in tasks if winners.get(task.number) in (0, 1)]:
        is_left = winners[task.number] == int(key.is_swapped[task.number - 1])
        chosen, rejected = (task.left, task.right) if is_left else (task.right, task.left)
        decided.append(Pair(task.prompt, chosen, rejected, row_id=f"row {key.rows[task.number - 1]}"))
    pairs = [pair for pair in decided if blind.NO_ANSWER not in (pair.chosen[0].content, pair.rejected[0].content)]
    left_out = {"ties": verdicts.num_ties, "skipped or not reached": verdicts.num_skipped}
    built = Built(pairs, len(tasks), {**left_out, "with an empty answer": len(decided) - len(pairs)})
    return Outcome(key.names, verdicts, by_rater, agreements, (sides["left"], sides["right"]), key.num_identical, built)


def in_words(outcome: Outcome) -> list[str]:
    """Lines for people."""
    first, second = outcome.names
    verdicts, rate = outcome.all_raters, outcome.all_raters.win_rate
    lines = [
        f"{second} was preferred {verdicts.num_second} times, {first} {verdicts.num_first} times; {verdicts.num_ties} "
        f"ties, {verdicts.num_skipped} skipped or not reached"
    ]
    if outcome.num_identical:
        lines.append(f"rows that were not shown, both answers being equal: {outcome.num_identical}")
    if rate:
        is_clear = rate.low > 0.5 or rate.high < 0.5
        doubt = "" if is_clear else "; the interval holds 50 %, so neither is shown to be better"
        lines.append(
            f"{second} wins {rate.value:.1%} of decided tasks (95 % interval {rate.low:.1%} to {rate.high:.1%}){doubt}"
        )
    left, right = outcome.left_right
    if left + right >= MIN_DECIDED and intervals.sign_test(left, left + right) < 0.05:
        lines.append(f"left was preferred {left} times, right {right} times: more uneven than chance; ask the raters")
    for rater, counts in outcome.by_rater.items():
        if len(outcome.by_rater) > 1 and counts.win_rate:
            decided = counts.num_first + counts.num_second
            lines.append(f"{rater}: {second} wins {counts.win_rate.value:.1%} of {decided} decided tasks")
    return [*lines, *map(agreement.in_words, outcome.agreements)]


def _majority(answered: Sequence[Answers], key: Key) -> dict[int, int | None]:
    """The winner of each task; tasks that all raters skipped are not there."""
    winners: dict[int, int | None] = {}
    for number in sorted({number for rater in answered for number in rater.choices}):
        choices = [rater.choices[number] for rater in answered if rater.choices.get(number, "skip") != "skip"]
        second: Choice = "left" if key.is_swapped[number - 1] else "right"  # the side of the second candidate
        if choices:
            num_second = choices.count(second)
            lead = 2 * num_second - (len(choices) - choices.count("tie"))
            winners[number] = -1 if not lead else int(lead > 0)
    return winners


def _verdicts(winners: dict[int, int | None], tasks: Sequence[Task]) -> Verdicts:
    """Count winners."""
    counts = Counter(winners.get(task.number) for task in tasks)
    return Verdicts(counts[0], counts[1], counts[-1], counts[None])
