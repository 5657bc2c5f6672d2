"""Unusable rows, told together: the first few by name and the number of all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from common.errors import DataError

MAX_LISTED: Final = 5


class UnusableError(ValueError):
    """One row, or one file, that cannot be used.

    Attributes:
        what: What is wrong with it; names, types and sizes, never a field's value.
        remedy: What its owner can do.
        others: What else is wrong with the same row.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.others: tuple[UnusableError, ...] = ()


class Problems:
    """Collects what is wrong, so that a site corrects its file once and not row by row.

    Attributes:
        found: Place of each unusable row, and why.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, UnusableError]] = []

    def add(self, place: str, error: UnusableError) -> None:
        """Remember an unusable row, and all that is wrong with it.

        Args:
            place: Where it is, such as "train.jsonl line 12".
        """
        self.found += [(place, each) for each in (error, *error.others)]

    def raise_if_any(self) -> None:
        """Refuse the data set if a row is unusable.

        Raises:
            DataError: One line with the first rows, the number of all and the remedies.
        """
        if not self.found:
            return
        told, remedies = listed(self.found)
        num_more = len(self.found) - MAX_LISTED
        more = f"; and {num_more} more, {len(self.found)} in all" if num_more > 0 else ""
        raise DataError(f"{told}{more}. Remedy: {remedies}")


def listed(found: Sequence[tuple[str, UnusableError]]) -> tuple[str, str]:
    """What is wrong with the first rows, and what can be done about them."""
    first = found[:MAX_LISTED]
    told = "; ".join(f"{place}: {error.what}" for place, error in first)
    return told, "; ".join(dict.fromkeys(error.remedy for _, error in first))


def all_of(*steps: Callable[[], Any]) -> list[Any]:
    """Do every step, so that a row with two faults is told both.

    Raises:
        UnusableError: Of the first step that failed; those of the others are in its `others`.
    """
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except UnusableError as error:
            errors.append(error)
    if errors:
        errors[0].others += tuple(errors[1:])
        raise errors[0]
    return results


@contextmanager
def at_site(name: str) -> Iterator[None]:
    """Let the messages of data errors begin with the site that they are of.

    Raises:
        DataError: The same, with the site's name before it.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"site {name}: {error}") from error
