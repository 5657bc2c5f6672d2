"""How far raters agree beyond chance."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from common.errors import DataError
from server.evaluate.figures import intervals
from server.evaluate.figures.intervals import Estimate
from server.preferences import answers
from server.preferences.answers import Answers


def kappa(judged: Sequence[tuple[str, str]]) -> Estimate | None:
    """Cohen's kappa of two raters, with its large-sample 95 % interval.

    Args:
        judged: What the one and the other answered, for each task that both judged.

    Returns:
        Kappa and its interval, cut to -1 and 1; None where both gave one and the same answer throughout, or there is
        no task: chance then explains everything, and kappa has no value.

    Source: Cohen 1960, doi.org/10.1177/001316446002000104; Fleiss, Cohen and Everitt 1969, doi.org/10.1037/h0028106,
        equation 13, for the standard error.
    """
    if len({answer for both in judged for answer in both}) <= 1:
        return None
    total = len(judged)
    shares = {cell: count / total for cell, count in Counter(judged).items()}
    ours = _margin([one for one, _ in judged])
    theirs = _margin([other for _, other in judged])
    observed = math.fsum(share for (one, other), share in shares.items() if one == other)
    chance = math.fsum(share * theirs.get(name, 0.0) for name, share in ours.items())
    value = (observed - chance) / (1 - chance)
    same = math.fsum(
        share * (1 - (ours[one] + theirs[other]) * (1 - value)) ** 2
        for (one, other), share in shares.items()
        if one == other
    )
    different = math.fsum(
        share * (theirs.get(one, 0.0) + ours.get(other, 0.0)) ** 2
        for (one, other), share in shares.items()
        if one != other
    )
    spread = same + (1 - value) ** 2 * different - (value - chance * (1 - value)) ** 2
    error = math.sqrt(max(0.0, spread) / total) / (1 - chance) * intervals.Z_95
    return Estimate(value, max(-1.0, value - error), min(1.0, value + error))


def compare(found: Sequence[Answers]) -> list[dict[str, Any]]:
    """Agreement of every two raters, on the tasks that both judged; skipped ones do not count.

    Agreement is on sides, which were shuffled: two raters who look at nothing agree by chance alone.

    Args:
        found: Answers of two or more raters to the same tasks.

    Returns:
        For every two: their names, the number of tasks, the share of equal answers and kappa with its interval.

    Raises:
        DataError: Fewer than two files, of different tasks, of one rater, or two raters without a common task.
    """
    if len(found) < 2:
        raise DataError("agreement needs two raters; name two or more files of answers")
    answers.of_same_tasks(found)
    return [_compare(one, other) for one, other in combinations(found, 2)]


def _compare(one: Answers, other: Answers) -> dict[str, Any]:
    """Agreement of two raters."""
    both = [
        (choice, other.choices[number])
        for number, choice in sorted(one.choices.items())
        if "skip" not in (choice, other.choices.get(number, "skip"))
    ]
    if not both:
        raise DataError(f"{one.rater} and {other.rater} judged no task both; let them rank the same tasks")
    equal = intervals.share(sum(a == b for a, b in both), len(both))
    beyond = kappa(both)
    return {
        "raters": [one.rater, other.rater],
        "num_tasks": len(both),
        "agreement": vars(equal),
        "kappa": vars(beyond) if beyond else None,
    }


def told(pair: dict[str, Any]) -> str:
    """One line for people."""
    share, beyond = pair["agreement"], pair["kappa"]
    kappa_told = (
        f"kappa {beyond['value']:.2f} ({beyond['low']:.2f} to {beyond['high']:.2f})"
        if beyond
        else "kappa has no value: both gave one answer throughout"
    )
    names = " and ".join(pair["raters"])
    return f"{names}: {share['value']:.0%} of {pair['num_tasks']} tasks answered alike, {kappa_told}"


def _margin(given: Sequence[str]) -> dict[str, float]:
    """Share of each answer."""
    return {name: count / len(given) for name, count in Counter(given).items()}
