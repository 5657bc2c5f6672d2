"""Does the noise protect as much as the accountant says? Dirac canaries through the product's own mechanism."""

import math

from client.train import dirac
from common import accounting
from common.errors import ConfigError
from common.privacy import bounds, cost
from common.privacy.noise import Noise
from common.run import config
from common.run.schema.privacy import UnitPrivacy
from simulations.audit.finding import Finding


def settings(sampling_prob: float, noise_multiplier: float, *, dp_delta: float) -> UnitPrivacy:
    """Settings without a run file."""
    if not (0 < sampling_prob <= 1 and 0 < noise_multiplier < math.inf and 0 < dp_delta < 0.1):
        raise ConfigError("--sampling-prob must be in (0, 1], --noise-multiplier above 0 and --dp-delta in (0, 0.1)")
    return UnitPrivacy(sampling_prob=sampling_prob, noise_multiplier=noise_multiplier, dp_delta=dp_delta)


def settings_of(run: config.RunConfig) -> tuple[UnitPrivacy, int]:
    """Section `[privacy]` and the number of steps of a run.

    Raises:
        ConfigError: The run is not private for units.
    """
    privacy = cost.resolve(run).privacy
    if privacy.mode != "unit":
        raise ConfigError(
            f"privacy.mode = '{privacy.mode}': there is no mechanism for units to audit; set privacy.mode = 'unit'"
        )
    return privacy, run.training.local_steps * run.federation.num_rounds


def audit(
    privacy: UnitPrivacy,
    *,
    num_steps: int,
    num_canaries: int,
    source: Noise,
    confidence: float = bounds.CONFIDENCE,
    claimed_epsilon: float | None = None,
) -> Finding:
    """Hold both estimators against the accountant.

    The Gaussian fit decides, as its assumption holds for our own noise; the one-run bound, which assumes nothing, and
    its ceiling are reported beside it.

    Args:
        num_canaries: m; a thousand tell half of the noise from all of it.
        confidence: Probability with which right noise is not refuted.
        claimed_epsilon: Another claim than the accountant's for these settings.
    """
    scores = dirac.scores(num_canaries=num_canaries, privacy=privacy, num_steps=num_steps, source=source)
    claimed = accounting.epsilon(
        sampling_prob=privacy.sampling_prob,
        noise_multiplier=privacy.noise_multiplier,
        num_steps=num_steps,
        dp_delta=privacy.dp_delta,
    )
    limits = {"dp_delta": privacy.dp_delta, "confidence": confidence}
    fit = bounds.gaussian_fit(scores.score_m, scores.is_in_m, **limits)
    one_run = bounds.one_run(scores.score_m, scores.is_in_m, **limits)
    return Finding(
        part="mechanism",
        claimed_epsilon=claimed if claimed_epsilon is None else claimed_epsilon,
        audited_epsilon=fit.epsilon,
        ceiling=math.inf,  # the Gaussian fit has none
        num_canaries=num_canaries,
        dp_delta=privacy.dp_delta,
        figures={
            "mu": fit.mu,
            "mu_lower": fit.mu_lower,
            "one_run_epsilon": one_run.epsilon,
            "one_run_ceiling": one_run.ceiling,
            "guesses": one_run.num_guesses,
            "right_guesses": one_run.num_right,
        },
    )
