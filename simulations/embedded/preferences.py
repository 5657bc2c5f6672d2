"""Preferences made from the embedded records: the right answer against a wrong one that the same task has elsewhere.

A wrong answer is one that the same hospital gives to the same instruction for another note, so that length and form do
not tell which of the two is right.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from simulations.embedded.records import Row

PAIR_COLUMNS = ("site", "patient_id", "prompt", "chosen", "rejected")
RATING_COLUMNS = ("site", "patient_id", "prompt", "completion", "label")


def pairs(rows: Sequence[Row], *, seed: int = 2026) -> list[dict[str, Any]]:
    """One pair for each record.

    Args:
        rows: From `records.generate`.
        seed: Chooses the wrong answers.

    Returns:
        Rows with the keys of `PAIR_COLUMNS`.

    Example:
        >>> from simulations.embedded import records
        >>> row = pairs(records.generate())[0]
        >>> row["patient_id"], row["chosen"] != row["rejected"]
        ('alder-0001', True)
    """
    rng = Random(f"{seed}/pairs")  # noqa: S311  synthetic data, not secrets
    return [
        dict(zip(PAIR_COLUMNS, (*_asked(row), row["output"], wrong), strict=True))
        for row, wrong in zip(rows, _wrong_answers(rows, rng), strict=True)
    ]


def ratings(rows: Sequence[Row], *, seed: int = 2026) -> list[dict[str, Any]]:
    """One rated answer for each record, right or wrong by a coin; see `pairs`.

    Example:
        >>> from simulations.embedded import records
        >>> {row["label"] for row in ratings(records.generate())} == {True, False}
        True
    """
    rng = Random(f"{seed}/ratings")  # noqa: S311  synthetic data, not secrets
    table = []
    for row, wrong in zip(rows, _wrong_answers(rows, rng), strict=True):
        is_right = rng.random() < 0.5
        given = row["output"] if is_right else wrong
        table.append(dict(zip(RATING_COLUMNS, (*_asked(row), given, is_right), strict=True)))
    return table


def _asked(row: Row) -> tuple[str, str, str]:
    """Site, patient and prompt of a record."""
    return row["site"], row["patient_id"], f"{row['instruction']}\n\n{row['input']}"


def _wrong_answers(rows: Sequence[Row], rng: Random) -> list[str]:
    """For each record another answer to its task at its site."""
    known: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        known.setdefault((row["site"], row["instruction"]), set()).add(row["output"])
    return [rng.choice(sorted(known[row["site"], row["instruction"]] - {row["output"]})) for row in rows]
