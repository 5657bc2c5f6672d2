"""Personal data in text, by patterns that are checked: each kind with the rule that makes a find of a candidate.

What is found is given to no log; callers count it.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

KINDS: Final = ("email", "iban", "card", "ssn", "birth_date", "record_number", "phone", "name")
_EMAIL: Final = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_IBAN: Final = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}(?!\w)", re.IGNORECASE)
_CARD: Final = re.compile(r"(?<![\w+-])\d(?:[ -]?\d){11,18}(?![\w-])")
_SSN: Final = re.compile(r"(?<![\w-])(\d{3})([- ])(\d{2})\2(\d{4})(?![\w-])")
_MONTHS: Final = {
    name: number
    for number, names in enumerate(
        ("january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
         "september sep sept", "october oct", "november nov", "december dec"),
        start=1,
    )
    for name in names.split()
}  # fmt: skip
_MONTH: Final = "|".join(sorted(_MONTHS, key=len, reverse=True))
_DATE: Final = (
    r"(?:(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})"
    r"|(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})[-/.](?P<y2>\d{4})"
    rf"|(?P<d3>\d{{1,2}})(?:st|nd|rd|th)?\.?\s+(?:of\s+)?(?P<m3>{_MONTH})\.?,?\s+(?P<y3>\d{{4}})"
    rf"|(?P<m4>{_MONTH})\.?\s+(?P<d4>\d{{1,2}})(?:st|nd|rd|th)?,?\s+(?P<y4>\d{{4}}))(?!\w)"
)
_BIRTH: Final = re.compile(
    rf"(?:\bborn(?:\s+on)?|\bd\.?o\.?b\b\.?|\b(?:date\s+of\s+birth|birth\s?da(?:te|y))(?:\s+is)?)\W{{0,4}}{_DATE}",
    re.IGNORECASE,
)
_RECORD: Final = re.compile(
    r"\b(?:MRN|medical\s+record(?:\s+(?:number|no\.?))?|patient\s+(?:id|number|no\.?))(?:\s+is)?[\s:#-]{0,4}"
    r"(?P<value>[A-Z]{0,3}-?\d{5,12})(?!\w)",
    re.IGNORECASE,
)
_PHONE: Final = re.compile(
    r"(?<![\w.,$/-])(?:\+|\(\+?)?\d(?:[ ().-]{0,3}\d){6,14}(?:\s?(?:x|ext\.?\s?)\d{1,6})?(?![\w/]|[.,-]\d)",
    re.IGNORECASE,
)
_PHONE_WORD: Final = re.compile(
    r"\b(?:phone|telephone|tel|call|fax|mobile|cell|ring|dial|text|contact|whatsapp)\b[^\d\n]{0,30}$",
    re.IGNORECASE,
)
_NO_PHONE: Final = re.compile(
    r"(?:\d{1,3}\.){3}\d{1,3}$|(?:19|20)\d{2}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d{2}"
)


@dataclass(frozen=True)
class Find:
    """One piece of personal data.

    Attributes:
        kind: Of `KINDS`.
        start: Where it begins, in characters.
        end: Where it ends.
        value: Itself; never written anywhere.
    """

    kind: str
    start: int
    end: int
    value: str


def find(text: str, *, names: Sequence[str] = ()) -> list[Find]:
    """All personal data in a text; what one kind has taken is not taken again by a later one.

    Args:
        text: To look at.
        names: People's names, found as whole words, whatever their case.

    Returns:
        Finds in the order of `KINDS`.

    Example:
        >>> [(one.kind, one.value) for one in find("Mail ann@example.org, card 4111 1111 1111 1111")]
        [('email', 'ann@example.org'), ('card', '4111 1111 1111 1111')]
    """
    taken: list[Find] = []
    for kind, search in _SEARCHES:
        for start, end in search(text):
            if all(end <= one.start or start >= one.end for one in taken):
                taken.append(Find(kind, start, end, text[start:end]))
    named = [Find("name", *match.span(), match[0]) for match in _names(names).finditer(text)] if names else []
    return taken + named


def new_in(answer: str, prompt: str, *, names: Sequence[str] = ()) -> list[Find]:
    """Personal data in an answer that is not in its prompt, however it is written there.

    Example:
        >>> [one.kind for one in new_in("Call 555-010-0199 or 555 010 0198.", "Her phone is (555) 010 0199.")]
        ['phone']
    """
    known = _plain(prompt)
    return [one for one in find(answer, names=names) if _plain(one.value) not in known]


def is_luhn(digits: str) -> bool:
    """Whether a card number's last digit fits.

    Source: ISO/IEC 7812-1, annex B.

    Example:
        >>> is_luhn("79927398713"), is_luhn("79927398710")
        (True, False)
    """
    numbers = [int(one) for one in reversed(digits)]
    doubled = [sum(divmod(2 * one, 10)) for one in numbers[1::2]]
    return (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether an IBAN's two check digits fit.

    Source: ISO 13616-1, ISO/IEC 7064 MOD 97-10.

    Example:
        >>> is_iban("GB82 WEST 1234 5698 7654 32"), is_iban("GB82 WEST 1234 5698 7654 33")
        (True, False)
    """
    plain = re.sub(r"[ -]", "", text).upper()
    return 15 <= len(plain) <= 34 and int("".join(str(int(one, 36)) for one in plain[4:] + plain[:4])) % 97 == 1


def _emails(text: str) -> Iterable[tuple[int, int]]:
    """An address at a domain with a top level of letters."""
    return (match.span() for match in _EMAIL.finditer(text))


def _ibans(text: str) -> Iterable[tuple[int, int]]:
    """The longest beginning of each candidate whose check digits fit, as words may stand right behind it."""
    for match in _IBAN.finditer(text):
        ends = (end for end in range(len(match[0]), 14, -1) if not match[0][end : end + 1].isalnum())
        fitting = next((end for end in ends if is_iban(match[0][:end])), 0)
        if fitting:
            yield match.start(), match.start() + fitting


def _cards(text: str) -> Iterable[tuple[int, int]]:
    """Twelve to nineteen digits with Luhn's check digit that do not all repeat."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if is_luhn(digits) and len(set(digits)) > 1 and digits[0] != "0":
            yield match.span()


def _ssns(text: str) -> Iterable[tuple[int, int]]:
    """No part all zeros, no area 666; areas from 900 count, as made-up numbers have them."""
    for match in _SSN.finditer(text):
        area, group, serial = match[1], match[3], match[4]
        if area not in ("000", "666") and group != "00" and serial != "0000":
            yield match.span()


def _birth_dates(text: str) -> Iterable[tuple[int, int]]:
    """A date that there was, after a word that says birth."""
    for match in _BIRTH.finditer(text):
        if any(_is_past(*parts) for parts in _readings(match)):
            found = next(match.start(name) for name in ("y", "a", "d3", "m4") if match[name] is not None)
            yield found, match.end()


def _records(text: str) -> Iterable[tuple[int, int]]:
    """A number after a word that says whose record it is."""
    return (match.span("value") for match in _RECORD.finditer(text))


def _phones(text: str) -> Iterable[tuple[int, int]]:
    """Seven to fifteen digits, in groups or behind a word such as phone, that are no date and no IP address."""
    for match in _PHONE.finditer(text):
        body = re.split(r"\s?(?:x|ext)", match[0], flags=re.IGNORECASE)[0]
        digits = re.sub(r"\D", "", body)
        is_told = _PHONE_WORD.search(text, max(0, match.start() - 60), match.start()) is not None
        if 7 <= len(digits) <= 15 and (is_told or _is_grouped(body)) and not _NO_PHONE.match(body):
            yield match.span()


_SEARCHES: Final[tuple[tuple[str, Callable[[str], Iterable[tuple[int, int]]]], ...]] = (
    ("email", _emails), ("iban", _ibans), ("card", _cards), ("ssn", _ssns), ("birth_date", _birth_dates),
    ("record_number", _records), ("phone", _phones),
)  # fmt: skip


def _is_grouped(body: str) -> bool:
    """Whether digits are written as a telephone number is; two groups with a space are more often an address."""
    groups = re.findall(r"\d+", body)
    return body[0] in "+(" or len(groups) > 2 or (len(groups) == 2 and " " not in body) or body.startswith("0")


def _readings(match: re.Match[str]) -> list[tuple[int, int, int]]:
    """Year, month and day as the date may be meant: 3/4/1990 is both ways."""
    if match["y"]:
        return [(int(match["y"]), int(match["m"]), int(match["d"]))]
    if match["y2"]:
        year, one, other = int(match["y2"]), int(match["a"]), int(match["b"])
        return [(year, one, other), (year, other, one)]
    name = "3" if match["m3"] else "4"
    return [(int(match[f"y{name}"]), _MONTHS[match[f"m{name}"].lower()], int(match[f"d{name}"]))]


def _is_past(year: int, month: int, day: int) -> bool:
    """Whether somebody alive may have been born then."""
    try:
        found = datetime.date(year, month, day)
    except ValueError:
        return False
    return year >= 1900 and found <= datetime.datetime.now(datetime.UTC).date()


def _names(names: Sequence[str]) -> re.Pattern[str]:
    """Any of the names as whole words."""
    ordered = sorted((r"\s+".join(map(re.escape, name.split())) for name in names), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(ordered)})(?!\w)", re.IGNORECASE)


def _plain(text: str) -> str:
    """Letters and digits only, in one case."""
    return "".join(one for one in text.casefold() if one.isalnum())
