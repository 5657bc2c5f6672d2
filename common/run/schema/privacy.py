"""Section `[privacy]` of the run file."""

from typing import Final, Literal

from pydantic import Field

from common.run.schema.section import PositiveCount, Section

Protection = Literal["none", "unit", "site"]


DP_DELTA: Final = 1e-6  # also that of an audit of a run that is not private
_MODE: Final = (
    "What protects an update when it leaves a site. There is no default: it must be stated. Outside simulations every "
    "site's policy must allow `none` by name."
)


class NoPrivacy(Section):
    """Updates leave unprotected."""

    mode: Literal["none"] = Field(default="none", description=_MODE)


class _Private(Section):
    epsilon: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="The most that the whole run may cost a unit. With `noise_multiplier = 0` the noise is chosen for "
        "it; else the plan is held to it. 0: no limit of the run's own; the sites have theirs.",
    )
    dp_delta: float = Field(
        default=DP_DELTA,
        gt=0,
        lt=0.1,
        description="Delta that goes with epsilon; at most the smaller of 1e-5 and 1/(n ln n) for the n units of a "
        "site, or under `site` for n sites.",
    )
    sampling_prob: float = Field(
        gt=0,
        le=1,
        description="Probability with which a unit takes part in a step, such as 0.02; under `site` a site in a round.",
    )
    noise_multiplier: float = Field(
        default=0.0, ge=0, le=10_000, description="Standard deviation of the noise over `clip_norm`. 0: from `epsilon`."
    )
    clip_norm: float = Field(
        default=1.0,
        gt=0,
        le=1_000_000,
        description="Largest L2 norm of a unit's gradient; a row's loss is the sum over its answer tokens, in nats. "
        "Under `site`: of a site's update, over all its tensors.",
    )
    adaptive_clipping: bool = Field(
        default=False,
        description="Let `clip_norm` follow a quantile of the norms; the noise of both is accounted. "
        "Under `site` it never rises above its start.",
    )
    clip_quantile: float = Field(
        default=0.5, gt=0, lt=1, description="Share of units, or of sites, that should not be clipped."
    )
    clip_learning_rate: float = Field(
        default=0.2, gt=0, le=1, description="How fast the clip norm follows, per step or round."
    )


class UnitPrivacy(_Private):
    """Each site's training is differentially private for each of its units, such as a patient, against everybody
    outside the site.
    """

    mode: Literal["unit"] = Field(default="unit", description=_MODE)
    max_rows_per_unit: PositiveCount = Field(
        default=1, description="Most rows of a unit in one step, drawn anew each time and clipped together."
    )
    clipping: Literal["auto", "stacked", "microbatch", "opacus"] = Field(
        default="auto",
        description="How the gradient of a unit is taken; each goes through the model alone. `microbatch`, which "
        "`auto` means: by plain autograd, for any adapter. `stacked`: off the layers of LoRA. `opacus`: by Opacus' "
        "hooks.",
    )


class SitePrivacy(_Private):
    """What is released is differentially private for each site as a whole; it takes a thousand sites or so."""

    mode: Literal["site"] = Field(default="site", description=_MODE)
    noise_at: Literal["server", "sites"] = Field(
        default="server",
        description="`server`: the coordinator noises the sum, and is itself trusted. `sites`: each site adds a share, "
        "enough with `federation.min_sites` of them.",
    )


Private = UnitPrivacy | SitePrivacy
PrivacyConfig = NoPrivacy | Private
