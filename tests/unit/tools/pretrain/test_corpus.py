import itertools

import pytest

from simulations.embedded import records
from tools.pretrain import corpus, houses


@pytest.fixture(scope="module")
def documents():
    return list(itertools.islice(corpus.documents(seed=11), 4000))


def test_the_same_seed_and_stream_give_the_same_documents(documents):
    again = corpus.documents(seed=11)
    assert [next(again) for _ in range(50)] == documents[:50]


@pytest.mark.parametrize(("seed", "stream"), [(12, 0), (11, 1)])
def test_another_seed_or_stream_gives_other_documents(documents, seed, stream):
    other = corpus.documents(seed, stream)
    assert not set(documents[:50]) & {next(other) for _ in range(50)}


def test_no_document_holds_an_answer_of_the_hospitals_tables(documents):
    assert not [text for text in documents if any(answer in text for answer in records.table_answers())]


def test_without_the_filter_some_document_would_hold_one(monkeypatch):
    answers = records.table_answers()
    monkeypatch.setattr(records, "table_answers", frozenset)
    texts = itertools.islice(corpus.documents(seed=11), 20_000)
    assert any(answer in text for text in texts for answer in answers)


def test_no_hospital_writes_its_notes_into_the_corpus(documents):
    text = "".join(documents)
    assert not [row for row in records.generate() if row["input"] in text]


def test_every_conversation_is_closed(documents):
    for text in documents:
        assert text.count("<|im_start|>") == text.count("<|im_end|>\n")


def test_every_kind_of_document_occurs(documents):
    is_chat = [text.startswith("<|im_start|>") for text in documents]
    assert any(is_chat)
    assert not all(is_chat)
    assert any(text.count("<|im_start|>assistant") > 3 for text in documents)


def test_shared_tasks_have_names_of_their_own():
    names = [task.instruction for task in houses.shared_tasks()]
    assert len(set(names)) == houses.NUM_SHARED
    assert not {records.TRIAGE, records.FORMULARY} & set(names)
