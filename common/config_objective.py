"""What of `[training]` says which loss the sites lower, and which of it goes together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field

from common.config_types import Contradiction, Section

if TYPE_CHECKING:
    from common.config import RunConfig

ObjectiveName = Literal["sft", "dpo", "kto"]
ReferencePoint = Literal["batch", "zero"]


class ObjectiveSettings(Section):
    """Settings of the loss; part of `[training]`."""

    objective: ObjectiveName = Field(
        default="sft",
        description="`sft`: likelihood of the answers. `dpo`: pairs (`prompt`, `chosen`, `rejected`). `kto`: rated "
        "answers (`prompt`, `completion`, `label`). A site's policy must allow `dpo` and `kto` by name.",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="`dpo`, `kto`: how much a log-ratio to the start of the run counts; larger stays closer to it.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="`dpo`: probability that a pair is the wrong way round."
    )
    desirable_weight: float = Field(default=1.0, gt=0, le=1000, description="`kto`: weight of wanted answers.")
    undesirable_weight: float = Field(default=1.0, gt=0, le=1000, description="`kto`: weight of unwanted answers.")
    reference_point: ReferencePoint = Field(
        default="batch",
        description="`kto`: what a log-ratio is held against. `batch`: the mean over answers to other prompts in the "
        "step, as published. `zero`: nothing, as in APO-zero; a private run needs it, as the mean couples units.",
    )


DEFAULTS: Final = {name: field.default for name, field in ObjectiveSettings.model_fields.items() if name != "objective"}
USES: Final[dict[str, tuple[str, ...]]] = {
    "sft": (),
    "dpo": ("beta", "label_smoothing"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference_point"),
}


def _is_unused(config: RunConfig, name: str) -> bool:
    training = config.training
    return getattr(training, name) != DEFAULTS[name] and name not in USES[training.objective]


def _has_idle_columns(config: RunConfig) -> bool:
    data = config.data
    is_named = (data.instruction_column, data.input_column, data.output_column) != ("instruction", "input", "output")
    return config.training.objective != "sft" and is_named and not config.evaluation.server_data


CONFLICTS: Final[tuple[Contradiction, ...]] = (
    *(
        (
            (f"training.{name}", "training.objective"),
            partial(_is_unused, name=name),
            "this objective does not use it; remove it or choose another",
        )
        for name in DEFAULTS
    ),
    (
        ("training.reference_point", "training.objective", "privacy.mode"),
        lambda c: c.training.objective == "kto" and c.training.reference_point == "batch" and c.privacy.is_private,
        "a mean over the step lets one unit move the gradients of all others, which no clipping bounds; set 'zero'",
    ),
    (
        ("training.objective", "evaluation.exact_match_rows"),
        lambda c: c.training.objective != "sft" and c.evaluation.exact_match_rows > 0,
        "held-out preferences are scored by their margins, none is answered by generation; remove exact_match_rows",
    ),
    (
        ("training.objective", "data.instruction_column", "data.input_column", "data.output_column"),
        _has_idle_columns,
        "columns of preferences have fixed names, and there are no other rows (evaluation.server_data); remove these",
    ),
)
