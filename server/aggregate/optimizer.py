"""What the coordinator makes of a round's mean update g: FedAvgM, FedAdam, FedYogi and FedAdagrad, on the factors.

    fedavgm:     m <- beta1 m + g,                step = rate m
    fedadam:     m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    step = rate m / (sqrt(v) + tau)
    fedyogi:     m, step as fedadam's,            v <- v - (1 - beta2) g^2 sign(v - g^2)
    fedadagrad:  m = g,                           v <- v + g^2,                      step as fedadam's

m and v begin at zero. A tensor that a round does not train keeps its own, so that factors trained in turn have a state
each. Source: Hsu et al. 2019, arXiv:1909.06335 (FedAvgM); Reddi et al. 2021, arXiv:2003.00295, algorithm 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.run.schema.aggregation import FedAdagrad, FedAdam, FedAvgM, ServerOptimizer
from server.aggregate.method import State

Memory = Mapping[str, Tensor]
_M, _V = "m/", "v/"


def step(mean: State, memory: Memory, *, settings: ServerOptimizer) -> tuple[State, Memory]:
    """What to add to the global adapter, and what to remember for the next round.

    Args:
        mean: The round's mean update: the tensors that were trained.
        memory: As the round before left it; empty at the start.
        settings: Section `[aggregation.server_optimizer]`.
    """
    if settings.kind == "none":
        return mean, memory
    steps: dict[str, Tensor] = {}
    kept = dict(memory)
    for name, g in mean.items():
        zero = torch.zeros_like(g)
        m, v = _moments(kept.get(_M + name, zero).double(), kept.get(_V + name, zero).double(), g.double(), settings)
        m, v = m.float(), v.float()
        scaled = m.double() if settings.kind == "fedavgm" else m.double() / (v.double().sqrt() + settings.tau)
        steps[name] = (settings.learning_rate * scaled).float()
        kept |= {_M + name: m, _V + name: v}
    return steps, kept


def _moments(m: Tensor, v: Tensor, g: Tensor, settings: FedAvgM | FedAdam | FedAdagrad) -> tuple[Tensor, Tensor]:
    """The running means of the updates and of their squares, value by value."""
    square = g * g
    if settings.kind == "fedavgm":
        return settings.beta1 * m + g, v
    if settings.kind == "fedadagrad":
        return g, v + square
    beta2 = settings.beta2
    first = settings.beta1 * m + (1 - settings.beta1) * g
    if settings.kind == "fedadam":
        return first, beta2 * v + (1 - beta2) * square
    return first, v - (1 - beta2) * square * torch.sign(v - square)
