"""Texts that are nearly the same: exact Jaccard similarity of word runs, without comparing every two texts.

N texts, M runs of all of them together. Runs are numbered from the rarest to the commonest, so that the first ones of a
text are its rarest.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

NUM_WORDS: Final = 3  # of a run; Broder 1997, doi.org/10.1109/SEQUEN.1997.666900
MIN_SIMILARITY: Final = 0.8
# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no blanks between words: each character counts.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_MIX: Final = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # any odd ones

Ints = NDArray[np.int64]
Text = str | Sequence[str]  # a text, or its words


def words(text: str) -> list[str]:
    """Words of a text; case, punctuation, blanks, invisible characters and Unicode's ways to write a letter aside.

    A text of signs alone, such as emoji, has its parts between blanks as words.

    Example:
        >>> words("Blood  pressure: 120/80")
        ['blood', 'pressure', '120', '80']
    """
    plain = text if text.isascii() else _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.findall(plain.casefold()) or plain.split()


def find(
    texts: Sequence[Text],
    among: Sequence[Text],
    *,
    min_similarity: float = MIN_SIMILARITY,
    max_holders: int | None = None,
) -> list[int]:
    """Which of `texts` are nearly the same as one of `among`; see `matches`.

    Returns:
        Places in `texts`, ascending.
    """
    found = matches(texts, among, min_similarity=min_similarity, max_holders=max_holders)
    return sorted({place for place, _ in found})


def matches(
    texts: Sequence[Text],
    among: Sequence[Text],
    *,
    min_similarity: float = MIN_SIMILARITY,
    max_holders: int | None = None,
) -> list[tuple[int, int]]:
    """Which of `texts` are nearly the same as which of `among`.

    Two sets that are this similar share one of the rarest runs of either, so only those are looked up; nothing is
    missed and nothing is drawn at random.

    Args:
        min_similarity: Least Jaccard similarity of word runs that counts; over 0, at most 1.
        max_holders: Runs that more texts have, of both, count for nothing, and a text of such runs alone is like no
            other; None: all count.

    Returns:
        Places in `texts` and in `among`.

    Source: Bayardo, Ma and Srikant 2007, doi.org/10.1145/1242572.1242591, prefix filtering.
    """
    sets = _sets([*texts, *among], max_holders=max_holders)
    index = _Index.of(sets, range(len(texts), len(sets)), min_similarity)
    found = index.similar(range(len(texts)))
    return [(place, int(other) - len(texts)) for place, near in found for other in near]


def groups(
    texts: Sequence[Text], *, min_similarity: float = MIN_SIMILARITY, max_holders: int | None = None
) -> list[int]:
    """Put texts that are nearly the same into one group, and whatever is nearly the same as one of those.

    Returns:
        The first text of the group that each text is in.
    """
    sets = _sets(texts, max_holders=max_holders)
    index = _Index.of(sets, range(len(sets)), min_similarity)
    return merged(len(sets), ((place, int(other)) for place, near in index.similar(range(len(sets))) for other in near))


def merged(size: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Groups of places that pairs tie together, directly or through others.

    Returns:
        The first place of the group that each place is in.

    Example:
        >>> merged(5, [(3, 1), (3, 4)])
        [0, 1, 2, 1, 1]
    """
    parent = list(range(size))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(place) for place in range(size)]


@dataclass(frozen=True)
class _Sets:
    """The runs of each text, ascending, one after the other. Shape: runs_m (M,), start_n (N + 1,)."""

    runs_m: Ints
    start_n: Ints
    num_runs: int

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.start_n) - 1

    @property
    def size_n(self) -> Ints:
        """Number of runs of each text."""
        return np.diff(self.start_n)

    def of(self, places: Ints) -> Ints:
        """The runs of several texts, one after the other."""
        return self.runs_m[_ranges(self.start_n[places], self.size_n[places])]


@dataclass(frozen=True)
class _Index:
    """Which texts have a run among their rarest ones: `holder_p` sorted by run, those of a run from `first_r` on."""

    sets: _Sets
    min_similarity: float
    first_r: Ints
    holder_p: Ints

    @classmethod
    def of(cls, sets: _Sets, places: Sequence[int], min_similarity: float) -> "_Index":
        """An index over some of the texts."""
        held = np.array(places, dtype=np.int64)
        counts = _num_rarest(sets.size_n[held], min_similarity)
        runs = sets.runs_m[_ranges(sets.start_n[held], counts)]
        order = np.argsort(runs, kind="stable")
        first = np.searchsorted(runs[order], np.arange(sets.num_runs + 1))
        return cls(sets, min_similarity, first.astype(np.int64), np.repeat(held, counts)[order])

    def similar(self, places: Sequence[int]) -> Iterator[tuple[int, Ints]]:
        """Of each text that has some, the texts in the index that are nearly the same; itself is none of them."""
        has_run = np.zeros(self.sets.num_runs, dtype=bool)
        sizes = self.sets.size_n
        for place, count in zip(
            places, _num_rarest(sizes[np.array(places, dtype=np.int64)], self.min_similarity), strict=True
        ):
            start, size = self.sets.start_n[place], int(sizes[place])
            rarest = self.sets.runs_m[start : start + count]
            first, last = self.first_r[rarest], self.first_r[rarest + 1]
            found = np.unique(self.holder_p[_ranges(first, last - first)])
            found = found[
                (found != place) & (np.minimum(sizes[found], size) >= self._least(np.maximum(sizes[found], size)))
            ]
            if not len(found):
                continue
            own = self.sets.runs_m[start : start + size]
            has_run[own] = True
            ends = np.cumsum(sizes[found])
            shared = np.add.reduceat(has_run[self.sets.of(found)].astype(np.int64), ends - sizes[found])
            has_run[own] = False
            if len(near := found[shared >= self._least(sizes[found] + size - shared)]):
                yield place, near

    def _least(self, sizes: Ints) -> Ints:
        """How many runs of so many have to be shared; what rounding adds is taken off."""
        least: Ints = np.ceil(self.min_similarity * sizes - 1e-9).astype(np.int64)
        return least


def _num_rarest(size_n: Ints, min_similarity: float) -> Ints:
    """So many of the rarest runs that a set as similar as this must have one of them; none of an empty set."""
    needed = np.ceil(min_similarity * size_n - 1e-9).astype(np.int64)
    return np.where(size_n > 0, size_n - needed + 1, 0)


def _ranges(start_n: Ints, count_n: Ints) -> Ints:
    """`range(start, start + count)` of all, one after the other."""
    ends = np.cumsum(count_n)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(start_n - ends + count_n, count_n)


def _sets(texts: Sequence[Text], *, max_holders: int | None) -> _Sets:
    """Texts as sets of numbered runs; two runs get one number with probability below 1e-6 in ten million of them."""
    numbers: dict[str, int] = {}
    split = (words(text) if isinstance(text, str) else text for text in texts)
    found = [_hashes([numbers.setdefault(word, len(numbers)) + 1 for word in text]) for text in split]
    sizes = np.array([len(runs) for runs in found], dtype=np.int64)
    _, number_m, count_r = np.unique(
        np.concatenate(found) if found else np.zeros(0, np.uint64), return_inverse=True, return_counts=True
    )
    place_m = np.repeat(np.arange(len(texts)), sizes)
    if max_holders is not None:
        is_kept = count_r[number_m] <= max_holders
        number_m, place_m = number_m[is_kept], place_m[is_kept]
    rank_r = np.empty(len(count_r), dtype=np.int64)
    rank_r[np.argsort(count_r, kind="stable")] = np.arange(len(count_r))
    runs_m = rank_r[number_m]
    order = np.lexsort((runs_m, place_m))
    start_n = np.searchsorted(place_m, np.arange(len(texts) + 1)).astype(np.int64)
    return _Sets(runs_m[order], start_n, len(count_r))


def _hashes(numbers: list[int]) -> NDArray[np.uint64]:
    """The runs of one text; a text of fewer words than a run has is one run."""
    padded = np.array([*numbers, *[0] * (NUM_WORDS - len(numbers))], dtype=np.uint64)
    last = len(padded) - NUM_WORDS + 1
    mixed = np.sort(sum((padded[k : last + k] * _MIX[k] for k in range(1, NUM_WORDS)), padded[:last] * _MIX[0]))
    distinct: NDArray[np.uint64] = mixed[np.concatenate([[True], mixed[1:] != mixed[:-1]])]
    return distinct
