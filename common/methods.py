"""What holds of each aggregation method, as data: server, sites, policy and pages all read this one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

MethodName = Literal["fedavg", "ffa"]


@dataclass(frozen=True)
class Facts:
    """What holds of a method; what may be combined with it follows from these.

    Attributes:
        name: As in `aggregation.method`.
        source: Paper.
        trains: Factors that a site trains and sends, one entry a round, in turn: `("B", "A")` alternates.
        fixed: Factor that is made from the run's seed at both ends, and never trained or sent; empty: none.
        is_linear: Only the weighted sum of uploads is used, so that secure aggregation and central noise apply.
        is_exact: The new effective weight equals the weighted mean of the sites' effective weights.
        has_orthonormal_start: A begins with orthonormal rows; else it is drawn as peft draws it.
    """

    name: MethodName
    source: str
    trains: tuple[str, ...]
    fixed: str
    is_linear: bool
    is_exact: bool
    has_orthonormal_start: bool


_TABLE: Final = (
    Facts(
        name="fedavg",
        source="arXiv:2305.05644",
        trains=("AB",),
        fixed="",
        is_linear=True,
        is_exact=False,
        has_orthonormal_start=False,
    ),
    Facts(
        name="ffa",
        source="arXiv:2403.12313",
        trains=("B",),
        fixed="A",
        is_linear=True,
        is_exact=True,
        has_orthonormal_start=True,
    ),
)
FACTS: Final[Mapping[str, Facts]] = {facts.name: facts for facts in _TABLE}
