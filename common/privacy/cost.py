"""What a run will cost a unit, before it starts: the noise for its epsilon, and the curve over its rounds.

A plan depends on the run file alone. What a site has spent is its own ledger's to say. Loads no torch.
"""

from collections.abc import Sequence

from common import accounting
from common.accounting import DpEvent
from common.errors import FloorRefused
from common.privacy import site_level
from common.run import config
from common.run.schema.privacy import Private

FIXED_WORDING = (
    "per site and per unit (such as a patient), against everybody outside the site; one unit added or removed; "
    "Poisson sampling; PLD accountant. A patient of two sites loses the sum. Not covered: that a site takes part. How "
    "many units a site has and figures on held-out ones are noised, and charged beside this, by a site whose policy "
    "requires differential privacy; by another they are not covered."
)


def wording(run: config.RunConfig) -> str:
    """What is protected and what is not, in the one wording that all pages show."""
    return site_level.WORDING[run.privacy.noise_at] if run.privacy.mode == "site" else FIXED_WORDING


def _privacy(run: config.RunConfig) -> Private:
    """What is accounted."""
    if run.privacy.mode == "none":
        raise ValueError("privacy.mode = 'none' has no epsilon")
    return run.privacy


def event_per_round(run: config.RunConfig) -> DpEvent:
    """What one round does to a site's units, or to a site as a whole.

    Raises:
        ValueError: The run is not private, or has no noise yet; see `resolve`.
    """
    privacy = _privacy(run)
    if privacy.mode == "site":
        return site_level.event_per_round(privacy)
    return DpEvent(privacy.sampling_prob, privacy.noise_multiplier, run.training.local_steps)


def resolve(run: config.RunConfig) -> config.RunConfig:
    """The run with the noise that its epsilon needs, or with its own noise, held to that epsilon.

    Returns:
        The same run with `privacy.noise_multiplier` above 0; unchanged if it is not private.

    Raises:
        AccountingUnsupported: No noise reaches that epsilon.
        FloorRefused: The noise that the file names costs more than its epsilon.
    """
    privacy = run.privacy
    if privacy.mode == "none":
        return run
    num_steps = run.federation.num_rounds * (1 if privacy.mode == "site" else run.training.local_steps)
    if not privacy.noise_multiplier:
        noise = accounting.noise_multiplier(
            epsilon=privacy.epsilon,
            dp_delta=privacy.dp_delta,
            sampling_prob=privacy.sampling_prob,
            num_steps=num_steps,
        )
        return run.model_copy(update={"privacy": privacy.model_copy(update={"noise_multiplier": noise})})
    planned = epsilon(run)
    if privacy.epsilon and not planned <= privacy.epsilon:
        raise FloorRefused(
            f"privacy.noise_multiplier = {privacy.noise_multiplier:g} costs epsilon {planned:.3f} over "
            f"{run.federation.num_rounds} rounds, above privacy.epsilon = {privacy.epsilon:g}; raise the noise, take "
            "fewer rounds or steps, or set noise_multiplier = 0 to have it chosen"
        )
    return run


def epsilon(run: config.RunConfig, *, dp_delta: float | None = None, beside: Sequence[DpEvent] = ()) -> float:
    """What the whole run costs a unit, or a site as a whole, at a site that has not spent anything before.

    Args:
        dp_delta: The site's own; None: the run's.
        beside: What the site releases beside its rounds.
    """
    event = event_per_round(run)
    whole = DpEvent(event.sampling_prob, event.noise_multiplier, event.num_steps * run.federation.num_rounds)
    return accounting.compose([whole, *beside], dp_delta=dp_delta or _privacy(run).dp_delta)


def milestones(
    run: config.RunConfig, *, dp_delta: float | None = None, beside: Sequence[DpEvent] = ()
) -> dict[int, float]:
    """Epsilon after the first round and after each quarter of the rounds, for who decides on a plan.

    Args:
        beside: What the site releases beside its rounds, taken as released before the first.

    Returns:
        Number of rounds to epsilon, the last one that of `epsilon`.
    """
    event, num_rounds = event_per_round(run), run.federation.num_rounds
    ends = sorted({1, *(max(1, num_rounds * quarter // 4) for quarter in range(1, 5))})
    dp_delta = dp_delta or _privacy(run).dp_delta
    return {end: accounting.compose([event.times(end), *beside], dp_delta=dp_delta) for end in ends}


def curve(run: config.RunConfig) -> list[float]:
    """Epsilon after each round; steep at first, never the whole over the number of rounds."""
    return accounting.planned_curve(event_per_round(run), run.federation.num_rounds, dp_delta=_privacy(run).dp_delta)
