"""A finished run's answers beside those of its base, for people who do not know which is which."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import ConfigError
from common.model import loading
from common.model.base import Engine
from common.run.schema.tasks import EvaluationConfig
from common.run.schema.training import DataConfig
from server.evaluate.tasks import answers as task_answers
from server.evaluate.tasks.task import as_base
from server.preferences import blind
from server.preferences.files import Pair
from server.run import finish

KEY_FOLDER: Final = "compare-keys"
ADAPTER: Final = "adapter"
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
    if (order.against == "prompt-only") != (order.prompt != ""):
        raise ConfigError("--against prompt-only and --prompt belong together; give both, or none")
    blind.check_new(out, key)
    checkpoint = finish.stored(run_folder, num_rounds=num_rounds)
    settings = checkpoint.run_manifest.run
    rows = loading.rows_of(order.rows, settings.data)[: order.max_rows or None]
    engine = loading.engine_of(settings, finish.base_of(checkpoint, base), date=checkpoint.run_manifest.date)
    adapter.write(engine.model, checkpoint.tensors)
    pairs = pairs_of(rows, answered(engine, rows, order.prompt, data=settings.data, evaluation=settings.evaluation))
    made = blind.write(pairs, names=(order.against, ADAPTER), seed=order.seed, tasks=out, key=key)
    return {
        "pairs": str(out), "key": str(key), "num_pairs": len(made.rows), "num_left_out": made.num_identical,
    }  # fmt: skip


def answered(
    engine: Engine, rows: Sequence[Row], prompt: str, *, data: DataConfig, evaluation: EvaluationConfig
) -> list[tuple[str, str]]:
    """For each row the other model's answer and the adapter's, greedily, with the run's own settings.

    Args:
        prompt: The system message of the other model, the base; empty: the run's.
        data: Has the run's system prompt.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
    """
    ask = partial(
        task_answers.answered,
        engine,
        what="--rows",
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        system_prompt=data.system_prompt,
    )
    ours = [text for text, _ in ask(rows)]
    asked = [task_answers.with_prompt(row, prompt, ()) for row in rows] if prompt else rows
    with as_base(engine):
        theirs = [text for text, _ in ask(asked)]
    return list(zip(theirs, ours, strict=True))


def pairs_of(rows: Sequence[Row], answers: Sequence[tuple[str, str]]) -> list[Pair]:
    """The other model's answer as the rejected and the adapter's as the chosen one, as `blind.write` takes them."""
    pairs = []
    for row, texts in zip(rows, answers, strict=True):
        theirs, ours = ((Message("assistant", text if text.strip() else blind.NO_ANSWER),) for text in texts)
        pairs.append(Pair(row.messages[:-1], ours, theirs, row.row_id))
    return pairs
