"""Jaccard similarity of runs of words by sets, to which `common.data.near` is held."""

from common.data import near


def shingles(text: str) -> frozenset[str]:
    """All runs of three words; a shorter text is one run."""
    found = near.words(text)
    last = max(0, len(found) - near.NUM_WORDS)
    return frozenset(" ".join(found[start : start + near.NUM_WORDS]) for start in range(last + 1))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Of all runs, the share that both have."""
    return len(one & other) / len(one | other)
