"""What an aggregation method does at the coordinator; what holds of it is in `common.run.catalogue.methods`."""

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from common.run.catalogue.methods import Facts

State = Mapping[str, Tensor]


class Sum(Protocol):
    """A running combination of uploads; its memory does not grow with the number of sites if the method is linear."""

    def add(self, upload: State, *, weight: float) -> None:
        """Take one site's upload: what it changed in the tensors that it trained."""

    def result(self) -> State:
        """What the uploads add up to."""


class Method(Protocol):
    """One way to aggregate adapters. A module of functions: each depends on its arguments only."""

    facts: Facts

    def start(self, state: State, *, trained: Collection[str]) -> Sum:
        """Begin a round from the global adapter; `trained` are the tensors that sites send."""

    def apply(self, state: State, combined: State) -> State:
        """The next global adapter."""
