"""Precision and recall of the detectors of personal data on annotated text.

    python -m tools.pii_measure test.jsonl

Rows are those of presidio-research: `text`, and `spans` with `type`, `start` and `end`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from common import cli
from common.data import read
from server.evaluate.figures import pii

_TYPES: Final = {
    "EMAIL_ADDRESS": "email", "IBAN_CODE": "iban", "CREDIT_CARD": "card", "US_SSN": "ssn", "PHONE_NUMBER": "phone",
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """How one detector did.

    Attributes:
        num_right: Annotated pieces that it found.
        num_missed: Annotated pieces that it did not.
        num_wrong: Finds that no annotation of its type overlaps.
    """

    num_right: int
    num_missed: int
    num_wrong: int

    @property
    def precision(self) -> float:
        """Share of finds that are right."""
        return self.num_right / max(self.num_right + self.num_wrong, 1)

    @property
    def recall(self) -> float:
        """Share of annotated pieces that were found."""
        return self.num_right / max(self.num_right + self.num_missed, 1)


def measure(rows: Iterable[Mapping[str, Any]]) -> dict[str, Quality]:
    """Each detector for which the data have a type; a find and a piece belong together where they overlap."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        finds = pii.find(row["text"])
        for kind in _TYPES.values():
            detected = [(piece.start, piece.end) for piece in finds if piece.kind == kind]
            annotated = [(span["start"], span["end"]) for span in row["spans"] if _TYPES.get(span["type"]) == kind]
            counts[kind, "right"] += sum(_overlaps(piece, detected) for piece in annotated)
            counts[kind, "missed"] += sum(not _overlaps(piece, detected) for piece in annotated)
            counts[kind, "wrong"] += sum(not _overlaps(piece, annotated) for piece in detected)
    return {
        kind: Quality(counts[kind, "right"], counts[kind, "missed"], counts[kind, "wrong"]) for kind in _TYPES.values()
    }


def _overlaps(piece: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    """Whether a piece shares a character with another."""
    return any(piece[0] < end and start < piece[1] for start, end in others)


if __name__ == "__main__":
    for kind, quality in measure(read.read_table(sys.argv[1])).items():
        figures = f"precision {quality.precision:.3f}  recall {quality.recall:.3f}"
        cli.show(f"{kind:<6} n {quality.num_right + quality.num_missed:>4}  {figures}")
