"""A thousand texts that are nowhere but in a site's rows."""

import random
import re
import string
from collections.abc import Sequence

COUNT = 1000
COLUMNS = ("instruction", "input", "output", "patient_id")
MARK = "ÿ?>"  # escaped by most encodings of text, and '+' or '/' in base64 at every offset
PATTERN = re.compile(rf"[0-9A-Za-z]{{12}}{re.escape(MARK)}[0-9A-Za-z]{{12}}")


def make(count: int = COUNT) -> list[str]:
    """So many canaries of 142 bits each; the same ones every time."""
    chosen, letters = random.Random(14), string.ascii_letters + string.digits
    halves = ["".join(chosen.choices(letters, k=12)) for _ in range(2 * count)]
    return [f"{halves[2 * number]}{MARK}{halves[2 * number + 1]}" for number in range(count)]


def table(canaries: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a site, a canary in every column."""
    found = iter(canaries)
    return [
        {"instruction": f"Code {one} now.", "input": f"Seen: {two}.", "output": three, "patient_id": four}
        for one, two, three, four in zip(found, found, found, found, strict=True)
    ]


def texts(rows: Sequence[dict[str, str]]) -> list[str]:
    """The fields of the rows, in the order of their canaries."""
    return [row[column] for row in rows for column in COLUMNS]
