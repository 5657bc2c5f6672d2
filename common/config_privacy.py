"""Section `[privacy]` of the run file."""

from typing import Literal

from pydantic import Field

from common.config_types import Section


class PrivacyConfig(Section):
    """What protects an update when it leaves a site. There is no default: it must be stated."""

    mode: Literal["none"] = Field(
        description="`none` states that updates leave unprotected. This version has no differential privacy."
    )
