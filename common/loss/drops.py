"""The score by which an attacker tells who was trained on: how far a loss fell from the base to the adapter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.data.rows import Row
from common.errors import ConfigError
from common.loss import evaluation
from common.model import base
from common.model.base import Engine
from common.run import config


def loss_drops(engine: Engine, trained: Tensors, units: Sequence[Sequence[Row]], *, data: config.DataConfig) -> Tensor:
    """How much each unit's loss fell from the base to the trained adapter, nats per answer token.

    Loss alone mostly tells easy rows from hard ones; the base says how hard they are.

    Args:
        engine: Holds the trained adapter when this returns.

    Returns:
        One score a unit, higher for members.

    Raises:
        ConfigError: A row is longer than the run's limit.

    Source: Carlini et al. 2022, arXiv:2112.03570, on calibrated scores.
    """
    before = _losses(engine, engine.initial, units, data)
    return before - _losses(engine, trained, units, data)


def _losses(engine: Engine, tensors: Tensors, units: Sequence[Sequence[Row]], data: config.DataConfig) -> Tensor:
    """Mean negative log-likelihood of each unit's answer tokens under an adapter."""
    adapter.write(engine.model, tensors)
    means = []
    for rows in units:
        encoded, report = base.encode(engine, rows, data)
        if report.num_dropped or report.num_truncated:
            raise ConfigError("a row of this audit is over data.max_length_tokens; raise it")
        total, count = evaluation.held_out_nll(engine, encoded, batch_size=len(encoded))
        means.append(total / count)
    return torch.tensor(means, dtype=torch.float64)
