"""The two small files for a run that is finished: stages to be played after it, and rules to judge it by once more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from common.errors import ConfigError
from common.run import config, reading
from common.run.schema.gate import GateConfig
from common.run.schema.polish import Stage
from common.run.schema.section import PATTERNS, Section, Tables, refuse_look_alikes

SITE_RULES: Final = frozenset({"sites", "loss"})  # what they are judged by are figures that only sites can tell
_NO_OVERRIDES: Final[Mapping[str, str]] = {}


class StagesConfig(Section):
    """The stages file: `silotune-server polish RUN_FOLDER --stages FILE`."""

    version: Annotated[Literal[1], BeforeValidator(refuse_look_alikes)] = Field(description="Version of this format.")
    polish: Tables[Stage] = Field(default=(), description="The stages, as in a run file.")
    gate: GateConfig = Field(
        default_factory=GateConfig, description="What their result must show; left out: what the run's own gate asks."
    )


class RulesConfig(Section):
    """The rules file: `silotune-server gate RUN_FOLDER --rules FILE`."""

    version: Annotated[Literal[1], BeforeValidator(refuse_look_alikes)] = Field(description="Version of this format.")
    gate: GateConfig = Field(default_factory=GateConfig, description="The rules, as in a run file.")


_STAGES: Final = reading.Format(
    StagesConfig, rules=(), patterns=PATTERNS, other=config.RunConfig, other_name="the run file"
)
_RULES: Final = reading.Format(
    RulesConfig, rules=(), patterns=PATTERNS, other=config.RunConfig, other_name="the run file"
)


def load_stages(path: Path) -> StagesConfig:
    """Read a stages file.

    Raises:
        ConfigError: It cannot be read, has problems, or names no stage that trains the adapter.
    """
    found = reading.parse(reading.read(path), _STAGES, name=str(path), overrides=_NO_OVERRIDES)
    if not any(stage.changes_adapter for stage in found.polish):
        raise ConfigError(f"{path}: no table [[polish]] of a kind that trains the adapter; add one")
    return found


def load_rules(path: Path) -> GateConfig:
    """Read a rules file.

    Raises:
        ConfigError: It cannot be read, has problems, or names no rule.
    """
    found = reading.parse(reading.read(path), _RULES, name=str(path), overrides=_NO_OVERRIDES).gate
    if not found.rules:
        raise ConfigError(f"{path}: section [gate] has no rules; add what must hold as [[gate.rules]]")
    return found
