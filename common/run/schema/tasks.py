"""Section `[evaluation]` of the run file, and its array `[[evaluation.tasks]]`: the coordinator's own rows."""

from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common import hosts
from common.run.schema.section import REGION, Array, Count, Line, PositiveCount, RequiredLine, Section, Slug, Tables

_GENERATES: Final = ("max_new_tokens",)
_BASELINE: Final = ("baseline_prompt", "baseline_examples", "baseline_data")
_JUDGE: Final = (
    "judge_base", "judge_url", "judge_model", "judge_key_file", "allow_remote", "against", "calibration_data",
    "min_agreement",
)  # fmt: skip
USES: Final[dict[str, tuple[str, ...]]] = {  # one line a kind: the settings that it takes besides the common ones
    "answers": ("metrics", "labels", "json_schema", *_GENERATES, *_BASELINE),
    "number": (*_GENERATES, *_BASELINE),
    "json": ("json_schema", *_GENERATES, *_BASELINE),
    "choice": _BASELINE,
    "perplexity": ("text_column",),
    "probe": (*_GENERATES, *_BASELINE),
    "harness": ("harness_tasks",),
    "memorisation": ("num_candidates", "members_data", "non_members_data"),
    "pii": ("names_file", "phone_regions", *_GENERATES),
    "judge": (*_JUDGE, *_GENERATES, *_BASELINE),
}
_NEEDS: Final[dict[str, str]] = {"answers": "metrics", "json": "json_schema", "harness": "harness_tasks"}
Metric = Literal["exact_match", "f1", "rouge1", "rouge2", "rougeL", "number", "json", "label_accuracy", "macro_f1"]
LABEL_METRICS: Final = frozenset({"label_accuracy", "macro_f1"})
OWN_TASK: Final = "server-data"


class TaskConfig(Section):
    """One task of the coordinator's evaluation suite; see docs/evaluation.md. Sites are never told of it."""

    name: Slug = Field(description="What figures are called after: `NAME.METRIC`.")
    kind: Literal[
        "answers", "number", "json", "choice", "perplexity", "probe", "harness", "memorisation", "pii", "judge"
    ] = Field(
        description="How it is measured: `answers`: generated text beside its reference; `number`: the final number, "
        "as in GSM8K; `json`: meets a schema; `choice`: the likeliest of several answers; `perplexity`: of raw text; "
        "`probe`: what must not be forgotten; `harness`: tasks of lm-evaluation-harness; "
        "`memorisation`: canaries and membership; `pii`: personal data in generated answers; `judge`: a model compares "
        "answers with those of the base."
    )
    data: RequiredLine = Field(
        description="Path of the rows, a file or folder as for sites; with `harness` the folder of the tasks' files."
    )
    max_rows: Count = Field(default=0, description="Use the first so many rows. 0: all.")
    metrics: Array[Metric] = Field(default=(), description="With `answers`: as `evaluation.metrics`; must be set.")
    labels: Array[RequiredLine] = Field(
        default=(),
        description="With `answers`: the closed set of labels, for `label_accuracy` and `macro_f1`. Empty: the "
        "references of all rows.",
    )
    json_schema: Line = Field(
        default="", description="With `json`, and for the metric `json` of `answers`: path of the JSON schema."
    )
    max_new_tokens: Count = Field(
        default=0, description="Longest generated answer, in tokens. 0: `evaluation.max_new_tokens`."
    )
    text_column: RequiredLine = Field(default="text", description="With `perplexity`: the column of the text.")
    harness_tasks: Array[RequiredLine] = Field(default=(), description="With `harness`: names of tasks in the folder.")
    baseline_prompt: str = Field(
        default="",
        max_length=65536,
        description="Also score the base with this instruction before each question (prompt-only), to compare with.",
    )
    baseline_examples: Count = Field(
        default=0, description="Answered examples before each question of that baseline: the first of `baseline_data`."
    )
    baseline_data: Line = Field(default="", description="Path of the rows that those examples are. Empty: none.")

    num_candidates: int = Field(
        default=256,
        ge=2,
        le=65536,
        description="With `memorisation`: how many texts a secret is ranked among, itself included, where a row has a "
        "`pattern`; the ceiling of its exposure is the logarithm of that to base 2.",
    )
    members_data: Line = Field(
        default="",
        description="With `memorisation`: path of rows that were trained on, in the run's columns, for `auc`. Empty: "
        "`auc` is of the canaries.",
    )
    non_members_data: Line = Field(
        default="", description="Path of rows of the same kind that were not; belongs to `members_data`."
    )
    names_file: Line = Field(
        default="", description="With `pii`: path of a text file of names, one a line, to look for. Empty: none."
    )
    phone_regions: Array[Annotated[str, Field(pattern=REGION)]] = Field(
        default=(),
        description="With `pii`: countries (ISO 3166-1, such as `DE`) whose telephone numbers are also found where "
        "they are written without a country code, as people there write them. Empty: by general patterns alone.",
    )
    judge_base: Line = Field(
        default="",
        description="With `judge`: folder of the model that judges. The run's own base is not loaded twice. Empty: "
        "`judge_url` judges.",
    )
    judge_url: Line = Field(
        default="",
        description="With `judge`: where an OpenAI-compatible server is, such as http://127.0.0.1:8000/v1. It is sent "
        "the rows of this task.",
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
        description="With `judge`: whose answers the adapter's are compared with; `prompt-only` is the base with "
        "`baseline_prompt` or `baseline_examples`.",
    )
    calibration_data: Line = Field(
        default="",
        description="With `judge`: path of pairs that people judged (`prompt`, `a`, `b`, `preferred`: a, b or tie). "
        "Empty: the judge counts as unreliable.",
    )
    min_agreement: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="With `calibration_data`: a judge that agrees with people on a smaller share is marked unreliable.",
    )

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
        _require(not needed or bool(getattr(self, needed)), f"kind {self.kind} needs {needed}")
        labelled = LABEL_METRICS & set(self.metrics)
        _require(bool(labelled) or not self.labels, "labels are for label_accuracy and macro_f1; name one in metrics")
        if self.kind == "answers":
            is_checked = "json" in self.metrics
            _require(is_checked == (self.json_schema != ""), "metric json and json_schema belong together")
        _require(
            (self.baseline_examples > 0) == (self.baseline_data != ""),
            "baseline_examples and baseline_data belong together; set both, or none",
        )
        _require(self.baseline_data != self.data, "baseline_data is the task's own file: examples would be its answers")
        return self

    @model_validator(mode="after")
    def _pairs_of_settings(self) -> Self:
        """What the kinds `memorisation` and `judge` need together."""
        _require(
            (self.members_data != "") == (self.non_members_data != ""),
            "members_data and non_members_data belong together; set both, or none",
        )
        if self.kind == "judge":
            _require((self.judge_base != "") != (self.judge_url != ""), "set one of judge_base and judge_url")
            _require((self.judge_url != "") == (self.judge_model != ""), "judge_url and judge_model belong together")
            _require(self.judge_url != "" or not self.judge_key_file, "judge_key_file is for judge_url")
            _require_place(self.judge_url, is_remote_allowed=self.allow_remote)
            is_prompted = self.against == "prompt-only"
            _require(is_prompted == self.has_baseline, 'against = "prompt-only" and a baseline_prompt belong together')
            has_default = self.min_agreement == type(self).model_fields["min_agreement"].default
            _require(self.calibration_data != "" or has_default, "min_agreement is for calibration_data")
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
    metrics: Array[Metric] = Field(
        default=(),
        description="Figures of generated answers to `server_data`, before the first round and after the last: "
        "`exact_match`, `f1` (SQuAD's), `rouge1`, `rouge2`, `rougeL`, `number` (the last, as in GSM8K), `json` (meets "
        "`json_schema`), `label_accuracy`, `macro_f1` (over the references as labels). Empty: none.",
    )
    json_schema: Line = Field(default="", description="Path of the JSON schema that `json` asks for. Empty: none.")
    tasks: Tables[TaskConfig] = Field(
        default=(), description="What the coordinator measures on its own rows, before the first round and at the end."
    )
    tasks_every_rounds: Count = Field(
        default=0, description="Also measure tasks and metrics after every so many rounds. 0: only before and after."
    )

    num_polish_stages: Count = Field(
        default=0,
        description="The sites also score the adapter after each of the last so many stages of `[[polish]]` that "
        "change it; of the stages they are told this number only. 0: they are not asked after polish.",
    )

    @property
    def suite(self) -> tuple[TaskConfig, ...]:
        """All tasks: `metrics` of `server_data` is one of them."""
        if not (self.metrics and self.server_data):
            return self.tasks
        own = TaskConfig.model_construct(
            name=OWN_TASK, kind="answers", data=self.server_data, metrics=self.metrics, json_schema=self.json_schema
        )
        return (own, *self.tasks)
