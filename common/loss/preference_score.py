"""Where preferences stand against the start of the run: references, KTO's reference point, held-out figures.

Examples go through the model in the same physical batches each time, so that an adapter that has not moved has margins
of exactly zero.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.adapter import adapter
from common.errors import ModelError
from common.loss import objectives
from common.loss.evaluation import Score
from common.loss.objectives import Example, Rated
from common.model.base import Engine
from common.run.schema.training import Objective, Preference
from common.text.prompts import Encoded


@torch.no_grad()
def with_references(
    engine: Engine, examples: Sequence[Example], start: adapter.Tensors, *, batch_size: int
) -> Sequence[Example]:
    """The same examples with the log-probabilities that they had at the start of the run.

    The start's adapter is written over the one that is in the engine, so that no second base is ever held; the caller
    writes its own afterwards. Switching the adapter off would do for LoRA, whose product begins at zero; written, it
    also holds for an adapter that does not begin as the base.

    Args:
        engine: Whose adapter is overwritten.
        examples: Of a site; those of `sft` are given back as they are.
        start: The adapter that the run begins with.
        batch_size: Examples in memory at once; a pair has two rows.
    """
    if all(isinstance(example, Encoded) for example in examples):
        return examples
    adapter.write(engine.model, start)
    engine.model.eval()
    return [
        example if isinstance(example, Encoded) else replace(example, reference=known)
        for part in objectives.parts(examples, batch_size)
        for example, known in zip(part, _known(engine, part), strict=True)
    ]


def _known(engine: Engine, part: Sequence[Example]) -> list[tuple[float, ...]]:
    """Log-probabilities of an example's rows, then of its mismatched one."""
    width = len(part[0].rows)
    own = objectives.log_probs(engine, [row for example in part for row in example.rows]).tolist()
    others = _mismatched(part)
    beside = objectives.log_probs(engine, others).tolist() if others else []
    return [(*own[place * width : (place + 1) * width], *beside[place : place + 1]) for place in range(len(part))]


@torch.no_grad()
def reference_point(
    engine: Engine, examples: Sequence[Example], objective: Objective, *, batch_size: int, max_tokens: int = 0
) -> Tensor:
    """KTO's reference point: how far the adapter has moved from the start on answers to other prompts, 0 at least.

    Returns:
        Mean log-ratio, nats, a float64 scalar on the device; 0 where the objective has no such point.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1; as TRL 1.16 estimates it.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    if not objective.couples_examples:
        return total
    for part in objectives.parts(examples, batch_size, max_tokens=max_tokens):
        begun = [example.reference[-1] for example in part if isinstance(example, Rated)]
        total += objectives.log_probs(engine, _mismatched(part)).double().sum() - math.fsum(begun)
    return (total / len(examples)).clamp(min=0.0)


def _mismatched(part: Sequence[Example]) -> list[Encoded]:
    """The mismatched rows of rated answers."""
    return [example.mismatched for example in part if isinstance(example, Rated) and example.mismatched is not None]


@torch.no_grad()
def score(engine: Engine, examples: Sequence[Example], objective: Preference, *, batch_size: int) -> Score:
    """Held-out figures: the objective's loss, how often the adapter agrees, and the likelihood of what was chosen.

    A margin of exactly zero, as at the start, is no agreement. The likelihood is that of the chosen answer of each
    pair, or of every rated answer.

    Raises:
        ModelError: The loss is not finite.
    """
    started = time.monotonic()
    engine.model.eval()
    origin = reference_point(engine, examples, objective, batch_size=batch_size)
    loss_sum, num_preferred, log_prob = 0.0, 0, 0.0
    for part in objectives.parts(examples, batch_size):
        log_prob_b = objectives.log_probs(engine, [row for example in part for row in example.rows])
        loss_n, margin_n = objectives.losses(part, log_prob_b, objective, origin=origin)
        loss_sum, num_preferred = loss_sum + float(loss_n.sum()), num_preferred + int((margin_n > 0).sum())
        log_prob += float(log_prob_b[:: len(part[0].rows)].sum())
    if not math.isfinite(loss_sum) or not math.isfinite(log_prob):
        raise ModelError(f"held-out loss is {loss_sum}; the adapter has diverged, lower training.learning_rate")
    num_tokens = sum(sum(example.rows[0].is_answer[1:]) for example in examples)
    return Score(-log_prob, num_tokens, 0, 0, time.monotonic() - started, loss_sum, num_preferred)
