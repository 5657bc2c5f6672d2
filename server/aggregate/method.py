"""What an aggregation method is: facts that are checked when the run file is read, and a few functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Facts:
    """What holds of a method; the compatibility checks rest on these.

    Attributes:
        name: As in `aggregation.method`.
        source: Paper.
        is_linear: Only the weighted sum of uploads is used, so that secure aggregation and central noise apply.
        is_exact: The new effective weight equals the weighted mean of the sites' effective weights.
        allows_mixed_ranks: Sites may have different ranks.
    """

    name: str
    source: str
    is_linear: bool
    is_exact: bool
    allows_mixed_ranks: bool


class Sum(Protocol):
    """A running combination of uploads; its memory does not grow with the number of sites if the method is linear."""

    def add(self, upload: State, *, weight: float) -> None:
        """Take one site's upload."""

    def result(self) -> State:
        """What the uploads add up to."""


class Method(Protocol):
    """One way to aggregate adapters."""

    facts: Facts

    def start(self, state: State) -> Sum:
        """Begin a round from the global adapter."""

    def apply(self, state: State, combined: State) -> State:
        """The next global adapter."""
