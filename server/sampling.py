"""Which sites train in a round."""

import random
from collections.abc import Sequence


def choose(node_ids: Sequence[int], *, num_sites: int, seed: int, round_index: int) -> list[int]:
    """A uniform sample without replacement, a function of run seed and round; all sites if `num_sites` is 0.

    Example:
        >>> choose([7, 8, 9], num_sites=0, seed=1, round_index=0)
        [7, 8, 9]
    """
    if not num_sites or num_sites >= len(node_ids):
        return sorted(node_ids)
    draw = random.Random(f"{seed}/{round_index}")  # noqa: S311  reproducible, not secret
    return sorted(draw.sample(sorted(node_ids), num_sites))
