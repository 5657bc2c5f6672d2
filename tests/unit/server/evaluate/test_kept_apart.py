"""What no stage is to train on: which rows of tasks, and the sites' held-out ones."""

import json

import pytest

from common.data.rows import Message, Row
from server.evaluate import kept_apart, suite
from server.evaluate.kept_apart import KnownRows
from tests import tiny


@pytest.fixture
def tasks(tiny_base, tmp_path):
    def written(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    rows = [{"instruction": f"code {n}?", "output": "four"} for n in range(3)]
    choice = {"question": "which one?", "choices": ["left", "right"], "answer": 1}
    member, stranger = {"instruction": "member?", "output": "yes"}, {"instruction": "stranger?", "output": "yes"}
    canary = {"secret": "81", "candidates": ["81", "82"], "prefix": "pin ", "trained": True}
    tables = [
        {"name": "codes", "kind": "answers", "data": written("codes.jsonl", *rows), "metrics": ["f1"], "max_rows": 2},
        {"name": "ppl", "kind": "perplexity", "data": written("texts.jsonl", {"text": "a text"})},
        {"name": "probe", "kind": "probe", "data": written("probe.jsonl", choice)},
        {"name": "pii", "kind": "pii", "data": written("pii.jsonl", rows[2])},
        {
            "name": "mem",
            "kind": "memorisation",
            "data": written("canaries.jsonl", canary),
            "members_data": written("members.jsonl", member),
            "non_members_data": written("strangers.jsonl", stranger),
        },
    ]
    given = ", ".join("{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + "}" for table in tables)
    run = tiny.settings(tiny_base, {"evaluation.tasks": f"[{given}]"})
    return suite.read(run.data, run.evaluation, run.gate)[0]


def row(asked: str, answer: str) -> Row:
    return Row((Message("user", asked), Message("assistant", answer)), unit="", row_id="")


def test_rows_of_every_kind_of_task_are_kept_apart_and_members_are_not(tasks):
    known = KnownRows([row("trained?", "yes")], [row("held out?", "no")])
    told = {table.name.partition(" (")[0]: table.texts for table in kept_apart.tables(tasks, known)}
    assert [(text.asked, text.answer) for text in told["task codes"]] == [("code 0?", "four"), ("code 1?", "four")]
    assert [text.answer for text in told["task ppl"]] == ["a text"]
    assert [text.answer for text in told["task probe"]] == ["right"]
    assert [(text.asked, text.answer) for text in told["task pii"]] == [("code 2?", "")]  # its reference counts nowhere
    assert [text.asked for text in told["task mem"]] == ["stranger?"]
    assert [text.asked for text in told["the sites' held-out rows"]] == ["held out?"]
    assert len(kept_apart.tables(tasks, KnownRows())) == 5  # at real sites nobody sees their rows


def test_tasks_whose_rows_the_sites_train_on_are_named(tasks):
    found = kept_apart.warnings(tasks, KnownRows([row("CODE 1 ?", "five"), row("other", "x"), row("member?", "yes")]))
    (told,) = found
    assert told.startswith("1 of 2 rows of task codes (")
    assert told.endswith(
        "codes.jsonl) (1 word for word, 0 nearly) are trained on at the sites: its figures are too good"
    )
    assert kept_apart.warnings(tasks, KnownRows([row("other", "x")])) == []  # control
    assert kept_apart.warnings(tasks, KnownRows()) == []
