"""A finished run's answers beside those of its base, for people who do not know which is which."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from common import adapter, config, model, storage
from common.errors import ConfigError, DataError
from common.model import Engine
from common.rows import Message, Row
from server import finish
from server.evaluate import task_answers
from server.evaluate.task import as_base

VERSION: Final = 1
KEY_FOLDER: Final = "compare-keys"
ADAPTER: Final = "adapter"
NO_ANSWER: Final = "[no answer]"  # an answer all the same: to leave it out would spare whoever gave none
Against = Literal["base", "prompt-only"]


@dataclass(frozen=True)
class Order:
    """What to compare.

    Attributes:
        rows: File of rows in the run's columns; their references do not count.
        against: Whose answers stand beside the adapter's.
        prompt: The system message that makes the base `prompt-only`.
        max_rows: The first so many rows; 0: all.
        seed: Draws sides and order.
    """

    rows: str
    against: Against = "base"
    prompt: str = ""
    max_rows: int = 0
    seed: int = 0


def compare(
    run_folder: Path, order: Order, *, out: Path, key: Path | None, num_rounds: int = 0, base: Path | None = None
) -> dict[str, object]:
    """Answer rows twice and write pairs whose sides are shuffled, and the key that tells them apart.

    Args:
        run_folder: The run.
        order: What to compare.
        out: New .jsonl file for raters: `prompt`, `left` and `right` a line.
        key: New .json file in another folder; None: in the run's folder, called after `out`.
        num_rounds: Which checkpoint; 0 is the newest.
        base: The base's folder; None looks for the run's base in the store.

    Returns:
        Both paths, pairs, and rows that were left out since both answers are equal.

    Raises:
        ConfigError: A file is there already, both would share a folder, or prompt and `against` do not fit.
        DataError: No such checkpoint, rows that cannot be used, or no pair is left.
        ModelError: The base is not here or another one.
        StorageError: A file cannot be written.
    """
    key = key or run_folder / KEY_FOLDER / f"{out.stem}.json"
    _check(order, out, key)
    found = finish.stored(run_folder, num_rounds=num_rounds)
    settings = found.run_manifest.run
    rows = task_answers.rows_of(order.rows, settings)[: order.max_rows or None]
    engine = _engine(settings, finish.base_of(found, base))
    adapter.write(engine.model, found.tensors)
    pairs = answered(engine, rows, order, settings)
    lines, told = shuffled(rows, pairs, order)
    _write(lines, told, out=out, key=key)
    return {"pairs": str(out), "key": str(key), "num_pairs": len(lines), "num_left_out": len(rows) - len(lines)}


def answered(engine: Engine, rows: Sequence[Row], order: Order, run: config.RunConfig) -> list[tuple[str, str]]:
    """For each row the other model's answer and the adapter's, greedily, with the run's own settings.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    own = _generate(engine, rows, run)
    asked = [task_answers.with_prompt(row, order.prompt, ()) for row in rows] if order.prompt else rows
    with as_base(engine):
        others = _generate(engine, asked, run)
    return list(zip(others, own, strict=True))


def shuffled(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], order: Order
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines for raters in a random order, the adapter on the left of half of them, and what only the key may say.

    Raises:
        DataError: All pairs are equal.
    """
    usable = [place for place, (other, own) in enumerate(pairs) if other.strip() != own.strip()]
    if not usable:
        raise DataError(f"{order.rows}: all {len(rows)} pairs of answers are equal; there is nothing to rank")
    draws = random.Random(order.seed)  # noqa: S311 - an order, no secret
    places = draws.sample(usable, len(usable))
    is_swapped = draws.sample([number % 2 == 1 for number in range(len(places))], len(places))
    lines = [_line(rows[place], pairs[place], swapped) for place, swapped in zip(places, is_swapped, strict=True)]
    names = (order.against, ADAPTER)
    return lines, {"names": names, "is_swapped": is_swapped, "rows": [n + 1 for n in places], "seed": order.seed}


def _line(row: Row, pair: tuple[str, str], swapped: bool) -> dict[str, Any]:
    """A pair as a rater sees it."""
    shown = [text if text.strip() else NO_ANSWER for text in pair]
    left, right = reversed(shown) if swapped else shown
    asked = row.messages[:-1]
    if len(asked) == 1:
        return {"prompt": asked[0].content, "left": left, "right": right}
    turns = {name: [_turn(Message("assistant", text))] for name, text in (("left", left), ("right", right))}
    return {"prompt": [_turn(message) for message in asked], **turns}


def _turn(message: Message) -> dict[str, str]:
    """A message as JSON."""
    return {"role": message.role, "content": message.content}


def _generate(engine: Engine, rows: Sequence[Row], run: config.RunConfig) -> list[str]:
    """Greedy answers."""
    return [text for text, _ in task_answers.answered(engine, rows, run, what="--rows")]


def _engine(settings: config.RunConfig, folder: Path) -> Engine:
    """The run's base with its adapter as attached."""
    return model.load(
        folder,
        model=settings.model,
        adapter_settings=settings.adapter,
        seed=settings.seed,
        residual_rank=settings.aggregation.residual_rank,
        num_heads=settings.aggregation.num_core_heads,
    )


def _check(order: Order, out: Path, key: Path) -> None:
    """Refuse what would unblind raters or overwrite a file."""
    if (order.against == "prompt-only") != (order.prompt != ""):
        raise ConfigError("--against prompt-only and --prompt belong together; give both, or none")
    if out.suffix != ".jsonl" or key.suffix != ".json":
        raise ConfigError("--out must end in .jsonl, and --key in .json")
    if out.resolve().parent == key.resolve().parent:
        raise ConfigError(f"{key}: lies in the folder of the pairs: give --key another folder, which no rater can read")
    if existing := [path for path in (out, key) if path.exists()]:
        raise ConfigError(f"{existing[0]}: exists already: give another name; pairs and keys are never overwritten")


def _write(lines: Sequence[dict[str, Any]], told: dict[str, Any], *, out: Path, key: Path) -> None:
    """The key first: pairs without one would be of no use."""
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    whole = {"version": VERSION, "tasks_sha256": hashlib.sha256(content).hexdigest(), **told}
    for path in (key, out):
        path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(key, json.dumps(whole, indent=1).encode())
    storage.write_atomic(out, content)
