"""FedAvg of the LoRA factors (FedIT: Zhang et al. 2023, arXiv:2305.05644)."""

from typing import Final

import torch
from torch import Tensor

from server.aggregate.method import Facts, State, Sum

facts: Final = Facts(name="fedavg", source="arXiv:2305.05644", is_linear=True, is_exact=False, allows_mixed_ranks=False)


class WeightedMean:
    """Mean of uploads in float64, one upload at a time.

    Float64 leaves 29 bits beyond float32's precision, so the rounded result does not depend on the order of arrival but
    for a chance of about 2^-29 a value.
    """

    def __init__(self, state: State) -> None:
        self._sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        self._total = 0.0

    def add(self, upload: State, *, weight: float) -> None:
        """Add `weight` times an upload.

        Raises:
            ValueError: The weight is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight {weight} is not positive")
        self._total += weight
        for name, total in self._sums.items():
            total.add_(upload[name].to(torch.float64), alpha=weight)

    def result(self) -> dict[str, Tensor]:
        """The mean, float32.

        Raises:
            ValueError: Nothing was added.
        """
        if not self._total:
            raise ValueError("no upload was added")
        return {name: (total / self._total).to(torch.float32) for name, total in self._sums.items()}


def start(state: State) -> Sum:
    """Begin a round."""
    return WeightedMean(state)


def apply(state: State, combined: State) -> State:
    """A <- A + mean of the sites' changes to A; B likewise."""
    return {name: tensor + combined[name] for name, tensor in state.items()}
