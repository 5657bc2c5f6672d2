"""Texts that are nearly the same: exact Jaccard similarity of word runs, without comparing every two texts."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

NUM_WORDS: Final = 3
MIN_SIMILARITY: Final = 0.8
_WORD: Final = re.compile(r"\w+")


def shingles(text: str) -> frozenset[str]:
    """All runs of three words, case and punctuation aside; a shorter text is one run.

    Source: Broder 1997, doi.org/10.1109/SEQUEN.1997.666900.
    """
    words = _WORD.findall(text.casefold())
    last = max(0, len(words) - NUM_WORDS)
    return frozenset(" ".join(words[start : start + NUM_WORDS]) for start in range(last + 1))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity: of all runs, the share that both have."""
    return len(one & other) / len(one | other)


def find(texts: Sequence[str], among: Sequence[str], *, min_similarity: float = MIN_SIMILARITY) -> list[int]:
    """Which of `texts` are nearly the same as one of `among`.

    Two sets that are this similar share one of the rarest runs of either, so only those are looked up; nothing is
    missed and nothing is drawn at random.

    Args:
        texts: To look at.
        among: To compare with.
        min_similarity: Least Jaccard similarity of word runs that counts; over 0, at most 1.

    Returns:
        Places in `texts`, ascending.

    Source: Bayardo, Ma and Srikant 2007, doi.org/10.1145/1242572.1242591, prefix filtering.
    """
    ours, theirs = list(map(shingles, texts)), list(map(shingles, among))
    counts = Counter(run for runs in (*ours, *theirs) for run in runs)
    holders: dict[str, list[frozenset[str]]] = defaultdict(list)
    for runs in theirs:
        for run in _rarest(runs, counts, min_similarity):
            holders[run].append(runs)
    return [
        place
        for place, runs in enumerate(ours)
        if any(
            similarity(runs, other) >= min_similarity
            for run in _rarest(runs, counts, min_similarity)
            for other in holders[run]
        )
    ]


def _rarest(runs: frozenset[str], counts: Counter[str], min_similarity: float) -> list[str]:
    """So many of the rarest runs that a set as similar as this must have one of them."""
    num_kept = len(runs) - math.ceil(min_similarity * len(runs) - 1e-9) + 1
    return sorted(runs, key=lambda run: (counts[run], run))[:num_kept]
