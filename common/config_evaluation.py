"""Section `[evaluation]` of the run file."""

from typing import Final

from pydantic import Field

from common.config_tasks import TaskConfig, split_names
from common.config_types import METRICS, Count, Line, PositiveCount, Section, Tables

OWN_TASK: Final = "server-data"


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
    metrics: str = Field(
        default="",
        pattern=METRICS,
        max_length=4096,
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
    def metric_names(self) -> tuple[str, ...]:
        """The names in `metrics`, each once, in the order written."""
        return split_names(self.metrics)

    @property
    def suite(self) -> tuple[TaskConfig, ...]:
        """All tasks: `metrics` of `server_data` is one of them."""
        if not (self.metrics and self.server_data):
            return self.tasks
        own = TaskConfig.model_construct(
            name=OWN_TASK, kind="answers", data=self.server_data, metrics=self.metrics, json_schema=self.json_schema
        )
        return (own, *self.tasks)
