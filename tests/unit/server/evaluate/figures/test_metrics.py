"""Metrics of answers, against numbers worked out by hand or by others."""

import json
import re
import time
from functools import partial
from typing import get_args

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from server.evaluate.figures import json_answers, metrics, patterns
from server.evaluate.tasks import constraints, harness, judge_ask
from server.polish import rewards

# F-measures by Google's rouge-score 0.1.2, use_stemmer=False.
ROUGE = [
    ("police kill the gunman", "police killed the gunman", 0.75, 0.333333333333, 0.75),
    ("the gunman kill police", "police killed the gunman", 0.75, 0.333333333333, 0.5),
    (
        "The patient has sepsis (A41.9), and was given 500 mg of ceftriaxone.",
        "Sepsis, A41.9. Ceftriaxone 500 mg was given to the patient.",
        0.833333333333,
        0.454545454545,
        0.416666666667,
    ),
    ("", "nothing was said", 0.0, 0.0, 0.0),
    ("one", "one two", 0.666666666667, 0.0, 0.666666666667),
    ("a b a b a b", "b a b a", 0.8, 0.75, 0.8),
    (
        "No acute findings. Heart size is normal; lungs are clear!",
        "The lungs are clear and the heart is of normal size. No acute finding.",
        0.75,
        0.272727272727,
        0.25,
    ),
    ("completely different words here", "another text that shares none", 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("given", "wanted", "one", "two", "longest"), ROUGE)
def test_rouge_is_that_of_googles_package(given, wanted, one, two, longest):
    assert metrics.rouge1(given, wanted) == pytest.approx(one, abs=1e-11)
    assert metrics.rouge2(given, wanted) == pytest.approx(two, abs=1e-11)
    assert metrics.rouge_l(given, wanted) == pytest.approx(longest, abs=1e-11)


@pytest.mark.parametrize(
    ("given", "wanted", "f1"),
    [
        ("東京は雨", "東京は晴れ", 2 * 3 / 9),  # 東, 京 and は of 4 and of 5
        ("сепсис лёгких", "Сепсис", 2 / 3),
        ("बुखार और खांसी", "खांसी", 0.5),  # vowel signs do not part a word
        ("fièvre", "fievre", 0.0),
        ("\U0001f600", "\U0001f600", 0.0),  # no word at all, which a task refuses
    ],
)
def test_rouge_has_words_in_every_script(given, wanted, f1):
    assert metrics.rouge1(given, wanted) == pytest.approx(f1)
    assert metrics.rouge_l(given, wanted) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("given", "wanted", "f1"),
    [
        ("The Sepsis!", "sepsis", 1.0),  # articles, case and punctuation do not count
        ("sepsis of the lung", "sepsis", 0.5),  # words sepsis, of, lung: precision 1/3, recall 1
        ("a dose, a dose", "dose dose dose", 0.8),  # 2 of 2, 2 of 3
        ("A41.9", "A41.8", 0.0),
        ("", "", 1.0),
        ("the", "an", 1.0),  # nothing is left of either
        ("", "sepsis", 0.0),
    ],
)
def test_f1_is_squads(given, wanted, f1):
    assert metrics.token_f1(given, wanted) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("given", "wanted", "is_met"),
    [
        ("She has 5 + 13 = 18 eggs.\n#### 18", "#### 18", True),
        ("The answer is $1,234.50", "#### 1234.5", True),
        ("it fell to -3", "-3", True),
        ("3 apples", "-3", False),
        ("#### 18 and then 19", "18", False),  # the last after the mark
        ("18, I think: 7 of them", "18", False),
        ("no number", "18", False),
        ("no number", "none either", False),
        ("half is .5.", "0.50", True),
        ("2,5 mg", "2.5", True),
        ("2,5 mg", "25", False),
        ("\u22125", "-5", True),
        ("\u22125", "5", False),
        ("\u20135 \u00b0C", "-5", True),
        ("1.234,50", "1234.5", True),
        ("1.234.567", "1234567", True),
        ("1\u202f234,5", "1,234.5", True),
        ("1'234", "1234", True),
        ("12,34,567", "1234567", True),
        ("0,125", "0.125", True),
        ("1.234", "1.234", True),
        ("3-5 days", "5", True),
        ("3\u20135 days", "-5", False),
        ("COVID-19", "19", True),
        ("1,2,3", "3", True),
        ("03.05.2024", "2024", True),
        ("2.5e-3", "0.0025", True),
    ],
)
def test_numbers_are_compared_by_value(given, wanted, is_met):
    assert metrics.number(given, wanted) == is_met


SCHEMA = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[A-Z][0-9]"}, "dose": {"type": "number", "minimum": 0}},
    "required": ["code"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("given", "is_met"),
    [
        ('{"code": "A41"}', True),
        (' {"code": "A41", "dose": 2.5}\n', True),
        ('{"code": "41"}', False),
        ('{"dose": 2.5}', False),
        ('{"code": "A41", "dose": -1}', False),
        ('{"code": "A41", "dose": NaN}', False),
        ('{"code": "A41", "more": 1}', False),
        ('Here: {"code": "A41"}', False),
        ('{"code": "A41"', False),
        ("", False),
    ],
)
def test_json_must_be_whole_and_meet_the_schema(tmp_path, given, is_met):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert json_answers.checker(tmp_path / "schema.json")(given, "the reference does not count") == is_met


@pytest.mark.parametrize("text", [None, "{", '{"type": "no such type"}', "[]", "3"])
def test_a_file_that_is_no_schema_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "schema.json").write_text(text)
    with pytest.raises(DataError, match="not a JSON schema"):
        json_answers.checker(tmp_path / "schema.json")


PATTERN = "^(a|aa)+$"
SLOW = 60 * "a" + "!"
TIMED = {
    "a text": ({"pattern": PATTERN}, f'"{SLOW}"', '"aaa"'),
    "a name": ({"patternProperties": {PATTERN: {"type": "null"}}, "additionalProperties": False},
               json.dumps({SLOW: None}), '{"aaa": null}'),
    "again below": ({"$schema": "https://json-schema.org/draft/2020-12/schema", "pattern": PATTERN,
                     "items": {"$ref": "#"}}, f'["{SLOW}"]', '["aaa"]'),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "slow", "good"), TIMED.values(), ids=TIMED)
def test_a_pattern_in_a_schema_has_a_limit_of_time(tmp_path, monkeypatch, schema, slow, good):
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.1)
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    score = json_answers.checker(tmp_path / "schema.json")
    before = time.monotonic()
    assert (score(slow, ""), score(good, "")) == (0.0, 1.0)
    assert time.monotonic() - before < 5
    with pytest.raises(TimeoutError):  # control: Python's own engine does not end in time either
        regex.search(PATTERN, SLOW, timeout=0.1)


def test_a_pattern_of_a_harness_filter_has_a_limit_of_time(monkeypatch):
    from lm_eval.filters.extraction import RegexFilter

    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.1)
    made = harness.timed(partial(RegexFilter, regex_pattern="(?:a|aa)+$"))
    assert made.apply([["x aaa", SLOW]], [{}]) == [["aaa", "[invalid]"]]


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"pattern": "("}, "not a JSON schema"),
        ({"patternProperties": {"(": {}}}, "not a JSON schema"),
        ({"patternProperties": {"a": {}}, "unevaluatedProperties": False}, "write additionalProperties"),
    ],
)
def test_patterns_that_cannot_be_checked_are_refused_at_once(tmp_path, schema, told):
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(DataError, match=told):
        json_answers.checker(tmp_path / "schema.json")


@pytest.mark.parametrize("text", [30_000 * "." + "x", 30_000 * "\n", 30_000 * "1,", 30_000 * "- \n", 30_000 * "* "])
def test_our_own_patterns_take_linear_time(text):
    before = time.process_time()
    constraints.num_sentences(text), constraints.num_bullets(text), metrics.final_number(text), judge_ask.parse(text)
    assert time.process_time() - before < 2


def test_a_schema_elsewhere_is_not_fetched(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"$ref": "https://example.org/schema.json"}))
    with pytest.raises(DataError, match="refers to a schema that is not in it"):
        json_answers.checker(tmp_path / "schema.json")("{}", "")
    inside = {"$ref": "#/$defs/code", "$defs": {"code": {"type": "string"}}}  # control
    (tmp_path / "schema.json").write_text(json.dumps(inside))
    assert json_answers.checker(tmp_path / "schema.json")('"A41"', "") == 1.0


def test_the_run_file_knows_the_metrics_that_there_are():
    from common.run.schema.tasks import LABEL_METRICS, Metric

    assert {*get_args(Metric)} == {*metrics.PER_ROW, "json", *LABEL_METRICS}


LONG = (
    "\n",
    " ",
    "1111 ",
    "1 ",
    "- ",
    "* ",
    "\t\n",
    " \n",
    "```",
    "$",
    "(",
    "a.",
    "1,",
    "111-111-1111 ",
    "born ",
    "+49 30 ",
)


@pytest.mark.parametrize(
    "judged",
    [
        constraints.num_bullets,
        constraints.num_sentences,
        judge_ask.parse,
        rewards.code_of,
        lambda text: metrics.rouge_l(text, text),
        lambda text: metrics.token_f1(text, text),
    ],
    ids=["bullets", "sentences", "verdict", "fence", "rouge-l", "f1"],
)
def test_the_time_of_a_long_answer_grows_with_its_length(judged):
    """20,000 newlines took 15 s. A pattern that tries every place from every place needs 100 times as long for 10."""

    def seconds(unit: str, num_characters: int) -> float:
        text, began = (unit * num_characters)[:num_characters], time.process_time()
        judged(text)
        return time.process_time() - began

    for unit in LONG:
        assert seconds(unit, 20_000) < 0.05 + 40 * seconds(unit, 2_000), repr(unit)


def test_control_the_pattern_for_bullets_that_also_crosses_lines_does_not():
    def seconds(num_characters: int) -> float:
        began = time.process_time()
        re.findall(r"^\s*[-*]\s+\S", "\n" * num_characters, flags=re.MULTILINE)
        return time.process_time() - began

    assert seconds(4_000) > 0.05 + 10 * seconds(400)


@given(st.lists(st.sampled_from("abc"), max_size=20), st.lists(st.sampled_from("abc"), max_size=20))
def test_the_longest_common_subsequence_is_that_of_the_table(found, reference):
    row = [0] * (len(reference) + 1)
    for word in found:
        above, row = row, [0]
        for place, other in enumerate(reference):
            row.append(above[place] + 1 if word == other else max(row[-1], above[place + 1]))
    assert metrics._common_length(found, reference) == row[-1]
