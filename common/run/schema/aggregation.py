"""Section `[aggregation]` of the run file."""

from typing import Annotated, Final, Literal

from pydantic import Field

from common.run.catalogue.methods import FACTS, MethodName
from common.run.schema.section import Decay, Section

NUM_HEADS: Final = 4
RobustRule = Literal["median", "trimmed_mean", "krum", "multi_krum", "bulyan"]


_STEP: Final = "What the coordinator makes of the mean update."
_RULE: Final = "What stands in the place of the mean where some sites may be bad."
_ACTION: Final = "What happens to an update unlike the round's others or the site's own of late."


class NoServerOptimizer(Section):
    """The mean update is added as it is."""

    kind: Literal["none"] = Field(default="none", description=_STEP)


class FedAvgM(Section):
    """Momentum of the mean update (Hsu et al. 2019, arXiv:1909.06335)."""

    kind: Literal["fedavgm"] = Field(default="fedavgm", description=_STEP)
    learning_rate: float = Field(default=0.3, gt=0, le=100, description="Rate of the coordinator's step.")
    beta1: Decay = Field(default=0.9, description="Decay of the mean update.")


class FedAdam(Section):
    """Momentum, divided by the root of a running mean of squares (Reddi et al. 2021, arXiv:2003.00295)."""

    kind: Literal["fedadam", "fedyogi"] = Field(default="fedadam", description=_STEP)
    learning_rate: float = Field(default=0.01, gt=0, le=100, description="Rate of the coordinator's step.")
    beta1: Decay = Field(default=0.9, description="Decay of the mean update.")
    beta2: Decay = Field(default=0.99, description="Decay of the mean update's square.")
    tau: float = Field(default=1e-3, gt=0, le=1, description="Added to the denominator. Smaller adapts more.")


class FedAdagrad(Section):
    """A step divided by the root of the sum of squares (Reddi et al. 2021, arXiv:2003.00295)."""

    kind: Literal["fedadagrad"] = Field(default="fedadagrad", description=_STEP)
    learning_rate: float = Field(default=0.01, gt=0, le=100, description="Rate of the coordinator's step.")
    tau: float = Field(default=1e-3, gt=0, le=1, description="Added to the denominator. Smaller adapts more.")


class Mean(Section):
    """The method's own mean, which one bad site can move where it likes."""

    rule: Literal["none"] = Field(default="none", description=_RULE)


class Robust(Section):
    """A rule that withstands some bad sites."""

    rule: RobustRule = Field(description=_RULE)
    num_bad_sites: int = Field(ge=1, le=1_000_000, description="Sites of a round that it must withstand, at most.")


class NoScreening(Section):
    """Every update counts."""

    action: Literal["off"] = Field(default="off", description=_ACTION)


class Screening(Section):
    """It is written down (`report`), or left out too (`drop`), once all updates of the round are there."""

    action: Literal["report", "drop"] = Field(description=_ACTION)
    threshold: float = Field(
        default=4.0, gt=0, le=1000, description="Distance from the median, in spreads, that is too far."
    )


ServerOptimizer = NoServerOptimizer | FedAvgM | FedAdam | FedAdagrad


class AggregationConfig(Section):
    """How the sites' updates become one."""

    method: MethodName = Field(
        default="fedavg", description="Aggregation method; `fedsvd` for a private run that names none."
    )
    weighting: Literal["examples", "uniform"] = Field(
        default="examples", description="A site's weight: its number of training rows, or the same for all."
    )
    max_weight_share: float = Field(
        default=0.5,
        ge=0.05,
        le=1,
        description="Largest share of a round, and of the held-out figures, that one site can have, where three or "
        "more answer: its number of rows is its own claim. 1: any.",
    )
    gap_warning: float = Field(
        default=0.1,
        ge=0,
        le=1_000_000,
        description="Warn when averaging the factors is off by more than this share of the mean update.",
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="FedProx's mu: each local step goes this times the learning rate back to the global adapter.",
    )
    max_update_norm: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Scale a longer update down to this L2 norm, over all its tensors. 0: take it as it is.",
    )
    residual_rank: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Rank of the frozen side adapter of methods that keep one (`fedex`, `flora`). 0: none.",
    )
    residual_max_lost: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Such a method only: share of a round's step that `residual_rank` may cut; more ends the run.",
    )
    num_heads: int = Field(
        default=NUM_HEADS,
        ge=1,
        le=512,
        description="Heads of `ravan`, which share the rank: each has a core of `adapter.r / num_heads` squared.",
    )
    server_optimizer: Annotated[ServerOptimizer, Field(discriminator="kind")] = Field(
        default_factory=NoServerOptimizer, description="What the coordinator makes of the mean update."
    )
    robust: Annotated[Mean | Robust, Field(discriminator="rule")] = Field(
        default_factory=Mean, description="What withstands bad sites."
    )
    screening: Annotated[NoScreening | Screening, Field(discriminator="action")] = Field(
        default_factory=NoScreening, description="What notices bad sites."
    )

    @property
    def num_core_heads(self) -> int:
        """Heads of the adapter's cores; 0 under a method that has none."""
        return self.num_heads if FACTS[self.method].has_cores else 0
