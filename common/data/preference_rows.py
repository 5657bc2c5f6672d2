"""The one reader of rows with a preference, for sites, polish stages and commands: pairs, and answers that are rated.

Columns are those of TRL 1.16. Each is text or a list of messages; an answer to a list of messages may be plain text.
Pairs without `prompt` are whole conversations that begin in the same way ("implicit prompt").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, Final

from common.data import shapes
from common.data.problems import UnusableError
from common.data.rows import Columns, Message, Row
from common.errors import DataError

PAIR: Final = ("prompt", "chosen", "rejected")
RATED: Final = ("prompt", "completion", "label")
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {"dpo": PAIR, "kto": RATED}
AS_PAIR: Final = "for DPO write `prompt`, `chosen` and `rejected`, each as text or each as a list of messages"
AS_RATED: Final = "for KTO write `prompt`, `completion` and `label`, which is true or false"
AS_LABEL: Final = "write true for a good answer and false for a bad one; a .csv file cannot, use .jsonl"
AS_DIFFERENT: Final = "remove the row: a pair without a difference teaches nothing and only adds noise"
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {"dpo": ("chosen", "rejected"), "kto": RATED}


def objective_of(names: Iterable[str], *, source: str, wanted: str = "") -> str:
    """Which of the two forms a data set has.

    Args:
        wanted: "dpo" or "kto" if it must have that form; "" takes the form that it has.

    Raises:
        DataError: It has the columns of both forms, or not those of the form.
    """
    names = set(names)
    fitting = [objective for objective, needed in _NEEDED.items() if names.issuperset(needed)]
    if len(fitting) > 1:
        raise DataError(f"{source}: has the columns of pairs and of ratings: keep one form a file")
    if not fitting or wanted not in ("", *fitting):
        remedy = {"dpo": AS_PAIR, "kto": AS_RATED}.get(wanted, f"{AS_PAIR}; {AS_RATED}")
        missing = [name for name in _NEEDED[wanted or "dpo"] if name not in names]
        raise DataError(
            f"{source}: has no column {' and no column '.join(map(repr, missing))} among its {len(names)}: {remedy}"
        )
    return fitting[0]


def choose(names: set[str], columns: Columns, *, source: str) -> shapes.Converter:
    """How rows of an objective are read.

    Args:
        columns: Objective and unit column.

    Returns:
        As `shapes.choose`.

    Raises:
        DataError: It has the columns of another form or of both, or lacks the unit column.
    """
    objective_of(names, source=source, wanted=columns.objective)
    convert = shapes.choose(
        {"prompt", "completion"} | names & {columns.unit}, Columns(unit=columns.unit), source=source
    )
    if columns.objective == "kto":
        return partial(_rated, convert=convert)
    return partial(_pair, convert=convert, has_prompt="prompt" in names)


def conversation(fields: Mapping[str, Any], *, answer: str, place: str) -> Row:
    """One prompt and one answer in normal form; the prompt is never learnt from.

    Args:
        fields: The row; "prompt" and the answer are text or lists of messages.
        place: Where the row was read; also its unit.

    Raises:
        UnusableError: Something is missing, empty or of the wrong type.
    """
    convert = shapes.choose({"prompt", "completion"}, Columns(), source=place)
    return _answered(fields, answer, columns=Columns(), place=place, convert=convert)


def is_same(one: Sequence[Message], other: Sequence[Message]) -> bool:
    """Whether two answers say the same, white space aside.

    Example:
        >>> is_same([Message("assistant", "two  words")], [Message("assistant", "two words ")])
        True
    """
    return normal(one) == normal(other)


def normal(turns: Sequence[Message]) -> tuple[str, ...]:
    """Turns without differences in white space."""
    return tuple(f"{turn.role}: {' '.join(turn.content.split())}" for turn in turns)


def _pair(
    fields: Mapping[str, Any], *, columns: Columns, place: str, convert: shapes.Converter, has_prompt: bool
) -> Row:
    """One pair: the conversation with the chosen answer, and the rejected one beside it."""
    given = fields if has_prompt else _with_prompt(fields)
    chosen, rejected = (
        _answered(given, name, columns=columns, place=place, convert=convert) for name in ("chosen", "rejected")
    )
    if is_same(chosen.messages, rejected.messages):
        raise UnusableError("'chosen' and 'rejected' are the same, so nothing is preferred", AS_DIFFERENT)
    return replace(chosen, rejected=rejected.messages)


def _rated(fields: Mapping[str, Any], *, columns: Columns, place: str, convert: shapes.Converter) -> Row:
    """One answer with what people said of it."""
    label = fields.get("label")
    if not isinstance(label, bool):
        kind = "missing" if label is None else f"{type(label).__name__} and not true or false"
        raise UnusableError(f"'label' is {kind}", AS_LABEL)
    row = _answered(fields, "completion", columns=columns, place=place, convert=convert)
    return replace(row, is_desirable=label)


def _answered(
    fields: Mapping[str, Any], answer: str, *, columns: Columns, place: str, convert: shapes.Converter
) -> Row:
    """Prompt and one answer, by the reader of `prompt` and `completion`."""
    prompt, completion = fields.get("prompt"), fields.get(answer)
    if isinstance(prompt, list) and isinstance(completion, str) and completion.strip():
        completion = [{"role": "assistant", "content": completion}]
    try:
        row = convert({**fields, "prompt": prompt, "completion": completion}, columns=columns, place=place)
    except UnusableError as error:
        what = error.what.replace("'completion", f"'{answer}").replace("completion[", f"{answer}[")
        raise UnusableError(what, error.remedy) from None
    num_prompt = row.num_context or 1
    if row.messages[num_prompt].role != "assistant":
        raise UnusableError(f"{answer!r} does not begin with the assistant's message", shapes.AS_CHAT)
    return replace(row, num_context=num_prompt)


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
