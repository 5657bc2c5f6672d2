"""Privacy units: which rows belong together, and which are drawn for a step."""

from collections.abc import Sequence

from common.loss.objectives import Example
from common.privacy.noise import Noise

Unit = Sequence[Example]


def group(rows: Sequence[Example]) -> list[list[Example]]:
    """The rows of each unit, units in the order of their first rows; a pair of answers counts as one row."""
    found: dict[str, list[Example]] = {}
    for row in rows:
        found.setdefault(row.unit, []).append(row)
    return list(found.values())


def poisson(units: Sequence[Unit], *, sampling_prob: float, max_rows: int, noise: Noise) -> list[Unit]:
    """Draw each unit on its own with the same probability, and of each at most `max_rows` rows.

    The draw must be secret: the amplification by sampling that the accountant counts holds against those only who do
    not know it.

    Args:
        units: All of the site's.
        sampling_prob: q, in (0, 1].
        max_rows: Most rows of a unit; which ones is drawn anew each time.
        noise: Where the draws come from.

    Returns:
        The drawn units; may be empty.

    Source: Poisson sampling as in Abadi et al. 2016, arXiv:1607.00133, section 3, over units.
    """
    is_drawn = noise.uniform(len(units)) < sampling_prob
    return [_some(unit, max_rows, noise) for unit, taken in zip(units, is_drawn, strict=True) if taken]


def _some(unit: Unit, max_rows: int, noise: Noise) -> Unit:
    """At most `max_rows` rows of a unit, each subset as likely as any other."""
    if len(unit) <= max_rows:
        return unit
    return [unit[index] for index in noise.uniform(len(unit)).argsort()[:max_rows]]
