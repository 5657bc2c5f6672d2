"""A blind comparison: tasks whose sides are shuffled, and the key that tells them apart, in a file of its own.

Half of the tasks have the first candidate on the left, so that a rater who prefers a side prefers no candidate. Tasks
and key never lie in one file; what a rater's page is served from is the tasks alone.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common import storage
from common.data import read as reading
from common.data.preference_rows import is_same
from common.errors import ConfigError, DataError
from server.preferences import build, files
from server.preferences.files import Pair, Turns

VERSION: Final = 1
NO_ANSWER: Final = "[no answer]"  # shown all the same: to leave it out would spare whoever gave none
MAKE_ANEW: Final = "make tasks and key anew with `silotune-server preferences blind`"


@dataclass(frozen=True)
class Task:
    """One comparison, as a rater sees it.

    Attributes:
        number: Its place in the tasks file, from 1.
        prompt: The turns before the answers.
    """

    number: int
    prompt: Turns
    left: Turns
    right: Turns


@dataclass(frozen=True)
class Key:
    """What no rater may see.

    Attributes:
        tasks_sha256: Of the tasks file that it belongs to.
        names: The two candidates, first and second.
        is_swapped: For each task, whether the second candidate is on the left.
        rows: For each task, the row of the source that it was made of, from 1.
        num_identical: Rows that were left out, since both candidates answered the same.
        seed: What sides and order were drawn with.
    """

    tasks_sha256: str
    names: tuple[str, str]
    is_swapped: tuple[bool, ...]
    rows: tuple[int, ...]
    num_identical: int
    seed: int


def make(source: Path, *, between: Sequence[str], seed: int, tasks: Path, key: Path) -> Key:
    """Write tasks and key for a file of prompts with two candidates each; rows where both are the same are left out.

    Args:
        source: Rows of `prompt` and two columns with the candidates' answers.
        seed: Draws sides and order; recorded in the key.
        key: New .json file, in another folder than the tasks.

    Returns:
        The key.

    Raises:
        ConfigError: `between` does not name two columns, a file is there already, or both would share a folder.
        DataError: The source cannot be read, rows are unusable, or the candidates never differ.
        StorageError: A file cannot be written.
    """
    if len(between) != 2 or len(set(between)) < 2 or "" in between:
        raise ConfigError("--between must name two different columns, such as base,tuned")
    check_new(tasks, key)
    first, second = between
    located = reading.locate(str(source))
    pairs = reading.convert_all(located, lambda row: build.pair_of(row.fields, first, second, row_id=row.place))
    return write(pairs, names=(first, second), seed=seed, tasks=tasks, key=key)


def write(pairs: Sequence[Pair], *, names: tuple[str, str], seed: int, tasks: Path, key: Path) -> Key:
    """Write tasks and key for answers of two candidates; pairs with equal answers are left out.

    Args:
        pairs: For each row of the source the first candidate's answer as the rejected, the second's as the chosen one.
        seed: Draws sides and order; recorded in the key.

    Raises:
        DataError: The candidates never differ.
        StorageError: A file cannot be written.
    """
    draws = random.Random(seed)  # noqa: S311 - an order, no secret
    different = [number for number, pair in enumerate(pairs) if not is_same(pair.chosen, pair.rejected)]
    if not different:
        raise DataError(
            f"{names[0]} and {names[1]} are the same in every row, {len(pairs)} in all, so there is nothing to rank: "
            "compare others"
        )
    order = draws.sample(different, len(different))
    is_swapped = draws.sample([number % 2 == 1 for number in range(len(order))], len(order))
    lines = []  # which hold nothing that distinguishes the candidates
    for number, swapped in zip(order, is_swapped, strict=True):
        fields = files.as_fields(pairs[number])
        left, right = ("chosen", "rejected") if swapped else ("rejected", "chosen")
        lines.append({"prompt": fields["prompt"], "left": fields[left], "right": fields[right]})
    content = build.as_lines(lines)
    sha256 = hashlib.sha256(content).hexdigest()
    rows, num_identical = tuple(number + 1 for number in order), len(pairs) - len(order)
    made = Key(sha256, names, tuple(is_swapped), rows, num_identical, seed)
    storage.write_atomic(key, json.dumps({"version": VERSION, **vars(made)}, indent=1).encode(), mode=0o600)
    storage.write_atomic(tasks, content)  # last: tasks without a key would be of no use
    return made


def check_new(tasks: Path, key: Path) -> None:
    """Refuse files that would unblind raters, overwrite others or not be read back.

    Raises:
        ConfigError: The names are unfit, both would share a folder, or one is there already.
    """
    if tasks.suffix != ".jsonl" or key.suffix != ".json":
        raise ConfigError(f"{tasks}, {key}: give tasks a name that ends with .jsonl, and the key one with .json")
    if tasks.resolve().parent == key.resolve().parent:
        raise ConfigError(f"{key}: lies in the folder of the tasks: give --key another folder, which no rater can read")
    if existing := [path for path in (tasks, key) if path.exists()]:
        raise ConfigError(f"{existing[0]}: exists already: give another name; tasks and keys are never overwritten")


def read_tasks(path: Path) -> list[Task]:
    """Read a tasks file.

    Raises:
        DataError: It is missing, unreadable or of another form.
    """
    located = reading.locate(str(path))
    pairs = reading.convert_all(located, lambda row: build.pair_of(row.fields, "right", "left", row_id=row.place))
    return [Task(number, pair.prompt, pair.chosen, pair.rejected) for number, pair in enumerate(pairs, start=1)]


def read_key(path: Path, tasks: Path) -> Key:
    """Read the key of a tasks file.

    Raises:
        DataError: It is missing, damaged, or belongs to other tasks.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        version = fields.pop("version")
        fields |= {name: tuple(fields[name]) for name in ("names", "is_swapped", "rows")}
        key = Key(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: is not a readable key: name the file of --key; else {MAKE_ANEW}") from None
    if version != VERSION or key.tasks_sha256 != digest(tasks):
        raise DataError(f"{path}: is not the key of {tasks.name}: name the key that was made with it; else {MAKE_ANEW}")
    return key


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return storage.sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
