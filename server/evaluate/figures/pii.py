"""Personal data in text, by patterns that are checked: each kind with the rule that makes a find of a candidate.

What is found is given to no log; callers count it.
"""

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from phonenumbers import Leniency, PhoneNumberMatcher

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
_HYPHENS: Final = "\u2010\u2011\u2012\u2013\u2014\u2212-"
_SPACES: Final = " \u00a0\u202f"
_PHONE: Final = re.compile(
    rf"(?<![\w.$/-])(?<!\d,)(?:\+|\(\+?)?\d(?:[{_SPACES}().{_HYPHENS}]{{0,3}}\d){{6,14}}"
    r"(?:,?\s?(?:x|ext(?:ension)?\.?|#)\s?\d{1,6})?(?![\w/]|[.,-]\d)",
    re.IGNORECASE,
)
_PHONE_WORD: Final = re.compile(
    r"\b(?:phone|telephone|tel|call|fax|mobile|cell|ring|dial|text|contact|whatsapp)\b[^\d\n]{0,30}$",
    re.IGNORECASE,
)
_AFTER_PLUS: Final = re.compile(rf"\+\d{{0,3}}[{_SPACES}{_HYPHENS}]?$")
_GROUPED: Final = re.compile(
    rf"\d{{3,4}}[.{_HYPHENS}]\d{{4}}"  # 555-0158
    rf"|\d+(?:[{_SPACES}().{_HYPHENS}]+\d+)+[{_SPACES}().{_HYPHENS}]+\d{{4,}}"  # a long last group
    rf"|\d+(?:[{_HYPHENS}]\d+)+[{_HYPHENS}]\d{{2,}}"  # hyphens alone
    rf"|\d{{3}}(?:[{_SPACES}]\d{{3}}){{2}}"  # three times three
)
_AMOUNT_OR_YEARS: Final = re.compile(r"\d+(?:\D000)+|(?:(?:19|20)\d{2}\D?)+")
_UNIT: Final = re.compile(r"\s?(?:[mkµu]?g|[md]?l|m?mol|iu|units?|mm|cm|bpm|%)(?:\b|/|(?<=%))", re.IGNORECASE)
_NO_PHONE: Final = re.compile(
    r"(?:\d{1,3}\.){3}\d{1,3}$|(?:19|20)\d{2}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d{2}"
)
_Search = Callable[[str], Iterable[tuple[int, int]]]


@dataclass(frozen=True)
class Find:
    """One piece of personal data.

    Attributes:
        start: Where it begins, in characters.
        value: Itself; never written anywhere.
    """

    kind: str
    start: int
    end: int
    value: str


def find(text: str, *, names: Sequence[str] = (), regions: Sequence[str] = ()) -> list[Find]:
    """All personal data in a text; what one kind has taken is not taken again by a later one.

    Args:
        names: People's names, found as whole words, whatever their case.
        regions: Countries (ISO 3166-1, such as "DE") in whose way telephone numbers may be written without a code.

    Returns:
        Finds in the order of `KINDS`.

    Example:
        >>> [(piece.kind, piece.value) for piece in find("Mail ann@example.org, card 4111 1111 1111 1111")]
        [('email', 'ann@example.org'), ('card', '4111 1111 1111 1111')]
    """
    phones: tuple[str, _Search] = ("phone", partial(_phones, regions=regions))
    taken, is_taken = list[Find](), bytearray(len(text))
    for kind, search in (*_SEARCHES, phones):
        for start, end in search(text):
            if not any(is_taken[start:end]):
                taken.append(Find(kind, start, end, text[start:end]))
                is_taken[start:end] = b"\1" * (end - start)
    if names:
        ordered = sorted((r"\s+".join(map(re.escape, name.split())) for name in names), key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(ordered)})(?!\w)", re.IGNORECASE)
        taken += [Find("name", *match.span(), match[0]) for match in pattern.finditer(text)]
    return taken


def new_in(answer: str, prompt: str, *, names: Sequence[str] = (), regions: Sequence[str] = ()) -> list[Find]:
    """Personal data in an answer that is not in its prompt, however it is written there.

    Example:
        >>> [piece.kind for piece in new_in("Call 555-010-0199 or 555 010 0198.", "Her phone is (555) 010 0199.")]
        ['phone']
    """
    known = _plain(prompt)
    return [piece for piece in find(answer, names=names, regions=regions) if _plain(piece.value) not in known]


def is_luhn(digits: str) -> bool:
    """Whether a card number's last digit fits.

    Source: ISO/IEC 7812-1, annex B.

    Example:
        >>> is_luhn("79927398713"), is_luhn("79927398710")
        (True, False)
    """
    numbers = [int(digit) for digit in reversed(digits)]
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[1::2]]
    return (sum(numbers[::2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether an IBAN's two check digits fit.

    Source: ISO 13616-1, ISO/IEC 7064 MOD 97-10.

    Example:
        >>> is_iban("GB82 WEST 1234 5698 7654 32"), is_iban("GB82 WEST 1234 5698 7654 33")
        (True, False)
    """
    plain = re.sub(r"[ -]", "", text).upper()
    return 15 <= len(plain) <= 34 and int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


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
        is_card = is_luhn(digits) and len(set(digits)) > 1 and digits[0] != "0"
        if is_card and not _is_after_plus(text, match.start()):
            yield match.span()


def _ssns(text: str) -> Iterable[tuple[int, int]]:
    """No part all zeros, no area 666; areas from 900 count, as made-up numbers have them."""
    for match in _SSN.finditer(text):
        area, group, serial = match[1], match[3], match[4]
        is_ssn = area not in ("000", "666") and group != "00" and serial != "0000"
        if is_ssn and not _is_after_plus(text, match.start()):
            yield match.span()


def _birth_dates(text: str) -> Iterable[tuple[int, int]]:
    """A date that there was, after a word that says birth."""
    for match in _BIRTH.finditer(text):
        # Year, month and day as the date may be meant: 3/4/1990 is both ways.
        if match["y"]:
            readings = [(int(match["y"]), int(match["m"]), int(match["d"]))]
        elif match["y2"]:
            year, first, second = int(match["y2"]), int(match["a"]), int(match["b"])
            readings = [(year, first, second), (year, second, first)]
        else:
            name = "3" if match["m3"] else "4"
            readings = [(int(match[f"y{name}"]), _MONTHS[match[f"m{name}"].lower()], int(match[f"d{name}"]))]
        dates = []
        for reading in readings:
            with suppress(ValueError):
                dates.append(datetime.date(*reading))
        if any(date.year >= 1900 and date <= datetime.datetime.now(datetime.UTC).date() for date in dates):
            start = next(match.start(name) for name in ("y", "a", "d3", "m4") if match[name] is not None)
            yield start, match.end()


def _phones(text: str, regions: Sequence[str]) -> Iterable[tuple[int, int]]:
    """What libphonenumber finds with a country code or in the way of one of the regions, and what the patterns find.

    A run of digits alone is a number of a region only behind a word such as phone.
    """
    for region in (None, *regions):
        for phone in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
            digits = phone.raw_string
            if not digits.isdigit() or digits.startswith("0") or _is_after_word(text, phone.start):
                yield phone.start, phone.end
    # Seven to fifteen digits, in groups or behind a word such as phone, that are no date and no IP address.
    for match in _PHONE.finditer(text):
        body = re.split(r",?\s?(?:x|ext|#)", match[0], flags=re.IGNORECASE)[0]
        digits = re.sub(r"\D", "", body)
        # Groups as measured values and amounts hardly ever have them, or a plus, a bracket or a nought first.
        is_grouped = _GROUPED.fullmatch(body) is not None and not _AMOUNT_OR_YEARS.fullmatch(body)
        is_grouped = (is_grouped or body[0] in "+(0") and (body[0] in "+(" or not _UNIT.match(text, match.end()))
        is_phone = is_grouped or _is_after_word(text, match.start())
        if 7 <= len(digits) <= 15 and is_phone and not _NO_PHONE.match(body):
            yield match.span()


def _is_after_word(text: str, start: int) -> bool:
    """Whether a word such as phone stands before."""
    return _PHONE_WORD.search(text, max(0, start - 60), start) is not None


def _is_after_plus(text: str, start: int) -> bool:
    """Whether what begins here is the rest of a number with a country code."""
    return _AFTER_PLUS.search(text, max(0, start - 5), start) is not None


_SEARCHES: Final[tuple[tuple[str, _Search], ...]] = (
    ("email", lambda text: (match.span() for match in _EMAIL.finditer(text))),
    ("iban", _ibans), ("card", _cards), ("ssn", _ssns), ("birth_date", _birth_dates),
    ("record_number", lambda text: (match.span("value") for match in _RECORD.finditer(text))),
)  # fmt: skip


def _plain(text: str) -> str:
    """Letters and digits only, in one case."""
    return "".join(sign for sign in text.casefold() if sign.isalnum())
