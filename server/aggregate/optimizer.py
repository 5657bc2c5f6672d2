"""What the coordinator makes of a round's mean update g: FedAvgM, FedAdam, FedYogi and FedAdagrad, on the factors.

    fedavgm:     m <- beta1 m + g,                step = rate m
    fedadam:     m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    step = rate m / (sqrt(v) + tau)
    fedyogi:     m, step as fedadam's,            v <- v - (1 - beta2) g^2 sign(v - g^2)
    fedadagrad:  m = g,                           v <- v + g^2,                      step as fedadam's

m and v begin at zero. A tensor that a round does not train keeps its own, so that factors trained in turn have a state
each. Source: Hsu et al. 2019, arXiv:1909.06335 (FedAvgM); Reddi et al. 2021, arXiv:2003.00295, algorithm 2.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from common.run.schema.aggregation import AggregationConfig
from server.aggregate.method import State

Memory = Mapping[str, Tensor]
_M, _V = "m/", "v/"
_RATES: Final = {"fedavgm": 0.3, "fedadam": 0.01, "fedyogi": 0.01, "fedadagrad": 0.01}


def step(mean: State, memory: Memory, *, settings: AggregationConfig) -> tuple[State, Memory]:
    """What to add to the global adapter, and what to remember for the next round.

    Args:
        mean: The round's mean update: the tensors that were trained.
        memory: As the round before left it; empty at the start.
        settings: Section `[aggregation]`.
    """
    if settings.server_optimizer == "none":
        return mean, memory
    steps: dict[str, Tensor] = {}
    kept = dict(memory)
    for name, g in mean.items():
        zero = torch.zeros_like(g)
        m, v = kept.get(_M + name, zero).double(), kept.get(_V + name, zero).double()
        m, v = _first(m, g.double(), settings).float(), _second(v, g.double(), settings).float()
        steps[name] = _step(m.double(), v.double(), settings).float()
        kept |= {_M + name: m, _V + name: v}
    return steps, kept


def _first(m: Tensor, g: Tensor, settings: AggregationConfig) -> Tensor:
    """The running mean of the updates."""
    beta1 = settings.server_beta1
    rules = {
        "fedavgm": lambda: beta1 * m + g,
        "fedadam": lambda: beta1 * m + (1 - beta1) * g,
        "fedyogi": lambda: beta1 * m + (1 - beta1) * g,
        "fedadagrad": lambda: g,
    }
    return rules[settings.server_optimizer]()


def _second(v: Tensor, g: Tensor, settings: AggregationConfig) -> Tensor:
    """The running mean of their squares, value by value."""
    beta2, square = settings.server_beta2, g * g
    rules = {
        "fedavgm": lambda: v,
        "fedadam": lambda: beta2 * v + (1 - beta2) * square,
        "fedyogi": lambda: v - (1 - beta2) * square * torch.sign(v - square),
        "fedadagrad": lambda: v + square,
    }
    return rules[settings.server_optimizer]()


def _step(m: Tensor, v: Tensor, settings: AggregationConfig) -> Tensor:
    """What is added."""
    rate = settings.server_learning_rate or _RATES[settings.server_optimizer]
    return rate * m if settings.server_optimizer == "fedavgm" else rate * m / (v.sqrt() + settings.server_tau)
