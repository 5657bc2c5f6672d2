"""Answers before and after training, to prompts that the coordinator has said may be shown (`output.example_prompts`).

They are the only texts that a run writes into its folder: in `examples.json`, not in its events.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.data import preference_rows, read
from common.data.files import Located
from common.data.problems import UnusableError
from common.data.rows import Row
from common.frame import wire
from common.model.base import Engine
from common.run import config
from server.evaluate.tasks import answers
from server.evaluate.tasks.task import as_base
from server.report.report import EXAMPLES_FILE

MAX_PROMPTS: Final = 8
_NAME: Final = "output.example_prompts"


def read_prompts(run: config.RunConfig, engine: Engine) -> list[Row]:
    """The prompts that may be shown, at most `MAX_PROMPTS`; none without the setting.

    Args:
        run: The run file.
        engine: The base, which must be able to answer them.

    Raises:
        DataError: The file is missing, not rows with a column `prompt`, or one is longer than the model takes.
    """
    if not run.output.example_prompts:
        return []
    rows = read.convert_all(read.locate(run.output.example_prompts)[:MAX_PROMPTS], _row)
    answers.require_short(engine, rows, run, what=_NAME, max_new_tokens=run.evaluation.max_new_tokens)
    return rows


def _row(given: Located) -> Row:
    """A prompt as a row; its reference is nothing."""
    if "prompt" not in given.fields:
        raise UnusableError("has no column 'prompt'", "give one prompt a line: text, or a list of messages")
    fields = {"prompt": given.fields["prompt"], "completion": "-"}
    return preference_rows.conversation(fields, answer="completion", place=given.place)


def write(folder: Path, prompts: Sequence[Row], tensors: Tensors, *, engine: Engine, run: config.RunConfig) -> None:
    """Have the base and an adapter answer, greedily, and keep the answers.

    Args:
        folder: The run's.
        prompts: See `read_prompts`; none writes nothing.
        tensors: The adapter that is exported.
        engine: The base.
        run: Its settings.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
        StorageError: Disk full or not writable.
    """
    if not prompts:
        return
    adapter.write(engine.model, tensors)
    after = [text for text, _ in answers.answered(engine, prompts, run, what=_NAME)]
    with as_base(engine):
        before = [text for text, _ in answers.answered(engine, prompts, run, what=_NAME)]
    found = [
        {"prompt": answers.shown(row), "base": early, "adapter": late}
        for row, early, late in zip(prompts, before, after, strict=True)
    ]
    told = {"adapter_sha256": adapter.digest(tensors), "examples": found}
    storage.write_atomic(folder / EXAMPLES_FILE, wire.canonical_json(told) + b"\n")
