"""Rows with the same text are found, word for word and nearly, and what only has the same form is not."""

import random
import time

import pytest

from common.data import near, overlap
from common.data.overlap import Text
from common.data.rows import Message, Row
from tests.samples import runs

VISIT = (
    "The patient is a 64 year old woman who came in with shortness of breath for three days, worse at night, and "
    "swelling of both legs. She takes furosemide and has missed the last week of it. The lungs have crackles at both "
    "bases and the heart is regular."
)
WHERE = ("arm", "leg", "back", "neck", "head", "hand", "foot", "knee", "hip", "ear")
OTHER = (
    "A 23 year old man fell from a ladder and hurt his left wrist. There is swelling and a dinner fork deformity, "
    "feeling in the hand is whole, and the film shows a fracture of the distal radius without displacement."
)


def places(texts, others):
    found = overlap.find([Text(*text) for text in texts], [Text(*text) for text in others])
    return sorted(found.exact), sorted(found.near)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ((VISIT, "Heart failure."), ([0], [])),
        ((VISIT.upper().replace(" ", "  \n"), "heart failure"), ([0], [])),
        ((VISIT.replace("breath", "bre\u200bath").replace("fi", "\ufb01"), "Heart failure."), ([0], [])),
        ((VISIT.replace("64", "65"), "Heart failure."), ([], [0])),
        ((VISIT, "Acute decompensation."), ([0], [])),  # the same is asked
        ((VISIT[:120], "Heart failure."), ([], [])),
        ((OTHER, "Heart failure."), ([], [])),  # the same label
    ],
)
def test_a_row_is_found_word_for_word_and_nearly(one, expected):
    assert places([one], [(VISIT, "Heart failure."), ("Anything else?", "No.")]) == expected


@pytest.mark.parametrize(
    ("one", "other"), [("患者は三日前から息切れが強く夜間に悪化している", "\U0001f600 \U0001f601"), ("é", "e")]
)
def test_texts_of_other_scripts_and_of_signs_are_themselves(one, other):
    assert places([(one, "")], [(one, "")]) == ([0], [])
    assert places([(one, "")], [(other, "")]) == ([], [])  # control


def test_a_character_more_is_nearly_the_same_where_words_have_no_blanks():
    text = "患者は三日前から息切れが強く夜間に悪化しているため本日救急外来を受診した"
    assert places([(text + "。高", "")], [(text, "")]) == ([], [0])


def test_what_all_rows_begin_with_is_their_form_and_no_text():
    form = (
        "You are a careful clinician. Read the message of the patient and name the one department that should see it."
    )
    texts = [
        (f"{form} {word} aches", "surgery")
        for word in ["arm", "leg", "back", "neck", "head", "hand", "foot", "knee", "hip", "ear"]
    ]
    fixed = [("Write a letter to a colleague about the visit.", f"letter {n} of {n}") for n in range(30)]
    for table in (texts, fixed):
        assert len(set(overlap.groups([Text(*text) for text in table]))) == len(table)
        assert places(table[:1], table[1:]) == ([], [])
    assert len(set(overlap.groups([Text(*texts[0])] * 2))) == 1  # control


def test_groups_reach_through_others_and_rows_without_text_stand_alone():
    words = [f"word{number}" for number in range(44)]
    chain = [" ".join(words[start : start + 36]) for start in range(0, 8, 2)]
    texts = [Text(text) for text in (*chain, OTHER)] + [Text(""), Text("")]
    assert overlap.groups(texts) == [0, 0, 0, 0, 4, 5, 6]
    assert not overlap.find([texts[0]], [texts[3]]).near  # control: its ends are not alike


def test_groups_are_those_of_comparing_every_two():
    draws = random.Random(3)
    texts = [" ".join(draws.choices("abcdef", k=draws.randint(1, 9))) for _ in range(120)]
    sets = list(map(runs.shingles, texts))
    pairs = [(i, j) for i in range(120) for j in range(i) if runs.similarity(sets[i], sets[j]) >= 0.5]
    assert near.groups(texts, min_similarity=0.5) == near.merged(120, pairs)
    assert 1 < len(set(near.groups(texts, min_similarity=0.5))) < 120  # control


def test_the_system_message_is_not_what_is_asked():
    turns = (Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So."))
    assert overlap.text_of(Row(turns, unit="", row_id="")) == Text("Why?", "So.")


def test_counts_are_of_each_site_s_held_out_rows():
    def row(text):
        return Row((Message("user", text), Message("assistant", "Yes.")), unit="", row_id="")

    found = overlap.between(
        {"north": [row(VISIT), row("new?")], "south": [row(OTHER.replace("23", "24"))]},
        {"north": [row(OTHER)], "south": [row(VISIT)]},
    )
    assert found == {"north": overlap.OverlapCounts(2, 1, 0), "south": overlap.OverlapCounts(1, 0, 1)}
    assert overlap.total(found.values()) == overlap.OverlapCounts(3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "templates"])
def test_twenty_thousand_rows_take_seconds(kind):
    draws = random.Random(0)
    words = [f"w{number}" for number in range(5000)]
    if kind == "copies":
        once = [" ".join(draws.choices(words, k=200)) for _ in range(10_000)]
        texts = [Text(text) for text in once + once]
    else:
        texts = [
            Text(
                f"{draws.choice(words[:300])} has {draws.choice(words)} and takes {draws.randint(1, 99)} mg since today"
            )
            for _ in range(20_000)
        ]
    started = time.process_time()
    found = overlap.groups(texts)
    assert time.process_time() - started < 20
    assert len(set(found)) <= 10_000 if kind == "copies" else len(set(found)) > 15_000
