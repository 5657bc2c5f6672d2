from dataclasses import replace

import pytest

from common.data import read
from common.data.rows import Columns
from common.errors import DataError
from common.text import prompts
from tests import tiny

DPO, KTO = Columns(objective="dpo"), Columns(objective="kto")
PAIR = {"prompt": "Code?", "chosen": "A1", "rejected": "B2"}
RATED = {"prompt": "Code?", "completion": "A1", "label": False}
CHAT = [{"role": "user", "content": "Code?"}]


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "fields",
    [
        PAIR,
        {"prompt": CHAT, "chosen": turn("A1"), "rejected": turn("B2")},
        {"prompt": CHAT, "chosen": "A1", "rejected": "B2"},
        {"chosen": [*CHAT, *turn("A1")], "rejected": [*CHAT, *turn("B2")]},
    ],
)
def test_a_pair_is_text_or_messages(fields):
    (row,) = read.to_rows([fields], DPO)
    assert [message.content for message in row.messages] == ["Code?", "A1"]
    assert [message.content for message in row.rejected] == ["Code?", "B2"]
    assert (row.num_context, row.is_desirable, row.unit) == (1, None, "row 1")


def test_both_answers_of_a_pair_are_one_unit():
    rows = read.to_rows(
        [{**PAIR, "patient": value} for value in (7, "7", "8")], Columns(unit="patient", objective="dpo")
    )
    assert [row.unit for row in rows] == ["7", "7", "8"]


def test_rows_of_a_pair_are_those_that_fine_tuning_reads():
    tokenizer = tiny.make_tokenizer()
    (row,) = read.to_rows([{"prompt": CHAT, "chosen": turn("A1"), "rejected": turn("B2")}], DPO)
    (expected,) = read.to_rows([{"prompt": CHAT, "completion": turn("A1")}], Columns())
    other = replace(row, messages=row.rejected)
    ours, worse, theirs = (prompts.encode_whole(item, tokenizer) for item in (row, other, expected))
    assert (ours.input_ids, ours.is_answer) == (theirs.input_ids, theirs.is_answer)
    assert worse.input_ids != theirs.input_ids


def test_a_rating_keeps_its_label_and_its_unit():
    (row,) = read.to_rows([{**RATED, "patient": 7}], Columns(unit="patient", objective="kto"))
    assert (row.messages[-1].content, row.is_desirable, row.rejected, row.unit) == ("A1", False, (), "7")


@pytest.mark.parametrize(
    ("columns", "fields", "expected"),
    [
        (DPO, RATED, "has no column 'chosen' and no column 'rejected' among its 3: for DPO write"),
        (KTO, PAIR, "has no column 'completion' and no column 'label' among its 3: for KTO write"),
        (DPO, PAIR | RATED, "columns of pairs and of ratings"),
        (KTO, {**RATED, "label": "true"}, "'label' is str and not true or false"),
        (DPO, {**PAIR, "rejected": " A1\n"}, "'chosen' and 'rejected' are the same"),
        (DPO, {**PAIR, "rejected": "A1"}, "'chosen' and 'rejected' are the same"),
        (DPO, {**PAIR, "rejected": " "}, "has no answer in 'rejected'"),
        (DPO, {**PAIR, "chosen": 3}, "'chosen' is int and not text"),
        (DPO, {**PAIR, "prompt": None}, "has nothing in 'prompt'"),
        (DPO, {**PAIR, "prompt": CHAT, "rejected": CHAT}, "the last message is not the assistant's"),
        (KTO, {**RATED, "label": 1}, "'label' is int and not true or false"),
        (KTO, {**RATED, "label": None}, "'label' is missing"),
        (Columns(unit="patient", objective="dpo"), PAIR, "no row has the column 'patient'"),
        (Columns(), PAIR, "has no column 'instruction'"),
    ],
)
def test_what_cannot_be_used_is_named_and_never_shown(columns, fields, expected):
    with pytest.raises(DataError) as caught:
        read.to_rows([fields], columns)
    assert expected in str(caught.value)
    assert "A1" not in str(caught.value)
