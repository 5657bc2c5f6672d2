"""What an answer is worth beside its reference; pure functions of two texts, 0 to 1."""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_NOT_WORD: Final = re.compile(r"[^a-z0-9]+")
_NUMBER: Final = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def exact_match(given: str, wanted: str) -> float:
    """Whether the texts are equal, white space at the ends aside; as the sites count it.

    Example:
        >>> exact_match(" A41.9\\n", "A41.9"), exact_match("a41.9", "A41.9")
        (1.0, 0.0)
    """
    return float(given.strip() == wanted.strip())


def token_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words: lower case, without punctuation and English articles.

    Source: Rajpurkar et al. 2018, arXiv:1806.03822, the evaluation script of SQuAD 2.0.

    Example:
        >>> round(token_f1("The heart, and lungs", "a heart"), 4)
        0.5
    """
    found, reference = _squad_words(given), _squad_words(wanted)
    if not found or not reference:
        return float(found == reference)
    return _f1(_overlap(found, reference), len(found), len(reference))


def rouge1(given: str, wanted: str) -> float:
    """F-measure over words; see `rouge_n`."""
    return rouge_n(given, wanted, size=1)


def rouge2(given: str, wanted: str) -> float:
    """F-measure over pairs of neighbouring words; see `rouge_n`."""
    return rouge_n(given, wanted, size=2)


def rouge_n(given: str, wanted: str, *, size: int) -> float:
    """F-measure over runs of `size` words, each counted as often as both texts have it; no stemming.

    Words are runs of a-z and 0-9, so text in other scripts scores 0.

    Source: Lin 2004, aclanthology.org/W04-1013; words as in Google's package rouge-score 0.1.2.
    """
    found, reference = (_runs(_rouge_words(text), size) for text in (given, wanted))
    return _f1(_overlap(found, reference), len(found), len(reference))


def rouge_l(given: str, wanted: str) -> float:
    """F-measure over the longest common subsequence of words of the whole texts; no stemming.

    Source: as `rouge_n`.

    Example:
        >>> rouge_l("police kill the gunman", "police killed the gunman")
        0.75
    """
    found, reference = _rouge_words(given), _rouge_words(wanted)
    return _f1(_common_length(found, reference), len(found), len(reference))


def number(given: str, wanted: str) -> float:
    """Whether the last number in the answer is the reference's, by value; a reference without one is never met.

    What follows `####` goes before what stands elsewhere; thousands may have commas, a dollar sign may lead.

    Source: Cobbe et al. 2021, arXiv:2110.14168, GSM8K's form of answers.

    Example:
        >>> number("so 3 + 4 makes $1,007.0.", "work #### 1007"), number("3 or 4", "#### 3")
        (1.0, 0.0)
    """
    reference = final_number(wanted)
    return float(reference is not None and final_number(given) == reference)


def final_number(text: str) -> Decimal | None:
    """The last number of a text, or of what follows its last `####`; None without any."""
    found = _NUMBER.findall(text.rpartition("####")[2])
    try:
        return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None
    except InvalidOperation:
        return None


PER_ROW: Final[Mapping[str, Callable[[str, str], float]]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": rouge1,
    "rouge2": rouge2,
    "rougeL": rouge_l,
    "number": number,
}


def _squad_words(text: str) -> list[str]:
    """SQuAD's normal form, as words."""
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _rouge_words(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9."""
    return _NOT_WORD.sub(" ", text.lower()).split()


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` words."""
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _overlap(found: Sequence[object], reference: Sequence[object]) -> int:
    """Items that both have, counted as often as both have them."""
    return sum((collections.Counter(found) & collections.Counter(reference)).values())


def _f1(num_common: int, num_found: int, num_reference: int) -> float:
    """Harmonic mean of precision and recall; 0 where there is nothing in common."""
    return 2 * num_common / (num_found + num_reference) if num_common else 0.0


def _common_length(found: Sequence[str], reference: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(reference) + 1)
    for word in found:
        above = row
        row = [0]
        for place, other in enumerate(reference):
            row.append(above[place] + 1 if word == other else max(row[-1], above[place + 1]))
    return row[-1]
