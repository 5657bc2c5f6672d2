"""What the two audits of a trained adapter share: coins, the federation's own training, and the score of a unit."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from client.agent import SiteData
from client.train import schedule
from common import adapter, config, evaluation, model, privacy_plan
from common.adapter import Tensors
from common.errors import ConfigError
from common.events import EventLog
from common.model import Engine
from common.noise import SeededNoise
from common.rows import Row
from simulations import run
from simulations.compare import World


def claim(settings: config.RunConfig) -> float:
    """What the run promises each unit; infinite if it promises nothing."""
    return privacy_plan.epsilon(settings) if settings.privacy.is_private_per_unit else math.inf


def coins(count: int, *, seed: int, purpose: str) -> Tensor:
    """Which ones take part: each with probability 1/2, for itself, as the run's seed says."""
    return torch.from_numpy(SeededNoise(schedule.derive_seed(seed, "audit", purpose)).uniform(count) < 0.5)


def train(shared: World, sites: Mapping[str, SiteData], log: EventLog) -> Tensors:
    """The adapter that the federation makes of these rows."""
    settings = shared.settings.model_copy(update={"gate": config.GateConfig()})  # what a gate refuses is attacked too
    outcome = run.in_process(settings, sites=sites, engine=shared.engine, folder=shared.folder, log=log)
    return outcome.tensors


def loss_drops(shared: World, trained: Tensors, units: Sequence[Sequence[Row]]) -> Tensor:
    """How much each unit's loss fell from the base to the trained adapter, nats per answer token: the score.

    Loss alone mostly tells easy rows from hard ones; the base says how hard they are.

    Raises:
        ConfigError: A row is longer than the run's limit.

    Source: Carlini et al. 2022, arXiv:2112.03570, on calibrated scores.
    """
    before = _losses(shared, shared.engine.initial, units)
    return before - _losses(shared, trained, units)


def by_unit(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each unit, units in the order of their first rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.unit, []).append(row)
    return list(found.values())


def _losses(shared: World, tensors: Tensors, units: Sequence[Sequence[Row]]) -> Tensor:
    """Mean negative log-likelihood of each unit's answer tokens under an adapter."""
    adapter.write(shared.engine.model, tensors)
    return torch.tensor([_loss(shared.engine, rows, shared.settings.data) for rows in units], dtype=torch.float64)


def _loss(engine: Engine, rows: Sequence[Row], data: config.DataConfig) -> float:
    """One unit's."""
    encoded, report = model.encode(engine, rows, data)
    if report.num_dropped or report.num_truncated:
        raise ConfigError("a row of this audit is over data.max_length_tokens; raise it")
    total, count = evaluation.held_out_nll(engine, encoded, batch_size=len(encoded))
    return total / count
