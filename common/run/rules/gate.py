"""Contradictions of `[gate]`; `common.run.rules.rules` adds them to its table."""

from collections.abc import Callable
from typing import Final

from common.run.rules.rule import Rule, idle
from common.run.schema.gate import FigureRule
from common.run.schema.tables import RunTables
from common.run.schema.tasks import AnswersTask, JsonTask, TaskConfig

_NEEDS: dict[str, tuple[Callable[[TaskConfig], bool], str]] = {  # what a rule needs one task of the coordinator for
    "probes": (lambda task: task.kind == "probe", "the rule probes needs a task of kind probe"),
    "baseline": (
        lambda task: task.has_baseline and task.kind != "probe",
        "the rule baseline needs a task with baseline_prompt or baseline_examples that is no probe",
    ),
    "schema": (
        lambda task: isinstance(task, AnswersTask | JsonTask) and task.json_schema != "",
        "the rule schema needs a task with json_schema",
    ),
    **{
        name: (lambda task: True, f"{name} is a figure of tasks, and there is none")
        for name in ("exposure", "extraction", "pii")
    },
}


def _has_figures_of_nothing(config: RunTables) -> bool:
    starts = tuple(f"{task.name}{sign}" for task in config.evaluation.tasks for sign in "./")
    figures = [rule.figure for rule in config.gate.rules if isinstance(rule, FigureRule)]
    return not all(figure.startswith(starts) for figure in figures)


def _asks_sites_after_polish(config: RunTables) -> bool:
    is_asked = not config.polish or config.evaluation.num_polish_stages > 0
    return not is_asked and bool({"sites", "loss"} & set(config.gate.kinds))


def _lacks(kind: str, has_figure: Callable[[TaskConfig], bool], message: str) -> Rule:
    def is_broken(config: RunTables) -> bool:
        return kind in config.gate.kinds and not any(map(has_figure, config.evaluation.tasks))

    return Rule(("gate.rules", "evaluation.tasks"), is_broken, message, "add one, or remove the rule")


RULES: Final = (
    *(_lacks(kind, has_figure, message) for kind, (has_figure, message) in _NEEDS.items()),
    Rule(
        ("gate.rules", "evaluation.tasks"),
        _has_figures_of_nothing,
        "a figure is TASK.METRIC, and no task has that name",
        "correct it",
    ),
    *(
        idle(
            f"gate.{key}",
            "gate.rules",
            where=lambda c: not c.gate.rules,
            message="has no effect without [[gate.rules]]",
            remedy="add one, or remove it",
        )
        for key in ("evidence", "min_rows")
    ),
    Rule(
        ("gate.rules", "polish", "evaluation.num_polish_stages"),
        _asks_sites_after_polish,
        "sites are not asked after polish, so that no stage could meet `sites` or `loss`",
        "set evaluation.num_polish_stages, or leave the rules out",
    ),
    Rule(
        ("gate.rules", "privacy.mode"),
        lambda c: "audit" in c.gate.kinds and c.privacy.mode == "none",
        "an audit is held against a claimed epsilon, and this run claims none",
        "remove the rule audit",
    ),
)
