"""Contradictions of `[gate]`; `common.run.rules.rules` adds them to its table."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from common.run.schema import gate
from common.run.schema.tables import Contradiction, RunTables


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run is in it, and the message: limits of rules that are not named, then rules without figures."""
    for rule, keys in gate.LIMITS.items():
        for key in keys:
            is_idle = functools.partial(_is_idle, key=key)
            yield (
                (f"gate.{key}", "gate.rules"),
                is_idle,
                f"has no effect without the rule {rule}; name it, or remove it",
            )
    for key in ("evidence", "min_rows"):
        yield (f"gate.{key}", "gate.rules"), functools.partial(_is_idle, key=key), "has no effect without a rule"
    yield from _OTHERS


def _is_idle(config: RunTables, *, key: str) -> bool:
    return key in config.gate.idle


def _lacks(config: RunTables, rule: str, has_figure: Callable[[Any], bool]) -> bool:
    return rule in config.gate.rule_names and not any(has_figure(task) for task in config.evaluation.suite)


def _has_figures_of_nothing(config: RunTables) -> bool:
    names = [task.name for task in config.evaluation.suite]
    asked = [limit.figure for limit in config.gate.figures]
    return any(not any(figure.startswith((f"{name}.", f"{name}/")) for name in names) for figure in asked)


def _lacks_tasks(config: RunTables) -> bool:
    asked = {"exposure", "extraction", "pii"} & set(config.gate.rule_names)
    return bool(asked) and not config.evaluation.suite


def _audits_nothing(config: RunTables) -> bool:
    return "audit" in config.gate.rule_names and not config.privacy.is_private


def _lacks_audit(config: RunTables) -> bool:
    return "audit" in config.gate.rule_names and not config.gate.audit_file


def _asks_sites_after_polish(config: RunTables) -> bool:
    is_asked = not config.polish or config.evaluation.num_polish_stages > 0
    return not is_asked and bool({"sites", "loss"} & set(config.gate.rule_names))


_TASKS = ("gate.rules", "evaluation.tasks")
_OTHERS: tuple[Contradiction, ...] = (
    (
        ("gate.rules", "polish", "evaluation.num_polish_stages"),
        _asks_sites_after_polish,
        "sites are not asked after polish, so that no stage could meet `sites` or `loss`; set "
        "evaluation.num_polish_stages, or leave the rules out",
    ),
    (
        _TASKS,
        lambda c: _lacks(c, "probes", lambda task: task.kind == "probe"),
        "the rule probes needs a task of kind probe; add one, or remove the rule",
    ),
    (
        _TASKS,
        lambda c: _lacks(c, "baseline", lambda task: task.has_baseline and task.kind != "probe"),
        "the rule baseline needs a task with baseline_prompt or baseline_examples that is no probe; add one, or remove "
        "the rule",
    ),
    (
        _TASKS,
        lambda c: _lacks(c, "schema", lambda task: task.json_schema != ""),
        "the rule schema needs a task with json_schema; add one, or remove the rule",
    ),
    (_TASKS, _lacks_tasks, "exposure, extraction and pii are figures of tasks; add one that has them"),
    (("gate.figures", "evaluation.tasks"), _has_figures_of_nothing, "a figure is TASK.METRIC; no task has that name"),
    (
        ("gate.rules", "privacy.mode"),
        _audits_nothing,
        "an audit is held against a claimed epsilon, and this run claims none; remove the rule audit",
    ),
    (("gate.audit_file", "gate.rules"), _lacks_audit, "the rule audit needs the file that an audit wrote; name it"),
)
