"""What of `[wire]` goes together with what other settings, under any method; loads no torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from common.run.catalogue.kinds import KINDS
from common.run.catalogue.methods import FACTS
from common.run.rules import compatibility, kinds
from common.run.schema.tables import Contradiction, RunTables
from common.run.schema.wire import WHOLE


@dataclass(frozen=True)
class Conflict:
    """Two settings of the wire, or of the wire and another section, that do not go together under any method.

    Attributes:
        keys: The settings; the first names the problem.
        is_asked: Whether a run asks for both.
        reason: Why not.
        nearest: What to set instead.
    """

    keys: tuple[str, ...]
    is_asked: Callable[[RunTables], bool]
    reason: str
    nearest: str


CONFLICTS: Final = (
    Conflict(
        ("wire.density", "privacy.mode"),
        lambda run: run.wire.density < 1 and run.privacy.mode != "none",
        "the largest values of a noised update are mostly its noise",
        'wire.dtype = "int4", which rounds after the noise',
    ),
    Conflict(
        ("wire.density", "aggregation.robust.rule"),
        lambda run: run.wire.density < 1 and run.aggregation.robust.rule != "none",
        "sites send different values, and where most send none the robust rule sees zeros",
        'wire.dtype = "int4" with density 1',
    ),
    Conflict(
        ("wire.error_feedback", "wire.density"),
        lambda run: run.wire.density == 1 and not run.wire.error_feedback,
        "nothing is left out of an update that is whole, and the setting has no effect",
        "a density below 1, or leave it out",
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


def with_down(table: dict[str, Any]) -> dict[str, Any]:
    """An unchecked table of a run file, in which `wire.down` is worked out where it was left out.

    The default of the schema, steps in integers, is for methods and kinds that go together with steps; the others get
    the adapter whole. What is no table, no method or no kind is left for the schema to refuse.
    """
    wire = table.get("wire", {})
    if not isinstance(wire, dict) or "down" in wire:
        return table
    method, kind = _named(table, "aggregation", "method", "fedavg"), _named(table, "adapter", "kind", "lora")
    facts, own = FACTS.get(method), KINDS.get(kind)
    has_steps = (facts is None or not compatibility.STEPS.why_not(facts)) and (
        own is None or not kinds.STEPS.why_not(own)
    )
    adapter = table.get("adapter", {})
    ranks = adapter.get("site_ranks") if isinstance(adapter, dict) else getattr(adapter, "site_ranks", None)
    if has_steps and not ranks:
        return table
    return {**table, "wire": {**wire, "down": WHOLE}}


def _named(table: Mapping[str, Any], section: str, key: str, default: str) -> str:
    """A word of an unchecked table; the default where it is missing, and nothing where it is no word."""
    found = table.get(section, {})
    value = found.get(key, default) if isinstance(found, dict) else getattr(found, key, default)
    return value if isinstance(value, str) else ""


def reasons() -> list[str]:
    """Why each option is refused where it is, columns with the same reason together."""
    told: dict[tuple[str, str], list[str]] = {}
    for option in OPTIONS:
        for column, reason in option.why_not.items():
            told.setdefault((column, reason), []).append(option.name)
    return [f"{column}: {reason}; not with {', '.join(names)}" for (column, reason), names in told.items()]


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run asks for both, and the message, of `CONFLICTS`."""
    for conflict in CONFLICTS:
        told = f"{conflict.reason}; the nearest that is allowed is {conflict.nearest}"
        yield conflict.keys, conflict.is_asked, told
