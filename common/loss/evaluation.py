"""Held-out figures of the adapter in an engine; sites and server share it."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from common.data.rows import Row
from common.errors import ModelError
from common.loss import objectives
from common.loss.likelihood import answer_nll
from common.model.base import Engine, answer
from common.text import prompts
from common.text.prompts import Encoded

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
        preference_loss_sum: Sum of the loss of preferences (`common.loss.preference_score`); None where none are
        learnt. num_preferred: Preferences that the adapter agrees with; None likewise.
    """

    nll_sum: float
    num_answer_tokens: int
    num_generated: int
    num_exact: int
    seconds: float
    preference_loss_sum: float | None = None
    num_preferred: int | None = None


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
    answers = generate(
        engine, generated, batch_size=batch_size, max_new_tokens=max_new_tokens, system_prompt=system_prompt
    )
    num_exact = sum(given.strip() == wanted.strip() for given, wanted in answers)
    return Score(nll_sum, num_answer_tokens, len(answers), num_exact, time.monotonic() - started)


def generate(
    engine: Engine, rows: Sequence[Row], *, batch_size: int, max_new_tokens: int, system_prompt: str
) -> list[tuple[str, str]]:
    """Greedy answers and the references that they should be, in the order of the rows."""
    asked = [prompts.prompt_ids(row, engine.tokenizer, system_prompt=system_prompt) for row in rows]
    answers = [""] * len(asked)
    for places in _batches(sorted(range(len(asked)), key=lambda place: len(asked[place][0])), batch_size):
        given = answer(engine, [asked[place][0] for place in places], max_new_tokens=max_new_tokens)
        for place, text in zip(places, given, strict=True):
            answers[place] = text
    return [(text, wanted) for text, (_, wanted) in zip(answers, asked, strict=True)]


@torch.no_grad()
def held_out_nll(engine: Engine, rows: Sequence[Encoded], *, batch_size: int) -> tuple[float, int]:
    """Sum of negative log-likelihood over answer tokens, nats, and their number.

    Raises:
        ModelError: The sum is not finite.
    """
    engine.model.eval()
    total, num_tokens = 0.0, 0
    for batch_rows in _batches(sorted(rows, key=lambda row: len(row.input_ids)), batch_size):
        nll, count = answer_nll(engine.model, objectives.collate(engine, [batch_rows]))
        total, num_tokens = total + float(nll), num_tokens + count
    if not math.isfinite(total):
        raise ModelError(f"held-out loss is {total}; the adapter has diverged, lower training.learning_rate")
    return total, num_tokens


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))
