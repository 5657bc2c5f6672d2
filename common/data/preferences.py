"""Preference data in one form: pairs of a better and a worse answer, or single answers that are called good or bad.

Columns are those of TRL 1.16: `prompt`, `chosen`, `rejected` for pairs, `prompt`, `completion`, `label` for ratings.
Each is text or a list of messages; an answer to a list of messages may be plain text. Without `prompt`, `chosen` and
`rejected` are whole conversations that begin in the same way ("implicit prompt").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from common.data import read as reading
from common.data import shapes
from common.data.files import Located
from common.data.problems import Problems, UnusableError
from common.errors import DataError
from common.rows import Columns, Message, Row

Turns = tuple[Message, ...]
Unusable = list[tuple[str, UnusableError]]
T = TypeVar("T")
PAIR: Final = ("prompt", "chosen", "rejected")
RATED: Final = ("prompt", "completion", "label")
AS_PAIR: Final = "write `prompt`, `chosen` and `rejected`, each as text or each as a list of messages"
AS_LABEL: Final = "write true for a good answer and false for a bad one; a .csv file cannot, use .jsonl"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which one is preferred. It is one unit: both answers share `unit`.

    Attributes:
        prompt: The turns before the answers.
        chosen: The better answer; its last turn is the assistant's.
        rejected: The worse one, likewise.
        unit: The privacy unit that the pair belongs to. Private.
        row_id: Where it was read, such as "pairs.jsonl line 12"; holds no field's value.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    unit: str
    row_id: str

    def rows(self) -> tuple[Row, Row]:
        """The conversation with the better and with the worse answer; only the answer is learnt from."""
        return _row(self.prompt, self.chosen, self), _row(self.prompt, self.rejected, self)


@dataclass(frozen=True)
class Rated:
    """One answer to a prompt, and whether it is good.

    Attributes:
        prompt: The turns before the answer.
        completion: The answer; its last turn is the assistant's.
        label: Whether it is a good one.
        unit: The privacy unit that the row belongs to. Private.
        row_id: Where it was read; holds no field's value.
    """

    prompt: Turns
    completion: Turns
    label: bool
    unit: str
    row_id: str

    def row(self) -> Row:
        """The conversation; only the answer is learnt from."""
        return _row(self.prompt, self.completion, self)


@dataclass(frozen=True)
class Scan:
    """All that a file holds, the unusable rows aside.

    Attributes:
        kind: "pairs" or "ratings", by the columns.
        pairs: Pairs; empty in a file of ratings.
        rated: Ratings; empty in a file of pairs.
        unusable: Place of each row that cannot be used, and why.
    """

    kind: Literal["pairs", "ratings"]
    pairs: list[Pair]
    rated: list[Rated]
    unusable: Unusable


def read(path: str | Path, *, unit_column: str = "") -> list[Pair] | list[Rated]:
    """Read a preference file, of whichever of the two forms it has.

    Args:
        path: A file, folder or `datasets` id, as for `common.data.read.read`.
        unit_column: Column that names the patient or customer; "" makes every row a unit of its own.

    Returns:
        Pairs or ratings, in the file's order.

    Raises:
        DataError: The file is missing or unreadable, has the columns of neither form, or some rows are unusable: the
            first five are named. No message holds a field's value.
    """
    found = scan(path, unit_column=unit_column)
    problems = Problems()
    for place, error in found.unusable:
        problems.add(place, error)
    problems.raise_if_any()
    return found.pairs or found.rated


def read_pairs(path: str | Path, *, unit_column: str = "") -> list[Pair]:
    """Read a file that must hold pairs.

    Args:
        path: As for `read`.
        unit_column: As for `read`.

    Raises:
        DataError: As for `read`, or it holds ratings.
    """
    found = read(path, unit_column=unit_column)
    pairs = [row for row in found if isinstance(row, Pair)]
    if not pairs:
        raise DataError(f"{path}: holds ratings of single answers, not pairs: use it for KTO, or {AS_PAIR}")
    return pairs


def read_rated(path: str | Path, *, unit_column: str = "") -> list[Rated]:
    """Read a file that must hold ratings of single answers.

    Args:
        path: As for `read`.
        unit_column: As for `read`.

    Raises:
        DataError: As for `read`, or it holds pairs.
    """
    found = read(path, unit_column=unit_column)
    rated = [row for row in found if isinstance(row, Rated)]
    if not rated:
        raise DataError(
            f"{path}: holds pairs, not ratings: write `prompt`, `completion` and `label`, or use it for DPO"
        )
    return rated


def scan(path: str | Path, *, unit_column: str = "") -> Scan:
    """Read what can be read, and tell what cannot.

    Args:
        path: As for `read`.
        unit_column: As for `read`.

    Raises:
        DataError: The file is missing or unreadable as a whole, or has the columns of neither form.
    """
    located = reading.locate(str(path))
    names = {name for row in located for name in row.fields}
    if unit_column and unit_column not in names:
        raise DataError(f"{path}: no row has the column {unit_column!r}: name the one of the patient or customer")
    if _is_rated(names, path):
        rated, unusable = _each(located, lambda row: _rated(row, unit_column))
        return Scan("ratings", [], rated, unusable)
    pairs, unusable = _each(located, lambda row: _pair(row, unit_column, has_prompt="prompt" in names))
    return Scan("pairs", pairs, [], unusable)


def as_fields(row: Pair | Rated) -> dict[str, Any]:
    """Give a row as JSON types: text where prompt and answers are single turns, lists of messages otherwise.

    Args:
        row: To write; `read` gives an equal one back, unit and place aside.
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


def conversation(fields: Mapping[str, Any], *, answer: str, place: str, unit_column: str = "") -> Row:
    """One prompt and one answer in normal form.

    Args:
        fields: The row; "prompt" and the answer are text or lists of messages.
        answer: Column of the answer.
        place: Where the row was read.
        unit_column: Column of the privacy unit, or "".

    Raises:
        UnusableError: Something is missing, empty or of the wrong type.
    """
    prompt, completion = fields.get("prompt"), fields.get(answer)
    if isinstance(prompt, list) and isinstance(completion, str) and completion.strip():
        completion = [{"role": "assistant", "content": completion}]
    columns = Columns(unit=unit_column)
    convert = shapes.choose({"prompt", "completion", *filter(None, [unit_column])}, columns, source=place)
    plain = {
        "prompt": prompt,
        "completion": completion,
        **({unit_column: fields.get(unit_column)} if unit_column else {}),
    }
    try:
        row = convert(plain, columns=columns, place=place)
    except UnusableError as error:
        what = error.what.replace("'completion", f"'{answer}").replace("completion[", f"{answer}[")
        raise UnusableError(what, error.remedy) from None
    if split(row)[1][0].role != "assistant":
        raise UnusableError(f"{answer!r} does not begin with the assistant's message", shapes.AS_CHAT)
    return row


def split(row: Row) -> tuple[Turns, Turns]:
    """The prompt and the answer of a conversation that `conversation` made."""
    num_prompt = row.num_context or len(row.messages) - 1
    return row.messages[:num_prompt], row.messages[num_prompt:]


def _is_rated(names: set[str], path: str | Path) -> bool:
    """Which of the two forms a file has."""
    is_pair, is_rated = {"chosen", "rejected"} <= names, {"completion", "label"} <= names
    if is_pair and is_rated:
        raise DataError(f"{path}: has the columns of pairs and of ratings: keep one form a file")
    if not is_pair and not is_rated:
        missing = [name for name in PAIR if name not in names]
        raise DataError(
            f"{path}: has no column {missing[0]!r} among its {len(names)}: {AS_PAIR}; or `completion`, `label`"
        )
    return is_rated


def _each(located: Sequence[Located], convert: Callable[[Located], T]) -> tuple[list[T], Unusable]:
    """Every row in normal form, and those that have none."""
    rows: list[T] = []
    unusable = []
    for row in located:
        try:
            rows.append(convert(row))
        except UnusableError as error:
            unusable.append((row.place, error))
    return rows, unusable


def _pair(row: Located, unit_column: str, *, has_prompt: bool) -> Pair:
    """One pair."""
    fields = row.fields if has_prompt else _with_prompt(row.fields)
    sides = [
        conversation(fields, answer=name, place=row.place, unit_column=unit_column) for name in ("chosen", "rejected")
    ]
    (prompt, chosen), (_, rejected) = map(split, sides)
    return Pair(prompt, chosen, rejected, unit=sides[0].unit, row_id=row.place)


def _rated(row: Located, unit_column: str) -> Rated:
    """One rating."""
    label = row.fields.get("label")
    if not isinstance(label, bool):
        kind = "missing" if label is None else f"{type(label).__name__} and not true or false"
        raise UnusableError(f"'label' is {kind}", AS_LABEL)
    found = conversation(row.fields, answer="completion", place=row.place, unit_column=unit_column)
    prompt, completion = split(found)
    return Rated(prompt, completion, label, unit=found.unit, row_id=row.place)


def _with_prompt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Take the turns that both conversations begin with as the prompt; at the latest, answers begin at the last turn.

    Source: TRL 1.16, `trl.data_utils.extract_prompt`.
    """
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise UnusableError("has no 'prompt', and 'chosen' and 'rejected' are not lists of messages", AS_PAIR)
    shared = takewhile(lambda both: both[0] == both[1], zip(chosen[:-1], rejected[:-1], strict=False))
    num_prompt = sum(1 for _ in shared)
    if not num_prompt:
        raise UnusableError("has no 'prompt', and 'chosen' and 'rejected' do not begin with the same message", AS_PAIR)
    given = {"prompt": chosen[:num_prompt], "chosen": chosen[num_prompt:], "rejected": rejected[num_prompt:]}
    return {**fields, **given}


def _row(prompt: Turns, answer: Turns, source: Pair | Rated) -> Row:
    """A conversation of which only the answer is learnt from."""
    return Row((*prompt, *answer), unit=source.unit, row_id=source.row_id, num_context=len(prompt))
