"""The three shapes of a row and their one normal form."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from common.data import units
from common.data.problems import UnusableError, all_of
from common.data.rows import Columns, Message, Row
from common.errors import DataError

Fields = Mapping[str, Any]
Converter = Callable[..., Row]
Turns = tuple[Message, ...]

ROLES: Final = ("system", "user", "assistant")
FILL_IN: Final = "fill in the missing text or remove the row"
AS_TEXT: Final = "write text in the columns that are trained on"
AS_CHAT: Final = (
    "write messages as a list of objects with `role` (system, user, assistant) and `content`, an answer last"
)
TASK_NAMES: Final = ("question", "query", "task", "problem", "prompt", "request", "source", "text", "message", "user")
ANSWER_NAMES: Final = ("answer", "response", "completion", "reply", "target", "label", "summary", "result", "assistant")
CHAT_NAMES: Final = ("conversations", "conversation", "chat", "dialog", "dialogue", "turns")


def choose(names: set[str], columns: Columns, *, source: str) -> Converter:
    """Find the shape that a data set has.

    Returns:
        `convert(fields, *, columns, place)`, which gives a `Row` or raises `UnusableError`.

    Raises:
        DataError: No shape fits or several do, or a column that the settings name is nowhere.
    """
    shapes: dict[tuple[str, ...], Callable[..., tuple[Turns, int, bool, int]]] = {
        ("messages",): _from_messages,
        ("prompt", "completion"): _from_completion,
        (columns.instruction, columns.output): _from_columns,  # last: settings that name the same columns win
    }
    fitting = {needed: convert for needed, convert in shapes.items() if names.issuperset(needed)}
    if not fitting:
        raise DataError(f"{source}: {_nearest(names, columns)}")
    if len(fitting) > 1:
        listed = " and ".join("/".join(needed) for needed in fitting)
        raise DataError(
            f"{source}: has the columns of two shapes, {listed}: remove those that are not to be trained on"
        )
    # a column that the settings name and no row has would do nothing, and nobody would notice
    if columns.input != Columns.input and columns.input not in names:
        raise DataError(f"{source}: no row has the column {columns.input!r}: correct data.input_column")
    if columns.unit and columns.unit not in names:
        raise DataError(
            f"{source}: no row has the column {columns.unit!r}: set data.unit_column to the one that names the patient "
            'or customer, or to "" if every row is someone else\'s'
        )
    return partial(_convert, read_turns=next(iter(fitting.values())))


def _nearest(names: set[str], columns: Columns) -> str:
    """What is missing and which setting would help; only column names that we know are repeated."""
    if chat := [name for name in CHAT_NAMES if name in names]:
        return f"has no column 'messages': rename {chat[0]!r} to it; {AS_CHAT}"
    wanted = {"instruction": columns.instruction, "output": columns.output}
    missing = {setting: name for setting, name in wanted.items() if name not in names}
    candidates = {"instruction": TASK_NAMES, "output": ANSWER_NAMES}
    taken = set(wanted.values()) | {columns.input}
    remedies = []
    for setting in missing:
        known = [name for name in candidates[setting] if name in names and name not in taken]
        remedies.append(f"data.{setting}_column = " + (f'"{known[0]}"' if known else f"the column of the {setting}"))
    return (
        f"has no column {' and no column '.join(map(repr, missing.values()))} among its {len(names)}, nor 'messages', "
        f"nor 'prompt' with 'completion': set {' and '.join(remedies)}"
    )


def _convert(
    fields: Fields, *, columns: Columns, place: str, read_turns: Callable[..., tuple[Turns, int, bool, int]]
) -> Row:
    """One row in normal form."""
    (messages, num_context, is_input_empty, input_start), unit = all_of(
        lambda: read_turns(fields, columns),
        lambda: units.name_of(fields.get(columns.unit), columns.unit) if columns.unit else place,
    )
    return Row(messages, unit, place, num_context, is_input_empty, input_start)


def _from_columns(fields: Fields, columns: Columns) -> tuple[Turns, int, bool, int]:
    """Instruction, a blank line and the input, if there is one; then the output."""
    given = fields.get(columns.input)
    task, about, answer = all_of(
        lambda: _filled(fields.get(columns.instruction), columns.instruction),
        lambda: "" if given is None else _text(given, columns.input),
        lambda: _filled(fields.get(columns.output), columns.output, is_answer=True),
    )
    before = f"{task}\n\n" if about.strip() else task
    question = before + about if about.strip() else task
    return (Message("user", question), Message("assistant", answer)), 0, not about.strip(), len(before)


def _from_messages(fields: Fields, columns: Columns) -> tuple[Turns, int, bool, int]:
    """A conversation of which every answer is trained on."""
    turns = _turns(fields.get("messages"), "messages")
    _check_order(turns)
    return turns, 0, False, 0


def _from_completion(fields: Fields, columns: Columns) -> tuple[Turns, int, bool, int]:
    """Two texts, or two lists of messages of which the first is only context."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) != isinstance(completion, list) and prompt is not None and completion is not None:
        raise UnusableError("has a list in one of 'prompt' and 'completion' and no list in the other", AS_CHAT)
    if not isinstance(prompt, list):
        given, wanted = all_of(
            lambda: _filled(prompt, "prompt"), lambda: _filled(completion, "completion", is_answer=True)
        )
        return (Message("user", given), Message("assistant", wanted)), 0, False, 0
    context = _turns(prompt, "prompt")
    turns = context + _turns(completion, "completion")
    _check_order(turns)
    return turns, len(context), False, 0


def _turns(value: Any, name: str) -> Turns:
    """A list of messages."""
    if value is None:
        raise UnusableError(f"has no {name!r}", FILL_IN)
    if not isinstance(value, list):
        raise UnusableError(f"{name!r} is {type(value).__name__} and not a list", AS_CHAT)
    if not value:
        raise UnusableError(f"{name!r} is empty", FILL_IN)
    turns = []
    for number, item in enumerate(value):
        what = f"{name}[{number}]"
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise UnusableError(f"{what} is not an object with `role` and `content`", AS_CHAT)
        if any(field is not None for key, field in item.items() if key not in ("role", "content")):
            raise UnusableError(f"{what} has more than `role` and `content`, which would be lost", AS_CHAT)
        if item["role"] not in ROLES:
            raise UnusableError(f"{what} has another role than system, user or assistant", AS_CHAT)
        is_answer = item["role"] == "assistant"
        turns.append(Message(item["role"], _filled(item["content"], f"{what}.content", is_answer=is_answer)))
    return tuple(turns)


def _check_order(turns: Sequence[Message]) -> None:
    """A system message only first, then the user, and an answer at the end."""
    roles = [turn.role for turn in turns]
    if roles[-1] != "assistant":
        raise UnusableError("has no answer: the last message is not the assistant's", AS_CHAT)
    rest = roles[1:] if roles[0] == "system" else roles
    if "system" in rest:
        raise UnusableError("has a system message that is not the first", AS_CHAT)
    if rest[0] != "user":
        raise UnusableError("begins with an answer: the user's message is missing", AS_CHAT)


def _filled(value: Any, name: str, *, is_answer: bool = False) -> str:
    """Text that is there."""
    text = "" if value is None else _text(value, name)
    if not text.strip():
        raise UnusableError(f"has no answer in {name!r}" if is_answer else f"has nothing in {name!r}", FILL_IN)
    return text


def _text(value: Any, name: str) -> str:
    """Text that a tokenizer can read."""
    if not isinstance(value, str):
        raise UnusableError(f"{name!r} is {type(value).__name__} and not text", AS_TEXT)
    if "\0" in value:
        raise UnusableError(f"{name!r} has a NUL character", "remove it; the file may be damaged")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableError(f"{name!r} has half a surrogate pair", "write the character whole, as UTF-8") from None
    return value
