"""Rows that a stage is not to train on, since its adapter is judged on them: those of tasks, and held-out ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.data import overlap
from common.data.overlap import Text
from common.data.rows import Row
from common.errors import DataError
from common.run.schema.polish import PolishStage
from server.view import polish

if TYPE_CHECKING:
    from server.evaluate.tasks.task import Task  # loads torch


@dataclass(frozen=True)
class Apart:
    """A table that is kept apart from training.

    Attributes:
        name: What messages call it, such as "task medquad (test.jsonl)".
        texts: Of its rows.
    """

    name: str
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Found:
    """What of a stage's data stands in tables that are kept apart.

    Attributes:
        dropped: Places of rows that are left out.
        overlaps: By table, for those of which rows are trained on: `num_rows`, `num_exact` and `num_near` of the table.
    """

    dropped: frozenset[int] = frozenset()
    overlaps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class KnownRows:
    """Rows of sites that the coordinator can see, as in a simulation; at real sites none.

    Attributes:
        train: What they train on.
        held_out: What they are scored on.
    """

    train: Sequence[Row] = ()
    held_out: Sequence[Row] = ()


def tables(tasks: "Sequence[Task]", known: KnownRows) -> list[Apart]:
    """What no stage is to train on: rows of tasks, and held-out rows that are known."""
    found = [Apart(_name(task), task.texts) for task in tasks if task.texts]
    held_out = tuple(map(overlap.text_of, known.held_out))
    return [*found, Apart("the sites' held-out rows", held_out)] if held_out else found


def warnings(tasks: "Sequence[Task]", known: KnownRows) -> list[str]:
    """What is too good of a task's figures, as sites train on its rows."""
    train, said = [overlap.text_of(row) for row in known.train], []
    for task in tasks if train else ():
        found = overlap.find(task.texts, train)
        counts = {"num_rows": len(task.texts), "num_exact": len(found.exact), "num_near": len(found.near)}
        if found.exact or found.near:
            said.append(f"{polish.sentence(_name(task), counts)} are trained on at the sites: its figures are too good")
    return said


def _name(task: "Task") -> str:
    """A task, and its file."""
    return f"task {task.name} ({task.settings.non_members_data or task.settings.data})"


def compare(texts: Sequence[Text], apart: Sequence[Apart], *, stage: PolishStage) -> Found:
    """Hold a stage's data against what is kept apart, as its `overlap` says.

    Args:
        texts: Of the stage's rows.
        apart: What they are not to hold.
        stage: Says what happens to rows that are the same.

    Raises:
        DataError: Some are, and this is an error; names files, counts and remedies.
    """
    found = overlap.find(texts, [text for table in apart for text in table.texts])
    dropped = found.exact | found.near
    if not dropped or stage.overlap == "drop":
        return Found(dropped=dropped)
    overlaps, first = {}, 0
    for table in apart:
        places = set(range(first, first + len(table.texts)))
        first += len(table.texts)
        exact, close = places & found.other_exact, places & found.other_near
        if exact | close:
            overlaps[table.name] = {"num_rows": len(places), "num_exact": len(exact), "num_near": len(close)}
    if stage.overlap == "error":
        raise DataError(
            f"{stage.data}, stage '{stage.name}': {len(dropped)} of {len(texts)} rows stand in rows that the result is "
            f"judged on: {'; '.join(map(polish.sentence, overlaps, overlaps.values()))}. Remove them from one of the "
            'files, or set the stage\'s overlap to "drop", which leaves them out, or to "allow", which trains on them '
            "and says so"
        )
    return Found(overlaps=overlaps)
