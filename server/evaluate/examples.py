"""Answers before and after training, to prompts that the coordinator has said may be shown (`output.example_prompts`).

They are the only texts that a run writes into its folder: in `examples.json`, not in its events.
"""

from collections.abc import Sequence
from functools import partial
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
from common.run.schema.tasks import EvaluationConfig
from common.run.schema.training import DataConfig
from server.evaluate.tasks import answers
from server.evaluate.tasks.task import as_base
from server.report.report import EXAMPLES_FILE

MAX_PROMPTS: Final = 8
_NAME: Final = "output.example_prompts"


def read_prompts(path: str, engine: Engine, *, max_new_tokens: int, system_prompt: str) -> list[Row]:
    """The prompts that may be shown, at most `MAX_PROMPTS`; none without a path.

    Args:
        engine: The base, which must be able to answer them.

    Raises:
        DataError: The file is missing, not rows with a column `prompt`, or one is longer than the model takes.
    """

    def row(given: Located) -> Row:
        if "prompt" not in given.fields:
            raise UnusableError("has no column 'prompt'", "give one prompt a line: text, or a list of messages")
        fields = {"prompt": given.fields["prompt"], "completion": "-"}  # a reference that is not read
        return preference_rows.conversation(fields, answer="completion", place=given.place)

    if not path:
        return []
    rows = read.convert_all(read.locate(path)[:MAX_PROMPTS], row)
    answers.require_short(engine, rows, what=_NAME, max_new_tokens=max_new_tokens, system_prompt=system_prompt)
    return rows


def write(
    folder: Path,
    prompts: Sequence[Row],
    tensors: Tensors,
    *,
    engine: Engine,
    data: DataConfig,
    evaluation: EvaluationConfig,
) -> None:
    """Have the base and an adapter answer, greedily, and keep the answers.

    Args:
        prompts: See `read_prompts`; none writes nothing.
        data: Has the system prompt.

    Raises:
        DataError: A prompt and its answer are longer than the model takes.
        StorageError: Disk full or not writable.
    """
    if not prompts:
        return
    ask = partial(
        answers.answered,
        engine,
        prompts,
        what=_NAME,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        system_prompt=data.system_prompt,
    )
    adapter.write(engine.model, tensors)
    after = [text for text, _ in ask()]
    with as_base(engine):
        before = [text for text, _ in ask()]
    examples = [
        {"prompt": answers.shown(row), "base": early, "adapter": late}
        for row, early, late in zip(prompts, before, after, strict=True)
    ]
    content = {"adapter_sha256": adapter.digest(tensors), "examples": examples}
    storage.write_atomic(folder / EXAMPLES_FILE, wire.canonical_json(content) + b"\n")
