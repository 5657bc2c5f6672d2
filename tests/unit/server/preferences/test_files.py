"""Preference files: two forms, one reader, and errors that quote nothing."""

import json

import pytest
import trl

from common.data.rows import Message
from common.errors import DataError
from server.preferences import files
from server.preferences.files import Pair, Rated

CANARY = "Zyxwvut-4711"
USER, MODEL = "user", "assistant"


def message(role, content):
    return {"role": role, "content": content}


def written(folder, *rows, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pair_of_texts_is_a_question_and_two_answers(tmp_path):
    path = written(tmp_path, {"id": 1, "prompt": "Why?", "chosen": "So.", "rejected": "No."})
    [pair] = files.read(path)
    assert pair == Pair(
        (Message(USER, "Why?"),),
        (Message(MODEL, "So."),),
        (Message(MODEL, "No."),),
        row_id="pairs.jsonl line 1",
    )


CHAT = [message("system", "Be brief."), message(USER, "Why?")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": [message(MODEL, "So.")], "rejected": [message(MODEL, "No.")]},
        {"prompt": CHAT, "chosen": "So.", "rejected": "No."},
        {"chosen": [*CHAT, message(MODEL, "So.")], "rejected": [*CHAT, message(MODEL, "No.")]},
    ],
)
def test_three_ways_to_write_messages_are_one_pair(tmp_path, row):
    [pair] = files.read(written(tmp_path, row))
    assert pair.prompt == (Message("system", "Be brief."), Message(USER, "Why?"))
    assert (pair.chosen, pair.rejected) == ((Message(MODEL, "So."),), (Message(MODEL, "No."),))


def test_an_implicit_prompt_is_the_one_that_trl_extracts(tmp_path):
    shared = [message(USER, "Why?"), message(MODEL, "What?"), message(USER, "That.")]
    row = {"chosen": [*shared, message(MODEL, "So.")], "rejected": [*shared, message(MODEL, "No.")]}
    [pair] = files.read(written(tmp_path, row))
    assert [vars(turn) for turn in pair.prompt] == trl.extract_prompt(row)["prompt"]


def test_ratings_have_a_label(tmp_path):
    rows = [{"prompt": "Why?", "completion": "So.", "label": label} for label in (True, False)]
    found = files.read(written(tmp_path, *rows))
    assert [row.label for row in found] == [True, False]
    assert (found[0].prompt, found[0].completion) == ((Message(USER, "Why?"),), (Message(MODEL, "So."),))


def test_what_is_written_is_read_back(tmp_path):
    rows = [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": CHAT, "chosen": [message(MODEL, "So.")], "rejected": [message(MODEL, "No.")]},
    ]
    pairs = files.read(written(tmp_path, *rows))
    assert [files.as_fields(pair) for pair in pairs] == rows
    assert files.read(written(tmp_path, *map(files.as_fields, pairs))) == pairs
    rated = Rated(pairs[0].prompt, pairs[0].chosen, False, row_id="")
    assert files.as_fields(rated) == {"prompt": "Why?", "completion": "So.", "label": False}


GOOD = {"prompt": CANARY, "chosen": CANARY + "a", "rejected": CANARY + "b"}
RATED = {"prompt": CANARY, "completion": CANARY, "label": True}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**GOOD, "chosen": ""}, "line 2: has no answer in 'chosen'"),
        ({**GOOD, "rejected": None}, "line 2: has no answer in 'rejected'"),
        ({**GOOD, "prompt": " "}, "line 2: has nothing in 'prompt'"),
        ({**GOOD, "chosen": 3}, "line 2: 'chosen' is int and not text"),
        ({**GOOD, "chosen": [message(MODEL, CANARY)]}, "line 2: has a list in one of 'prompt' and 'chosen'"),
        ({**GOOD, "prompt": [message(USER, CANARY)], "chosen": [message("doctor", CANARY)]}, "line 2: chosen[0] has"),
        (
            {
                "prompt": [message(USER, CANARY)],
                "chosen": [message(USER, CANARY), message(MODEL, "a")],
                "rejected": "b",
            },
            "line 2: 'chosen' does not begin with the assistant's message",
        ),
        ({**GOOD, "prompt": [message(MODEL, CANARY)]}, "line 2: begins with an answer"),
        ({**GOOD, "rejected": f" {GOOD['chosen']}\n"}, "line 2: 'chosen' and 'rejected' are the same"),
    ],
)
def test_an_unusable_pair_is_refused_by_file_and_line(tmp_path, row, told):
    with pytest.raises(DataError) as caught:
        files.read(written(tmp_path, GOOD, row))
    assert f"pairs.jsonl {told}" in str(caught.value)
    assert "Zyx" not in str(caught.value)
    assert files.read(written(tmp_path, GOOD))  # control: the other row alone is fine


@pytest.mark.parametrize("label", [1, "true", None, 0.5])
def test_a_label_is_true_or_false_and_nothing_else(tmp_path, label):
    with pytest.raises(DataError, match="line 2: 'label' is"):
        files.read(written(tmp_path, RATED, {**RATED, "label": label}))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": "a", "chosen": "b"}], "has no column 'rejected'"),
        ([GOOD | RATED], "columns of pairs and of ratings"),
        ([{"chosen": "a", "rejected": "b"}], "are not lists of messages"),
        (
            [
                {
                    "chosen": [message(USER, "a"), message(MODEL, "b")],
                    "rejected": [message(USER, "c"), message(MODEL, "d")],
                }
            ],
            "do not begin with the same message",
        ),
    ],
)
def test_a_file_of_neither_form_is_refused(tmp_path, rows, told):
    with pytest.raises(DataError, match=told):
        files.read(written(tmp_path, *rows))
