"""Pairs out of ratings and out of clinicians' edits, written as a preference file."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from common import storage
from common.data import preference_rows
from common.data import read as reading
from common.data.files import Located
from common.data.preference_rows import is_same
from common.data.problems import UnusableError
from common.errors import ConfigError
from server.preferences import files
from server.preferences.files import Pair, Rated, Turns

AS_RATINGS: Final = (
    "write `prompt`, `completion` and `score` in each row, or `prompt` with lists `completions` and `scores`"
)


@dataclass(frozen=True)
class Built:
    """Pairs or ratings, and what was left out on the way.

    Attributes:
        left_out: How many were left out, by reason.
    """

    rows: Sequence[Pair | Rated]
    num_read: int
    left_out: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Give the counts as JSON types."""
        return {"num_read": self.num_read, "num_written": len(self.rows), "left_out": self.left_out}


def from_ratings(path: Path, *, margin: float = 0.0) -> Built:
    """Make pairs of every two answers to one prompt whose scores differ by more than `margin`.

    An answer that several raters scored counts with its mean score.

    Args:
        path: Rows of `prompt`, `completion`, `score`, or of `prompt` with lists `completions` and `scores`.
        margin: Scores that differ by this or less are a tie, as are equal answers; at least 0.

    Returns:
        Pairs by prompt, in the file's order; ties are counted and left out.

    Raises:
        ConfigError: `margin` is negative or not finite.
        DataError: The file cannot be read, or rows are unusable.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError("--margin must be 0 or more")
    located = reading.locate(str(path))
    pairs, num_ties, num_alone = [], 0, 0
    # Every prompt's answers, each with its scores and their rows; in the file's order.
    by_prompt: dict[Turns, dict[Turns, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    for scored in reading.convert_all(located, _scored):
        for prompt, answer, score, row_id in scored:
            by_prompt[prompt][answer].append((score, row_id))
    for prompt, answers in by_prompt.items():
        num_alone += len(answers) == 1
        means = {answer: math.fsum(score for score, _ in scores) / len(scores) for answer, scores in answers.items()}
        for first, second in combinations(answers, 2):
            difference = means[first] - means[second]
            if abs(difference) <= margin or is_same(first, second):
                num_ties += 1
                continue
            better, worse = (first, second) if difference > 0 else (second, first)
            pairs.append(Pair(prompt, better, worse, row_id=answers[better][0][1]))
    return Built(pairs, len(located), {"ties": num_ties, "prompts with one answer": num_alone})


def from_edits(path: Path, *, draft: str = "draft", edited: str = "edited") -> Built:
    """Make pairs of a model's draft and what a clinician made of it: the edited text is preferred.

    Args:
        path: Rows of `prompt`, a draft and the edited text.

    Returns:
        Pairs in the file's order; drafts that nobody changed, white space aside, are counted and left out.

    Raises:
        DataError: The file cannot be read, or rows are unusable.
    """
    located = reading.locate(str(path))
    pairs = reading.convert_all(located, lambda row: pair_of(row.fields, draft, edited, row_id=row.place))
    return different(pairs, num_read=len(located), left_out={}, reason="unchanged drafts")


def different(
    pairs: Sequence[Pair], *, num_read: int, left_out: dict[str, int], reason: str = "equal answers"
) -> Built:
    """Leave out pairs that no reader would take, as both answers are the same, white space aside."""
    kept = [pair for pair in pairs if not is_same(pair.chosen, pair.rejected)]
    return Built(kept, num_read, {**left_out, reason: len(pairs) - len(kept)})


def write(built: Built, path: Path, *, is_overwriting: bool = False) -> None:
    """Write a preference file, wholly or not at all.

    Args:
        built: Has at least one row.
        is_overwriting: Whether a file that is there may go.

    Raises:
        ConfigError: There is nothing to write, the name is not .jsonl, or the file is there already.
        StorageError: It cannot be written.
    """
    if not built.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in built.left_out.items()) or "none"
        raise ConfigError(f"{path}: nothing to write: all rows were left out ({reasons}); add others")
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path}: give it a name that ends with .jsonl")
    if path.exists() and not is_overwriting:
        raise ConfigError(f"{path}: exists already: give another name, or --force")
    storage.write_atomic(path, as_lines(map(files.as_fields, built.rows)))


def as_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def pair_of(fields: dict[str, Any], rejected: str, chosen: str, *, row_id: str) -> Pair:
    """A pair out of three columns.

    Raises:
        UnusableError: One of them is missing, empty or of the wrong type.
    """
    better = preference_rows.conversation(fields, answer=chosen, place=row_id)
    worse = preference_rows.conversation(fields, answer=rejected, place=row_id)
    return files.pair_of(replace(better, rejected=worse.messages))


def _scored(row: Located) -> list[tuple[Turns, Turns, float, str]]:
    """Prompt, answer, score and row, of each answer in a row."""
    completions, scores = row.fields.get("completions"), row.fields.get("scores")
    if completions is None and scores is None:
        completions, scores = [row.fields.get("completion")], [row.fields.get("score")]
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise UnusableError("has not as many scores as completions", AS_RATINGS)
    scored = []
    for completion, score in zip(completions, scores, strict=True):
        fields = {"prompt": row.fields.get("prompt"), "completion": completion}
        prompt, answer = files.split(preference_rows.conversation(fields, answer="completion", place=row.place))
        number: Any = score
        if isinstance(score, str):  # as .csv files have no others
            try:
                number = float(score)
            except ValueError:
                raise UnusableError("'score' is text that is no number", AS_RATINGS) from None
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            kind = "missing" if number is None else "no finite number"
            raise UnusableError(f"'score' is {kind}", AS_RATINGS)
        scored.append((prompt, answer, float(number), row.place))
    return scored
