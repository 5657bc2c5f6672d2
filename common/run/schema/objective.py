"""What of `[training]` says which loss the sites lower, and which setting belongs to which loss."""

from typing import Final, Literal

from pydantic import Field

from common.run.schema.section import Section

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
