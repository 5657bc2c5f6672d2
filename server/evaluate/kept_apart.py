"""Rows that a stage is not to train on, since its adapter is judged on them: those of tasks, and held-out ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.data import overlap
from common.data.overlap import Text
from common.data.rows import Row
from common.errors import DataError
from common.run.schema.polish import PolishStage
from common.run.schema.tasks import MemorisationTask
from server.view import polish

if TYPE_CHECKING:
    from server.evaluate.tasks.task import Task  # loads torch


@dataclass(frozen=True)
class Apart:
    """A table that is kept apart from training.

    Attributes:
        name: What messages call it, such as "task medquad (test.jsonl)".
    """

    name: str
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class OverlapCounts:
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
        held_out: What they are scored on.
    """

    train: Sequence[Row] = ()
    held_out: Sequence[Row] = ()


def tables(tasks: "Sequence[Task]", known: KnownRows) -> list[Apart]:
    """What no stage is to train on: rows of tasks, and held-out rows that are known."""
    rows = [Apart(_name(task), task.texts) for task in tasks if task.texts]
    held_out = tuple(map(overlap.text_of, known.held_out))
    return [*rows, Apart("the sites' held-out rows", held_out)] if held_out else rows


def warnings(tasks: "Sequence[Task]", known: KnownRows) -> list[str]:
    """One sentence for each task whose figures are too good, as sites train on its rows."""
    train, reasons = [overlap.text_of(row) for row in known.train], []
    for task in tasks if train else ():
        same = overlap.find(task.texts, train)
        counts = {"num_rows": len(task.texts), "num_exact": len(same.exact), "num_near": len(same.near)}
        if same.exact or same.near:
            rows = polish.sentence(_name(task), counts)
            reasons.append(f"{rows} are trained on at the sites: its figures are too good")
    return reasons


def _name(task: "Task") -> str:
    """A task and its file, for messages."""
    settings = task.settings
    non_members = settings.non_members_data if isinstance(settings, MemorisationTask) else ""
    return f"task {task.name} ({non_members or settings.data})"


def compare(texts: Sequence[Text], apart: Sequence[Apart], *, stage: PolishStage) -> OverlapCounts:
    """Hold a stage's data against what is kept apart, as its `overlap` says.

    Args:
        apart: What they are not to hold.
        stage: Says what happens to rows that are the same.

    Raises:
        DataError: Some are, and this is an error; names files, counts and remedies.
    """
    same = overlap.find(texts, [text for table in apart for text in table.texts])
    dropped = same.exact | same.near
    if not dropped or stage.overlap == "drop":
        return OverlapCounts(dropped=dropped)
    overlaps, first = {}, 0
    for table in apart:
        numbers = set(range(first, first + len(table.texts)))
        first += len(table.texts)
        exact, close = numbers & same.other_exact, numbers & same.other_near
        if exact | close:
            overlaps[table.name] = {"num_rows": len(numbers), "num_exact": len(exact), "num_near": len(close)}
    if stage.overlap == "error":
        raise DataError(
            f"{stage.data}, stage '{stage.name}': {len(dropped)} of {len(texts)} rows stand in rows that the result is "
            f"judged on: {'; '.join(map(polish.sentence, overlaps, overlaps.values()))}. Remove them from one of the "
            'files, or set the stage\'s overlap to "drop", which leaves them out, or to "allow", which trains on them '
            "and says so"
        )
    return OverlapCounts(overlaps=overlaps)
