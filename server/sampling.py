"""Which sites train in a round."""

import random
from collections.abc import Sequence


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
