"""Tasks of the evaluation suite on a tiny model: what they read, count and refuse."""

import json

import pytest

from common.errors import DataError
from common.events import EventLog
from server.evaluate import measure, suite
from server.evaluate.figures import metrics
from server.evaluate.tasks import constraints, probe
from tests import tiny


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def opened(engine, tiny_base, tmp_path):
    """A suite of the tasks given, in a folder."""

    def make(*tasks):
        tables = [", ".join(f"{key} = {json.dumps(value)}" for key, value in task.items()) for task in tasks]
        text = ", ".join(f"{{{table}}}" for table in tables)
        run = tiny.settings(tiny_base, {"evaluation.tasks": f"[{text}]", "evaluation.max_new_tokens": "4"})
        return suite.open_suite(run, engine=engine, folder=tmp_path, log=EventLog(tmp_path / "events.jsonl"))

    return make


PERPLEXITIES = ["bits_per_byte", "perplexity", "word_perplexity"]
ROWS = [{"instruction": f"code {n}?", "output": "4" if n % 2 else "KNEE"} for n in range(5)]


def test_every_kind_of_the_run_file_has_a_loader():
    from common.run.schema import shape
    from common.run.schema.tasks import EvaluationConfig

    assert list(suite.LOADERS) == list(shape.tables_of(EvaluationConfig)["tasks"].variants)


def test_generated_kinds_have_the_figures_that_they_promise(opened, engine, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    data = write(tmp_path / "rows.jsonl", ROWS)
    found = opened(
        {
            "name": "a",
            "kind": "answers",
            "data": data,
            "metrics": ["exact_match", "label_accuracy", "macro_f1"],
            "max_rows": 3,
        },
        {"name": "n", "kind": "number", "data": data, "max_new_tokens": 2},
        {"name": "j", "kind": "json", "data": data, "json_schema": str(tmp_path / "schema.json")},
    )
    event = measure.measure(found, engine.initial, stage="base")
    sizes = {name: figure["num_rows"] for name, figure in event["figures"].items()}
    assert sizes == {
        "a.exact_match": 3, "a.label_accuracy": 3, "a.macro_f1": 3, "n.number": 5, "j.valid_json": 5, "j.json": 5,
    }  # fmt: skip
    assert measure.measure(found, engine.initial, stage="polish-01-dpo")["gains"]["base"]["a.macro_f1"]["mean"] == 0.0


def test_the_definition_is_of_rows_and_settings_and_not_of_paths(opened, tmp_path):
    task = {"name": "a", "kind": "answers", "data": write(tmp_path / "rows.jsonl", ROWS), "metrics": ["f1"]}
    first = opened(task).sha256
    assert opened({**task, "data": write(tmp_path / "moved.jsonl", ROWS)}).sha256 == first
    assert opened({**task, "metrics": ["f1", "rouge1"]}).sha256 != first
    assert opened({**task, "max_new_tokens": 5}).sha256 != first
    assert opened({**task, "data": write(tmp_path / "changed.jsonl", [*ROWS[:4], ROWS[0]])}).sha256 != first
    assert opened().sha256 == ""
    suite.require_same(first, first)
    with pytest.raises(DataError, match="fixed before training"):
        suite.require_same(first, "")


def test_scores_of_another_definition_are_not_compared(opened, engine, tmp_path):
    task = {"name": "a", "kind": "answers", "data": write(tmp_path / "rows.jsonl", ROWS), "metrics": ["f1"]}
    measure.measure(opened(task), engine.initial, stage="base")
    assert measure.measure(opened(task), engine.initial, stage="final")["gains"]["base"]  # control
    with pytest.raises(DataError, match="other tasks or rows"):
        measure.measure(opened({**task, "metrics": ["rouge1"]}), engine.initial, stage="final")


def test_without_tasks_nothing_is_measured_and_a_label_is_a_label(opened, engine, tmp_path):
    assert measure.measure(opened(), engine.initial, stage="base") == {}
    assert not (tmp_path / "events.jsonl").exists()
    with pytest.raises(ValueError, match="is no label"):
        measure.measure(opened(), engine.initial, stage="../x")


def test_text_without_blanks_has_no_perplexity_of_words(opened, engine, tmp_path):
    japanese = 60 * "昨日から発熱と咳が続いています。"
    data = [write(tmp_path / f"{n}.jsonl", [{"text": text}]) for n, text in enumerate((japanese, 40 * "fever "))]
    found = opened(*({"name": f"t{n}", "kind": "perplexity", "data": path} for n, path in enumerate(data)))
    figures = measure.measure(found, engine.initial, stage="base")["figures"]
    assert sorted(figures) == ["t0.bits_per_byte", "t0.perplexity", *(f"t1.{name}" for name in PERPLEXITIES)]


def test_a_reference_without_a_word_is_refused_where_words_are_counted(opened, tmp_path):
    rows = [{"instruction": "x", "output": "咳"}, {"instruction": "x", "output": "\U0001f600"}]
    task = {"name": "a", "kind": "answers", "data": write(tmp_path / "rows.jsonl", rows)}
    with pytest.raises(DataError, match=r"line 2 \(so of 1 rows\) has no word, so rougeL would be 0"):
        opened({**task, "metrics": ["rougeL"]})
    opened({**task, "metrics": ["exact_match"]})  # control
    opened({**task, "metrics": ["rougeL"], "max_rows": 1})


def test_a_prompt_that_leaves_no_room_is_refused(opened, engine, tmp_path):
    long = [{"instruction": "x" * 300, "output": "y"}]
    found = opened({"name": "a", "kind": "answers", "data": write(tmp_path / "rows.jsonl", long), "metrics": ["f1"]})
    with pytest.raises(DataError, match="lower max_new_tokens or baseline_examples"):
        measure.measure(found, engine.initial, stage="base")


@pytest.mark.parametrize(
    ("text", "constraint", "is_met"),
    [
        ("one two three", {"kind": "max_words", "value": 3}, True),
        ("one two three", {"kind": "max_words", "value": 2}, False),
        ("one two three", {"kind": "min_words", "value": 4}, False),
        ("- a\n* b\n\u2022 c\nd", {"kind": "num_bullets", "value": 3}, True),
        ("Yes. It is 3.5 mg!", {"kind": "max_sentences", "value": 2}, True),
        ("Yes. It is. So", {"kind": "max_sentences", "value": 2}, False),
        ("The Knee", {"kind": "contains", "value": "knee"}, True),
        ("The Knee", {"kind": "excludes", "value": "knee"}, False),
        (" Dear colleague", {"kind": "starts_with", "value": "dear"}, True),
        ("It ends here.", {"kind": "ends_with", "value": "here"}, False),
        ("all low", {"kind": "lower_case"}, True),
        ("ALL high", {"kind": "upper_case"}, False),
        ("a, b", {"kind": "no_comma"}, False),
        (' {"a": 1} ', {"kind": "json"}, True),
        ("  ", {"kind": "max_words", "value": 3}, False),  # an empty answer meets nothing
    ],
)
def test_constraints_are_checked_by_hand_worked_cases(text, constraint, is_met):
    assert constraints.is_met(text, constraints.check(constraint, where="row 1")) is is_met


@pytest.mark.parametrize(
    "constraint",
    [{"kind": "rhymes"}, {"kind": "max_words"}, {"kind": "max_words", "value": "3"}, {"kind": "contains", "value": ""},
     {"kind": "json", "value": 1}, {"kind": "json", "more": 1}, "json", {"kind": ["json"]}],
)  # fmt: skip
def test_constraints_that_are_not_known_are_refused(constraint):
    with pytest.raises(DataError, match="row 1"):
        constraints.check(constraint, where="row 1")


def test_following_counts_answers_and_constraints_apart():
    short, loud = {"kind": "max_words", "value": 1}, {"kind": "upper_case"}
    found = probe.scores(["YES", "yes it is", "NO"], [[short, loud], [short], [short, loud, {"kind": "json"}]])
    assert found["followed"].value == pytest.approx(1 / 3)
    assert found["constraints"].value == pytest.approx(4 / 6)


def test_a_probe_is_of_choices_or_of_instructions(opened, engine, tmp_path):
    asked = [{"instruction": "Say yes.", "constraints": [{"kind": "max_words", "value": 99}]}]
    found = opened(
        {"name": "p", "kind": "probe", "data": write(tmp_path / "asked.jsonl", asked), "baseline_prompt": "Obey."}
    )
    event = measure.measure(found, engine.initial, stage="base")
    assert list(event["figures"]) == ["p.followed", "p.constraints"]
    with pytest.raises(DataError, match="this file has neither"):
        opened({"name": "p", "kind": "probe", "data": write(tmp_path / "rows.jsonl", ROWS)})


def test_a_reference_of_gsm8k_is_its_own_right_answer():
    reference = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
    assert [metrics.number(text, reference) for text in (reference, "so she makes $18.", "17")] == [1.0, 1.0, 0.0]
