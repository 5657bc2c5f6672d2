"""What the two audits of a trained adapter share: coins, the federation's own training, and what scores say."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from client.agent.agent import SiteData
from client.train import schedule
from common.adapter.adapter import Tensors
from common.data.rows import Row
from common.events import EventLog
from common.privacy import bounds, cost, roc
from common.privacy.noise import SeededNoise
from common.run import config
from common.run.schema.privacy import DP_DELTA
from simulations.audit.finding import Finding, Part
from simulations.world import run
from simulations.world.world import World


def coins(count: int, *, seed: int, purpose: str) -> Tensor:
    """Which ones take part: each with probability 1/2, for itself, as the run's seed says."""
    return torch.from_numpy(SeededNoise(schedule.derive_seed(seed, "audit", purpose)).uniform(count) < 0.5)


def train(shared: World, sites: Mapping[str, SiteData], log: EventLog) -> Tensors:
    """The adapter that the federation makes of these rows."""
    settings = shared.settings.model_copy(
        update={"gate": config.GateConfig(), "export": config.ExportConfig()}
    )  # what a gate refuses is attacked too
    return run.in_process(replace(shared, settings=settings, sites=sites), log=log).tensors


def judge(
    part: Part,
    shared: World,
    score_m: Tensor,
    is_in_m: Tensor,
    *,
    claimed_epsilon: float | None,
    figures: Mapping[str, float],
) -> Finding:
    """What the scores of m units say against the claim, by the one-run bound.

    Args:
        score_m: Of each unit; higher where it is thought to have trained.
        is_in_m: Whether it has.
        figures: What this part reports beside the rates.
    """
    settings = shared.settings
    dp_delta = DP_DELTA if settings.privacy.mode == "none" else settings.privacy.dp_delta
    claimed = claimed_epsilon
    if claimed is None:  # what the run promises each unit
        claimed = cost.epsilon(settings) if settings.privacy.mode == "unit" else math.inf
    bound = bounds.one_run(score_m, is_in_m, dp_delta=dp_delta)
    return Finding(
        part=part,
        claimed_epsilon=claimed,
        audited_epsilon=bound.epsilon,
        ceiling=bound.ceiling,
        num_canaries=len(score_m),
        dp_delta=dp_delta,
        figures={
            "guesses": bound.num_guesses,
            "right_guesses": bound.num_right,
            **roc.rates(score_m, is_in_m).figures(),
            **figures,
        },
    )


def by_unit(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each unit, units in the order of their first rows."""
    units: dict[str, list[Row]] = {}
    for row in rows:
        units.setdefault(row.unit, []).append(row)
    return list(units.values())
