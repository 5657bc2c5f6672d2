"""A stage's data: read, split into training and held-out rows, and brought into the tokens that TRL's trainers take.

Tokens and masks come from `common/text/prompts.py`, so a stage trains on what sites train on; TRL never sees a text.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, Final

from common.data import overlap, preference_rows, read
from common.data.files import Located
from common.data.overlap import Text
from common.data.problems import UnusableError
from common.data.rows import Columns, Row
from common.errors import DataError
from common.model import base_files
from common.model.base import Engine
from common.run.schema.polish import AnyStage, CptStage, GrpoStage, PolishStage, SampledStage
from common.run.schema.training import DataConfig
from common.text import prompts
from common.text.prompts import Encoded
from server.evaluate import kept_apart
from server.evaluate.kept_apart import Apart

Tokens = dict[str, Any]
_OBJECTIVES: Final[Mapping[str, str]] = {"sft": "sft", "kto": "kto"}  # of all other kinds it is pairs
ANSWER_OF: Final[Mapping[str, str]] = {"exact": "answer", "unit_test": "tests"}


@dataclass(frozen=True)
class StageRows:
    """A stage's data, ready for its trainer.

    Attributes:
        held_out: Rows for the figures before and after.
        num_dropped: Rows that were left out as too long.
        num_equal: Pairs that were left out as both answers are the same after the cut.
        num_overlapping: Rows that were left out as they stand in rows that are kept apart.
        overlaps: Of each table that is kept apart and has some, how many of its rows the stage trains on.
    """

    train: list[Tokens]
    held_out: list[Tokens]
    num_truncated: int = 0
    num_dropped: int = 0
    num_equal: int = 0
    num_overlapping: int = 0
    overlaps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def load(stage: AnyStage, engine: Engine, data: DataConfig, apart: Sequence[Apart] = ()) -> StageRows:
    """Read and encode the data of a stage.

    Args:
        stage: Names the file and says what is made of it.
        engine: Has the tokenizer.
        data: Section `[data]`: columns of `sft` rows, and the system prompt of all.
        apart: Rows of tasks, and held-out ones, that the stage is not to train on.

    Raises:
        DataError: The file is missing or not of the stage's form, a row is too long, rows stand in those of `apart`
            and the stage says that this is an error, or too few rows are left.
    """
    encode = _Encoder(stage, engine, data.system_prompt)
    texts: list[Text]
    makers: list[Callable[[], list[Tokens] | Tokens | None]]  # of a row's tokens; none if it is dropped
    if stage.kind == "cpt":
        raw = read.convert_all(_table(stage, "text"), _raw)
        texts, makers = [Text("", text) for text in raw], [partial(encode.pieces, text) for text in raw]
    elif isinstance(stage, SampledStage):
        table = _table(stage, "prompt", *filter(None, [ANSWER_OF.get(encode.reward, "")]))
        prompted = read.convert_all(table, encode.prompt)
        texts, makers = [text for text, _ in prompted], [partial(dict, tokens or {}) for _, tokens in prompted]
    else:
        names = (data.instruction_column, data.input_column, data.output_column)
        rows = read.read(stage.data, columns=Columns(*names, objective=_OBJECTIVES.get(stage.kind, "dpo")))
        convert = {"sft": encode.answer, "kto": encode.judged}.get(stage.kind, encode.pair)
        texts, makers = [overlap.text_of(row) for row in rows], [partial(convert, row) for row in rows]
    same = kept_apart.compare(texts, apart, stage=stage)
    used = [number for number in range(len(texts)) if number not in same.dropped]
    made = [makers[number]() for number in used]
    tokens = [pieces if isinstance(pieces, list) else [pieces] if pieces else [] for pieces in made]
    num_dropped = sum(not pieces for pieces in tokens)
    if encode.num_equal and not any(tokens):
        raise DataError(
            f"{stage.data}: both answers of all {encode.num_equal} pairs are the same after the cut at "
            f"{stage.max_length_tokens} tokens, so nothing is preferred: raise the stage's max_length_tokens, or set "
            'its too_long to "truncate_input"'
        )
    return replace(
        _split([texts[number] for number in used], tokens, stage),
        num_truncated=encode.num_truncated,
        num_dropped=num_dropped - encode.num_equal,
        num_equal=encode.num_equal,
        num_overlapping=len(same.dropped),
        overlaps=same.overlaps,
    )


def num_steps(stage: PolishStage, rows: StageRows) -> int:
    """Optimizer steps of a stage; a pass of a kind that samples is all answers to all prompts."""
    answers = stage.num_generations if isinstance(stage, SampledStage) else 1
    return stage.steps or max(1, math.ceil(stage.epochs * len(rows.train) * answers / stage.batch_size))


class _Encoder:
    """Rows to tokens, as one stage wants them; None for a row that is dropped."""

    def __init__(self, stage: AnyStage, engine: Engine, system_prompt: str) -> None:
        self._stage, self._tokenizer, self._system_prompt = stage, engine.tokenizer, system_prompt
        self.reward = stage.reward if isinstance(stage, GrpoStage) else ""
        self._too_long = "error" if isinstance(stage, CptStage) else stage.too_long  # raw text is cut into pieces
        self._base = engine.model
        self.num_truncated, self.num_equal = 0, 0

    def pieces(self, text: str) -> list[Tokens]:
        """A raw text, ended by the end token, in pieces of at most `max_length_tokens`; every token is learnt from."""
        size, end = self._stage.max_length_tokens, self._tokenizer.eos_token_id
        ids = prompts.text_ids(text, self._tokenizer)
        ids = [*ids, *([end] if end is not None else [])]
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]

    def answer(self, row: Row) -> Tokens | None:
        """Tokens, and labels on the answers alone."""
        encoded = self._encode(row)
        if encoded is None:
            return None
        self.num_truncated += encoded.num_truncated > 0
        pairs = zip(encoded.input_ids, encoded.is_answer, strict=True)
        return {"input_ids": list(encoded.input_ids), "labels": [token if wanted else -100 for token, wanted in pairs]}

    def pair(self, row: Row) -> Tokens | None:
        """One prompt, and a better and a worse answer."""
        limit = self._stage.max_length_tokens
        if self._too_long == "truncate_input":  # the input that fits both answers
            row = prompts.shorten(row, self._tokenizer, max_length_tokens=limit, system_prompt=self._system_prompt)
        chosen, rejected = self._encode(row), self._encode(replace(row, messages=row.rejected, rejected=()))
        if chosen is None or rejected is None:
            return None
        if chosen.input_ids == rejected.input_ids:
            self.num_equal += 1
            return None
        self.num_truncated += chosen.num_truncated > 0 or rejected.num_truncated > 0
        both = zip(chosen.input_ids, rejected.input_ids, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        start = min(_begin(chosen), _begin(rejected), num_shared)
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
        self.num_truncated += encoded.num_truncated > 0
        start = _begin(encoded)
        return {
            "prompt_ids": list(encoded.input_ids[:start]),
            "completion_ids": _between(encoded, start, row.row_id),
            "label": row.is_desirable,
        }

    def prompt(self, given: Located) -> tuple[Text, Tokens | None]:
        """What one prompt says, and the prompt as tokens with what its answers are held against."""
        fields = {**given.fields, "completion": "-"}
        row = preference_rows.conversation(fields, answer="completion", place=given.place)
        ids, _ = prompts.prompt_ids(row, self._tokenizer, system_prompt=self._system_prompt)
        text = Text(overlap.text_of(row).asked)
        if len(ids) > self._stage.max_length_tokens:
            if self._too_long == "drop":
                return text, None
            raise UnusableError(
                f"prompt of {len(ids)} tokens, over the limit of {self._stage.max_length_tokens}",
                "raise max_length_tokens of the stage or set its too_long to drop",
            )
        column = ANSWER_OF.get(self.reward, "")
        wanted = given.fields.get(column, "") if column else ""
        if column and (not isinstance(wanted, str) or not wanted.strip()):
            raise UnusableError(f"reward '{self.reward}' needs text in '{column}'", "fill it in")
        return text, {"prompt": ids, "wanted": wanted}

    def _encode(self, row: Row) -> Encoded | None:
        """One conversation under the stage's limit."""
        encoded = prompts.encode(
            row,
            self._tokenizer,
            max_length_tokens=self._stage.max_length_tokens,
            too_long=self._too_long,
            system_prompt=self._system_prompt,
        )
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


def _between(encoded: Encoded, start: int, row_id: str) -> list[int]:
    """From `start` to the end of the answer, which must be one."""
    end = len(encoded.is_answer) - encoded.is_answer[::-1].index(True)
    if not all(encoded.is_answer[_begin(encoded) : end]):
        raise DataError(f"{row_id}: holds more than one answer to learn from; put the earlier ones into the prompt")
    return list(encoded.input_ids[start:end])


def _raw(row: Located) -> str:
    """A text that is there."""
    if not isinstance(text := row.fields.get("text"), str) or not text.strip():
        raise UnusableError("has nothing in 'text'", "write text or remove the row")
    return text


def _split(texts: Sequence[Text], pieces: Sequence[list[Tokens]], stage: PolishStage) -> StageRows:
    """Shuffle by the stage's seed and keep a share aside, a text on one side; of both labels where there are labels."""
    order = random.Random(stage.seed)  # noqa: S311 - an order, no secret
    firsts = overlap.groups(texts) if stage.overlap != "allow" else range(len(texts))
    rows = [(number, row) for number, tokens in zip(firsts, pieces, strict=True) for row in tokens]
    labels = (True, False) if stage.kind == "kto" else (None,)
    sides = {label: [row for row in rows if row[1].get("label") == label] for label in labels}
    wanted, sizes = {}, {label: len(side) for label, side in sides.items()}
    for label, side in sides.items():
        order.shuffle(side)
        wanted[label] = max(1, math.ceil(stage.held_out_fraction * len(side)))
    bundles: dict[int, list[Tokens]] = {}
    for first, row in (row for side in sides.values() for row in side):
        bundles.setdefault(first, []).append(row)
    counts = [Counter(row.get("label") for row in bundle) for bundle in bundles.values()]
    chosen = set(overlap.choose(counts, wanted=wanted, sizes=sizes))
    is_held_out = {first: number in chosen for number, first in enumerate(bundles)}
    train = [row for side in sides.values() for first, row in side if not is_held_out[first]]
    held_out = [row for side in sides.values() for first, row in side if is_held_out[first]]
    for label in labels:
        if len({is_held_out[first] for first, _ in sides[label]}) < 2:
            what = "rows" if label is None else f"rows with label {str(label).lower()}"
            raise DataError(
                f"{stage.data}: {sizes[label]} {what} are too few to train on and hold some out, a text on one side "
                "only; add rows"
            )
    order.shuffle(train)
    order.shuffle(held_out)
    return StageRows(train, held_out)
