"""One round of local training at a site."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from client.train import private, proof, regulariser, schedule
from client.train.gradients import mean_gradient
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ModelError
from common.loss.objectives import Example, Objective
from common.model.base import Engine
from common.privacy.noise import Noise
from common.run import config
from common.run.schema.privacy import PrivacyConfig, Protection

Watch = Callable[[int, int], None]  # told after each step: how many are done, of how many
PROVEN_STEP: Final = 1  # after it the adapter must have moved; a failure costs two steps, not a night


def unwatched(step: int, num_steps: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class LocalResult:
    """What a round of training did; the loss as in `gradients`. None: not to be told, as it would not be private.

    `spread` is over how many of its steps the gradients were spread, as a share (`spread_of`); it never leaves. None
    where noise covers single units.
    """

    num_steps: int
    num_tokens: int | None
    train_loss: float | None
    seconds: float | None
    protection: Protection
    spread: float | None = None


def spread_of(norms: Sequence[float]) -> float:
    """Over how many steps a round's gradients were spread, as a share of all: (sum n)^2 / sum n^2 / number.

    1 where all are of one length. Where one row alone has a gradient, it is the share of the steps that read this row.

    Example:
        >>> spread_of([1.0, 1.0, 1.0, 1.0]), spread_of([0.0, 0.0, 5.0, 0.0])
        (1.0, 0.25)
    """
    squares = math.fsum(norm * norm for norm in norms)
    return math.fsum(norms) ** 2 / squares / len(norms) if squares > 0 else 0.0


def train(
    engine: Engine,
    rows: Sequence[Example],
    *,
    training: config.TrainingConfig,
    privacy: PrivacyConfig,
    round_index: int,
    num_rounds: int,
    seed: int,
    source: Noise,
    proximal: float = 0.0,
    watch: Watch = unwatched,
) -> LocalResult:
    """Train the adapter in `engine` in place.

    Args:
        engine: Holds the adapter to start from.
        rows: The site's training rows; preferences with their references.
        training: Section `[training]`.
        privacy: Section `[privacy]`, resolved.
        round_index: From 0.
        num_rounds: Of the run; the learning-rate schedule spans them all.
        seed: Of this run and site.
        source: Of the draws and the noise where training is private.
        proximal: FedProx's mu.
        watch: Told after each step how many are done, of how many.

    Raises:
        ModelError: The loss is not finite, or the adapter did not move.
        PrivacyError: The site's rows are too few for what the run asks.
    """
    started = time.monotonic()
    num_steps = schedule.num_local_steps(len(rows), training)
    first_step = round_index * num_steps
    rates = schedule.rates(round_index, num_rounds=num_rounds, num_steps=num_steps, training=training)
    with torch.random.fork_rng():
        torch.manual_seed(schedule.derive_seed(seed, round_index))
        if privacy.is_private_per_unit:
            _fit_privately(
                engine, rows, rates, training=training, privacy=privacy, source=source, proximal=proximal, watch=watch
            )
            num_tokens, train_loss, spread = None, None, None
        else:
            batches = _batches(rows, training=training, first_step=first_step, num_steps=num_steps, seed=seed)
            num_tokens, train_loss, spread = _fit(
                engine, batches, rates, training=training, proximal=proximal, watch=watch
            )
    proof.check_reload(engine)
    protection: Protection = "unit" if privacy.is_private_per_unit else "none"
    if privacy.is_private:  # for the site as a whole too: no noise covers these figures
        return LocalResult(num_steps, None, None, None, protection, spread)
    return LocalResult(num_steps, num_tokens, train_loss, time.monotonic() - started, protection, spread)


def _fit_privately(
    engine: Engine,
    rows: Sequence[Example],
    rates: Sequence[float],
    *,
    training: config.TrainingConfig,
    privacy: PrivacyConfig,
    source: Noise,
    proximal: float,
    watch: Watch,
) -> None:
    """One noised step for each rate."""
    gradients = private.gradients(
        engine,
        rows,
        privacy=privacy,
        num_steps=len(rates),
        source=source,
        objective=Objective.of(training),
    )
    with contextlib.closing(gradients):
        _steps(engine, gradients, rates, training=training, max_grad_norm=0.0, proximal=proximal, watch=watch)


def _fit(
    engine: Engine,
    batches: Sequence[Sequence[Example]],
    rates: Sequence[float],
    *,
    training: config.TrainingConfig,
    proximal: float,
    watch: Watch,
) -> tuple[int, float, float]:
    """One step for each batch; how many tokens it read, the mean of its losses, and how its gradients were spread."""
    size, objective = training.micro_batch_size or training.batch_size, Objective.of(training)
    gradients = (mean_gradient(engine, batch, micro_batch_size=size, objective=objective) for batch in batches)
    max_norm = training.max_grad_norm
    losses, norms = _steps(
        engine, gradients, rates, training=training, max_grad_norm=max_norm, proximal=proximal, watch=watch
    )
    num_tokens = sum(len(row.input_ids) for batch in batches for example in batch for row in example.rows)
    return num_tokens, sum(losses) / len(losses), spread_of(norms)


def _batches(
    rows: Sequence[Example], *, training: config.TrainingConfig, first_step: int, num_steps: int, seed: int
) -> list[list[Example]]:
    """The rows of each step."""
    chosen = schedule.batches(
        num_rows=len(rows), batch_size=training.batch_size, first_step=first_step, num_steps=num_steps, seed=seed
    )
    return [[rows[index] for index in indices] for indices in chosen]


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
    engine: Engine,
    gradients: Iterator[float | None],
    rates: Sequence[float],
    *,
    training: config.TrainingConfig,
    max_grad_norm: float,
    proximal: float,
    watch: Watch,
) -> tuple[list[float], list[float]]:
    """One optimiser step for each gradient that is set.

    Returns:
        The losses that came with them, and their norms before clipping; empty of private ones.
    """
    optimizer = make_optimizer(engine, training)
    before = adapter.read(engine.model)
    origin = {name: p.detach().clone() for name, p in adapter.parameters(engine.model).items()} if proximal else {}
    engine.model.train()
    losses: list[float] = []
    norms: list[torch.Tensor] = []
    for number, rate in enumerate(rates):
        optimizer.zero_grad()
        loss = next(gradients)
        if loss is not None:
            losses.append(_finite(loss, step=len(losses)))
            norms.append(_clip(optimizer, max_grad_norm))
        regulariser.add_gradient(engine.model)
        _pull(engine, origin, rate * proximal)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if number in (PROVEN_STEP, len(rates) - 1) and any(rates[: number + 1]):
            proof.check_moved(engine, before)
        watch(number + 1, len(rates))
    return losses, [float(norm) for norm in norms]


def _finite(loss: float, *, step: int) -> float:
    """The loss, which must be a number."""
    if not math.isfinite(loss):
        raise ModelError(f"training loss is {loss} at step {step}; lower training.learning_rate")
    return loss


def _clip(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> torch.Tensor:
    """Scale the whole gradient to at most `max_grad_norm`, 0 leaves it alone; its L2 norm as it was, a scalar."""
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


@torch.no_grad()
def _pull(engine: Engine, origin: Tensors, share: float) -> None:
    """Go a share of the way back to where the round began, before the step along a gradient that is there already.

    With plain SGD both together are a step on FedProx's loss, f + mu/2 || w - w_t ||^2; the pull depends on no row, so
    that neither clipping nor noise has to see it.

    Source: Li et al. 2020, arXiv:1812.06127, equation 2.
    """
    if share:
        for name, parameter in adapter.parameters(engine.model).items():
            parameter.lerp_(origin[name], share)
