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
    ours = _margin([first for first, _ in judged])
    theirs = _margin([second for _, second in judged])
    observed = math.fsum(share for (first, second), share in shares.items() if first == second)
    chance = math.fsum(share * theirs.get(name, 0.0) for name, share in ours.items())
    value = (observed - chance) / (1 - chance)
    same = math.fsum(
        share * (1 - (ours[first] + theirs[second]) * (1 - value)) ** 2
        for (first, second), share in shares.items()
        if first == second
    )
    different = math.fsum(
        share * (theirs.get(first, 0.0) + ours.get(second, 0.0)) ** 2
        for (first, second), share in shares.items()
        if first != second
    )
    spread = same + (1 - value) ** 2 * different - (value - chance * (1 - value)) ** 2
    error = math.sqrt(max(0.0, spread) / total) / (1 - chance) * intervals.Z_95
    return Estimate(value, max(-1.0, value - error), min(1.0, value + error))


def compare(answered: Sequence[Answers]) -> list[dict[str, Any]]:
    """Agreement of every two raters, on the tasks that both judged; skipped ones do not count.

    Agreement is on sides, which were shuffled: two raters who look at nothing agree by chance alone.

    Args:
        answered: By two or more raters, to the same tasks.

    Returns:
        For every two: their names, the number of tasks, the share of equal answers and kappa with its interval.

    Raises:
        DataError: Fewer than two files, of different tasks, of one rater, or two raters without a common task.
    """
    if len(answered) < 2:
        raise DataError("agreement needs two raters; name two or more files of answers")
    answers.of_same_tasks(answered)
    compared = []
    for first, second in combinations(answered, 2):
        both = [
            (choice, second.choices[number])
            for number, choice in sorted(first.choices.items())
            if "skip" not in (choice, second.choices.get(number, "skip"))
        ]
        if not both:
            raise DataError(f"{first.rater} and {second.rater} judged no task both; let them rank the same tasks")
        beyond = kappa(both)
        compared.append(
            {
                "raters": [first.rater, second.rater],
                "num_tasks": len(both),
                "agreement": vars(intervals.share(sum(a == b for a, b in both), len(both))),
                "kappa": vars(beyond) if beyond else None,
            }
        )
    return compared


def in_words(pair: dict[str, Any]) -> str:
    """One line for people."""
    share, beyond = pair["agreement"], pair["kappa"]
    kappa_in_words = (
        f"kappa {beyond['value']:.2f} ({beyond['low']:.2f} to {beyond['high']:.2f})"
        if beyond
        else "kappa has no value: both gave one answer throughout"
    )
    names = " and ".join(pair["raters"])
    return f"{names}: {share['value']:.0%} of {pair['num_tasks']} tasks answered alike, {kappa_in_words}"


def _margin(given: Sequence[str]) -> dict[str, float]:
    """Share of each answer."""
    return {name: count / len(given) for name, count in Counter(given).items()}
