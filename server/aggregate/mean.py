"""The weighted mean of uploads: all that a linear method uses of them."""

from collections.abc import Collection

import torch
from torch import Tensor

from server.aggregate.method import State, Sum


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


def start(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round."""
    return WeightedMean({name: state[name] for name in trained})


def add(state: State, combined: State) -> State:
    """Add the mean change to the tensors that were trained; the others stay."""
    return {name: tensor + combined[name] if name in combined else tensor for name, tensor in state.items()}
