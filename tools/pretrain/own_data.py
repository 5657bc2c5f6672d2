"""Synthetic data of a fictional coordinator: notes of the same region, made in the manner of the hospitals' records.

`rows.jsonl` to imitate, `pairs.jsonl` with a right and a wrong answer each, `held_out.jsonl` to evaluate on. Each is of
patients of its own, whom no hospital of `records.generate()` has.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from common import storage
from simulations.embedded import records

SEEDS = {"rows": 3001, "pairs": 3002, "held_out": 3003}
Table = list[dict[str, str]]


def rows(seed: int) -> Table:
    """Instruction, input and output, in an order of the seed's own; neither hospital nor patient is named."""
    kept = [{name: row[name] for name in ("instruction", "input", "output")} for row in records.generate(seed)]
    Random(seed).shuffle(kept)  # noqa: S311 - made-up data, no secret
    return kept


def pairs(seed: int) -> Table:
    """The right answer over one that is right for another note of the same task; tasks with one answer are left out.

    Example:
        >>> sorted(pairs(3002)[0])
        ['chosen', 'prompt', 'rejected']
    """
    found = rows(seed)
    answers: dict[str, list[str]] = {}
    for row in found:
        answers.setdefault(row["instruction"], []).append(row["output"])
    source = Random(seed)  # noqa: S311 - as above
    return [_pair(row, answers[row["instruction"]], source) for row in found if len({*answers[row["instruction"]]}) > 1]


def write(folder: Path) -> list[Path]:
    """Write the three files.

    Raises:
        StorageError: Disk full or not writable.
    """
    tables = {
        "rows": rows(SEEDS["rows"]),
        "pairs": pairs(SEEDS["pairs"]),
        "held_out": rows(SEEDS["held_out"])[:200],
    }
    paths = [folder / f"{name}.jsonl" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        storage.write_atomic(path, "".join(json.dumps(row) + "\n" for row in table).encode())
    return paths


def _pair(row: Mapping[str, str], answers: Sequence[str], source: Random) -> dict[str, str]:
    """One pair."""
    wrong = source.choice([answer for answer in answers if answer != row["output"]])
    return {"prompt": f"{row['instruction']}\n\n{row['input']}", "chosen": row["output"], "rejected": wrong}


def main() -> None:
    """Write the files into a folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain.own_data", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    for path in write(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
