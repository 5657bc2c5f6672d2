"""The name of a privacy unit in one form, whichever file and whichever program it came from.

A patient whose name is written in two ways would be two units, each protected by half; two patients under one name
would share one protection. So what says the same to a reader, or to a spreadsheet, is one name; what may be two people
stays two, and `alike` tells of it.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final

from common.data.problems import UnusableError

NAME_IT: Final = "give every row its patient or customer"
AS_WHOLE: Final = "write the column as whole numbers or as text, where no digit is lost"
MAX_EXACT: Final = 2**53  # above it, a float stands for several whole numbers
# What pandas (`read_csv`, `na_values`), R, Excel and databases write where there is no value, letters and digits only;
# and the words with which people say so.
_MARKS: Final = "na nan null none nil 1ind 1qnan ref value name true false undefined void empty blank nothing tbd"
_WORDS: Final = (
    "missing nodata noid noname notavailable notapplicable notknown notgiven notspecified notrecorded unspecified "
    "unknown unk unknownpatient anonymous anon unbekannt keineangabe fehlt inconnu desconocido sconosciuto "
    "desconhecido onbekend ukendt nieznany"
)
MISSING: Final = frozenset(f"{_MARKS} {_WORDS}".split())
# Default_Ignorable_Code_Point of Unicode 16 that is not of category Cf: nothing of it is seen.
_UNSEEN: Final = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)
_OTHER_VALUE: Final = ("<super>", "<sub>", "<circle>", "<square>", "<fraction>")  # "7²" is not "72"
_WHOLE: Final = re.compile(r"([+-]?[0-9]+)\.0+")
_ROUNDED: Final = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?[eE]\+[0-9]+")
_nfkc: Final = functools.partial(unicodedata.normalize, "NFKC")
_LEADING_ZEROS: Final = re.compile(r"(?<![0-9.,])0+(?=[0-9])")


def name_of(value: Any, column: str) -> str:
    """The unit's name in its one form.

    Unicode NFKC, without characters of category Cf and others that are not seen, blanks around it left out and others
    made one; 7, 7.0 and "7.0" are "7". Superscripts, circled and squared characters stay, as they change what a number
    says; so do case and leading zeros.

    Raises:
        UnusableError: It is missing, stands for a missing value, is neither text nor a number, or is a number that may
            have lost digits.

    Source: Unicode Standard Annex 15 (NFKC); NFKC_Casefold, Unicode Standard 3.13, for what is not seen.

    Example:
        >>> name_of(7.0, "patient"), name_of(" P\u200b\uff11\u00a0 2 ", "patient"), name_of("007", "patient")
        ('7', 'P1 2', '007')
    """
    name = form(value, column)
    bare = "".join(character for character in name.casefold() if character.isalnum())
    if not bare or bare in MISSING:
        what = f"the unit column {column!r} is a mark or a word for a missing value"
        raise UnusableError(what, f"{NAME_IT}, or remove the row")
    return name


def form(value: Any, column: str) -> str:
    """The one form of a name of any kind, such as that of a site; see `name_of`, which refuses more.

    Raises:
        UnusableError: It is empty, neither text nor a number, or a number that may have lost digits.
    """
    text = value if isinstance(value, str) else _number(value, column)
    while (shown := _shown(text)) != text:
        text = shown
    if not text:
        raise UnusableError(f"the unit column {column!r} is empty", NAME_IT)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise UnusableError(f"the unit column {column!r} is text with a control character or half a character", NAME_IT)
    if _ROUNDED.fullmatch(text):
        raise UnusableError(f"the unit column {column!r} is a number in exponent form, which lost digits", AS_WHOLE)
    if whole := _WHOLE.fullmatch(text):
        if abs(int(whole[1])) >= MAX_EXACT:
            raise UnusableError(f"the unit column {column!r} is a number that may have lost digits", AS_WHOLE)
        return whole[1]
    return text


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that a reader may take for one: they differ in case, leading zeros, blanks, dashes or kind of digits only.

    Returns:
        Groups of two or more, in the order of their first names.

    Example:
        >>> alike(["p-7", "P-007", "8"])
        [['p-7', 'P-007']]
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        text = "".join(map(_plain, _nfkc(name))).casefold()
        groups.setdefault(_LEADING_ZEROS.sub("", text), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _number(value: Any, column: str) -> str:
    """A whole number as text."""
    if isinstance(value, float | Decimal) and value != value:
        raise UnusableError(f"the unit column {column!r} is NaN, which stands for a missing value", NAME_IT)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        kind = "missing" if value is None else f"{type(value).__name__} and neither text nor a number"
        raise UnusableError(f"the unit column {column!r} is {kind}", NAME_IT)
    if isinstance(value, int):
        return str(value)
    if value in (float("inf"), float("-inf")) or value != int(value):
        raise UnusableError(f"the unit column {column!r} is a number that is not whole, so 1.1 may be 1.10", AS_WHOLE)
    if isinstance(value, float) and abs(value) >= MAX_EXACT:
        raise UnusableError(f"the unit column {column!r} is a number that may have lost digits", AS_WHOLE)
    return str(int(value))


def _shown(text: str) -> str:
    """What is seen of a text, by NFKC where that says the same; again of its result, it may be less."""
    seen = (c for c in text if unicodedata.category(c) != "Cf" and c not in _UNSEEN)
    folded = (c if unicodedata.decomposition(c).startswith(_OTHER_VALUE) else _nfkc(c) for c in seen)
    return unicodedata.normalize("NFC", " ".join("".join(folded).split()))


def _plain(character: str) -> str:
    """A character without what `alike` looks over."""
    if unicodedata.category(character) == "Pd" or character == "\N{MINUS SIGN}":
        return "-"
    digit = unicodedata.decimal(character, None)
    return "" if character.isspace() else character if digit is None else str(digit)
