"""Section `[wire]` of the run file."""

from typing import Annotated, Literal

from pydantic import Field

from common.config_types import Mebibytes, Section


class WireConfig(Section):
    """What travels."""

    dtype: Literal["bfloat16", "float32", "int8", "int4", "int3"] = Field(
        default="bfloat16",
        description="Type of the deltas that go up. Integers have a scale for each rank direction and are rounded up "
        "or down by chance, so that their mean is right.",
    )
    density: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of an update's values that goes up: the largest of the whole adapter, and a bit for every "
        "value that tells which. 1 is all.",
    )
    error_feedback: bool = Field(
        default=True,
        description="What a sparse update left out is kept at the site and added to its next one. Off: it is "
        "forgotten, as in FLASC.",
    )
    down: Literal["float32", "int8", "int4", "int3"] = Field(
        default="float32",
        description="How the adapter goes down: whole in float32 every time, or whole once and then each round's step "
        "as integers. What rounding leaves out of a step goes into the next, and coordinator and sites hold the same "
        "adapter, bit by bit.",
    )
    down_density: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of the values that go down to be trained from, the largest. With down as integers: of each "
        "step, and what a step leaves out goes into the next. With float32: of the adapter itself, as in FLASC; sites "
        "train all values from there, and the coordinator adds their changes to the whole adapter. 1 is all.",
    )
    max_update_mib: Mebibytes = Field(default=600, description="Largest update that is accepted, in MiB.")

    @property
    def keeps_residual(self) -> bool:
        """Whether a site keeps what its sparse updates left out."""
        return self.density < 1 and self.error_feedback

    @property
    def is_adapter_sparse(self) -> bool:
        """Whether the adapter that goes down to be trained is cut to its largest values (FLASC)."""
        return self.down == "float32" and self.down_density < 1
