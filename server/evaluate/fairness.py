"""How evenly the sites fare: the mean hides whoever is worse off."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.events import Event


@dataclass(frozen=True)
class Spread:
    """One figure over sites, each site counting the same.

    Attributes:
        mean: Over sites.
        std: Standard deviation over sites (of all of them, not of a sample).
        worst: The figure of the site that fares worst.
        worst_site: Its name.
        best: The figure of the site that fares best.
        best_site: Its name.
        spread: Distance from worst to best.
    """

    mean: float
    std: float
    worst: float
    worst_site: str
    best: float
    best_site: str
    spread: float


def spread(figures: Mapping[str, float | None], *, higher_is_better: bool) -> dict[str, Any] | None:
    """Worst, best, mean and spread over the sites that have the figure; None if none has.

    Example:
        >>> spread({"north": 1.0, "south": 3.0}, higher_is_better=False)["worst_site"]
        'south'
    """
    known = {site: value for site, value in sorted(figures.items()) if value is not None}
    if not known:
        return None
    mean = math.fsum(known.values()) / len(known)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known.values()) / len(known))
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    best, worst = (high, low) if higher_is_better else (low, high)
    return asdict(Spread(mean, std, known[worst], worst, known[best], best, abs(known[best] - known[worst])))


def of_sites(losses: Mapping[str, float], exact: Mapping[str, float | None]) -> dict[str, Any]:
    """The spread of the held-out loss, and of exact match where answers were generated."""
    return {"loss": spread(losses, higher_is_better=False), "exact_match": spread(exact, higher_is_better=True)}


def base_losses(log: Sequence[Event]) -> dict[str, float]:
    """Each site's loss on its own rows with the base as it is, from the run's events."""
    found: dict[str, float] = {}
    for event in log:
        if event["kind"] == "evaluated" and event["num_rounds"] == 0:
            found.update({site: figures["loss"] for site, figures in event["sites"].items() if site not in found})
    return found


def changes(losses: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """How far each site's loss is from the base's there; above 0 it got worse."""
    return {site: loss - before[site] for site, loss in losses.items() if site in before}
