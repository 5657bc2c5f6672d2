"""Instructions whose fulfilment a program can check.

Source: the idea and the two figures are those of IFEval, Zhou et al. 2023, arXiv:2311.07911, in their strict form; the
constraints are our own and fewer.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from common.errors import DataError

_SENTENCE_END: Final = re.compile(r"(?<![.!?])[.!?]++(?=\s|$)")  # linear, as all patterns here


def num_words(text: str) -> int:
    """Words of a text."""
    return len(text.split())


def num_bullets(text: str) -> int:
    """Lines that begin with `-`, `*` or a bullet."""
    return len(re.findall(r"^[^\S\n]*+[-*\u2022]\s++\S", text, flags=re.MULTILINE))


def num_sentences(text: str) -> int:
    """Sentences by their marks at the end; text after the last mark is one too."""
    ends = list(_SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(rest.strip())


def is_json_value(text: str) -> bool:
    """Whether the whole text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


NUMBERS: Final[Mapping[str, Callable[[str, int], bool]]] = {
    "max_words": lambda text, value: num_words(text) <= value,
    "min_words": lambda text, value: num_words(text) >= value,
    "num_bullets": lambda text, value: num_bullets(text) == value,
    "max_sentences": lambda text, value: num_sentences(text) <= value,
}
TEXTS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "contains": lambda text, value: value.casefold() in text.casefold(),
    "excludes": lambda text, value: value.casefold() not in text.casefold(),
    "starts_with": lambda text, value: text.strip().casefold().startswith(value.casefold()),
    "ends_with": lambda text, value: text.strip().casefold().endswith(value.casefold()),
}
PLAIN: Final[Mapping[str, Callable[[str], bool]]] = {
    "lower_case": lambda text: text == text.lower(),
    "upper_case": lambda text: text == text.upper(),
    "no_comma": lambda text: "," not in text,
    "json": lambda text: is_json_value(text.strip()),
}


def is_met(text: str, constraint: Mapping[str, Any]) -> bool:
    """Whether an answer meets a constraint; an empty answer meets none.

    Example:
        >>> is_met("one two", {"kind": "max_words", "value": 2}), is_met("", {"kind": "lower_case"})
        (True, False)
    """
    kind: str = constraint["kind"]
    value: Any = constraint.get("value")
    if not text.strip():
        return False
    if kind in PLAIN:
        return PLAIN[kind](text)
    return NUMBERS[kind](text, value) if kind in NUMBERS else TEXTS[kind](text, value)


def check(constraint: object, *, where: str) -> dict[str, Any]:
    """A constraint of a file.

    Raises:
        DataError: It is none that is known, or has another value than it needs.
    """
    known = ", ".join((*NUMBERS, *TEXTS, *PLAIN))
    is_object = isinstance(constraint, dict) and {"kind"} <= constraint.keys() <= {"kind", "value"}
    if not isinstance(constraint, dict) or not is_object or not isinstance(constraint["kind"], str):
        raise DataError(f"{where}: a constraint is an object with kind and value; the kinds are {known}")
    kind, value = constraint["kind"], constraint.get("value")
    is_right = (
        (kind in PLAIN and value is None)
        or (kind in NUMBERS and type(value) is int and value >= 0)
        or (kind in TEXTS and isinstance(value, str) and value != "")
    )
    if not is_right:
        raise DataError(
            f"{where}: unknown constraint or wrong value; a whole number for {', '.join(NUMBERS)}, text for "
            f"{', '.join(TEXTS)}, no value for {', '.join(PLAIN)}"
        )
    return constraint
