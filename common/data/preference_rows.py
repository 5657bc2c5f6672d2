"""Rows with a preference, for a site's own training: pairs (`dpo`) and rated answers (`kto`), by TRL's column names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from common.data import shapes
from common.data.problems import UnusableError
from common.errors import DataError
from common.rows import Columns, Row

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
}
AS_LABEL: Final = "write true for a good answer and false for a bad one; a .csv file cannot, use .jsonl"


def choose(names: set[str], columns: Columns, *, source: str) -> shapes.Converter:
    """How rows of an objective are read.

    Args:
        names: All column names in the data set.
        columns: Objective and unit column.
        source: What messages call the data set.

    Returns:
        As `shapes.choose`.

    Raises:
        DataError: A column is missing.
    """
    needed = COLUMNS[columns.objective]
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"{source}: has no column {' and no column '.join(map(repr, missing))} among its {len(names)}, which "
            f"training.objective = '{columns.objective}' reads; name them {', '.join(needed)}, each prompt and answer "
            "as text or as a list of messages"
        )
    if columns.unit and columns.unit not in names:
        raise DataError(f"{source}: no row has the column {columns.unit!r}: set data.unit_column to the unit's, or ''")
    return _pair if columns.objective == "dpo" else _rated


def _pair(fields: Mapping[str, Any], *, columns: Columns, place: str) -> Row:
    """One pair: the conversation with the chosen answer, and the rejected one beside it."""
    chosen, rejected = (_answered(fields, name, columns=columns, place=place) for name in ("chosen", "rejected"))
    if chosen.messages == rejected.messages:
        raise UnusableError("'chosen' and 'rejected' are the same, so nothing is preferred", "remove the row")
    return replace(chosen, rejected=rejected.messages)


def _rated(fields: Mapping[str, Any], *, columns: Columns, place: str) -> Row:
    """One answer with what people said of it."""
    label = fields.get("label")
    if not isinstance(label, bool):
        kind = "missing" if label is None else f"{type(label).__name__} and not true or false"
        raise UnusableError(f"'label' is {kind}", AS_LABEL)
    return replace(_answered(fields, "completion", columns=columns, place=place), is_desirable=label)


def _answered(fields: Mapping[str, Any], answer: str, *, columns: Columns, place: str) -> Row:
    """Prompt and one answer, by the reader of `prompt` and `completion`; the prompt is never learnt from."""
    prompt, completion = fields.get("prompt"), fields.get(answer)
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    given = {**fields, "prompt": prompt, "completion": completion}
    convert = shapes.choose({"prompt", "completion"} | {columns.unit} - {""}, Columns(unit=columns.unit), source=place)
    try:
        row = convert(given, columns=columns, place=place)
    except UnusableError as error:
        what = error.what.replace("'completion", f"'{answer}").replace("completion[", f"{answer}[")
        raise UnusableError(what, error.remedy) from None
    num_prompt = len(prompt) if isinstance(prompt, list) else len(row.messages) - 1
    if row.messages[num_prompt].role != "assistant":
        raise UnusableError(f"{answer!r} does not begin with the assistant's message", shapes.AS_CHAT)
    return replace(row, num_context=num_prompt)
