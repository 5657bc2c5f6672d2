"""A stage's data: read, split into training and held-out rows, and brought into the tokens that TRL's trainers take.

Tokens and masks come from `common/prompts.py`, so a stage trains on what sites train on; TRL never sees a text.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Final

from common import base_files, prompts
from common.config_polish import PAIRED, SAMPLED, PolishStage
from common.config_training import DataConfig
from common.data import preference_rows, read
from common.data.files import Located
from common.data.problems import UnusableError
from common.errors import DataError
from common.model import Engine
from common.prompts import Encoded
from common.rows import Columns, Row

Tokens = dict[str, Any]
_OBJECTIVES: Final[Mapping[str, str]] = {"sft": "sft", "kto": "kto", **dict.fromkeys(PAIRED, "dpo")}
ANSWER_OF: Final[Mapping[str, str]] = {"exact": "answer", "unit_test": "tests"}


@dataclass(frozen=True)
class StageRows:
    """A stage's data, ready for its trainer.

    Attributes:
        train: Rows to train on.
        held_out: Rows for the figures before and after.
        num_truncated: Rows that were cut.
        num_dropped: Rows that were left out as too long.
    """

    train: list[Tokens]
    held_out: list[Tokens]
    num_truncated: int = 0
    num_dropped: int = 0


def load(stage: PolishStage, engine: Engine, data: DataConfig) -> StageRows:
    """Read and encode the data of a stage.

    Args:
        stage: Names the file and says what is made of it.
        engine: Has the tokenizer.
        data: Section `[data]`: columns of `sft` rows, and the system prompt of all.

    Raises:
        DataError: The file is missing or not of the stage's form, a row is too long, or too few rows are left.
    """
    if stage.kind == "cpt":
        return _split(_pieces(stage, engine), stage)
    encode = _Encoder(stage, engine, data.system_prompt)
    found: Sequence[Tokens | None]
    if stage.kind in SAMPLED:
        table = _table(stage, "prompt", *filter(None, [ANSWER_OF.get(stage.reward, "")]))
        found = read.convert_all(table, encode.prompt)
    else:
        names = (data.instruction_column, data.input_column, data.output_column)
        rows = read.read(stage.data, columns=Columns(*names, objective=_OBJECTIVES[stage.kind]))
        convert = {"sft": encode.answer, "kto": encode.judged}.get(stage.kind, encode.pair)
        found = [convert(row) for row in rows]
    kept = [tokens for tokens in found if tokens is not None]
    parts = _split(kept, stage)
    return StageRows(parts.train, parts.held_out, encode.num_truncated, len(found) - len(kept))


def num_steps(stage: PolishStage, rows: StageRows) -> int:
    """Optimizer steps of a stage; a pass of a kind that samples is all answers to all prompts."""
    answers = stage.num_generations if stage.kind in SAMPLED else 1
    return stage.steps or max(1, math.ceil(stage.epochs * len(rows.train) * answers / stage.batch_size))


class _Encoder:
    """Rows to tokens, as one stage wants them; None for a row that is dropped."""

    def __init__(self, stage: PolishStage, engine: Engine, system_prompt: str) -> None:
        self._stage, self._tokenizer, self._system_prompt = stage, engine.tokenizer, system_prompt
        self._base = engine.model
        self.num_truncated = 0

    def answer(self, row: Row) -> Tokens | None:
        """Tokens, and labels on the answers alone."""
        encoded = self._encode(row)
        if encoded is None:
            return None
        pairs = zip(encoded.input_ids, encoded.is_answer, strict=True)
        return {"input_ids": list(encoded.input_ids), "labels": [token if wanted else -100 for token, wanted in pairs]}

    def pair(self, row: Row) -> Tokens | None:
        """One prompt, and a better and a worse answer."""
        chosen, rejected = self._encode(row), self._encode(replace(row, messages=row.rejected))
        if chosen is None or rejected is None:
            return None
        start = min(_begin(chosen), _begin(rejected), _num_shared(chosen.input_ids, rejected.input_ids))
        return {
            "prompt_ids": list(chosen.input_ids[:start]),
            "chosen_ids": _between(chosen, start, row.row_id),
            "rejected_ids": _between(rejected, start, row.row_id),
        }

    def judged(self, row: Row) -> Tokens | None:
        """One prompt, one answer, and whether it is good."""
        encoded = self._encode(row)
        if encoded is None:
            return None
        start = _begin(encoded)
        return {
            "prompt_ids": list(encoded.input_ids[:start]),
            "completion_ids": _between(encoded, start, row.row_id),
            "label": row.is_desirable,
        }

    def prompt(self, given: Located) -> Tokens | None:
        """One prompt as tokens, and what its answers are held against."""
        fields = {**given.fields, "completion": "-"}
        row = preference_rows.conversation(fields, answer="completion", place=given.place)
        ids, _ = prompts.prompt_ids(row, self._tokenizer, system_prompt=self._system_prompt)
        if len(ids) > self._stage.max_length_tokens:
            if self._stage.too_long == "drop":
                return None
            raise UnusableError(
                f"prompt of {len(ids)} tokens, over the limit of {self._stage.max_length_tokens}",
                "raise max_length_tokens of the stage or set its too_long to drop",
            )
        column = ANSWER_OF.get(self._stage.reward, "")
        wanted = given.fields.get(column, "") if column else ""
        if column and (not isinstance(wanted, str) or not wanted.strip()):
            raise UnusableError(f"reward '{self._stage.reward}' needs text in '{column}'", "fill it in")
        return {"prompt": ids, "wanted": wanted}

    def _encode(self, row: Row) -> Encoded | None:
        """One conversation under the stage's limit."""
        encoded = prompts.encode(
            row,
            self._tokenizer,
            max_length_tokens=self._stage.max_length_tokens,
            too_long=self._stage.too_long,
            system_prompt=self._system_prompt,
        )
        self.num_truncated += encoded is not None and encoded.num_truncated > 0
        base_files.check_token_ids(iter(encoded.input_ids if encoded else ()), self._base)
        return encoded


def _table(stage: PolishStage, *needed: str) -> list[Located]:
    """The rows as they are written, once they have the columns that the kind needs."""
    table = read.locate(stage.data)
    names = {name for row in table for name in row.fields}
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{stage.data}: has no column '{missing[0]}'; a {stage.kind} stage needs {', '.join(needed)}")
    return table


def _begin(encoded: Encoded) -> int:
    """Where the answer begins."""
    return encoded.is_answer.index(True)


def _between(encoded: Encoded, start: int, place: str) -> list[int]:
    """From `start` to the end of the answer, which must be one."""
    end = len(encoded.is_answer) - encoded.is_answer[::-1].index(True)
    if not all(encoded.is_answer[_begin(encoded) : end]):
        raise DataError(f"{place}: holds more than one answer to learn from; put the earlier ones into the prompt")
    return list(encoded.input_ids[start:end])


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    return len(list(takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False))))


def _pieces(stage: PolishStage, engine: Engine) -> list[Tokens]:
    """Raw texts, each ended by the end token, in pieces of at most `max_length_tokens`; every token is learnt from."""
    found, size = [], stage.max_length_tokens
    for text in read.convert_all(_table(stage, "text"), _raw):
        ids = prompts.text_ids(text, engine.tokenizer)
        ids = [*ids, *([engine.tokenizer.eos_token_id] if engine.tokenizer.eos_token_id is not None else [])]
        found += [ids[start : start + size] for start in range(0, len(ids), size)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in found if len(ids) > 1]


def _raw(row: Located) -> str:
    """A text that is there."""
    if not isinstance(text := row.fields.get("text"), str) or not text.strip():
        raise UnusableError("has nothing in 'text'", "write text or remove the row")
    return text


def _split(rows: list[Tokens], stage: PolishStage) -> StageRows:
    """Shuffle by the stage's seed and keep a share aside; of both labels where there are labels."""
    order = random.Random(stage.seed)  # noqa: S311 - an order, no secret
    train, held_out = [], []
    for label in (True, False) if stage.kind == "kto" else (None,):
        group = [row for row in rows if row.get("label") == label]
        order.shuffle(group)
        count = max(1, math.ceil(stage.held_out_fraction * len(group)))
        held_out += group[:count]
        train += group[count:]
        if len(group) <= count:
            what = "rows" if label is None else f"rows with label {str(label).lower()}"
            raise DataError(f"{stage.data}: {len(group)} {what} are too few to train on and hold some out; add rows")
    order.shuffle(train)
    order.shuffle(held_out)
    return StageRows(train, held_out)
