"""What does not go together in a file: the one type of it, and how it is checked and said."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from common.run.problems import hints


@dataclass(frozen=True)
class Rule:
    """Settings that are fine alone and contradict each other, or of which one has no effect beside the others.

    Attributes:
        keys: Dotted keys that take part; the first names the problem.
        is_broken: Whether a config breaks the rule.
        message: What is wrong.
        remedy: What to set instead.
    """

    keys: tuple[str, ...]
    is_broken: Callable[[Any], bool]
    message: str
    remedy: str

    @property
    def words(self) -> str:
        """Message and remedy."""
        return f"{self.message}; {self.remedy}"


def idle(key: str, *others: str, where: Callable[[Any], bool], message: str, remedy: str = "remove it") -> Rule:
    """The rule that a setting stays at its default where it has no effect: it would do nothing unnoticed."""

    def is_broken(config: Any) -> bool:
        if not where(config):
            return False
        *tables, name = key.split(".")
        for table in tables:
            config = getattr(config, table)
        field = type(config).model_fields.get(name)
        return field is not None and getattr(config, name) != field.get_default(call_default_factory=True)

    return Rule((key, *others), is_broken, message, remedy)


def check(config: BaseModel, rules: tuple[Rule, ...]) -> None:
    """Raise if a config breaks a rule.

    Raises:
        ValueError: Every broken rule, in one line.
    """
    broken = [f"{rule.keys[0]}: {describe(config, rule)}" for rule in rules if rule.is_broken(config)]
    if broken:
        raise ValueError("; ".join(broken))


def describe(config: BaseModel, rule: Rule) -> str:
    """Say what is wrong, with the values that take part; of an array of tables with their number."""
    shown = []
    for key in rule.keys:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        is_tables = isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value)
        if value is not None:  # else a setting that another variant of its table has
            shown.append(f"{key} = {f'{len(value)} tables' if is_tables else hints.show_value(value)}")
    return f"{rule.words} ({', '.join(shown)})"
