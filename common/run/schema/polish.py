"""Tables `[[polish]]` of the run file: what the coordinator trains on its own data after the last round."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from common.run.schema.section import LINE, Count, Decay, Line, RequiredLine, Section, Slug, is_positive

EXPERIMENTAL: Final = ("orpo", "simpo")  # their trainers live under trl.experimental
_KIND: Any = Field(description="What is trained; `orpo` and `simpo` are experimental in TRL.")

Rate = Annotated[float, Field(gt=0, le=100, description="Peak learning rate.")]
BatchSize = Annotated[int, Field(ge=1, le=65536, description="Rows per optimizer step; of kinds that sample answers.")]
Weight = Annotated[float, Field(ge=0, le=1000)]
Beta = Annotated[float, Field(gt=0, le=1000, description="How close, or the weight of the preference.")]
HeldBeta = Annotated[float, Field(ge=0, le=1000, description="How close to `reference`. 0: no reference takes part.")]


class PolishStage(Section):
    """A stage after the last round, on the coordinator's own data. Stages run in the order of the file, each on the
    adapter that the one before has left. Sites are told nothing of them.
    """

    name: Slug = Field(description="Name of the stage, and of its folder.")
    kind: str
    data: RequiredLine = Field(
        description="Path of the stage's data. `sft`: as a site's rows; `cpt`: column `text`; `dpo`, `orpo`, `simpo`, "
        "`reward`: `prompt`, `chosen`, `rejected`; `kto`: `prompt`, `completion`, `label`; `rloo`, `grpo`: `prompt`, "
        "and `answer` or `tests` where the reward needs it."
    )
    epochs: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="Passes over the stage's data. Leave it out (it is then 0) where `steps` is set.",
    )
    steps: Count = Field(default=0, description="Optimizer steps. 0: `epochs` decides.")
    batch_size: BatchSize = 8
    micro_batch_size: int = Field(
        default=0, ge=0, le=65536, description="Rows in memory at once; divides `batch_size`. 0: `batch_size`."
    )
    learning_rate: Rate = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate over the stage."
    )
    warmup_fraction: Decay = Field(default=0.0, description="Share of the stage in which the rate rises from 0.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1_000_000, description="Gradients are scaled to this L2 norm at most."
    )
    max_length_tokens: int = Field(
        default=512,
        ge=8,
        le=1_048_576,
        description="Longest row, prompt and answer together, in tokens; `cpt` cuts texts into pieces of it.",
    )
    overlap: Literal["error", "drop", "allow"] = Field(
        default="error",
        description="What happens to rows whose text stands in a task's rows, or in a simulation in the sites' "
        "held-out rows, word for word or nearly: `drop` leaves them out, `allow` trains on them, and it is said beside "
        "the figures. With `allow` a text of the stage's own data may also be on both sides of its split.",
    )
    held_out_fraction: float = Field(
        default=0.1, gt=0, lt=0.9, description="Share of the stage's rows that are not trained on, for its figures."
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of the stage: split, order, samples.")

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, table: Any) -> Any:
        """Let `steps` alone decide where `epochs` was left out, and say so in the resolved values."""
        if not isinstance(table, dict) or "epochs" in table or not is_positive(table, "steps"):
            return table
        return {**table, "epochs": 0.0}

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        if found := next((message for is_broken, message in self._rules() if is_broken), ""):
            raise ValueError(f"stage '{self.name}': {found}")
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What is broken, and the remedy; a kind adds its own."""
        return (
            ((self.steps > 0) == (self.epochs > 0), "set either steps or epochs above 0"),
            (self.batch_size % self.micro_rows != 0, "micro_batch_size must divide batch_size"),
        )

    @property
    def changes_adapter(self) -> bool:
        """Whether the run's adapter is trained; a reward model is another one."""
        return self.kind != "reward"

    @property
    def micro_rows(self) -> int:
        """Rows in memory at once."""
        return self.micro_batch_size or self.batch_size

    @property
    def held_to(self) -> str:
        """What the model is held close to, as in `reference`; empty for nothing."""
        return ""


class RowsStage(PolishStage):
    """A stage that takes each row whole or cut."""

    too_long: Literal["truncate", "truncate_input", "drop", "error"] = Field(
        default="error", description="What happens to a row over `max_length_tokens`, as for `data.too_long`."
    )


class ReferencedStage(PolishStage):
    """A stage that holds the model close to a reference, where `beta` is above 0."""

    reference: Literal["start", "base"] = Field(
        default="start",
        description="What the model is held close to: the frozen adapter from which the stage begins, or `base`, no "
        "adapter.",
    )
    beta: float

    @property
    def held_to(self) -> str:
        """What the model is held close to; empty for nothing."""
        return self.reference if self.beta else ""


class SftStage(RowsStage):
    """Answers, as sites learn them."""

    kind: Literal["sft"] = _KIND
    learning_rate: Rate = 1e-4


class CptStage(PolishStage):
    """Raw text, every token of it."""

    kind: Literal["cpt"] = _KIND
    learning_rate: Rate = 5e-5


class DpoStage(ReferencedStage, RowsStage):
    """Preferences, by pairs of answers."""

    kind: Literal["dpo"] = _KIND
    beta: Beta = 0.1
    loss: Literal["sigmoid", "ipo", "robust"] = Field(default="sigmoid", description="Its loss.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="`sigmoid` or `robust`: share of pairs taken to be swapped."
    )

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        smooths = self.label_smoothing > 0
        return (
            *super()._rules(),
            (self.loss == "ipo" and smooths, "label_smoothing has no effect with loss 'ipo'; remove it"),
            (self.loss == "robust" and not smooths, "loss 'robust' with no label_smoothing is 'sigmoid'; set it"),
        )


class KtoStage(ReferencedStage, RowsStage):
    """Preferences, by answers that are good or bad."""

    kind: Literal["kto"] = _KIND
    beta: Beta = 0.1
    desirable_weight: Weight = Field(default=1.0, description="Weight of good answers.")
    undesirable_weight: Weight = Field(default=1.0, description="Weight of bad answers.")

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            *super()._rules(),
            (self.micro_rows < 2, "kto needs a micro_batch_size of 2 or more for its KL term"),
            (
                not self.desirable_weight + self.undesirable_weight,
                "with both weights 0 nothing would be learnt; raise desirable_weight or undesirable_weight",
            ),
        )


class OrpoStage(RowsStage):
    """Preferences beside the likelihood of the better answer, without a reference."""

    kind: Literal["orpo"] = _KIND
    beta: Beta = 0.1


class SimpoStage(RowsStage):
    """Preferences by mean log-likelihood, without a reference."""

    kind: Literal["simpo"] = _KIND
    beta: Beta = 2.0
    margin: Weight = Field(default=1.0, description="Target margin, gamma.")


class RewardStage(RowsStage):
    """A reward model; the run's adapter stays as it is."""

    kind: Literal["reward"] = _KIND
    learning_rate: Rate = 1e-4


class SampledStage(ReferencedStage):
    """A stage in which the model writes answers, which are scored."""

    batch_size: BatchSize = 16
    too_long: Literal["drop", "error"] = Field(
        default="error", description="What happens to a prompt over `max_length_tokens`, which cannot be cut."
    )
    beta: HeldBeta = 0.0
    num_generations: int = Field(default=4, ge=2, le=1_000_000, description="Answers to each prompt.")
    max_new_tokens: int = Field(default=128, ge=1, le=65536, description="Longest answer, in tokens.")
    temperature: float = Field(default=1.0, gt=0, le=100, description="Of sampling.")

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        is_idle = self.reference != "start" and not self.beta
        return (
            *super()._rules(),
            (is_idle, "reference has no effect while beta is 0; set both, or neither"),
            (self.batch_size % self.num_generations != 0, "num_generations must divide batch_size"),
        )


class RlooStage(SampledStage):
    """Answers that a reward model likes, by REINFORCE with a leave-one-out baseline."""

    kind: Literal["rloo"] = _KIND
    beta: HeldBeta = 0.05
    reward_stage: RequiredLine = Field(description="Name of the `reward` stage before it that scores.")


class GrpoStage(SampledStage):
    """Answers that a rule accepts, against the mean of their group."""

    kind: Literal["grpo"] = _KIND
    reward: Literal["exact", "json", "regex", "unit_test"] = Field(
        description="What earns 1: the `answer`; JSON that meets `json_schema`; a whole match of `pattern`, found "
        "within a second; Python that passes `tests` in a sandbox."
    )
    json_schema: Line = Field(default="", description="Reward `json`: path of the schema.")
    pattern: str = Field(
        default="", pattern=LINE, max_length=4096, description="Reward `regex`: Python's regular expression."
    )
    test_timeout_s: float = Field(
        default=5.0, gt=0, le=600, description="Reward `unit_test`: longest time of one answer's tests."
    )

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        schema_fits = (self.reward == "json") == bool(self.json_schema)
        is_timed = self.test_timeout_s != type(self).model_fields["test_timeout_s"].default
        return (
            *super()._rules(),
            (not schema_fits, "reward 'json' and json_schema belong together; set both, or neither"),
            ((self.reward == "regex") != bool(self.pattern), "reward 'regex' and pattern belong together"),
            (is_timed and self.reward != "unit_test", "test_timeout_s is for reward 'unit_test'"),
        )


AnyStage = SftStage | CptStage | DpoStage | KtoStage | OrpoStage | SimpoStage | RewardStage | RlooStage | GrpoStage
Stage = Annotated[AnyStage, Field(discriminator="kind")]


def check_order(stages: tuple[AnyStage, ...]) -> tuple[AnyStage, ...]:
    """Refuse two stages of one name, and a reward stage that does not stand before the stage that asks for it.

    Raises:
        ValueError: Names the stage and the remedy.
    """
    for number, stage in enumerate(stages):
        before = {other.name: other.kind for other in stages[:number]}
        if stage.name in before:
            raise ValueError(f"two stages are called '{stage.name}'; give each a name of its own")
        if isinstance(stage, RlooStage) and before.get(stage.reward_stage) != "reward":
            raise ValueError(
                f"stage '{stage.name}': no stage of kind 'reward' called '{stage.reward_stage}' stands before it; "
                "correct reward_stage or move the stage up"
            )
    return stages
