"""The weighted mean of the sites' products B_i A_i, as one pair of thin matrices; what non-linear methods rest on."""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from server.aggregate import factored
from server.aggregate.kept import Kept
from server.aggregate.method import State, Sum

_STACKED: Final = "stacked/"  # before a module's name, apart from the module's own factors


class MeanOfProducts:
    """Keeps every upload of a round: the products of a sum are not the sum of the products."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._kept = Kept()

    def add(self, upload: State, *, weight: float) -> None:
        """Keep an upload.

        Raises:
            ValueError: The weight is not positive.
        """
        self._kept.add(upload, weight=weight)

    def result(self) -> dict[str, Tensor]:
        """Of each module `[p_1 B_1, ..., p_K B_K]` and `[A_1; ...; A_K]`: rank K r, product the mean; see `pairs`.

        Raises:
            ValueError: Nothing was added.
        """
        ordered = sorted(self._kept.ordered(), key=lambda kept: kept[0])
        total = sum(weight for weight, _ in ordered)
        shares = [(weight / total, factored.modules(self._local(upload))) for weight, upload in ordered]
        stacked: dict[str, Tensor] = {}
        for module in factored.modules(self._state):
            left_dm = torch.cat([share * pairs[module][0] for share, pairs in shares], dim=1)
            right_mk = torch.cat([pairs[module][1] for _, pairs in shares], dim=0)
            stacked |= factored.named(_STACKED + module, left_dm, right_mk)
        return stacked

    def _local(self, upload: State) -> dict[str, Tensor]:
        """A site's adapter after its training."""
        return {name: tensor + upload[name] for name, tensor in self._state.items()}


def start(state: State, *, trained: Collection[str]) -> Sum:
    """Begin a round; both factors of every module are trained."""
    return MeanOfProducts({name: state[name] for name in trained})


def pairs(combined: State) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean of the products of every module in a round's result; empty if it holds none."""
    found = {name: tensor for name, tensor in combined.items() if name.startswith(_STACKED)}
    return {name.removeprefix(_STACKED): pair for name, pair in factored.modules(found).items()}
