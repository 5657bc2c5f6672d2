"""Preference files as a whole: pairs of a better and a worse answer, or single answers that are called good or bad.

Rows are read by `common/data/preference_rows.py`, as sites and stages read them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.data import preference_rows
from common.data import read as reading
from common.data.problems import Problems
from common.data.rows import Columns, Message, Row

Turns = tuple[Message, ...]
KINDS: Final = {"dpo": "pairs", "kto": "ratings"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which one is preferred.

    Attributes:
        prompt: The turns before the answers.
        chosen: The better answer; its last turn is the assistant's.
        row_id: Where it was read, such as "pairs.jsonl line 12"; holds no field's value.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    row_id: str


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, and whether it is good.

    Attributes:
        prompt: The turns before the answer.
        completion: The answer; its last turn is the assistant's.
        label: Whether it is a good one.
        row_id: Where it was read; holds no field's value.
    """

    prompt: Turns
    completion: Turns
    label: bool
    row_id: str


@dataclass(frozen=True)
class Scan:
    """All that a file holds, the unusable rows aside.

    Attributes:
        kind: "pairs" or "ratings", by the columns.
        pairs: Pairs; empty in a file of ratings.
        rated: Ratings; empty in a file of pairs.
        problems: The rows that cannot be used.
    """

    kind: str
    pairs: list[Pair]
    rated: list[Rated]
    problems: Problems


def read(path: str | Path) -> list[Pair] | list[Rated]:
    """Read a preference file, of whichever of the two forms it has.

    Args:
        path: A file, folder or `datasets` id, as for `common.data.read.read`.

    Returns:
        Pairs or ratings, in the file's order.

    Raises:
        DataError: The file is missing or unreadable, has the columns of neither form, or some rows are unusable: the
            first five are named. No message holds a field's value.
    """
    content = scan(path)
    content.problems.raise_if_any()
    return content.pairs or content.rated


def scan(path: str | Path) -> Scan:
    """Read what can be read, and list what cannot.

    Args:
        path: As for `read`.

    Raises:
        DataError: The file is missing or unreadable as a whole, or has the columns of neither form.
    """
    located = reading.locate(str(path))
    objective = preference_rows.objective_of({name for row in located for name in row.fields}, source=str(path))
    rows, problems = reading.scan(located, Columns(objective=objective), source=str(path))
    pairs = [pair_of(row) for row in rows if row.rejected]
    rated = [Rated(*split(row), bool(row.is_desirable), row.row_id) for row in rows if not row.rejected]
    return Scan(KINDS[objective], pairs, rated, problems)


def pair_of(row: Row) -> Pair:
    """A row with a rejected answer as a pair."""
    return Pair(*split(row), row.rejected[row.num_context :], row.row_id)


def as_fields(row: Pair | Rated) -> dict[str, Any]:
    """Give a row as JSON types: text where prompt and answers are single turns, lists of messages otherwise.

    Args:
        row: To write; `read` gives an equal one back, places aside.
    """
    sides = (
        {"chosen": row.chosen, "rejected": row.rejected} if isinstance(row, Pair) else {"completion": row.completion}
    )
    is_text = [turn.role for turn in row.prompt] == ["user"] and all(len(turns) == 1 for turns in sides.values())
    fields: dict[str, Any] = {
        name: turns[0].content if is_text else [{"role": turn.role, "content": turn.content} for turn in turns]
        for name, turns in {"prompt": row.prompt, **sides}.items()
    }
    return fields if isinstance(row, Pair) else {**fields, "label": row.label}


def split(row: Row) -> tuple[Turns, Turns]:
    """The prompt and the answer of a row with a preference."""
    return row.messages[: row.num_context], row.messages[row.num_context :]
