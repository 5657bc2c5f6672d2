"""Differential privacy for sites as a whole: what a run promises each, what it has spent, and when it is hopeless.

In a round every site is drawn with probability `privacy.sampling_prob`, each for itself. The update of a drawn site is
scaled down to norm C over all its tensors, updates are added up, noise of standard deviation sigma C is added to the
sum, and the sum is divided by the expected number of sites: a Poisson-sampled Gaussian mechanism, one step a round. A
site that is added or removed moves the sum by C at most. Loads no torch.

Source: McMahan et al. 2018, arXiv:1710.06963, algorithm 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from common import accounting
from common.accounting import DpEvent
from common.errors import AccountingUnsupported, FloorRefused, PrivacyError
from common.run import config
from common.run.schema.privacy import SitePrivacy

MAX_NOISE_RATIO: Final = 10.0
_PROMISE: Final = (
    "each site as a whole; one site added or removed; this run alone (runs with the same site add up); PLD accountant. "
)
_REST: Final = (
    "Not covered: that a site takes part or fails, its numbers of rows, figures on held-out rows, the text of its rows "
    "if it becomes known elsewhere. It is no promise to a patient whose site is known to take part."
)
WORDING: Final[Mapping[str, str]] = {
    "server": f"{_PROMISE}Protects from those who see released adapters and do not learn who was drawn. An insider "
    "learns it: the sites of a run may, from the audit logs' heads. The coordinator is trusted: it sees every "
    f"update as it is. {_REST}",
    "sites": f"{_PROMISE}Protects from those who see released adapters, if every site whose update counted added its "
    "share of the noise. The insider is the coordinator: it sees every update by itself, under that one share only. "
    f"{_REST}",
}


def _privacy(run: config.RunConfig) -> SitePrivacy:
    """The noise for whole sites, which the run must have."""
    if run.privacy.mode != "site":
        raise ValueError(f"privacy.mode = '{run.privacy.mode}' has no noise for whole sites")
    return run.privacy


def event_per_round(privacy: SitePrivacy) -> DpEvent:
    """What a round costs a site at most: under noise at the sites, with as many shares as the quorum guarantees."""
    return DpEvent(privacy.sampling_prob, privacy.noise_multiplier, 1)


def spent(run: config.RunConfig, num_updates: Sequence[int | None]) -> float:
    """Epsilon of the rounds that were released.

    Under noise at the sites the noise of a round is that of the updates that came. A site whose update is among them
    is protected by all these shares, its own included.

    Args:
        num_updates: Updates in each round; None where that is not known any more: the quorum's minimum.

    Raises:
        AccountingUnsupported: Above what is worth a name.
    """
    privacy, least = _privacy(run), run.federation.min_sites
    if privacy.noise_at == "server":
        events = [event_per_round(privacy)] * len(num_updates)
    else:
        shares = (max(number or least, least) / least for number in num_updates)
        events = [DpEvent(1.0, privacy.noise_multiplier * math.sqrt(share), 1) for share in shares]
    return accounting.compose(events, dp_delta=privacy.dp_delta)


def spent_for_insider(run: config.RunConfig, num_taken: int) -> float | None:
    """Epsilon against an insider (see `WORDING`) for a site of which so many updates were taken.

    Sampling saves nothing where it is known who was drawn.

    Args:
        num_taken: Updates of the site that was drawn most often, those of rounds that were broken off included.

    Returns:
        None where epsilon is above 1000, which protects nobody.
    """
    if not num_taken:
        return 0.0
    privacy = _privacy(run)
    by_itself = 1.0 if privacy.noise_at == "server" else math.sqrt(run.federation.min_sites)
    event = DpEvent(1.0, privacy.noise_multiplier / by_itself, num_taken)
    try:
        return accounting.compose([event], dp_delta=privacy.dp_delta)
    except AccountingUnsupported:
        return None


def spent_by(run: config.RunConfig, num_updates: Sequence[int | None], *, num_taken: int) -> dict[str, float | None]:
    """What the rounds cost a site: `epsilon` and `epsilon_insider`; see `spent` and `spent_for_insider`."""
    return {"epsilon": spent(run, num_updates), "epsilon_insider": spent_for_insider(run, num_taken)}


def check_resume(*, num_released: int, num_rounds: int) -> None:
    """A round that was released is never played again: other noise on the same updates would be another release.

    Args:
        num_released: Rounds that were released, as the run's events say.
        num_rounds: Rounds whose checkpoints are there.

    Raises:
        PrivacyError: A later round was released and its checkpoint is gone.
    """
    if num_released > num_rounds:
        raise PrivacyError(
            f"round {num_released} was released, and the newest whole checkpoint is of round {num_rounds}; playing it "
            "again would release the same sites under other noise, which is not accounted; put the checkpoint "
            "back, or start another run"
        )


def num_expected(run: config.RunConfig) -> float:
    """Sites of a round on average, by the run file alone; the noised sum is divided by it."""
    return _privacy(run).sampling_prob * run.federation.num_sites


def noise_ratio(run: config.RunConfig, num_parameters: int) -> float:
    """L2 norm of the noise on a round's mean update over the largest norm that the mean can have without it."""
    return accounting.client_level_noise_ratio(
        num_sites=num_expected(run),
        noise_multiplier=_privacy(run).noise_multiplier,
        num_parameters=num_parameters,
    )


def require_signal(run: config.RunConfig, num_parameters: int, *, is_accepted: bool) -> None:
    """Refuse a run whose noise drowns what so few sites have to say.

    Raises:
        FloorRefused: The ratio is above 10, and nobody accepted it.
    """
    ratio = noise_ratio(run, num_parameters)
    if ratio > MAX_NOISE_RATIO and not is_accepted:
        raise FloorRefused(
            f"noise to signal is {ratio:,.0f}: with {num_expected(run):g} sites a round and {num_parameters:,} values "
            f"the noise on the mean update is {ratio:,.0f} times as long as the longest mean that privacy.clip_norm "
            f"allows; above {MAX_NOISE_RATIO:g} a run learns next to nothing. Take privacy.mode = 'unit', more sites, "
            "a smaller adapter or a larger epsilon; --i-accept runs it all the same"
        )
