"""Verifiable rewards: 1 for an answer that a rule accepts, else 0. No model judges."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import ConfigError
from common.run.schema.polish import GrpoStage
from server.evaluate.figures import json_answers, metrics, patterns
from server.polish import sandbox

Check = Callable[[str, str], float]
Reward = Callable[..., list[float]]
_FENCED: Final = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class Verified:
    """A reward function as TRL calls it."""

    def __init__(self, stage: GrpoStage) -> None:
        self.__name__ = stage.reward
        self._check = check_of(stage)

    def __call__(self, *, completions: Sequence[str], wanted: Sequence[str], **_: Any) -> list[float]:
        """The reward of each answer, by what its row wants."""
        return [self._check(given, reference) for given, reference in zip(completions, wanted, strict=True)]


def check_of(stage: GrpoStage) -> Check:
    """The rule of a stage: given answer and wanted text to 0 or 1.

    Raises:
        ConfigError: The pattern is none, or code cannot be shut in here.
        DataError: `json_schema` is missing or no schema.
    """
    if stage.reward == "exact":
        return metrics.exact_match
    if stage.reward == "json":
        return json_answers.checker(Path(stage.json_schema).expanduser())
    if stage.reward == "regex":
        try:
            pattern = patterns.Pattern(stage.pattern)
        except ValueError as error:
            raise ConfigError(
                f"polish stage '{stage.name}': pattern is no regular expression ({error}); mend it"
            ) from error
        return lambda given, _: float(pattern.is_whole(given.strip()))
    sandbox.require()
    return lambda given, tests: float(sandbox.passes(code_of(given), tests, timeout_s=stage.test_timeout_s))


def code_of(answer: str) -> str:
    """The code in an answer: what stands in its first fence, or all of it.

    Example:
        >>> code_of("Here:\\n```python\\nx = 1\\n```\\nDone."), code_of("x = 2")
        ('x = 1\\n', 'x = 2')
    """
    fenced = _FENCED.search(answer)
    return fenced[1] if fenced else answer
