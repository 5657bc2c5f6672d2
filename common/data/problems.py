"""Unusable rows, told together: the first few by name and the number of all of them."""

from typing import Final

from common.errors import DataError

MAX_LISTED: Final = 5


class UnusableError(ValueError):
    """One row that cannot be used.

    Attributes:
        what: What is wrong with it; names, types and sizes, never a field's value.
        remedy: What its owner can do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


class Problems:
    """Collects what is wrong, so that a site corrects its file once and not row by row."""

    def __init__(self) -> None:
        self._listed: list[str] = []
        self._remedies: dict[str, None] = {}
        self._count = 0

    def add(self, place: str, error: UnusableError) -> None:
        """Remember an unusable row.

        Args:
            place: Where it is, such as "train.jsonl line 12".
            error: What is wrong and the remedy.
        """
        self._count += 1
        if self._count <= MAX_LISTED:
            self._listed.append(f"{place}: {error.what}")
            self._remedies[error.remedy] = None

    def raise_if_any(self) -> None:
        """Refuse the data set if a row is unusable.

        Raises:
            DataError: One line with the first rows, the number of all and the remedies.
        """
        if self._count:
            num_more = self._count - len(self._listed)
            more = f"; and {num_more} more, {self._count} in all" if num_more else ""
            raise DataError(f"{'; '.join(self._listed)}{more}. Remedy: {'; '.join(self._remedies)}")
