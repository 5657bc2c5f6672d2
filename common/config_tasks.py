"""Array `[[evaluation.tasks]]` of the run file: what the coordinator measures on its own rows."""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from common.config_types import METRICS, Count, Line, RequiredLine, Section, Slug

_GENERATES: Final = ("max_new_tokens",)
_BASELINE: Final = ("baseline_prompt", "baseline_examples", "baseline_data")
USES: Final[dict[str, tuple[str, ...]]] = {  # one line a kind: the settings that it takes besides the common ones
    "answers": ("metrics", "labels", "json_schema", *_GENERATES, *_BASELINE),
    "number": (*_GENERATES, *_BASELINE),
    "json": ("json_schema", *_GENERATES, *_BASELINE),
    "choice": _BASELINE,
    "perplexity": ("text_column",),
    "probe": (*_GENERATES, *_BASELINE),
    "harness": ("harness_tasks",),
}
_NEEDS: Final[dict[str, str]] = {"answers": "metrics", "json": "json_schema", "harness": "harness_tasks"}
LABEL_METRICS: Final = frozenset({"label_accuracy", "macro_f1"})


class TaskConfig(Section):
    """One task of the coordinator's evaluation suite; see docs/evaluation.md. Sites are never told of it."""

    name: Slug = Field(description="What figures are called after: `NAME.METRIC`.")
    kind: Literal["answers", "number", "json", "choice", "perplexity", "probe", "harness"] = Field(
        description="How it is measured: `answers`: generated text beside its reference; `number`: the final number, "
        "as in GSM8K; `json`: meets a schema; `choice`: the likeliest of several answers; `perplexity`: of raw text; "
        "`probe`: what must not be forgotten; `harness`: tasks of lm-evaluation-harness."
    )
    data: RequiredLine = Field(
        description="Path of the rows, a file or folder as for sites; with `harness` the folder of the tasks' files."
    )
    max_rows: Count = Field(default=0, description="Use the first so many rows. 0: all.")
    metrics: str = Field(
        default="",
        pattern=METRICS,
        max_length=4096,
        description="With `answers`: as `evaluation.metrics`; must be set.",
    )
    labels: Line = Field(
        default="",
        description="With `answers`: the closed set of labels, with commas between them, for `label_accuracy` and "
        "`macro_f1`. Empty: the references of all rows.",
    )
    json_schema: Line = Field(
        default="", description="With `json`, and for the metric `json` of `answers`: path of the JSON schema."
    )
    max_new_tokens: Count = Field(
        default=0, description="Longest generated answer, in tokens. 0: `evaluation.max_new_tokens`."
    )
    text_column: RequiredLine = Field(default="text", description="With `perplexity`: the column of the text.")
    harness_tasks: Line = Field(
        default="", description="With `harness`: names of tasks in the folder, with commas between them."
    )
    baseline_prompt: str = Field(
        default="",
        max_length=65536,
        description="Also score the base with this instruction before each question (prompt-only), to compare with.",
    )
    baseline_examples: Count = Field(
        default=0, description="Answered examples before each question of that baseline: the first of `baseline_data`."
    )
    baseline_data: Line = Field(default="", description="Path of the rows that those examples are. Empty: none.")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names in `metrics`, each once, in the order written."""
        return split_names(self.metrics)

    @property
    def has_baseline(self) -> bool:
        """Whether the base is also scored with a prompt."""
        return bool(self.baseline_prompt or self.baseline_examples)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse what is missing, and what could have no effect."""
        for key in type(self).model_fields:
            self._require_use(key)
        needed = _NEEDS.get(self.kind, "")
        _require(not needed or getattr(self, needed) != "", f"kind {self.kind} needs {needed}")
        labelled = LABEL_METRICS & set(self.metric_names)
        _require(bool(labelled) or not self.labels, "labels are for label_accuracy and macro_f1; name one in metrics")
        if self.kind == "answers":
            is_checked = "json" in self.metric_names
            _require(is_checked == (self.json_schema != ""), "metric json and json_schema belong together")
        _require(
            (self.baseline_examples > 0) == (self.baseline_data != ""),
            "baseline_examples and baseline_data belong together; set both, or none",
        )
        _require(self.baseline_data != self.data, "baseline_data is the task's own file: examples would be its answers")
        return self

    def _require_use(self, key: str) -> None:
        """A setting of another kind would do nothing."""
        takers = [kind for kind, keys in USES.items() if key in keys]
        is_default = getattr(self, key) == type(self).model_fields[key].default
        is_used = not takers or self.kind in takers or is_default
        _require(is_used, f"{key} has no effect with kind {self.kind}; remove it (it is for {', '.join(takers)})")


def split_names(text: str) -> tuple[str, ...]:
    """The names in a list with commas, each once, in the order written.

    Example:
        >>> split_names("f1, json,f1")
        ('f1', 'json')
    """
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _require(holds: bool, message: str) -> None:
    """The one way to refuse a task."""
    if not holds:
        raise ValueError(message)
