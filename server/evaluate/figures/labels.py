"""Answers that are one of a closed set of labels."""

import re
from collections.abc import Sequence
from typing import Final

from common.errors import DataError

_EDGES: Final = " \t\r\n.,;:!?\"'`"
NO_LABEL: Final = -1


def normal(text: str) -> str:
    """Lower case, one space between words, no punctuation or quotes at the ends.

    Example:
        >>> normal(' "Card  Arrival." ')
        'card arrival'
    """
    return re.sub(r"\s+", " ", text).strip(_EDGES).casefold()


def label_set(written: Sequence[str], references: Sequence[str]) -> tuple[str, ...]:
    """The closed set: those written, or else all references; in normal form, sorted.

    Raises:
        DataError: A reference is not in the set, or nothing is left of it or of a label in normal form, so that an
            empty answer would be right.
    """
    wanted = {normal(text) for text in references}
    known = {normal(text) for text in written} if written else wanted
    if empty := [number for number, text in enumerate(references, start=1) if not normal(text)]:
        raise DataError(
            f"the reference of row {empty[0]} (so of {len(empty)} rows) is empty or punctuation alone, as which an "
            "empty answer would be right; write the label as a word"
        )
    if "" in known:
        raise DataError("a label is punctuation alone, as which an empty answer would be right; write it as a word")
    if outside := [number for number, text in enumerate(references, start=1) if normal(text) not in known]:
        raise DataError(
            f"the reference of row {outside[0]} is none of the {len(known)} labels (so of {len(outside)} rows); "
            "mend labels or the rows"
        )
    return tuple(sorted(known))


def number_of(text: str, labels: Sequence[str]) -> int:
    """Which label a text is, exactly after normalisation; -1 if it is none."""
    return labels.index(normal(text)) if normal(text) in labels else NO_LABEL
