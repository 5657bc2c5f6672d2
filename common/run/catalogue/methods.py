"""What holds of each aggregation method, as data: server, sites, policy and pages all read this one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

MethodName = Literal[
    "fedavg", "ffa", "fedsvd", "rolora", "flexlora", "fedex", "flora", "fedsa", "ravan",
]  # fmt: skip
Privacy = Literal["record", "central"]


@dataclass(frozen=True)
class Facts:
    """What holds of a method; what may be combined with it follows from these (`common.run.rules.compatibility`).

    Attributes:
        name: As in `aggregation.method`.
        title: As in its paper.
        source: Paper.
        rule: What the coordinator does, in a line.
        trains: Factors that a site trains, one entry a round, in turn: `("B", "A")` alternates. It sends them, but for
            those of `client_state`. H is a core between A and B (`common.adapter.cores`).
        fixed: Factors that are made from the run's seed at both ends, and never trained or sent; empty: none.
        is_linear: Only the weighted sum of uploads is used, so that secure aggregation and central noise apply.
        is_exact: The new effective weight equals the weighted mean of the sites' effective weights.
        has_orthonormal_start: A begins with orthonormal rows, else it is drawn as peft draws it; B with orthonormal
            columns where it is fixed, else with zeros.
        refreshes: The coordinator gives the factors new coordinates each round, so that no momentum fits them.
        mixed_ranks: Whether sites of different ranks could take part; `truncate`: with an error at the smaller ones.
        client_state: Factors that stay at a site from round to round and never travel: there is no global adapter then.
        stages: Trips between coordinator and sites in a round.
        base_delta: What is left beside the two factors; `residual`: a frozen side adapter of capped rank.
        privacy: Differential privacy under which the method is sound: noise at the sites, or on the sum.
        nearest: Methods to take where this one is refused, nearest first.
        is_experimental: Nobody but its authors has shown that it helps; a run says so when it starts.
    """

    name: MethodName
    title: str
    source: str
    rule: str
    trains: tuple[str, ...]
    fixed: str
    is_linear: bool
    is_exact: bool
    has_orthonormal_start: bool
    refreshes: bool
    mixed_ranks: Literal["no", "truncate", "yes"]
    client_state: tuple[str, ...]
    stages: int
    base_delta: Literal["none", "residual"]
    privacy: tuple[Privacy, ...]
    nearest: tuple[MethodName, ...]
    is_experimental: bool = False

    @property
    def is_personal(self) -> bool:
        """Whether each site ends with an adapter of its own."""
        return bool(self.client_state)

    @property
    def has_cores(self) -> bool:
        """Whether a core stands between the two factors."""
        return "H" in "".join(self.trains)

    @property
    def has_bias(self) -> bool:
        """Whether both factors are averaged, so that the mean of their products is another one."""
        return "AB" in self.sends and not self.is_exact and not self.refreshes

    @property
    def sends(self) -> tuple[str, ...]:
        """Factors of an update, one entry a round, in turn."""
        return tuple("".join(factor for factor in turn if factor not in self.client_state) for turn in self.trains)


_TABLE: Final = (
    Facts(
        name="fedavg",
        title="FedIT",
        source="arXiv:2305.05644",
        rule="the mean of A and the mean of B",
        trains=("AB",),
        fixed="",
        is_linear=True,
        is_exact=False,
        has_orthonormal_start=False,
        refreshes=False,
        mixed_ranks="no",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("rolora", "flexlora", "fedsvd", "ffa"),
    ),
    Facts(
        name="ffa",
        title="FFA-LoRA",
        source="arXiv:2403.12313",
        rule="A fixed, the mean of B",
        trains=("B",),
        fixed="A",
        is_linear=True,
        is_exact=True,
        has_orthonormal_start=True,
        refreshes=False,
        mixed_ranks="no",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("fedsvd", "rolora", "fedavg", "flexlora"),
    ),
    Facts(
        name="fedsvd",
        title="FedSVD",
        source="arXiv:2505.12805",
        rule="the mean of B; then B A is factored anew, A with orthonormal rows",
        trains=("B",),
        fixed="",
        is_linear=True,
        is_exact=True,
        has_orthonormal_start=True,
        refreshes=True,
        mixed_ranks="truncate",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("ffa", "rolora", "fedavg", "flexlora"),
    ),
    Facts(
        name="rolora",
        title="RoLoRA",
        source="arXiv:2502.01755",
        rule="the mean of B in even rounds, of A in odd ones; the other factor stays",
        trains=("B", "A"),
        fixed="",
        is_linear=True,
        is_exact=True,
        has_orthonormal_start=False,
        refreshes=False,
        mixed_ranks="no",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("fedsvd", "ffa", "fedavg", "flexlora"),
    ),
    Facts(
        name="flexlora",
        title="FlexLoRA",
        source="arXiv:2402.11505",
        rule="the mean of the products B A, cut to the adapter's rank by its singular values",
        trains=("AB",),
        fixed="",
        is_linear=False,
        is_exact=False,
        has_orthonormal_start=False,
        refreshes=True,
        mixed_ranks="yes",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record",),
        nearest=("fedsvd", "rolora", "fedavg", "ffa", "flora"),
    ),
    Facts(
        name="fedex",
        title="FedEx-LoRA",
        source="arXiv:2410.09432",
        rule="the mean of A and the mean of B; what that leaves out goes into a frozen side adapter",
        trains=("AB",),
        fixed="",
        is_linear=False,
        is_exact=True,
        has_orthonormal_start=False,
        refreshes=False,
        mixed_ranks="no",
        client_state=(),
        stages=1,
        base_delta="residual",
        privacy=(),
        nearest=("rolora", "fedsvd", "ffa", "fedavg", "flexlora"),
    ),
    Facts(
        name="flora",
        title="FLoRA",
        source="arXiv:2409.05976",
        rule="the mean of the products goes into a frozen side adapter; A and B begin anew",
        trains=("AB",),
        fixed="",
        is_linear=False,
        is_exact=True,
        has_orthonormal_start=False,
        refreshes=True,
        mixed_ranks="yes",
        client_state=(),
        stages=1,
        base_delta="residual",
        privacy=(),
        nearest=("fedsvd", "rolora", "ffa", "fedavg", "flexlora"),
    ),
    Facts(
        name="fedsa",
        title="FedSA-LoRA",
        source="arXiv:2410.01463",
        rule="the mean of A; every site keeps its own B, so that there is no global adapter",
        trains=("AB",),
        fixed="",
        is_linear=True,
        is_exact=False,
        has_orthonormal_start=False,
        refreshes=False,
        mixed_ranks="no",
        client_state=("B",),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("fedavg", "rolora", "fedsvd", "ffa", "flexlora"),
    ),
    Facts(
        name="ravan",
        title="RAVAN",
        source="arXiv:2506.05568",
        rule="A and B fixed, in heads; the mean of the cores H between them",
        trains=("H",),
        fixed="AB",
        is_linear=True,
        is_exact=True,
        has_orthonormal_start=True,
        refreshes=False,
        mixed_ranks="no",
        client_state=(),
        stages=1,
        base_delta="none",
        privacy=("record", "central"),
        nearest=("ffa", "fedsvd", "rolora", "fedavg", "flexlora"),
        is_experimental=True,
    ),
)
FACTS: Final[Mapping[str, Facts]] = {facts.name: facts for facts in _TABLE}
