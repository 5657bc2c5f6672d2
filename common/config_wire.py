"""Section `[wire]` of the run file."""

from typing import Literal

from pydantic import Field

from common.config_types import Mebibytes, Section


class WireConfig(Section):
    """What travels."""

    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Type of the deltas that go up. The adapter always goes down in float32."
    )
    max_update_mib: Mebibytes = Field(default=600, description="Largest update that is accepted, in MiB.")
