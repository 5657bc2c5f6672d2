"""Which sites train in a round, and which are asked about an adapter."""

import hashlib
import random
from collections.abc import Collection, Sequence

from common.privacy.noise import Noise


def choose(sites: Sequence[str], *, num_sites: int, seed: int, round_index: int) -> list[str]:
    """A uniform sample without replacement, a function of run seed and round; all sites if `num_sites` is 0.

    Example:
        >>> choose(["b", "a"], num_sites=0, seed=1, round_index=0)
        ['a', 'b']
    """
    if not num_sites or num_sites >= len(sites):
        return sorted(sites)
    draw = random.Random(f"{seed}/{round_index}")  # noqa: S311  reproducible, not secret
    return sorted(draw.sample(sorted(sites), num_sites))


def poisson(sites: Sequence[str], *, sampling_prob: float, source: Noise) -> list[str]:
    """Each site with the same probability and for itself, perhaps none; secret where `source` is.

    Args:
        sites: Names of those that are there.
        sampling_prob: Probability of each.
        source: Of the draws; a run's seed would tell them to every site.
    """
    ordered = sorted(sites)
    return [site for site, draw in zip(ordered, source.uniform(len(ordered)), strict=True) if draw < sampling_prob]


def panel(sites: Collection[str], *, num_sites: int, seed: int) -> list[str]:
    """A uniform sample that stays the same from evaluation to evaluation, so that figures can be held side by side.

    Each site's place in the order is its own, a function of seed and name: one that goes is followed by the next, and
    one that comes moves nobody but the last.

    Args:
        sites: Names of those to choose from.
        num_sites: How many; 0 is all.
        seed: The run's.

    Example:
        >>> panel(["a", "b", "c"], num_sites=2, seed=1), panel(["b", "c"], num_sites=2, seed=1)
        (['a', 'c'], ['b', 'c'])
    """
    if not num_sites or num_sites >= len(sites):
        return sorted(sites)
    order = {site: hashlib.sha256(f"{seed}/evaluated/{site}".encode()).digest() for site in sites}
    return sorted(sorted(sites, key=order.__getitem__)[:num_sites])
