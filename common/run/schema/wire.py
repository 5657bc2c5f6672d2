"""Section `[wire]` of the run file."""

from typing import Annotated, Final, Literal

from pydantic import Field

from common.run.schema.section import Mebibytes, Section

WHOLE: Final = "float32"  # of `down`


class WireConfig(Section):
    """What travels."""

    dtype: Literal["bfloat16", "float32", "int8", "int4", "int3"] = Field(
        default="int8",
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
        default="int4",
        description="How the adapter goes down: as each round's step in integers, or whole in float32. Either way a "
        "site that holds it already is sent its hash, and one that lacks what a step builds on is sent it whole. What "
        "rounding leaves out of a step goes into the next, and coordinator and sites hold the same adapter, bit by "
        "bit. Left out, it is `float32` where the method or kind has no small steps, or where sites differ in rank.",
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
        return self.down == WHOLE and self.down_density < 1
