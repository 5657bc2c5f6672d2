"""Data of polish stages, in the manner of the tiny rows: a question, and its word in capitals as the right answer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from common.run.schema.polish import AnyStage, Stage
from tests import tiny


def stage(kind: str, **settings) -> AnyStage:
    """A stage called `trial` of a kind, with settings as a run file has them."""
    return TypeAdapter(Stage).validate_python({"name": "trial", "kind": kind, **settings})


def question(number: int) -> str:
    return tiny.row(number).messages[0].content


def right(number: int) -> str:
    return tiny.row(number).messages[1].content


def wrong(number: int) -> str:
    return tiny.WORDS[(number + 5) % len(tiny.WORDS)]


def pairs(count: int = 40, *, is_both_ways: bool = False) -> list[dict]:
    """Right answers over wrong ones; with `is_both_ways` each pair is there turned round too, so nothing is better."""
    found = [{"prompt": question(n), "chosen": right(n), "rejected": wrong(n)} for n in range(count)]
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in found]
    return found + turned if is_both_ways else found


def judged(count: int = 40, *, is_both_ways: bool = False) -> list[dict]:
    """Right answers marked good and wrong ones bad; with `is_both_ways` each is marked as both."""
    found = []
    for n in range(count):
        is_good = n % 2 == 0
        row = {"prompt": question(n), "completion": right(n) if is_good else wrong(n), "label": is_good}
        found += [row, {**row, "label": not is_good}] if is_both_ways else [row]
    return found


def instructions(count: int = 40) -> list[dict]:
    return [{"instruction": question(n), "output": right(n)} for n in range(count)]


def texts(count: int = 40) -> list[dict]:
    return [{"text": f"{question(n)} {right(n)}"} for n in range(count)]


def questions(count: int = 40) -> list[dict]:
    return [
        {"prompt": question(n), "answer": right(n), "tests": f"assert answer == {right(n)!r}"} for n in range(count)
    ]


def write(path: Path, rows: Iterable[Mapping]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
