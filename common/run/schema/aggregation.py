"""Section `[aggregation]` of the run file."""

from typing import Final, Literal

from pydantic import Field

from common.run.catalogue.methods import FACTS, MethodName
from common.run.schema.section import Decay, Section

NUM_HEADS: Final = 4


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
    robust: Literal["none", "median", "trimmed_mean", "krum", "multi_krum", "bulyan"] = Field(
        default="none", description="What stands in the place of the mean where some sites may be bad."
    )
    num_bad_sites: int = Field(
        default=0, ge=0, le=1_000_000, description="Sites of a round that `robust` must withstand, at most."
    )
    max_update_norm: float = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="Scale a longer update down to this L2 norm, over all its tensors. 0: take it as it is.",
    )
    screening: Literal["off", "report", "drop"] = Field(
        default="off",
        description="Look for updates unlike the round's others or the site's own of late, and say so (`report`) or "
        "leave them out too (`drop`).",
    )
    screening_threshold: float = Field(
        default=4.0, gt=0, le=1000, description="Distance from the median, in spreads, that `screening` calls too far."
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
    server_optimizer: Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = Field(
        default="none", description="What the coordinator makes of the mean update. `none`: adds it."
    )
    server_learning_rate: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Rate of `server_optimizer`. 0: 0.3 under `fedavgm`, 0.01 under the others.",
    )
    server_beta1: Decay = Field(default=0.9, description="Decay of the mean update; not under `fedadagrad`.")
    server_beta2: Decay = Field(
        default=0.99, description="Decay of the mean update's square; `fedadam` and `fedyogi` only."
    )
    server_tau: float = Field(
        default=1e-3, gt=0, le=1, description="Added to the denominator; not under `fedavgm`. Smaller adapts more."
    )

    @property
    def num_core_heads(self) -> int:
        """Heads of the adapter's cores; 0 under a method that has none."""
        return self.num_heads if FACTS[self.method].has_cores else 0
