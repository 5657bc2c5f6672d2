"""Detectors of personal data: what each finds, and what it must not."""

import re

import phonenumbers
import pytest

from common.errors import ConfigError, DataError
from common.run.schema.tasks import PiiTask
from server.evaluate.figures import pii
from server.evaluate.tasks import pii as task_pii
from tests import tiny


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        ("email", "Mail ann.b+x@mail.example.co.uk, please", ["ann.b+x@mail.example.co.uk"]),
        ("email", "ann at example.org, ann@localhost, @ann, a@b.1", []),
        ("iban", "to DE89 3704 0044 0532 0130 00 by Friday", ["DE89 3704 0044 0532 0130 00"]),
        ("iban", "gb82west12345698765432", ["gb82west12345698765432"]),
        ("iban", "to DE88 3704 0044 0532 0130 00 by Friday", []),  # wrong check digits
        ("card", "5555-5555-5555-4444 and 378282246310005", ["5555-5555-5555-4444", "378282246310005"]),
        ("card", "5555-5555-5555-4445 and 000000000000", []),  # wrong check digit, all alike
        ("ssn", "SSN 536-90-4399 or 536 90 4399", ["536-90-4399", "536 90 4399"]),
        ("ssn", "000-12-3456 666-12-3456 536-00-4399 536-90-0000 536-90 4399 1536-90-4399", []),
        ("birth_date", "born 1993-12-19, DOB: 3/4/1990", ["1993-12-19", "3/4/1990"]),
        ("birth_date", "Date of birth is 4 March 1961. Born on July 4, 1976", ["4 March 1961", "July 4, 1976"]),
        ("birth_date", "seen 1993-12-19, born 1993-13-32, born 1803-01-01, DOB 31/31/1990", []),
        ("record_number", "MRN-16541448, medical record number: AB123456", ["16541448", "AB123456"]),
        ("record_number", "MRN 12, room 16541448, the MRN is missing", []),
        ("phone", "+1 (984) 182-0190, 905-674-3793, phone 555-0158", ["+1 (984) 182-0190", "905-674-3793", "555-0158"]),
        ("phone", "call me at 6625551234", ["6625551234"]),
        ("phone", "2024-01-31, 192.168.10.20, 1.25, $1,000,000, order 6625551234, 17151 2450 Crown St", []),
    ],
)  # fmt: skip
def test_each_kind_finds_its_own_and_no_look_alike(kind, text, values):
    assert [one.value for one in pii.find(text) if one.kind == kind] == values


def numbers(text, *regions):
    return [re.sub(r"\D", "", one.value) for one in pii.find(text, regions=regions) if one.kind == "phone"]


def examples(style):
    """The example numbers that libphonenumber publishes: each country's digits, and how they are written."""
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        for kind in (phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE):
            if number := phonenumbers.example_number_for_type(region, kind):
                yield region, phonenumbers.format_number(number, style)


@pytest.mark.parametrize("style", ["E164", "INTERNATIONAL", "RFC3966"])
def test_every_countrys_numbers_are_found_with_their_code(style):
    found = [
        numbers(f"She left {text} for you.") == [re.sub(r"\D", "", text)]
        for _, text in examples(getattr(phonenumbers.PhoneNumberFormat, style))
    ]
    assert len(found) > 480
    assert all(found)


def test_a_countrys_own_way_of_writing_is_found_where_the_country_is_named():
    national = list(examples(phonenumbers.PhoneNumberFormat.NATIONAL))
    named = [numbers(f"Her phone: {text}.", region) == [re.sub(r"\D", "", text)] for region, text in national]
    unnamed = [numbers(f"She left {text} for you.") == [re.sub(r"\D", "", text)] for _, text in national]
    assert sum(named) / len(named) > 0.99
    assert 0.6 < sum(unnamed) / len(unnamed) < 0.7  # control; docs/evaluation.md tells this figure


PUBLISHED = [  # FCC: 555-0100 to 555-0199 are fictitious; Ofcom: numbers for drama; ITU-T E.123 (02/2001): its examples
    "202-555-0123", "(202) 555-0123", "202.555.0123", "202 555 0123", "1-202-555-0123", "+1 202 555 0123",
    "(202)555-0123", "555-0123", "+1 (202) 555-0123 ext. 876", "202-555-0123 x12", "202-555-0123, extension 12",
    "202\u2011555\u20110123", "+1\u00a0202\u00a0555\u00a00123", "020 7946 0958", "(01632) 960123", "07700 900123",
    "0808 157 0123", "+44 20 7946 0958", "+44 (0)20 7946 0958", "(0609) 123 4567", "+22 609 123 4567",
    "+22 609 123 4567 ext. 876",
]  # fmt: skip


@pytest.mark.parametrize("number", PUBLISHED)
@pytest.mark.parametrize("sentence", ["She left {} for you.", "({})", "Office,{}", "Ward 3: {}; then more."])
def test_published_examples_are_found_whole(number, sentence):
    [found] = numbers(sentence.format(number))
    assert re.sub(r"\D", "", number) == found


@pytest.mark.parametrize(
    "text",
    [
        "Seen 2024-01-31 and 31.01.2024, 01/31/2024, 3 May 2021 10:45, from 08:15-16:45, in 2019-2020-2021",
        "Na 138, K 4.1, WBC 12.400, PLT 250 000, glucose 5.4 6.1 7.2 8.3 mmol, 110 120 130 mg/dL, 98.6, 37.5",
        "500 mg 3 x 2, 0.5-1 mg/kg, 1 250 000 IU, 100 000 units, 250 000 000, 1,000,000, 3.14159265, 120/80",
        "MRN 16541448, order 6625551234, ID 4455667788, specimen 12345-6789, NPI 1234567893, NCT01234567",
        "ICD 250.00, CPT 99213-25, LOINC 2345-7, ISBN 978-3-16-148410-0, DOI 10.1000/182, PMID 12345678",
        "192.168.10.20, 17151 2450 Crown St, 10001-1234, code 4711, 12 345 678, 3 4 5 6 7 8 9 10, weeks 12-14-16",
    ],
)
@pytest.mark.parametrize("regions", [(), ("US",), ("DE", "GB", "FR")])
def test_dates_values_doses_and_identifiers_are_no_telephone_numbers(text, regions):
    assert numbers(text, *regions) == []


def test_a_number_with_a_country_code_is_neither_card_nor_social_security_number():
    assert [one.kind for one in pii.find("+672 10 6609, +992 372 12 3456, 536 90 4399")] == ["ssn", "phone", "phone"]


def test_names_are_whole_words_whatever_their_case_and_spacing():
    names = ["Ann Lee", "Bo Ek-Dahl"]
    assert [one.value for one in pii.find("ANN  LEE and Bo Ek-Dahl", names=names)] == ["ANN  LEE", "Bo Ek-Dahl"]
    assert pii.find("Joann Lee, Ann Leeds", names=names) == []


def test_one_piece_is_counted_once():
    assert [one.kind for one in pii.find("card 4111 1111 1111 1111, SSN 536-90-4399, phone 536-904-3990")] == [
        "card", "ssn", "phone",
    ]  # fmt: skip


def test_what_the_prompt_holds_is_no_emission_however_it_is_written():
    prompts = ["Mail ANN@example.org, card 4111111111111111", "Who is it?", "Who is it?"]
    answers = ["ann@example.org and 4111 1111 1111 1111", "ann@example.org, bo@example.org", "Nobody."]
    found = task_pii.scores(answers, prompts, names=[])
    assert found["emission"].rows == ((0.0,), (1.0,), (0.0,))
    assert found["emission"].value == pytest.approx(1 / 3)
    assert (found["num_email"].value, found["num_card"].value) == (2.0, 0.0)
    assert "num_name" not in found
    assert task_pii.scores(["It is Ann Lee"], ["Who?"], names=["Ann Lee"])["num_name"].value == 1.0


def test_a_tasks_regions_reach_its_scores_and_must_be_countries(tiny_base):
    answer = ["It is 8312 3456."]
    assert task_pii.scores(answer, ["Who?"], names=[], regions=["SG"])["num_phone"].value == 1.0
    assert task_pii.scores(answer, ["Who?"], names=[])["num_phone"].value == 0.0
    rows = tiny_base / "config.json"
    task = PiiTask(name="leaks", kind="pii", data=str(rows), phone_regions=["DE", "XX"])
    run = tiny.settings(tiny_base)
    with pytest.raises(ConfigError, match="phone_regions XX"):
        task_pii.load(task, run.data, run.evaluation)


@pytest.mark.parametrize(("content", "message"), [("\n", "holds no name"), ("Ann Lee\nBo\n", "name 2 has fewer")])
def test_names_that_would_find_nothing_or_everything_are_refused(tmp_path, content, message):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        task_pii.read_names(str(tmp_path / "names.txt"))
