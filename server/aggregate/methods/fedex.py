"""Both factors are averaged, and what that leaves out is kept beside them (FedEx-LoRA: arXiv:2410.09432).

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   U V <- U V + (sum_i p_i B_i A_i - B A)

What goes into U V is formed as sum_i p_i B_i (A_i - A), the same and without B A to cancel.
The side adapter U V is the sum over all rounds, so that a site that missed some is sent all of it. Its
rank is capped.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, mean, products
from server.aggregate.method import State, Sum

facts: Final = FACTS["fedex"]


class _MeanOfBoth:
    """The mean of the factors and the mean of the products."""

    def __init__(self, factors: Sum, stacked: Sum) -> None:
        self._factors, self._stacked = factors, stacked

    def add(self, upload: State, *, weight: float) -> None:
        """Take one site's upload."""
        self._factors.add(upload, weight=weight)
        self._stacked.add(upload, weight=weight)

    def result(self) -> State:
        """The mean change of each factor under its name, the products under names of their own."""
        return {**self._factors.result(), **self._stacked.result()}


def start(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round."""
    return _MeanOfBoth(mean.start(state, trained=trained), products.start(state, trained=trained))


def apply(state: State, combined: State) -> State:
    """The next global adapter, its side adapter included."""
    after: dict[str, Tensor] = dict(mean.add(state, combined))
    stacked, beside = products.pairs(combined), factored.side(state)
    for module, (_, a_rk) in factored.modules(after).items():
        left_dm, right_mk = stacked[module]
        apart_mk = right_mk - a_rk.repeat(len(right_mk) // len(a_rk), 1)
        lefts, rights = [beside[module][0], left_dm], [beside[module][1], apart_mk]
        after |= factored.cut_side(module, torch.cat(lefts, dim=1), torch.cat(rights), like=beside[module])
    return after
