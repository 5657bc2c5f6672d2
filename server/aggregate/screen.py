"""Update screening: which of a round's updates do not look like the others, or like their site's own of late.

Four signs, each a distance from a median in spreads (1.4826 times the median absolute deviation, Leys et al. 2013,
doi:10.1016/j.jesp.2013.03.013; never less than a floor, so that a cohort that agrees closely flags nobody for little):

    norm       log of the norm of each module's part, against the same module's over the cohort
    direction  cosine to the sum of the others' updates, against the cohort's cosines; lower only
    history    norm beside the cohort's and cosine, against the same site's in the last ten rounds
    copy       cosine of almost 1 to another update: of those alike only one counts

Median and deviation hold while fewer than half of the sites are bad. An attacker who stays within the spread passes,
a backdoor for one (docs/results.md): screening finds what is coarse. S sites of a round.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from common.event_kinds import Screened
from server.aggregate.method import State

HISTORY: Final = 10  # rounds
MIN_HISTORY: Final = 3  # rounds of a site before its own past says anything
COPY: Final = 0.9999
NORM_FLOOR: Final = 0.35  # of a log norm: four of them are a factor of 4
COSINE_FLOOR: Final = 0.05
_TINY: Final = 1e-30


@dataclass(frozen=True)
class Look:
    """What one update looks like beside the round's others.

    Attributes:
        norm: Median over its modules of log norm less the cohort's median.
        cosine: To the sum of the others' updates.
        reasons: Why it is flagged; empty if it is not.
        is_copy: Another one like it is there, whose site comes first by name.
    """

    norm: float
    cosine: float
    reasons: tuple[str, ...]
    is_copy: bool = False


def look(updates: Mapping[str, State], past: Mapping[str, Sequence[Look]], *, threshold: float) -> dict[str, Look]:
    """Judge a round's updates.

    Args:
        updates: By site; all hold the same tensors.
        past: What the same sites' updates looked like in earlier rounds, newest last.
        threshold: Spreads from the median that are too far.
    """
    offsets = _norm_offsets(updates)
    gram = _gram(list(updates.values()))
    cosines = dict(zip(updates, _to_others(gram), strict=True))
    spread = _spread(cosines.values(), floor=COSINE_FLOOR)
    usual = median(cosines.values())
    copies = dict(_copies(list(updates), gram))
    found = {}
    for site in updates:
        norm = median(offsets[site].values())
        reasons = [
            *_of_norms(offsets, site, threshold),
            *_of_history(norm, cosines[site], past.get(site, ()), threshold),
        ]
        if (usual - cosines[site]) / spread > threshold:
            reasons.append(f"direction: cosine {cosines[site]:.2f} to the others, whose median is {usual:.2f}")
        if site in copies:
            reasons.append(f"copy: the same as {copies[site]}'s")
        found[site] = Look(norm, cosines[site], tuple(reasons), is_copy=copies.get(site, site) < site)
    return found


def left_out(found: Mapping[str, Look]) -> set[str]:
    """Sites whose updates are not to count: all that are flagged, but of copies the first one's own is judged alone."""
    return {site for site, seen in found.items() if seen.is_copy or any(not r.startswith("copy") for r in seen.reasons)}


def history(rounds: Mapping[int, Screened], *, round_index: int) -> dict[str, list[Look]]:
    """What each site's updates looked like in the last rounds before one."""
    newest = [rounds[number].sites for number in sorted(rounds) if round_index - HISTORY <= number < round_index]
    past: dict[str, list[Look]] = {}
    for site, seen in itertools.chain.from_iterable(sites.items() for sites in newest):
        past.setdefault(site, []).append(Look(seen.norm, seen.cosine, tuple(seen.reasons)))
    return past


def _norm_offsets(updates: Mapping[str, State]) -> dict[str, dict[str, float]]:
    """By site and module: log norm less its median over the sites."""
    logs = {site: _log_norms(update) for site, update in updates.items()}
    usual = {module: median(norms[module] for norms in logs.values()) for module in next(iter(logs.values()))}
    return {site: {module: norm - usual[module] for module, norm in norms.items()} for site, norms in logs.items()}


def _log_norms(update: State) -> dict[str, float]:
    """By module: both factors of a pair count as one."""
    squares: dict[str, float] = {}
    for name, tensor in update.items():
        module = name.rpartition(".lora_")[0] or name
        squares[module] = squares.get(module, 0.0) + float(tensor.double().square().sum())
    return {module: math.log(max(square, _TINY)) / 2 for module, square in squares.items()}


def _of_norms(offsets: Mapping[str, Mapping[str, float]], site: str, threshold: float) -> list[str]:
    """One reason for all modules whose norm is too far off."""
    far = {}
    for module, offset in offsets[site].items():
        spread = _spread((other[module] for other in offsets.values()), floor=NORM_FLOOR)
        if abs(offset) / spread > threshold:
            far[module] = offset
    if not far:
        return []
    worst = max(far.values(), key=abs)
    factor = math.exp(max(-99.0, min(worst, 99.0)))
    return [f"norm: off in {len(far)} of {len(offsets[site])} modules, at worst {factor:.2g} times the cohort's median"]


def _of_history(norm: float, cosine: float, past: Sequence[Look], threshold: float) -> list[str]:
    """Reasons why an update is not like its site's earlier ones; those that were flagged are no example."""
    usual = [seen for seen in past if not seen.reasons][-HISTORY:]
    if len(usual) < MIN_HISTORY:
        return []
    norms, cosines = [seen.norm for seen in usual], [seen.cosine for seen in usual]
    reasons = []
    if abs(norm - median(norms)) / _spread(norms, floor=NORM_FLOOR) > threshold:
        reasons.append(f"history: norm unlike the site's own in {len(usual)} earlier rounds")
    if (median(cosines) - cosine) / _spread(cosines, floor=COSINE_FLOOR) > threshold:
        reasons.append(f"history: direction unlike the site's own in {len(usual)} earlier rounds")
    return reasons


def _spread(values: Iterable[float], *, floor: float) -> float:
    """Median absolute deviation as a standard deviation of a normal distribution, at least the floor."""
    found = list(values)
    middle = median(found)
    return max(1.4826 * median(abs(value - middle) for value in found), floor)


def _gram(updates: Sequence[State]) -> torch.Tensor:
    """Inner products of all pairs of updates, (S, S), float64."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0]:
        rows = torch.stack([update[name].flatten() for update in updates]).double()
        total += rows @ rows.T
    return total


def _to_others(gram: torch.Tensor) -> list[float]:
    """Each update's cosine to the sum of all others; 0 where one of them is zero."""
    own = gram.diagonal()
    inner = gram.sum(dim=1) - own
    others = gram.sum() - 2 * gram.sum(dim=1) + own
    lengths = (own.clamp_min(0) * others.clamp_min(0)).sqrt()
    return [float(value) for value in torch.where(lengths > 0, inner / lengths.clamp_min(_TINY), 0.0)]


def _copies(sites: Sequence[str], gram: torch.Tensor) -> Iterable[tuple[str, str]]:
    """Sites with an update like another's, and the first of those others by name."""
    lengths = gram.diagonal().sqrt()
    cosines = gram / (lengths[:, None] * lengths).clamp_min(_TINY)
    for place, site in enumerate(sites):
        alike = [other for at, other in enumerate(sites) if at != place and float(cosines[place, at]) > COPY]
        if alike:
            yield site, min(alike)
