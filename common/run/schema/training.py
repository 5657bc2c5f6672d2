"""Sections `[data]`, `[training]` and `[federation]` of the run file."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from common.run.schema.section import Count, Decay, Line, PositiveCount, RequiredLine, Seconds, Section, is_positive


class DataConfig(Section):
    """The rows: where a simulation takes them from, and how rows become examples at every site."""

    source: RequiredLine = Field(
        default="embedded",
        description="Simulations only (a site's path is in its own file): a JSONL, JSON, CSV, TSV or Parquet file "
        "or a folder of them, a `datasets` id, or `embedded`.",
    )
    partition: Literal["column", "iid", "dirichlet"] = Field(
        default="column",
        description="Simulations only: how rows become sites: by `site_column`, evenly at random, or skewed.",
    )
    num_sites: Count = Field(
        default=0, description="Simulations only: number of sites. 0: one per value of `site_column`."
    )
    dirichlet_alpha: float = Field(
        default=0.5, gt=0, le=1_000_000, description="Skew of `dirichlet`; smaller means sites differ more."
    )
    site_column: Line = Field(default="site", description="Simulations only: the column that names a row's site.")
    unit_column: Line = Field(
        default="patient_id",
        description="Column of the unit, such as a patient. Rows of one unit are never split between training and "
        "held-out. Empty: each row is its own unit.",
    )
    instruction_column: RequiredLine = Field(default="instruction", description="Column of the task or question.")
    input_column: RequiredLine = Field(
        default="input", description="Column of the text that the task is about; may be empty in a row."
    )
    output_column: RequiredLine = Field(default="output", description="Column of the wanted answer.")
    held_out_fraction: float = Field(
        default=0.2, gt=0, lt=0.9, description="Share of a site's units kept for evaluation, never trained on."
    )
    same_text: Literal["together", "count"] = Field(
        default="together",
        description="Rows whose text is the same, word for word or nearly: `together` puts them on one side of the "
        "split, in a simulation over all sites; `count` only says how many held-out rows are trained on elsewhere, as "
        "private runs always do.",
    )
    max_length_tokens: int = Field(
        default=512, ge=8, le=1_048_576, description="Longest example, prompt and answer together, in tokens."
    )
    too_long: Literal["truncate", "truncate_input", "drop", "error"] = Field(
        default="error",
        description="What happens to an example over `max_length_tokens`: `truncate_input` cuts the middle out of its "
        "input and keeps instruction and answer, which suits long notes and visits; `truncate` cuts at the end, often "
        "the answer; `drop` leaves it out.",
    )
    system_prompt: str = Field(default="", max_length=65536, description="System message before every example.")


ObjectiveName = Literal["sft", "dpo", "kto"]
_OBJECTIVE: Final = "What local training lowers. A site's policy must allow `dpo` and `kto` by name."
_BETA: Final = "How much a log-ratio to the start of the run counts; larger stays closer to it."


class _Objective(Section):
    @property
    def couples_examples(self) -> bool:
        """Whether the loss of one example depends on others of its batch, which no clipping of units survives."""
        return False


class Sft(_Objective):
    """Likelihood of the answers."""

    kind: Literal["sft"] = Field(default="sft", description=_OBJECTIVE)


class Dpo(_Objective):
    """Pairs (`prompt`, `chosen`, `rejected`); arXiv:2305.18290."""

    kind: Literal["dpo"] = Field(default="dpo", description=_OBJECTIVE)
    beta: float = Field(default=0.1, gt=0, le=100, description=_BETA)
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Probability that a pair is the wrong way round."
    )


class Kto(_Objective):
    """Rated answers (`prompt`, `completion`, `label`); arXiv:2402.01306."""

    kind: Literal["kto"] = Field(default="kto", description=_OBJECTIVE)
    beta: float = Field(default=0.1, gt=0, le=100, description=_BETA)
    desirable_weight: float = Field(default=1.0, gt=0, le=1000, description="Weight of wanted answers.")
    undesirable_weight: float = Field(default=1.0, gt=0, le=1000, description="Weight of unwanted answers.")
    reference_point: Literal["batch", "zero"] = Field(
        default="batch",
        description="What a log-ratio is held against. `batch`: the mean over answers to other prompts in the step, "
        "as published. `zero`: nothing, as in APO-zero; a private run needs it, as the mean couples units.",
    )

    @property
    def couples_examples(self) -> bool:
        """See the other objectives."""
        return self.reference_point == "batch"


Preference = Dpo | Kto
Objective = Sft | Preference


class AdamW(Section):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    kind: Literal["adamw"] = Field(default="adamw", description="Optimizer at the sites.")
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="Decay of weights, beside the gradient.")
    beta1: Decay = Field(default=0.9, description="Decay of the first moment.")
    beta2: Decay = Field(default=0.999, description="Decay of the second moment.")
    epsilon: float = Field(default=1e-8, gt=0, le=1, description="Added to the denominator.")


class Sgd(Section):
    """Stochastic gradient descent, with momentum."""

    kind: Literal["sgd"] = Field(default="sgd", description="Optimizer at the sites.")
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="Decay of weights, part of the gradient.")
    momentum: Decay = Field(default=0.0, description="Momentum.")


OptimizerConfig = Annotated[AdamW | Sgd, Field(discriminator="kind")]


class TrainingConfig(Section):
    """What a site does in one round, and the optimizer that does it."""

    objective: Annotated[Objective, Field(discriminator="kind")] = Field(
        default_factory=Sft, description="What local training lowers."
    )
    local_epochs: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Passes over a site's training rows per round; 0.5 is half of them. Leave it out (it is then 0) "
        "where `local_steps` is set.",
    )
    local_steps: Count = Field(default=0, description="Optimizer steps per round. 0: `local_epochs` decides.")
    batch_size: int = Field(
        default=8, ge=1, le=65536, description="Rows per optimizer step; a pair of answers counts as one."
    )
    micro_batch_size: int = Field(
        default=0, ge=0, le=65536, description="Rows in memory at once; divides `batch_size`. 0: `batch_size`."
    )
    micro_batch_tokens: int = Field(
        default=0,
        ge=0,
        le=1 << 24,
        description="Tokens in memory at once, in the place of rows; a longer row goes alone. 0: `micro_batch_size`.",
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=100, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate over the whole run, all rounds together."
    )
    final_rate_fraction: float = Field(
        default=0.0, ge=0, le=1, description="`linear` and `cosine`: share of `learning_rate` at which the run ends."
    )
    warmup_fraction: Decay = Field(default=0.0, description="Share of the whole run in which the rate rises from 0.")
    optimizer: OptimizerConfig = Field(default_factory=AdamW, description="What makes steps of gradients.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1_000_000, description="Gradients are scaled to this L2 norm at most. 0: no clipping."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations: less memory, about a third more time."
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, table: Any) -> Any:
        """Let `local_steps` alone decide where `local_epochs` was left out, and say so in the resolved values."""
        if not isinstance(table, dict) or "local_epochs" in table or not is_positive(table, "local_steps"):
            return table
        return {**table, "local_epochs": 0.0}


class FederationConfig(Section):
    """Rounds, and which sites take part in them."""

    num_rounds: int = Field(default=10, ge=1, le=100_000, description="Rounds in the run.")
    sites_per_round: Count = Field(default=0, description="Sites drawn for each round. 0: all.")
    min_sites: PositiveCount = Field(default=2, description="Fewest valid updates with which a round counts.")
    round_timeout_s: Seconds = Field(default=3600.0, description="Longest wait for a round's updates, in seconds.")
    join_timeout_s: Seconds = Field(default=600.0, description="Longest wait for sites at the start, in seconds.")
    num_sites: Count = Field(
        default=0, description="Sites to wait for at the start. 0: whoever has connected, at least `min_sites`."
    )
