"""The mean of both factors; a site weighs by the size of its product (HetLoRA: Cho et al. 2024, arXiv:2401.06432).

    A <- sum_i q_i A_i,   B <- sum_i q_i B_i,   q_i = n_i / sum_l n_l,   n_i = sum over modules of || B_i A_i ||_F

A site of a smaller rank is padded with zeros, and is sent the first columns of B and rows of A. Neither rows nor
`aggregation.weighting` count. A site's own pruning of its rank, the other half of the paper, is not here: who holds
which rank is in the manifest.
"""

from collections.abc import Collection
from typing import Final

from torch import Tensor

from common.adapter import ranks
from common.run.catalogue.methods import FACTS
from server.aggregate import factored, mean
from server.aggregate.method import State, Sum

facts: Final = FACTS["hetlora"]


class _BySize:
    """A mean of whole factors, a few sites at a time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._mean = mean.WeightedMean(state)
        self._num_sized = self._num_empty = 0

    def add(self, upload: State, *, weight: float) -> None:
        """Take one site's upload; one whose product is zero has the weight zero.

        Raises:
            ValueError: The weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        local = {name: tensor + upload[name] for name, tensor in ranks.cut(self._state, upload).items()}
        size = sum(factored.norm(b_dq, a_qk) for b_dq, a_qk in factored.modules(local).values())
        if size > 0:
            self._mean.add(local, weight=size)
        self._num_sized, self._num_empty = self._num_sized + (size > 0), self._num_empty + (size == 0)

    def result(self) -> dict[str, Tensor]:
        """The mean factors, float32; nothing where no site has a product.

        Raises:
            ValueError: Nothing was added.
        """
        return {} if self._num_empty and not self._num_sized else self._mean.result()


def start(state: State, *, trained: Collection[str], round_index: int = 0) -> Sum:
    """Begin a round; both factors of every module are trained."""
    return _BySize({name: state[name] for name in trained})


def apply(state: State, combined: State) -> State:
    """The next global adapter: the mean itself."""
    return {**state, **combined}
