"""What of `[wire]` goes together with what other settings, under any method; loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from common.run.rules.rule import Rule, idle

RULES: Final = (
    Rule(
        ("wire.density", "privacy.mode"),
        lambda run: run.wire.density < 1 and run.privacy.mode != "none",
        "the largest values of a noised update are mostly its noise",
        'the nearest that is allowed is wire.dtype = "int4", which rounds after the noise',
    ),
    Rule(
        ("wire.density", "aggregation.robust.rule"),
        lambda run: run.wire.density < 1 and run.aggregation.robust.rule != "none",
        "sites send different values, and where most send none the robust rule sees zeros",
        'the nearest that is allowed is wire.dtype = "int4" with density 1',
    ),
    idle(
        "wire.error_feedback",
        "wire.density",
        where=lambda run: run.wire.density == 1,
        message="nothing is left out of an update that is whole, and the setting has no effect",
        remedy="set a density below 1, or leave it out",
    ),
)


@dataclass(frozen=True)
class Option:
    """A way to send less, and what it does not go together with under any method.

    Attributes:
        name: For a table.
        setting: What asks for it.
        why_not: Reason by column of `COLUMNS`; a column that is missing goes together with it.
    """

    name: str
    setting: str
    why_not: Mapping[str, str]


COLUMNS: Final = ("secure aggregation", "record DP", "central DP", "robust aggregation", "mixed ranks")
_OWN_PLACES: Final = "each site chooses its own places, and"
_SPARSE_UP: Final = {
    "secure aggregation": f"{_OWN_PLACES} a secure sum adds by place",
    "record DP": "the largest values of a noised update are mostly its noise",
    "central DP": "the largest values of a noised update are mostly its noise",
    "robust aggregation": f"{_OWN_PLACES} where most send none the rule sees zeros",
    "mixed ranks": "no method has both",
}
_DOWN: Final = {"mixed ranks": _SPARSE_UP["mixed ranks"]}
OPTIONS: Final = (
    Option(
        "integers up",
        "wire.dtype = 'int8', 'int4' or 'int3'",
        {"secure aggregation": "a secure sum has integers of its own, with one scale for all sites"},
    ),
    Option("sparse up with error feedback", "wire.density below 1", _SPARSE_UP),
    Option("sparse up as in FLASC", "wire.density below 1, wire.error_feedback = false", _SPARSE_UP),
    Option("steps down", "wire.down = 'int8', 'int4' or 'int3'", _DOWN),
    Option("sparse steps down", "wire.down as integers, wire.down_density below 1", _DOWN),
    Option("sparse adapter down as in FLASC", "wire.down = 'float32', wire.down_density below 1", _DOWN),
)


def reasons() -> list[str]:
    """Why each option is refused where it is, columns with the same reason together."""
    told: dict[tuple[str, str], list[str]] = {}
    for option in OPTIONS:
        for column, reason in option.why_not.items():
            told.setdefault((column, reason), []).append(option.name)
    return [f"{column}: {reason}; not with {', '.join(names)}" for (column, reason), names in told.items()]
