"""RunConfig (the run file) and NodeConfig (a site's own file): the only schemas, and how they are loaded.

Both are frozen, strict (no value is converted from another type) and closed (an unknown key is an error). A setting
has one home and one unit; what is derived from settings is a property. Nothing here looks at disk or hardware.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, model_validator

from common.run import reading
from common.run.catalogue.kinds import KINDS
from common.run.catalogue.methods import FACTS
from common.run.rules import compatibility, kinds, rules
from common.run.rules.rule import check
from common.run.schema import shape
from common.run.schema.aggregation import AggregationConfig
from common.run.schema.export import ExportConfig
from common.run.schema.gate import GateConfig
from common.run.schema.model import AdapterConfig, ModelConfig
from common.run.schema.node import AgentConfig, HardwareConfig, LinkConfig, NodeDataConfig, NodeModelConfig, SiteConfig
from common.run.schema.polish import PolishStage
from common.run.schema.privacy import PrivacyConfig
from common.run.schema.section import PATTERNS, Section
from common.run.schema.tables import NodeTables, OutputConfig, RunTables
from common.run.schema.tasks import EvaluationConfig
from common.run.schema.training import DataConfig, FederationConfig, TrainingConfig
from common.run.schema.wire import WHOLE, WireConfig

__all__ = [
    "NODE_FILE",
    "RUN_FILE",
    "AdapterConfig",
    "AgentConfig",
    "AggregationConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FederationConfig",
    "GateConfig",
    "HardwareConfig",
    "LinkConfig",
    "ModelConfig",
    "NodeConfig",
    "NodeDataConfig",
    "NodeModelConfig",
    "OutputConfig",
    "PolishStage",
    "PrivacyConfig",
    "RunConfig",
    "SiteConfig",
    "TrainingConfig",
    "WireConfig",
    "changed",
    "load",
    "load_node",
    "parse",
    "parse_node",
    "resolved_json",
    "sha256",
]


PRIVATE_METHOD: Final = "fedsvd"


class RunConfig(RunTables):
    """One whole run: the file that a coordinator writes and every site can read."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow(cls, table: Any) -> Any:
        """Work out what was left out and depends on other settings."""
        return _with_defaults(_with_private_method(table)) if isinstance(table, dict) else table

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        check(self, rules.RUN_RULES)
        return self


def _with_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """An unchecked table with what was left out and follows from its method: `wire.down`, how many sites are asked.

    What is no table, no method or no kind is left for the schema to refuse.
    """
    method, kind = _named(table, "aggregation", "method", "fedavg"), _named(table, "adapter", "kind", "lora")
    facts, own = FACTS.get(method), KINDS.get(kind)
    adapter, wire, evaluation = (table.get(name, {}) for name in ("adapter", "wire", "evaluation"))
    ranks = adapter.get("site_ranks") if isinstance(adapter, dict) else getattr(adapter, "site_ranks", None)
    has_steps = not (ranks or (facts and compatibility.STEPS.why_not(facts)) or (own and kinds.STEPS.why_not(own)))
    if isinstance(wire, dict) and not has_steps:
        table = {**table, "wire": {"down": WHOLE, **wire}}
    # A site puts down its own adapter when it scores it, so that one that is never asked would end without.
    if isinstance(evaluation, dict) and facts and facts.is_personal:
        table = {**table, "evaluation": {"sites_per_round": 0, **evaluation}}
    return table


def _named(table: Mapping[str, Any], section: str, key: str, default: str) -> str:
    """A word of an unchecked table; the default where it is missing, and nothing where it is no word."""
    found = table.get(section, {})
    value = found.get(key, default) if isinstance(found, dict) else getattr(found, key, default)
    return value if isinstance(value, str) else ""


def _with_private_method(table: dict[str, Any]) -> dict[str, Any]:
    """Let a private run of LoRA that names no method use `fedsvd`: its product carries no noise squared."""
    is_private, aggregation = _named(table, "privacy", "mode", "none") in ("unit", "site"), table.get("aggregation", {})
    if not is_private or not isinstance(aggregation, dict):
        return table
    method = PRIVATE_METHOD if _named(table, "adapter", "kind", "lora") == "lora" else "fedavg"
    return {**table, "aggregation": {"method": method, **aggregation}}


class NodeConfig(NodeTables):
    """One site: what the coordinator must never decide. The file stays at the site."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        check(self, rules.NODE_RULES)
        return self


RUN_FILE = reading.Format(
    RunConfig,
    rules=rules.RUN_RULES,
    patterns=PATTERNS,
    other=NodeConfig,
    other_name="a site's own file",
    fill=_with_defaults,
)
NODE_FILE = reading.Format(
    NodeConfig, rules=rules.NODE_RULES, patterns=PATTERNS, other=RunConfig, other_name="the run file"
)
_NO_OVERRIDES: Mapping[str, str] = {}


def load(path: Path, *, overrides: Mapping[str, str] = _NO_OVERRIDES) -> RunConfig:
    """Read a run file.

    Args:
        path: A TOML file.
        overrides: Settings that win over the file: `section.key` to a TOML value; a bare word counts as a string.

    Returns:
        The settings, defaults filled in.

    Raises:
        ConfigError: The file cannot be read, or it has problems; the message lists all of them.
    """
    return parse(reading.read(path), name=str(path), overrides=overrides)


def load_node(path: Path) -> NodeConfig:
    """Read a site's own file; see `load`."""
    return parse_node(reading.read(path), name=str(path))


def parse(text: str, *, name: str, overrides: Mapping[str, str] = _NO_OVERRIDES) -> RunConfig:
    """Check the text of a run file; `name` is what messages call it. See `load`.

    Example:
        >>> text = 'version = 1\\n[model]\\nbase = "embedded"\\n[privacy]\\nmode = "none"'
        >>> parse(text, name="run.toml", overrides={"adapter.r": "8"}).adapter.r
        8
    """
    return reading.parse(text, RUN_FILE, name=name, overrides=overrides)


def parse_node(text: str, *, name: str) -> NodeConfig:
    """Check the text of a site's own file; `name` is what messages call it. See `load`."""
    return reading.parse(text, NODE_FILE, name=name, overrides=_NO_OVERRIDES)


def resolved_json(config: RunConfig | NodeConfig) -> str:
    """Write every setting, defaults included, as canonical JSON: sorted keys, no spaces, ASCII.

    Example:
        >>> resolved_json(NodeConfig(site=SiteConfig(name="north"), data=NodeDataConfig(path="rows.jsonl")))[:43]
        '{"agent":{"courier_group":"","identity_key"'
    """
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def changed(run: RunConfig) -> dict[str, Any]:
    """The settings of a run that are not at their defaults, by dotted key; those without a default always.

    Example:
        >>> text = 'version = 1\\n[model]\\nbase = "embedded"\\n[privacy]\\nmode = "none"\\n[adapter]\\nr = 8'
        >>> changed(parse(text, name="run.toml"))
        {'version': 1, 'model.base': 'embedded', 'adapter.r': 8, 'privacy.mode': 'none'}
    """
    tables = shape.tables_of(type(run))

    def of_table(section: BaseModel, path: str) -> Iterator[tuple[str, Any]]:
        for name, field in type(section).model_fields.items():
            key, value = shape.join(path, name), getattr(section, name)
            if isinstance(value, Section):
                yield from of_table(value, key)
                continue
            is_tag = name == tables[path].tag
            if value != (tables[path].default if is_tag else field.get_default(call_default_factory=True)):
                yield key, value

    return dict(of_table(run, ""))


def sha256(config: RunConfig | NodeConfig) -> str:
    """Hash the resolved settings: equal for two files that mean the same, however they are written."""
    return hashlib.sha256(resolved_json(config).encode("ascii")).hexdigest()
