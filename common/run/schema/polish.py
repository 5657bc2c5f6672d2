"""Tables `[[polish]]` of the run file: what the coordinator trains on its own data after the last round."""

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.run.schema.section import LINE, Count, Decay, Line, RequiredLine, Section, Slug

Kind = Literal["sft", "cpt", "dpo", "kto", "orpo", "simpo", "reward", "rloo", "grpo"]
EXPERIMENTAL: Final = ("orpo", "simpo")  # their trainers live under trl.experimental
PAIRED: Final = ("dpo", "orpo", "simpo", "reward")
SAMPLED: Final = ("rloo", "grpo")  # the model writes answers, which are scored
REFERENCED: Final = ("dpo", "kto", *SAMPLED)

USED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "reference": REFERENCED,
    "beta": (*REFERENCED, "orpo", "simpo"),
    "loss": ("dpo",),
    "label_smoothing": ("dpo",),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reward": ("grpo",),
    "json_schema": ("grpo",),
    "pattern": ("grpo",),
    "test_timeout_s": ("grpo",),
    "reward_stage": ("rloo",),
    "num_generations": SAMPLED,
    "max_new_tokens": SAMPLED,
    "temperature": SAMPLED,
}
DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sft": {"learning_rate": 1e-4},
    "cpt": {"learning_rate": 5e-5},
    "dpo": {"learning_rate": 1e-5, "beta": 0.1, "loss": "sigmoid", "reference": "start"},
    "kto": {
        "learning_rate": 1e-5,
        "beta": 0.1,
        "reference": "start",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    },
    "orpo": {"learning_rate": 1e-5, "beta": 0.1},
    "simpo": {"learning_rate": 1e-5, "beta": 2.0, "margin": 1.0},
    "reward": {"learning_rate": 1e-4},
    "rloo": {"learning_rate": 1e-5, "batch_size": 16, "beta": 0.05},
    "grpo": {"learning_rate": 1e-5, "batch_size": 16},
}
_SAMPLED_DEFAULTS: Final = {"num_generations": 4, "max_new_tokens": 128, "temperature": 1.0}
_COUNTED: Final = "`rloo`, `grpo`: "


class PolishStage(Section):
    """A stage after the last round, on the coordinator's own data. Stages run in the order of the file, each on the
    adapter that the one before has left. Sites are told nothing of them. Where the default depends on the kind, the
    table shows what counts as left out; `docs/polish.md` has each kind's own.
    """

    name: Slug = Field(description="Name of the stage, and of its folder.")
    kind: Kind = Field(description="What is trained; `orpo` and `simpo` are experimental in TRL.")
    data: RequiredLine = Field(
        description="Path of the stage's data. `sft`: as a site's rows; `cpt`: column `text`; `dpo`, `orpo`, `simpo`, "
        "`reward`: `prompt`, `chosen`, `rejected`; `kto`: `prompt`, `completion`, `label`; `rloo`, `grpo`: `prompt`, "
        "and `answer` or `tests` where the reward needs it."
    )
    epochs: float = Field(default=0.0, ge=0, le=1000, description="Passes over the stage's data; 1 if `steps` is 0.")
    steps: Count = Field(default=0, description="Optimizer steps. 0: `epochs` decides.")
    batch_size: int = Field(
        default=8, ge=1, le=65536, description="Rows per optimizer step; for `rloo` and `grpo` answers, 16 by default."
    )
    micro_batch_size: int = Field(
        default=0, ge=0, le=65536, description="Rows in memory at once; divides `batch_size`. 0: `batch_size`."
    )
    learning_rate: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Peak learning rate. 0 or left out: 1e-4 for `sft` and `reward`, 5e-5 for `cpt`, else 1e-5.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate over the stage."
    )
    warmup_fraction: Decay = Field(default=0.0, description="Share of the stage in which the rate rises from 0.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1_000_000, description="Gradients are scaled to this L2 norm at most."
    )
    max_length_tokens: int = Field(
        default=512, ge=8, le=1_048_576, description="Longest row, prompt and answer together, in tokens."
    )
    too_long: Literal["truncate", "truncate_input", "drop", "error"] = Field(
        default="error",
        description="What happens to a row over `max_length_tokens`, as for `data.too_long`; `cpt` cuts texts into "
        "pieces.",
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
    reference: Literal["", "start", "base"] = Field(
        default="",
        description="`dpo`, `kto`, `rloo`, `grpo`: what the model is held close to: `start` (by default), the frozen "
        "adapter from which the stage begins, or `base`, no adapter.",
    )
    beta: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="How close, or the weight of the preference: 0.1 for `dpo`, `kto` and `orpo`, 2 for `simpo`, 0.05 "
        "for `rloo`, 0 for `grpo`.",
    )
    loss: Literal["", "sigmoid", "ipo", "robust"] = Field(default="", description="`dpo`: its loss; `sigmoid`.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="`dpo`, `sigmoid` or `robust`: share of pairs taken to be swapped."
    )
    margin: float = Field(default=0.0, ge=0, le=1000, description="`simpo`: target margin, gamma; 1.")
    desirable_weight: float = Field(default=0.0, ge=0, le=1000, description="`kto`: weight of good answers; 1.")
    undesirable_weight: float = Field(default=0.0, ge=0, le=1000, description="`kto`: weight of bad answers; 1.")
    reward: Literal["", "exact", "json", "regex", "unit_test"] = Field(
        default="",
        description="`grpo`: what earns 1: the `answer`; JSON that meets `json_schema`; a whole match of `pattern`, "
        "found within a second; Python that passes `tests` in a sandbox.",
    )
    json_schema: Line = Field(default="", description="Reward `json`: path of the schema.")
    pattern: str = Field(
        default="", pattern=LINE, max_length=4096, description="Reward `regex`: Python's regular expression."
    )
    test_timeout_s: float = Field(
        default=0.0, ge=0, le=600, description="Reward `unit_test`: longest time of one answer's tests; 5."
    )
    reward_stage: Line = Field(default="", description="`rloo`: name of the `reward` stage before it that scores.")
    num_generations: Count = Field(default=0, description=_COUNTED + "answers to each prompt; 4.")
    max_new_tokens: int = Field(default=0, ge=0, le=65536, description=_COUNTED + "longest answer, in tokens; 128.")
    temperature: float = Field(default=0.0, ge=0, le=100, description=_COUNTED + "of sampling; 1.")

    @model_validator(mode="before")
    @classmethod
    def _kind_decides(cls, table: Any) -> Any:
        """Fill in what was left out, so that the resolved file says what is done."""
        if not isinstance(table, dict) or not isinstance(kind := table.get("kind"), str) or kind not in DEFAULTS:
            return table
        given = {name: value for name, value in table.items() if name != "learning_rate" or value != 0}
        filled = {**DEFAULTS[kind], **(_SAMPLED_DEFAULTS if kind in SAMPLED else {}), **given}
        if kind in SAMPLED and _is_positive(filled.get("beta")):
            filled.setdefault("reference", "start")
        if filled.get("reward") == "unit_test":
            filled.setdefault("test_timeout_s", 5.0)
        if not filled.get("steps"):
            filled.setdefault("epochs", 1.0)
        return filled

    @field_validator(*USED_BY)
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would do nothing."""
        kind, name = info.data.get("kind"), str(info.field_name)
        if kind and kind not in USED_BY[name] and value != cls.model_fields[name].default:
            raise ValueError(f"has no effect with kind '{kind}', only with {', '.join(USED_BY[name])}; remove it")
        return value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        """Refuse values that are fine alone and contradict each other."""
        if found := next((message for is_broken, message in self._rules() if is_broken), ""):
            raise ValueError(f"stage '{self.name}': {found}")
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What is broken, and the remedy."""
        schema_fits = (self.reward == "json") == bool(self.json_schema)
        smooths = self.label_smoothing > 0
        needs_beta = self.kind in (*REFERENCED, "orpo", "simpo") and self.kind not in SAMPLED
        return (
            ((self.steps > 0) == (self.epochs > 0), "set either steps or epochs above 0"),
            (self.batch_size % self.micro_rows != 0, "micro_batch_size must divide batch_size"),
            (needs_beta and not self.beta, "beta must be above 0; at 0 nothing would be learnt"),
            (bool(self.reference) != self._is_held, "reference has no effect while beta is 0; set both, or neither"),
            (self.loss == "ipo" and smooths, "label_smoothing has no effect with loss 'ipo'; remove it"),
            (self.loss == "robust" and not smooths, "loss 'robust' with no label_smoothing is 'sigmoid'; set it"),
            (self.kind == "kto" and self.micro_rows < 2, "kto needs a micro_batch_size of 2 or more for its KL term"),
            (
                self.kind == "kto" and not self.desirable_weight + self.undesirable_weight,
                "with both weights 0 nothing would be learnt; raise desirable_weight or undesirable_weight",
            ),
            (self.kind == "grpo" and not self.reward, "set reward to exact, json, regex or unit_test"),
            (not schema_fits, "reward 'json' and json_schema belong together; set both, or neither"),
            ((self.reward == "regex") != bool(self.pattern), "reward 'regex' and pattern belong together"),
            ((self.reward == "unit_test") != (self.test_timeout_s > 0), "test_timeout_s is for reward 'unit_test'"),
            (self.kind == "rloo" and not self.reward_stage, "set reward_stage to the name of a reward stage before"),
            (self.kind in SAMPLED and self.num_generations < 2, "num_generations must be 2 or more, to compare"),
            (
                self.kind in SAMPLED and self.batch_size % max(self.num_generations, 1) != 0,
                "num_generations must divide batch_size",
            ),
            (self.kind in SAMPLED and not self.max_new_tokens, "max_new_tokens must be above 0"),
            (self.kind in SAMPLED and not self.temperature, "temperature must be above 0; else all answers are one"),
            (
                self.kind in SAMPLED and self.too_long.startswith("truncate"),
                "a prompt cannot be cut; set too_long to drop",
            ),
            (self.kind == "cpt" and self.too_long != "error", "cpt cuts texts into pieces; remove too_long"),
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
    def _is_held(self) -> bool:
        """Whether a reference takes part."""
        return self.kind in REFERENCED and self.beta > 0


def check_order(stages: tuple[PolishStage, ...]) -> tuple[PolishStage, ...]:
    """Refuse two stages of one name, and a reward stage that does not stand before the stage that asks for it.

    Raises:
        ValueError: Names the stage and the remedy.
    """
    for number, stage in enumerate(stages):
        before = {other.name: other.kind for other in stages[:number]}
        if stage.name in before:
            raise ValueError(f"two stages are called '{stage.name}'; give each a name of its own")
        if stage.reward_stage and before.get(stage.reward_stage) != "reward":
            raise ValueError(
                f"stage '{stage.name}': no stage of kind 'reward' called '{stage.reward_stage}' stands before it; "
                "correct reward_stage or move the stage up"
            )
    return stages


def _is_positive(value: object) -> bool:
    """Whether an unchecked value is a number over 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
