"""Contradictions of what the sites score, and after polish; `common.run.rules.rules` adds them to its table."""

from typing import Any, Final

from common.run.catalogue.methods import FACTS
from common.run.schema.model import BY_HASH
from common.run.schema.tables import Contradiction, RunTables


def _has_fewer_stages(config: RunTables) -> bool:
    """A manifest names no stages, so this is for the coordinator's own file; it may lack a base yet."""
    if getattr(config.model, "base", BY_HASH) == BY_HASH:
        return False
    return config.evaluation.num_polish_stages > sum(stage.changes_adapter for stage in config.polish)


def _asks(config: RunTables) -> bool:
    return config.evaluation.num_polish_stages > 0


def with_all_asked(table: dict[str, Any]) -> dict[str, Any]:
    """An unchecked table of a run file: where sites keep adapters of their own all are asked, unless it says otherwise.

    A site puts down its own adapter when it scores it, so that one that is never asked would end without.
    """
    evaluation, aggregation = table.get("evaluation", {}), table.get("aggregation", {})
    facts = FACTS.get(str(aggregation.get("method", ""))) if isinstance(aggregation, dict) else None
    if not isinstance(evaluation, dict) or "sites_per_round" in evaluation or facts is None or not facts.is_personal:
        return table
    return {**table, "evaluation": {**evaluation, "sites_per_round": 0}}


CONTRADICTIONS: Final[tuple[Contradiction, ...]] = (
    (
        ("evaluation.sites_per_round", "aggregation.method"),
        lambda c: c.evaluation.sites_per_round > 0 and FACTS[c.aggregation.method].is_personal,
        "a site puts down its own adapter when it is asked about it, so all must be asked; remove it, or set 0",
    ),
    (
        ("evaluation.num_polish_stages", "polish"),
        _has_fewer_stages,
        "there are fewer stages of [[polish]] that change the adapter; add stages, or lower it",
    ),
    (
        ("evaluation.num_polish_stages", "adapter.site_ranks"),
        lambda c: _asks(c) and bool(c.adapter.site_ranks),
        "a site of a lower rank would score a part of the polished adapter only; remove one of the two",
    ),
    (
        ("evaluation.num_polish_stages", "aggregation.method"),
        lambda c: _asks(c) and FACTS[c.aggregation.method].is_personal,
        "sites would score the adapter with factors of their own in the place of its; choose another method",
    ),
)
