"""Which sites train in a round."""

import random
from collections.abc import Sequence

from common.noise import Noise


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
