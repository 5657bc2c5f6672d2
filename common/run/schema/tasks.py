"""Section `[evaluation]` of the run file, and its array `[[evaluation.tasks]]`: the coordinator's own rows."""

from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common import hosts
from common.run.schema.section import REGION, Array, Count, Line, PositiveCount, RequiredLine, Section, Slug, Tables

Metric = Literal["exact_match", "f1", "rouge1", "rouge2", "rougeL", "number", "json", "label_accuracy", "macro_f1"]
LABEL_METRICS: Final = frozenset({"label_accuracy", "macro_f1"})
_KIND: Any = Field(description="How it is measured.")


class TaskConfig(Section):
    """What every task of the coordinator's evaluation suite has; see docs/evaluation.md. Sites are never told of it."""

    name: Slug = Field(description="What figures are called after: `NAME.METRIC`.")
    kind: str
    data: RequiredLine = Field(
        description="Path of the rows, a file or folder as for sites; with `harness` the folder of the tasks' files."
    )
    max_rows: Count = Field(default=0, description="Use the first so many rows. 0: all.")

    @property
    def has_baseline(self) -> bool:
        """Whether the base is also scored with a prompt."""
        return False


class GeneratedTask(TaskConfig):
    """A task whose answers are generated."""

    max_new_tokens: Count = Field(
        default=0, description="Longest generated answer, in tokens. 0: `evaluation.max_new_tokens`."
    )


class ComparedTask(TaskConfig):
    """A task on which the base may also be scored with a prompt, to compare with."""

    baseline_prompt: str = Field(
        default="",
        max_length=65536,
        description="Also score the base with this instruction before each question (prompt-only).",
    )
    baseline_examples: Count = Field(
        default=0, description="Answered examples before each question of that baseline: the first of `baseline_data`."
    )
    baseline_data: Line = Field(default="", description="Path of the rows that those examples are. Empty: none.")

    @property
    def has_baseline(self) -> bool:
        """Whether the base is also scored with a prompt."""
        return bool(self.baseline_prompt or self.baseline_examples)

    @model_validator(mode="after")
    def _examples_are_other_rows(self) -> Self:
        _require_both(self, "baseline_examples", "baseline_data")
        _require(self.baseline_data != self.data, "baseline_data is the task's own file: examples would be its answers")
        return self


class AnswersTask(GeneratedTask, ComparedTask):
    """Generated text beside its reference."""

    kind: Literal["answers"] = _KIND
    metrics: Array[Metric] = Field(
        min_length=1,
        description="Its figures; `f1` is SQuAD's, `number` the last one, as in GSM8K, `json` whether it meets "
        "`json_schema`, `macro_f1` over the labels.",
    )
    labels: Array[RequiredLine] = Field(
        default=(),
        description="The closed set of labels, for `label_accuracy` and `macro_f1`. Empty: the references of all rows.",
    )
    json_schema: Line = Field(default="", description="For the metric `json`: path of the JSON schema.")

    @model_validator(mode="after")
    def _metrics_have_what_they_need(self) -> Self:
        is_labelled = not LABEL_METRICS.isdisjoint(self.metrics)
        _require(is_labelled or not self.labels, "labels are for label_accuracy and macro_f1; name one in metrics")
        is_checked = "json" in self.metrics
        _require(is_checked == (self.json_schema != ""), "metric json and json_schema belong together")
        return self


class NumberTask(GeneratedTask, ComparedTask):
    """The final number of a generated answer, as in GSM8K."""

    kind: Literal["number"] = _KIND


class JsonTask(GeneratedTask, ComparedTask):
    """Whether a generated answer meets a JSON schema."""

    kind: Literal["json"] = _KIND
    json_schema: RequiredLine = Field(description="Path of the JSON schema.")


class ChoiceTask(ComparedTask):
    """The likeliest of several answers."""

    kind: Literal["choice"] = _KIND


class PerplexityTask(TaskConfig):
    """Perplexity of raw text."""

    kind: Literal["perplexity"] = _KIND
    text_column: RequiredLine = Field(default="text", description="The column of the text.")


class ProbeTask(GeneratedTask, ComparedTask):
    """What must not be forgotten."""

    kind: Literal["probe"] = _KIND


class HarnessTask(TaskConfig):
    """Tasks of lm-evaluation-harness."""

    kind: Literal["harness"] = _KIND
    harness_tasks: Array[RequiredLine] = Field(min_length=1, description="Names of tasks in the folder.")


class MemorisationTask(TaskConfig):
    """Canaries and membership: what the model has learnt by heart."""

    kind: Literal["memorisation"] = _KIND
    num_candidates: int = Field(
        default=256,
        ge=2,
        le=65536,
        description="How many texts a secret is ranked among, itself included, where a row has a `pattern`; the "
        "ceiling of its exposure is the logarithm of that to base 2.",
    )
    members_data: Line = Field(
        default="",
        description="Path of rows that were trained on, in the run's columns, for `auc`. Empty: `auc` is of the "
        "canaries.",
    )
    non_members_data: Line = Field(
        default="", description="Path of rows of the same kind that were not; belongs to `members_data`."
    )

    @model_validator(mode="after")
    def _members_and_others(self) -> Self:
        _require_both(self, "members_data", "non_members_data")
        return self


class PiiTask(GeneratedTask):
    """Personal data in generated answers."""

    kind: Literal["pii"] = _KIND
    names_file: Line = Field(
        default="", description="Path of a text file of names, one a line, to look for. Empty: none."
    )
    phone_regions: Array[Annotated[str, Field(pattern=REGION)]] = Field(
        default=(),
        description="Countries (ISO 3166-1, such as `DE`) whose telephone numbers are also found where they are "
        "written without a country code, as people there write them. Empty: by general patterns alone.",
    )


class JudgeTask(GeneratedTask, ComparedTask):
    """A model compares answers with those of the base."""

    kind: Literal["judge"] = _KIND
    judge_base: Line = Field(
        default="",
        description="Folder of the model that judges. The run's own base is not loaded twice. Empty: `judge_url` "
        "judges.",
    )
    judge_url: Line = Field(
        default="",
        description="Where an OpenAI-compatible server is, such as http://127.0.0.1:8000/v1. It is sent the rows of "
        "this task.",
    )
    judge_model: Line = Field(default="", description="With `judge_url`: the name of the model there.")
    judge_key_file: Line = Field(
        default="", description="With `judge_url`: file with the key that it asks for, mode 0600. Empty: none."
    )
    allow_remote: bool = Field(
        default=False,
        description="With `judge_url`: let the rows of this task and all answers to them leave this machine.",
    )
    against: Literal["base", "prompt-only"] = Field(
        default="base",
        description="Whose answers the adapter's are compared with; `prompt-only` is the base with `baseline_prompt` "
        "or `baseline_examples`.",
    )
    calibration_data: Line = Field(
        default="",
        description="Path of pairs that people judged (`prompt`, `a`, `b`, `preferred`: a, b or tie). Empty: the "
        "judge counts as unreliable.",
    )
    min_agreement: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="With `calibration_data`: a judge that agrees with people on a smaller share is marked unreliable.",
    )

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        _require((self.judge_base != "") != (self.judge_url != ""), "set one of judge_base and judge_url")
        _require_both(self, "judge_url", "judge_model")
        _require(self.judge_url != "" or not self.judge_key_file, "judge_key_file is for judge_url")
        _require_place(self.judge_url, is_remote_allowed=self.allow_remote)
        is_prompted = self.against == "prompt-only"
        _require(is_prompted == self.has_baseline, 'against = "prompt-only" and a baseline_prompt belong together')
        has_default = self.min_agreement == type(self).model_fields["min_agreement"].default
        _require(self.calibration_data != "" or has_default, "min_agreement is for calibration_data")
        return self


Task = Annotated[
    AnswersTask
    | NumberTask
    | JsonTask
    | ChoiceTask
    | PerplexityTask
    | ProbeTask
    | HarnessTask
    | MemorisationTask
    | PiiTask
    | JudgeTask,
    Field(discriminator="kind"),
]


def _require_both(task: TaskConfig, one: str, other: str) -> None:
    """Two settings of which each is for the other."""
    is_set = bool(getattr(task, one)), bool(getattr(task, other))
    _require(len(set(is_set)) == 1, f"{one} and {other} belong together; set both, or none")


def _require_place(url: str, *, is_remote_allowed: bool) -> None:
    """Rows leave this machine only where that was said."""
    parts = urlsplit(url)
    _require(not url or (parts.scheme in ("http", "https") and bool(parts.hostname)), "judge_url: give http(s)://HOST")
    is_remote = url != "" and not hosts.is_loopback(parts.hostname or "")
    _require(
        is_remote_allowed or not is_remote,
        "judge_url is another machine: it would be sent this task's rows and all answers; let a model here judge "
        "(judge_base), or set allow_remote = true if these rows may leave",
    )
    _require(not is_remote or parts.scheme == "https", "judge_url: to another machine only by https")
    _require(is_remote or not is_remote_allowed, "allow_remote has no effect, as no row leaves this machine; remove it")


def _require(holds: bool, message: str) -> None:
    """The one way to refuse a task."""
    if not holds:
        raise ValueError(message)


class EvaluationConfig(Section):
    """What is measured on held-out rows, and how often."""

    every_rounds: PositiveCount = Field(default=1, description="Evaluate after every so many rounds.")
    sites_per_round: Count = Field(
        default=100,
        description="Most sites that are asked about an adapter: a sample by the run's seed, the same ones every time, "
        "so that figures of two rounds are of the same rows. 0: all, which is the default where sites keep adapters "
        "of their own (`fedsa`).",
    )
    server_data: Line = Field(default="", description="Path of the coordinator's own held-out rows. Empty: none.")
    batch_size: int = Field(default=16, ge=1, le=65536, description="Rows in memory at once in evaluation.")
    exact_match_rows: Count = Field(
        default=0, description="Held-out rows per site that are answered by generation at the end. 0: none."
    )
    max_new_tokens: int = Field(default=32, ge=1, le=65536, description="Longest generated answer, in tokens.")
    tasks: Tables[Task] = Field(
        default=(), description="What the coordinator measures on its own rows, before the first round and at the end."
    )
    tasks_every_rounds: Count = Field(
        default=0, description="Also measure tasks after every so many rounds. 0: only before and after."
    )

    num_polish_stages: Count = Field(
        default=0,
        description="The sites also score the adapter after each of the last so many stages of `[[polish]]` that "
        "change it; of the stages they are told this number only. 0: they are not asked after polish.",
    )
