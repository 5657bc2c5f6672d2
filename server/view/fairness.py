"""How evenly the sites fare: the mean hides whoever is worse off."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from common.frame.records import SiteMetrics
from common.run.schema import precisions
from common.run.schema.model import ModelConfig
from common.scores import Fairness, PrecisionLoss, Scores, Spread

MIN_SITES: Final = 3


def spread(figures: Mapping[str, float | None], *, higher_is_better: bool) -> Spread | None:
    """Worst, best, mean and spread over the sites that have the figure; None if none has.

    Example:
        >>> spread({"north": 1.0, "south": 3.0}, higher_is_better=False).worst_site
        'south'
    """
    known = {site: value for site, value in sorted(figures.items()) if value is not None}
    if not known:
        return None
    mean = math.fsum(known.values()) / len(known)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known.values()) / len(known))
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    best, worst = (high, low) if higher_is_better else (low, high)
    return Spread(mean, std, known[worst], worst, known[best], best, abs(known[best] - known[worst]))


def of_sites(losses: Mapping[str, float], exact: Mapping[str, float | None]) -> Fairness:
    """The spread of the held-out loss, and of exact match where answers were generated."""
    return Fairness(loss=spread(losses, higher_is_better=False), exact_match=spread(exact, higher_is_better=True))


def trimmed(losses: Mapping[str, float]) -> float | None:
    """Mean over sites, each counting the same, without the fifth that fares best and the fifth that fares worst.

    At least one site at each end is left out, so that one false figure moves it no further than to the next site's.
    What is decided by the held-out loss (early end, the best round, the gate) holds by this figure.

    Returns:
        The mean; None for fewer than three sites, of which none could be left out.

    Example:
        >>> trimmed({"north": 1.0, "south": 1.5, "west": 1e-14})
        1.0
    """
    if len(losses) < MIN_SITES:
        return None
    num_cut = max(1, len(losses) // 5)
    kept = sorted(losses.values())[num_cut : len(losses) - num_cut]
    return math.fsum(kept) / len(kept)


def outliers(losses: Mapping[str, float]) -> list[str]:
    """Sites whose loss is far from the others': modified z-score above 3.5; none among fewer than three.

    Source: Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers, section 3.3, with its fall-back to the mean
    absolute deviation where the median one is zero.

    Example:
        >>> outliers({"north": 1.0, "south": 1.1, "east": 0.9, "west": 1e-14})
        ['west']
    """
    if len(losses) < MIN_SITES:
        return []
    centre = statistics.median(losses.values())
    far = {site: abs(loss - centre) for site, loss in losses.items()}
    scale = 1.4826 * statistics.median(far.values()) or 1.2533 * statistics.fmean(far.values())
    return sorted(site for site, distance in far.items() if distance > 3.5 * scale > 0)


def decisive(scores: Scores) -> float:
    """The held-out loss by which is decided: trimmed, or the mean where fewer than three sites answered, nats."""
    return scores.loss if scores.trimmed_loss is None else scores.trimmed_loss


def of_precisions(settings: ModelConfig, metrics: Sequence[SiteMetrics]) -> dict[str, PrecisionLoss] | None:
    """Held-out loss over the sites of each precision; None where all sites have one.

    Each is over its own sites' rows: the difference between two of them is also that of their rows.
    """
    if not settings.site_quantization:
        return None
    found: dict[str, list[SiteMetrics]] = {}
    for each in metrics:
        found.setdefault(precisions.of_site(settings, each.site), []).append(each)
    return {
        name: PrecisionLoss(
            loss=sum(m.loss_sum for m in alike) / sum(m.num_terms for m in alike), sites=[m.site for m in alike]
        )
        for name, alike in sorted(found.items())
    }
