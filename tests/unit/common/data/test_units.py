"""One patient is one unit, however the name was written, and two patients are two."""

import unicodedata
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.data import read, units
from common.data.problems import UnusableError
from common.data.rows import Columns
from common.errors import DataError

# Format characters, and others that nobody sees.
UNSEEN = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u202e\u061c\ufe0f\u034f\u3164\U000e0041"
BLANKS = "\u00a0\u2009\u3000\t\n  "
pseudonyms = st.text("AZaz059ßéÅ\u017f-_./äö日ー病Ж", min_size=1).filter(
    lambda text: any(c.isalnum() for c in text) and text.casefold() not in units.MISSING
)


def name(value: object) -> str:
    return units.name_of(value, "patient_id")


@given(text=pseudonyms, data=st.data())
@example(text="Å-7", data=None)
def test_what_nobody_sees_never_makes_a_second_patient(text, data):
    expected = name(text)
    assert name(expected) == expected, "the form of a form is itself"
    for way in ("NFC", "NFD", "NFKC", "NFKD"):
        assert name(unicodedata.normalize(way, text)) == expected
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    assert name(wide) == expected
    if data is not None:
        place = data.draw(st.integers(0, len(text)))
        unseen, blank = data.draw(st.sampled_from(UNSEEN)), data.draw(st.sampled_from(BLANKS))
        assert name(text[:place] + unseen + text[place:]) == expected
        assert name(f"{unseen}{blank}{text}{blank}{unseen}") == expected
        assert name(f"{text}{blank}{blank}{text}") == name(f"{text} {text}")


@given(number=st.integers(-(2**53) + 1, 2**53 - 1))
def test_a_whole_number_is_one_patient_in_every_type(number):
    written = [number, str(number), f" {number}\u200b", f"{number}.0", f"{number}.000", float(number), Decimal(number)]
    assert {name(value) for value in written} - {"-0"} == {str(number)}


@given(text=st.text("AZaz019", min_size=1))
def test_names_of_letters_and_digits_stay_as_they_are_so_that_two_patients_stay_two(text):
    assert name(text) == text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("007", "7"),
        ("p-1", "P-1"),
        ("A 1", "A1"),
        ("7²", "72"),
        ("①", "1"),
        ("½", "1\u20442"),
        ("1.10", "1.1"),
        ("7.0.0", "7"),
        ("v1.05", "v1.5"),
        ("P\u20131", "P-1"),
        ("é", "e"),
        ("12e5", "1200000"),
        ("A", "\u0410"),  # the second one is Cyrillic
    ],
)
def test_what_may_be_two_patients_is_never_made_one(one, other):
    assert name(one) != name(other)


@pytest.mark.parametrize(
    ("groups", "others"),
    [
        (
            [["007", "7"], ["p-1", "P-1", "P\u201301"], ["A 1", "A1"], ["7²", "72"], ["٤٢", "42"]],
            ["x", "100", "10", "1.05"],
        ),
        ([], ["1.05", "1.5", "10", "1", "ab", "a-b"]),
    ],
)
def test_names_that_a_reader_may_take_for_one_are_told(groups, others):
    assert units.alike([*others, *(one for group in groups for one in group)]) == groups


EMPTY_CELLS = "nan,NaN,-NaN,NULL,None,N/A,n.a.,<NA>,#N/A,#REF!,unknown,(Unknown),-,--,?,.,_,,true,False,unbekannt"


@pytest.mark.parametrize(
    "value",
    [
        *EMPTY_CELLS.split(","),
        *(" NULL\u200b", " ", "\u200b", "\ufeff", "\u3164", "\uff4e\uff55\uff4c\uff4c"),
        *(None, True, False, float("nan"), Decimal("NaN"), b"p1", ["p1"], {"p": 1}),
    ],
)
def test_what_stands_for_no_patient_is_refused(value):
    with pytest.raises(UnusableError, match="the unit column 'patient_id' is "):
        name(value)


@pytest.mark.parametrize(
    "value", [7.5, Decimal("7.5"), float("inf"), float(2**53), "9007199254740993.0", "1.23E+15", "1e+16", "P\x08"]
)
def test_numbers_that_lost_digits_are_refused(value):
    with pytest.raises(UnusableError):
        name(value)


def test_digits_that_are_all_there_are_kept():
    assert [name(value) for value in (2**70, "9007199254740993", 2**53 - 1.0)] == [
        "1180591620717411303424",
        "9007199254740993",
        "9007199254740991",
    ]


def test_files_of_several_programs_give_one_patient_one_unit(tmp_path):
    """A column with a gap by pandas, one without, a registry in full width, and a web form."""
    (tmp_path / "a.csv").write_text("patient_id,instruction,output\n7.0,i,o\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("patient_id,instruction,output\n7,i,o\n\uff17,i,o\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"patient_id": "7\\u200b", "instruction": "i", "output": "o"}\n')
    (tmp_path / "d.json").write_text('[{"patient_id": 7.0, "instruction": "i", "output": "o"}]')
    rows = read.read(str(tmp_path), columns=Columns(unit="patient_id"))
    assert [row.unit for row in rows] == ["7"] * 5


def test_every_row_without_a_patient_is_named_and_no_value_is(tmp_path):
    (tmp_path / "a.csv").write_text("patient_id,instruction,output\nnan,i,o\n7,i,o\nNULL,i,\n")
    with pytest.raises(DataError) as caught:
        read.read(str(tmp_path / "a.csv"), columns=Columns(unit="patient_id"))
    assert str(caught.value).count("a mark or a word for a missing value") == 2
    assert "a.csv line 4: has no answer in 'output'; a.csv line 4: the unit column" in str(caught.value)
    assert "NULL" not in str(caught.value)
