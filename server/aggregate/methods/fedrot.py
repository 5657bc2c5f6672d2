"""The mean of both factors, each site's turned towards the global ones before (FedRot-LoRA: arXiv:2602.23638).

    U S V^T = SVD(X),   X = A_i A^T in even rounds and while B is zero, B_i^T B in odd ones;   R = U V^T
    O = the orthogonal matrix nearest to (1 - lambda) I + lambda R
    A <- sum_i p_i O^T A_i,   B <- sum_i p_i B_i O

B_i A_i is what it was; the factors of different sites are nearer to each other, so that their means lose less. A
reflection becomes a rotation by the sign of its last direction, as in the authors' code. There the sites turn their own
factors; here the coordinator does, for a site runs no code of a method, so that it needs each site's factors.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from common.run.catalogue.methods import FACTS
from server.aggregate import factored, mean
from server.aggregate.method import State, Sum

LAMBDA: Final = 0.4  # the paper's
facts: Final = FACTS["fedrot"]


class _MeanOfTurned:
    """A mean of whole factors, a few sites at a time."""

    def __init__(self, state: State, *, is_odd: bool) -> None:
        self._state, self._is_odd = state, is_odd
        self._mean = mean.WeightedMean(state)

    def add(self, upload: State, *, weight: float) -> None:
        """Take one site's upload.

        Raises:
            ValueError: The weight is not positive.
        """
        local = factored.modules({name: tensor + upload[name] for name, tensor in self._state.items()})
        turned: dict[str, Tensor] = {}
        for module, (b_dr, a_rk) in factored.modules(self._state).items():
            turned |= factored.named(module, *turn(local[module], like=(b_dr, a_rk), is_odd=self._is_odd))
        self._mean.add(turned, weight=weight)

    def result(self) -> dict[str, Tensor]:
        """The mean factors, float32.

        Raises:
            ValueError: Nothing was added.
        """
        return self._mean.result()


def start(state: State, *, trained: Collection[str], round_index: int = 0) -> Sum:
    """Begin a round; both factors of every module are trained."""
    return _MeanOfTurned({name: state[name] for name in trained}, is_odd=bool(round_index % 2))


def apply(state: State, combined: State) -> State:
    """The next global adapter: the mean itself."""
    return {**state, **combined}


def turn(
    pair: tuple[Tensor, Tensor], *, like: tuple[Tensor, Tensor], is_odd: bool, strength: float = LAMBDA
) -> tuple[Tensor, Tensor]:
    """A pair of factors of the same product, turned towards another pair.

    Args:
        pair: B (d x r) and A (r x k).
        like: The global pair.
        is_odd: Whether B shows where to, unless it is zero; else A does.
        strength: lambda; 1 turns all the way, 0 not at all.
    """
    (b_dr, a_rk), (to_dr, to_rk) = (tuple(factor.double() for factor in factors) for factors in (pair, like))
    x_rr = b_dr.T @ to_dr if is_odd and bool(to_dr.any()) else a_rk @ to_rk.T
    u_rr, _, vh_rr = torch.linalg.svd(x_rr)
    if float(torch.linalg.det(u_rr @ vh_rr)) < 0:
        vh_rr[-1] *= -1
    identity_rr = torch.eye(len(x_rr), dtype=torch.float64)
    u_rr, _, vh_rr = torch.linalg.svd((1 - strength) * identity_rr + strength * (u_rr @ vh_rr))
    return b_dr @ u_rr @ vh_rr, (u_rr @ vh_rr).T @ a_rk
