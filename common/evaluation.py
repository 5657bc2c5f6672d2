"""Held-out figures of the adapter in an engine; sites and server share it."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from common import prompts
from common.errors import ModelError
from common.model import Engine, answer, answer_nll
from common.prompts import Encoded
from common.rows import Row

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Held-out figures.

    Attributes:
        nll_sum: Sum of negative log-likelihood over answer tokens, nats.
        num_answer_tokens: Tokens in that sum.
        num_generated: Rows answered greedily.
        num_exact: Of these, equal to the reference, white space at the ends aside.
        seconds: Wall time.
    """

    nll_sum: float
    num_answer_tokens: int
    num_generated: int
    num_exact: int
    seconds: float


def score(
    engine: Engine,
    encoded: Sequence[Encoded],
    generated: Sequence[Row],
    *,
    batch_size: int,
    max_new_tokens: int,
    system_prompt: str,
) -> Score:
    """Score the adapter in `engine`: loss on the encoded rows, exact match on the rows to generate.

    Raises:
        ModelError: The loss is not finite.
    """
    started = time.monotonic()
    nll_sum, num_answer_tokens = held_out_nll(engine, encoded, batch_size=batch_size)
    num_exact = 0
    asked = [prompts.prompt_ids(row, engine.tokenizer, system_prompt=system_prompt) for row in generated]
    for batch in _batches(sorted(asked, key=lambda item: len(item[0])), batch_size):
        given = answer(engine, [ids for ids, _ in batch], max_new_tokens=max_new_tokens)
        num_exact += sum(text.strip() == wanted.strip() for text, (_, wanted) in zip(given, batch, strict=True))
    return Score(nll_sum, num_answer_tokens, len(asked), num_exact, time.monotonic() - started)


@torch.no_grad()
def held_out_nll(engine: Engine, rows: Sequence[Encoded], *, batch_size: int) -> tuple[float, int]:
    """Sum of negative log-likelihood over answer tokens, nats, and their number.

    Raises:
        ModelError: The sum is not finite.
    """
    engine.model.eval()
    total, num_tokens = 0.0, 0
    for batch_rows in _batches(sorted(rows, key=lambda row: len(row.input_ids)), batch_size):
        batch = prompts.collate(batch_rows, pad_id=engine.pad_id)
        nll, count = answer_nll(engine.model, batch.to(engine.device))
        total, num_tokens = total + float(nll), num_tokens + count
    if not math.isfinite(total):
        raise ModelError(f"held-out loss is {total}; the adapter has diverged, lower training.learning_rate")
    return total, num_tokens


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
