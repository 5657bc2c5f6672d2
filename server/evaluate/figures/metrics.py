"""What an answer is worth beside its reference; pure functions of two texts, 0 to 1."""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final

import regex

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_UNSPACED: Final = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD: Final = regex.compile(rf"[{_UNSPACED}]\p{{M}}*+|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}]\p{{M}}*+)++")
_GAPS: Final = "\u00a0\u2009\u202f'\u2019"  # between thousands; an ordinary blank stands between two numbers too
_NUMBER: Final = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-\u2212\u2013\uff0d])?\$?(?:"
    r"(?P<english>[1-9]\d{0,2}(?:,\d{2}){0,8}(?:,\d{3}){1,12}(?:\.\d+)?)(?![\d]|,\d)"  # 1,234.5; 12,34,567
    r"|(?P<german>[1-9]\d{0,2}(?:(?:\.\d{3}){2,12}|(?:\.\d{3}){1,12},\d+))(?![\d]|[.,]\d)"  # 1.234,5; 1.234.567
    rf"|(?P<spaced>[1-9]\d{{0,2}}(?:[{_GAPS}]\d{{3}}){{1,12}}(?:[.,]\d+)?)(?!\d)"
    r"|(?P<comma>(?<!\d,)\d+,\d+)(?!\d|,\d)"  # 2,5; not one of 1,2,3
    r"|(?P<plain>\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|(?<!\d)\.\d+))"
)


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
    words, reference = _squad_words(given), _squad_words(wanted)
    if not words or not reference:
        return float(words == reference)
    return _f1(_num_common(words, reference), len(words), len(reference))


def rouge1(given: str, wanted: str) -> float:
    """F-measure over words; see `rouge_n`."""
    return rouge_n(given, wanted, size=1)


def rouge2(given: str, wanted: str) -> float:
    """F-measure over pairs of neighbouring words; see `rouge_n`."""
    return rouge_n(given, wanted, size=2)


def rouge_n(given: str, wanted: str, *, size: int) -> float:
    """F-measure over runs of `size` words, each counted as often as both texts have it; no stemming.

    A word is a run of letters, their marks and digits, in lower case; in scripts without blanks between words (Chinese,
    Japanese, Thai, Lao, Khmer, Burmese) it is one letter.

    Source: Lin 2004, aclanthology.org/W04-1013. Of text in a-z and 0-9 words and figures are those of Google's package
    rouge-score 0.1.2, which sees no other letters.
    """
    runs, reference = (
        [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
        for words in (_rouge_words(given), _rouge_words(wanted))
    )
    return _f1(_num_common(runs, reference), len(runs), len(reference))


def rouge_l(given: str, wanted: str) -> float:
    """F-measure over the longest common subsequence of words of the whole texts; no stemming.

    Source: as `rouge_n`.

    Example:
        >>> rouge_l("police kill the gunman", "police killed the gunman")
        0.75
    """
    words, reference = _rouge_words(given), _rouge_words(wanted)
    return _f1(_common_length(words, reference), len(words), len(reference))


def number(given: str, wanted: str) -> float:
    """Whether the last number in the answer is the reference's, by value; a reference without one is never met.

    What follows `####` goes before what stands elsewhere; a dollar sign may lead. See `final_number`.

    Source: Cobbe et al. 2021, arXiv:2110.14168, GSM8K's form of answers.

    Example:
        >>> number("so 3 + 4 makes $1,007.0.", "work #### 1007"), number("3 or 4", "#### 3")
        (1.0, 0.0)
    """
    reference = final_number(wanted)
    return float(reference is not None and final_number(given) == reference)


def final_number(text: str) -> Decimal | None:
    """The last number of a text, or of what follows its last `####`; None without any.

    A comma before groups of three digits stands between thousands, any other one before decimals: `1,234` is a
    thousand and more, `2,5` two and a half, and `2,500` two and a half thousand. A dot is the other way round where it
    is written twice or a comma follows: `1.234.567`, `1.234,5`. Thousands may also have an apostrophe or a narrow or
    no-break space between them. A minus may be U+2212 or a dash; behind a letter, a digit or a bracket it is a hyphen
    or makes a range, whose last number counts: `3-5` is 5.

    Example:
        >>> [str(final_number(text)) for text in ("2,5 mg", "\u22125", "1.234,50", "12-15", "1,200", "no")]
        ['2.5', '-5', '1234.50', '15', '1200', 'None']
    """
    all_found = list(_NUMBER.finditer(text.rpartition("####")[2]))
    if not all_found:
        return None
    match = all_found[-1]
    form, written = next((name, part) for name, part in match.groupdict().items() if name != "sign" and part)
    for gap in {"english": ",", "german": ".", "spaced": _GAPS}.get(form, ""):
        written = written.replace(gap, "")
    try:
        value = Decimal(written.replace(",", "."))
    except InvalidOperation:
        return None
    return value.copy_negate() if match["sign"] else value


def has_words(text: str) -> bool:
    """Whether ROUGE sees a word in a text; of signs alone every answer would score 0.

    Example:
        >>> has_words("\u6771\u4eac"), has_words("\U0001f600!")
        (True, False)
    """
    return bool(_rouge_words(text))


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
    """Lower-case words of any script."""
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text.lower()))]


def _num_common(given: Sequence[object], reference: Sequence[object]) -> int:
    """Items of both texts, each counted as often as both have it."""
    return sum((collections.Counter(given) & collections.Counter(reference)).values())


def _f1(num_common: int, num_given: int, num_reference: int) -> float:
    """Harmonic mean of precision and recall; 0 where there is nothing in common."""
    return 2 * num_common / (num_given + num_reference) if num_common else 0.0


def _common_length(given: Sequence[str], reference: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one number.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    bits_of: dict[str, int] = collections.defaultdict(int)
    for position, word in enumerate(reference):
        bits_of[word] |= 1 << position
    every = (1 << len(reference)) - 1
    row = every
    for word in given:
        met = row & bits_of.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(reference) - row.bit_count()
