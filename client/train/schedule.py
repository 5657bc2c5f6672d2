"""Which rows a round sees and at which learning rate; both are functions of the run, not of a site's memory."""

import hashlib
import math
import random
from collections.abc import Iterator

from common.run import config


def num_local_steps(num_rows: int, training: config.TrainingConfig) -> int:
    """Optimiser steps of one round at a site with `num_rows` rows."""
    if training.local_steps:
        return training.local_steps
    return max(1, math.ceil(training.local_epochs * num_rows / training.batch_size))


def batches(*, num_rows: int, batch_size: int, first_step: int, num_steps: int, seed: int) -> Iterator[list[int]]:
    """Row indices of each step, from an endless chain of permutations of all rows.

    A round takes up where the one before stopped, so that a site's rows are all used equally often over the run,
    whatever the number of local steps; each pass has an order of its own.

    Args:
        num_rows: Rows of the site.
        batch_size: Rows of a step.
        first_step: Steps that earlier rounds of the run took.
        num_steps: Steps wanted.
        seed: Of this run and site.

    Example:
        >>> [sorted(b) for b in batches(num_rows=4, batch_size=4, first_step=0, num_steps=2, seed=1)]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    orders: dict[int, list[int]] = {}
    for step in range(first_step, first_step + num_steps):
        places = range(step * batch_size, (step + 1) * batch_size)
        yield [_order(orders, place // num_rows, num_rows, seed)[place % num_rows] for place in places]


def learning_rate(progress: float, training: config.TrainingConfig) -> float:
    """Rate at a point of the whole run.

    Args:
        progress: Share of the run's local steps that are done, 0 to 1.
        training: Section `[training]`.

    Source: cosine as in Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts.
    """
    if progress < training.warmup_fraction:
        return training.learning_rate * progress / training.warmup_fraction
    share = (progress - training.warmup_fraction) / (1 - training.warmup_fraction)
    factors = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    last = training.final_rate_fraction
    return training.learning_rate * (last + (1 - last) * factors[training.schedule])


def rates(round_index: int, *, num_rounds: int, num_steps: int, training: config.TrainingConfig) -> list[float]:
    """Rate of each step of a round.

    Args:
        round_index: From 0.
        num_rounds: Of the run, all of which the schedule spans.
        num_steps: Of each round at this site.
        training: Section `[training]`.
    """
    first = round_index * num_steps
    return [learning_rate(step / (num_rounds * num_steps), training) for step in range(first, first + num_steps)]


def mean_rate(round_index: int, *, num_rounds: int, num_steps: int, training: config.TrainingConfig) -> float:
    """Mean rate of a round's steps; see `rates`."""
    return math.fsum(rates(round_index, num_rounds=num_rounds, num_steps=num_steps, training=training)) / num_steps


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from names and numbers, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _order(orders: dict[int, list[int]], epoch: int, num_rows: int, seed: int) -> list[int]:
    """The permutation of one pass, made once."""
    if epoch not in orders:
        order = list(range(num_rows))
        random.Random(derive_seed(seed, epoch)).shuffle(order)  # noqa: S311  an order of rows, not a secret
        orders[epoch] = order
    return orders[epoch]
