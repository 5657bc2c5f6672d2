"""One round of local training at a site."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from client.train import schedule
from client.train.gradients import mean_gradient
from common import adapter, config
from common.errors import ModelError
from common.model import Engine
from common.prompts import Encoded


@dataclass(frozen=True)
class LocalResult:
    """What a round of training did; loss in nats per answer token."""

    num_steps: int
    num_tokens: int
    train_loss: float
    seconds: float


def train(
    engine: Engine,
    rows: Sequence[Encoded],
    *,
    training: config.TrainingConfig,
    round_index: int,
    num_rounds: int,
    seed: int,
) -> LocalResult:
    """Train the adapter in `engine` in place.

    Args:
        engine: Holds the adapter to start from.
        rows: The site's training rows.
        training: Section `[training]`.
        round_index: From 0.
        num_rounds: Of the run; the learning-rate schedule spans them all.
        seed: Of this run and site.

    Raises:
        ModelError: The loss is not finite.
    """
    started = time.monotonic()
    num_steps = schedule.num_local_steps(len(rows), training)
    first_step = round_index * num_steps
    chosen = schedule.batches(
        num_rows=len(rows), batch_size=training.batch_size, first_step=first_step, num_steps=num_steps, seed=seed
    )
    batches = [[rows[index] for index in indices] for indices in chosen]
    rates = (
        schedule.learning_rate(step / (num_rounds * num_steps), training)
        for step in range(first_step, first_step + num_steps)
    )
    with torch.random.fork_rng():
        torch.manual_seed(schedule.derive_seed(seed, round_index))
        losses = _steps(engine, batches, rates, training=training)
    num_tokens = sum(len(row.input_ids) for batch in batches for row in batch)
    return LocalResult(num_steps, num_tokens, sum(losses) / len(losses), time.monotonic() - started)


def make_optimizer(engine: Engine, training: config.TrainingConfig) -> torch.optim.Optimizer:
    """A fresh optimiser over the adapter; its rate is set at every step."""
    parameters = list(adapter.parameters(engine.model).values())
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _steps(
    engine: Engine, batches: Sequence[Sequence[Encoded]], rates: Iterable[float], *, training: config.TrainingConfig
) -> list[float]:
    """One optimiser step a batch; the loss of each."""
    optimizer = make_optimizer(engine, training)
    engine.model.train()
    losses: list[float] = []
    for batch, rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        loss = mean_gradient(engine, batch, micro_batch_size=training.micro_batch_size or training.batch_size)
        if not math.isfinite(loss):
            raise ModelError(f"training loss is {loss} at step {len(losses)}; lower training.learning_rate")
        _clip(optimizer, training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss)
    return losses


def _clip(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Scale the whole gradient to at most `max_grad_norm`; 0 leaves it alone."""
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
