"""Rows with the same text: those that belong on one side of a split, and those that are on both.

Two rows have the same text if the whole of them (what is asked, and the answer), or what is asked alone, is the same
word for word, or nearly (`common.data.near`). What many rows have in common, such as one instruction for all, is their
form and says nothing: word runs that stand in more than a twentieth of the rows, and in more than five, do not count.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from common.data import near
from common.data.rows import Row

MAX_SHARE: Final = 20  # a twentieth
MIN_HOLDERS: Final = 5

Words = tuple[str, ...]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Text:
    """What a row says.

    Attributes:
        asked: The turns before the last answer; empty where a text is all there is.
        answer: The last answer, or the text.
    """

    asked: str
    answer: str = ""

    @property
    def whole(self) -> str:
        """Both."""
        return f"{self.asked}\n{self.answer}"


@dataclass(frozen=True)
class OverlapCounts:
    """Held-out rows whose text stands in rows that are trained on.

    Attributes:
        num_held_out: Held-out rows.
        num_exact: Those that stand there word for word, as a whole or what is asked.
        num_near: Further ones that stand there nearly so.
    """

    num_held_out: int
    num_exact: int = 0
    num_near: int = 0

    def as_dict(self) -> dict[str, int]:
        """Give the counts as JSON types."""
        return asdict(self)


def text_of(row: Row) -> Text:
    """What a row says; system messages, which are the same for many, aside."""
    asked = "\n".join(message.content for message in row.messages[:-1] if message.role != "system")
    return Text(asked, row.messages[-1].content if row.messages else "")


def groups(texts: Sequence[Text]) -> list[int]:
    """Put rows with the same text into one group, and whatever has the same text as one of those.

    Returns:
        The first row of the group that each row is in.
    """
    whole_n, asked_n = _words(texts)
    first = _first_places(whole_n, range(len(texts)))
    kept = sorted(first.values())  # each whole text once
    forms = _forms([asked_n[place] for place in kept])
    pairs = [(place, first[words]) for place, words in enumerate(whole_n) if words]
    limit = _max_holders(len(kept))
    for plain in (whole_n, asked_n):
        told = [place for place in kept if plain[place]]
        found = near.groups([plain[place] for place in told], max_holders=limit)
        pairs += [(told[place], told[other]) for place, other in enumerate(found)]
    by_asked: dict[Words, int] = {}
    for place in kept:
        if (asked := asked_n[place]) and asked not in forms:
            pairs.append((place, by_asked.setdefault(asked, place)))
    return near.merged(len(texts), pairs)


@dataclass(frozen=True)
class Matches:
    """Places of texts on two sides that are the same; a place is in one of the two sets of its side at most.

    Attributes:
        exact: On the first side, word for word.
        near: On the first side, nearly.
        other_exact: On the second side, word for word.
        other_near: On the second side, nearly.
    """

    exact: frozenset[int]
    near: frozenset[int]
    other_exact: frozenset[int]
    other_near: frozenset[int]


def find(texts: Sequence[Text], others: Sequence[Text]) -> Matches:
    """Which texts are the same as one of the other side."""
    whole_n, asked_n = _words([*texts, *others])
    kept = sorted(_first_places(whole_n, range(len(whole_n))).values())
    forms, limit, count = _forms([asked_n[place] for place in kept]), _max_holders(len(kept)), len(texts)
    found: list[set[int]] = [set(), set(), set(), set()]
    for plain in (whole_n, asked_n):
        sides = (range(count), range(count, len(plain)))
        places = [_places(plain, side) for side in sides]
        same = {words for words in places[0].keys() & places[1].keys() if plain is whole_n or words not in forms}
        once = [[place for place in _first_places(whole_n, side).values() if plain[place]] for side in sides]
        close = near.matches(*([plain[place] for place in side] for side in once), max_holders=limit)
        for side in (0, 1):
            close_words = {plain[once[side][pair[side]]] for pair in close}
            found[2 * side].update(place for words in same for place in places[side][words])
            found[2 * side + 1].update(place for words in close_words for place in places[side][words])
    exact, close_by = (
        [frozenset(p - start for p in found[k + side]) for side, start in ((0, 0), (2, count))] for k in (0, 1)
    )
    return Matches(exact[0], close_by[0] - exact[0], exact[1], close_by[1] - exact[1])


def choose(bundles: Sequence[Mapping[K, int]], *, wanted: Mapping[K, int], sizes: Mapping[K, int]) -> list[int]:
    """Choose whole bundles to hold out: the first ones that stay within what is wanted of each kind.

    A kind of which nothing fits gets the smallest bundle that leaves something of every kind, if there is one.

    Args:
        bundles: How many of each kind are in each; in the order in which they are tried.
        wanted: How many of each kind to hold out.

    Returns:
        Places of bundles.

    Example:
        >>> choose([{"a": 3}, {"a": 1}, {"a": 1}, {"a": 1}], wanted={"a": 2}, sizes={"a": 6})
        [1, 2]
    """
    taken: Counter[K] = Counter()
    chosen = []
    for place, counts in enumerate(bundles):
        if all(taken[kind] + count <= wanted[kind] for kind, count in counts.items()):
            chosen.append(place)
            taken.update(counts)
    for kind in wanted:
        possible = [
            (sum(counts.values()), place)
            for place, counts in enumerate(bundles)
            if counts.get(kind) and all(taken[other] + count < sizes[other] for other, count in counts.items())
        ]
        if not taken[kind] and possible:
            _, place = min(possible)
            chosen.append(place)
            taken.update(bundles[place])
    return chosen


def between(held_out: Mapping[str, Sequence[Row]], train: Mapping[str, Sequence[Row]]) -> dict[str, OverlapCounts]:
    """Count the held-out rows of each site whose text stands in any site's training rows."""
    texts = [text_of(row) for rows in held_out.values() for row in rows]
    found = find(texts, [text_of(row) for rows in train.values() for row in rows])
    counts, first = {}, 0
    for site, rows in held_out.items():
        places = set(range(first, first + len(rows)))
        counts[site] = OverlapCounts(len(rows), len(places & found.exact), len(places & found.near))
        first += len(rows)
    return counts


def total(counts: Iterable[OverlapCounts]) -> OverlapCounts:
    """All sites' counts together."""
    found = list(counts)
    names = ("num_held_out", "num_exact", "num_near")
    return OverlapCounts(*(sum(getattr(one, name) for one in found) for name in names))


def num_same(found: Mapping[str, Any]) -> int:
    """Held-out rows that are trained on, in counts as `OverlapCounts.as_dict` gives them."""
    return int(found["num_exact"] + found["num_near"])


def sentence(found: Mapping[str, Any]) -> str:
    """Say what an overlap, as `OverlapCounts.as_dict` gives it, means for held-out figures.

    Example:
        >>> sentence({"num_held_out": 9, "num_exact": 2, "num_near": 1})
        '3 of 9 held-out rows stand in rows that are trained on (2 word for word, 1 nearly): figures are too good'
        >>> sentence({"num_held_out": 9, "num_exact": 0, "num_near": 0})
        'none of 9 held-out rows stands in rows that are trained on'
    """
    if not (count := num_same(found)):
        return f"none of {found['num_held_out']} held-out rows stands in rows that are trained on"
    kinds = f"{found['num_exact']} word for word, {found['num_near']} nearly"
    verb = "stands" if count == 1 else "stand"
    return (
        f"{count} of {found['num_held_out']} held-out rows {verb} in rows that are trained on ({kinds}): "
        "figures are too good"
    )


def _words(texts: Sequence[Text]) -> tuple[list[Words], list[Words]]:
    """The words of each whole text and of what is asked."""
    asked = [tuple(near.words(text.asked)) for text in texts]
    return [(*words, *near.words(text.answer)) for words, text in zip(asked, texts, strict=True)], asked


def _first_places(texts: Sequence[Words], among: range) -> dict[Words, int]:
    """Each text of some places, and where it stands first there."""
    return {texts[place]: place for place in reversed(among)}


def _places(texts: Sequence[Words], among: range) -> dict[Words, list[int]]:
    """Where each text stands among some places; those without a word are none."""
    places: dict[Words, list[int]] = {}
    for place in among:
        if texts[place]:
            places.setdefault(texts[place], []).append(place)
    return places


def _max_holders(num_texts: int) -> int:
    """In so many different texts a run of words may stand before it counts as their form."""
    return max(MIN_HOLDERS, num_texts // MAX_SHARE)


def _forms(asked: Sequence[Words]) -> set[Words]:
    """What is asked in so many different rows that it tells none of them from the others."""
    return {words for words, count in Counter(asked).items() if count > _max_holders(len(asked))}
