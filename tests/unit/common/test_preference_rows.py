import pytest

from common.data import read
from common.errors import DataError
from common.rows import Columns

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
    ],
)
def test_a_pair_is_text_or_messages(fields):
    (row,) = read.to_rows([fields], DPO)
    assert [message.content for message in row.messages] == ["Code?", "A1"]
    assert [message.content for message in row.rejected] == ["Code?", "B2"]
    assert (row.num_context, row.is_desirable, row.unit) == (1, None, "row 1")


def test_a_rating_keeps_its_label_and_its_unit():
    (row,) = read.to_rows([{**RATED, "patient": 7}], Columns(unit="patient", objective="kto"))
    assert (row.messages[-1].content, row.is_desirable, row.rejected, row.unit) == ("A1", False, (), "7")


@pytest.mark.parametrize(
    ("columns", "fields", "expected"),
    [
        (DPO, RATED, "has no column 'chosen' and no column 'rejected' among its 3, which training.objective = 'dpo'"),
        (KTO, PAIR, "has no column 'completion' and no column 'label'"),
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
