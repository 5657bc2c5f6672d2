"""Pairs out of ratings, edits and other tools' exports."""

import json

import pytest

from common.errors import ConfigError, DataError
from server.preferences import build, files, imports

CANARY = "Zyxwvut"


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows))
    return path


def texts(built):
    fields = map(files.as_fields, built.rows)
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in fields]


def scores(*values, prompt="Why?"):
    return [{"prompt": prompt, "completion": f"answer {k}", "score": value} for k, value in enumerate(values)]


def test_every_two_answers_with_different_scores_are_a_pair(tmp_path):
    built = build.from_ratings(written(tmp_path, [*scores(4, 2, 4), *scores(1, prompt="How?")]))
    assert texts(built) == [("Why?", "answer 0", "answer 1"), ("Why?", "answer 2", "answer 1")]
    assert built.as_dict() == {
        "num_read": 4,
        "num_written": 2,
        "left_out": {"ties": 1, "prompts with one answer": 1},
    }


def test_scores_within_the_margin_are_a_tie(tmp_path):
    path = written(tmp_path, scores(1, 1.5, 3))
    assert texts(build.from_ratings(path, margin=0.5)) == [
        ("Why?", "answer 2", "answer 0"),
        ("Why?", "answer 2", "answer 1"),
    ]
    assert len(build.from_ratings(path, margin=0.4).rows) == 3
    with pytest.raises(ConfigError, match="--margin"):
        build.from_ratings(path, margin=float("nan"))


def test_an_answer_that_several_raters_scored_has_their_mean(tmp_path):
    rows = [*scores(1, 2), *scores(5, 2)]  # answer 0: 3, answer 1: 2
    assert texts(build.from_ratings(written(tmp_path, rows))) == [("Why?", "answer 0", "answer 1")]


def test_lists_of_answers_and_scores_are_the_same(tmp_path):
    row = {"prompt": "Why?", "completions": ["answer 0", "answer 1"], "scores": [1, 2]}
    assert texts(build.from_ratings(written(tmp_path, [row]))) == texts(
        build.from_ratings(written(tmp_path, scores(1, 2)))
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CANARY, "completion": CANARY},
        {"prompt": CANARY, "completion": CANARY, "score": "good"},
        {"prompt": CANARY, "completion": CANARY, "score": True},
        {"prompt": CANARY, "completions": [CANARY], "scores": [1, 2]},
        {"prompt": CANARY, "completion": "", "score": 1},
    ],
)
def test_unusable_ratings_are_refused_by_line_and_without_their_text(tmp_path, row):
    with pytest.raises(DataError, match=r"rows\.jsonl line 3") as caught:
        build.from_ratings(written(tmp_path, [*scores(1, 2), row]))
    assert CANARY not in str(caught.value)


def test_an_edit_is_preferred_to_its_draft_and_an_untouched_draft_is_left_out(tmp_path):
    rows = [
        {"prompt": "Letter?", "draft": "Dear sir", "edited": "Dear madam"},
        {"prompt": "Letter?", "draft": "Fine.", "edited": " Fine. \n"},
    ]
    built = build.from_edits(written(tmp_path, rows))
    assert texts(built) == [("Letter?", "Dear madam", "Dear sir")]
    assert built.left_out == {"unchanged drafts": 1}


def test_columns_of_edits_can_be_named(tmp_path):
    (path := tmp_path / "letters.csv").write_text("prompt,model,signed\nLetter?,Dear sir,Dear madam\n")
    assert texts(build.from_edits(path, draft="model", edited="signed")) == [("Letter?", "Dear madam", "Dear sir")]
    with pytest.raises(DataError, match="'edited'"):
        build.from_edits(path, draft="model")


def test_a_file_is_written_once_whole_and_readable(tmp_path):
    built = build.from_ratings(written(tmp_path, scores(1, 2)))
    build.write(built, out := tmp_path / "pairs.jsonl")
    assert [files.as_fields(row) for row in files.read(out)] == [files.as_fields(row) for row in built.rows]
    with pytest.raises(ConfigError, match="exists already"):
        build.write(built, out)
    build.write(built, out, is_overwriting=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl"]


def test_nothing_is_not_written(tmp_path):
    built = build.from_ratings(written(tmp_path, scores(1, 1)))
    with pytest.raises(ConfigError, match="1 ties"):
        build.write(built, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


ANSWERS = {"prompt": "Why?", "one": "So.", "two": "No."}
BETWEEN = ("one", "two")


def argilla_record(*values, question="preference", **changes):
    """A record as `to_json` of Argilla's SDK 2.x writes it."""
    return {
        "id": "6d0b",
        "fields": ANSWERS,
        "metadata": {},
        "suggestions": {question: {"value": ["two", "one"], "score": None, "agent": "a-model"}},
        "responses": {question: [{"value": value, "user_id": f"user-{k}"} for k, value in enumerate(values)]},
        "vectors": {},
        "_server_id": None,
    } | changes


@pytest.mark.parametrize(
    "value",
    [["one", "two"], "one", [{"value": "one", "rank": 1}, {"value": "two", "rank": 2}]],
    ids=["ranking 2.x", "label", "ranking 1.x"],
)
def test_argilla_responses_are_pairs_and_suggestions_are_not(tmp_path, value):
    path = written(tmp_path, [argilla_record(value), argilla_record()], "records.json")
    built = imports.argilla(path, question="preference", prompt="prompt", between=BETWEEN)
    assert texts(built) == [("Why?", "So.", "No.")]
    assert built.left_out["records without a response"] == 1


def test_each_argilla_users_response_counts_and_equal_ranks_are_ties(tmp_path):
    tie = [{"value": "one", "rank": 1}, {"value": "two", "rank": 1}]
    path = written(tmp_path, [argilla_record(["two", "one"], ["one", "two"], tie)], "records.json")
    built = imports.argilla(path, question="preference", prompt="prompt", between=BETWEEN)
    assert texts(built) == [("Why?", "No.", "So."), ("Why?", "So.", "No.")]
    assert built.left_out["ties"] == 1


def test_only_submitted_responses_of_flattened_argilla_records_count(tmp_path):
    row = {
        "id": "6d0b",
        **ANSWERS,
        "preference.responses": [["one", "two"], ["two", "one"]],
        "preference.responses.users": ["a", "b"],
        "preference.responses.status": ["submitted", "draft"],
    }
    built = imports.argilla(written(tmp_path, [row]), question="preference", prompt="prompt", between=BETWEEN)
    assert texts(built) == [("Why?", "So.", "No.")]
    assert built.left_out["responses not submitted"] == 1


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (argilla_record(["one"]), "does not rank the 2 answers"),
        (argilla_record(["one", "three"]), "does not rank"),
        (argilla_record("three"), "ranks none"),
        (argilla_record(5), "ranks none"),
        (argilla_record(responses={"preference": "x"}), "not a list of objects"),
        ({"id": 1, **ANSWERS}, "has no responses to the question"),
        (argilla_record(["one", "two"], fields={"prompt": "Why?", "one": "So."}), "has no field 'two'"),
    ],
)
def test_other_argilla_forms_are_refused_by_row(tmp_path, record, told):
    path = written(tmp_path, [record], "records.json")
    with pytest.raises(DataError, match=told) as caught:
        imports.argilla(path, question="preference", prompt="prompt", between=BETWEEN)
    assert "records.json row 1" in str(caught.value)


def label_studio_task(*sides, cancelled=False):
    """A task as Label Studio's export "JSON" has it, template "Human Preference collection for RLHF"."""
    result = [
        [{"id": "Dx", "type": "pairwise", "value": {"selected": side}, "from_name": "pw", "to_name": "a1,a2"}]
        if side
        else []
        for side in sides
    ]
    return {
        "id": 1,
        "data": {"prompt": "Why?", "answer1": "So.", "answer2": "No."},
        "annotations": [
            {"id": k, "completed_by": k, "was_cancelled": cancelled, "ground_truth": False, "result": item}
            for k, item in enumerate(result)
        ],
        "predictions": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
        "project": 83,
    }


def test_label_studio_annotations_are_pairs_and_predictions_are_not(tmp_path):
    tasks = [label_studio_task("left", "right", None), label_studio_task("left", cancelled=True), label_studio_task()]
    built = imports.label_studio(
        written(tmp_path, tasks, "project.json"), prompt="prompt", between=("answer1", "answer2")
    )
    assert texts(built) == [("Why?", "So.", "No."), ("Why?", "No.", "So.")]
    assert built.left_out == {
        "tasks without an annotation": 1,
        "cancelled annotations": 1,
        "annotations without a choice": 1,
        "equal answers": 0,
    }


def test_label_studios_short_export_is_refused_with_the_remedy(tmp_path):
    short = {"prompt": "Why?", "answer1": "So.", "answer2": "No.", "id": 1, "pw": {"selected": "left"}, "annotator": 1}
    with pytest.raises(DataError, match='export as "JSON", not "JSON-MIN"'):
        imports.label_studio(written(tmp_path, [short]), prompt="prompt", between=("answer1", "answer2"))


def test_what_is_compared_must_be_named(tmp_path):
    path = written(tmp_path, [label_studio_task("left")], "project.json")
    with pytest.raises(ConfigError, match="two different columns"):
        imports.label_studio(path, prompt="prompt", between=("answer1",))
    with pytest.raises(DataError, match="has no field 'b'"):
        imports.label_studio(path, prompt="prompt", between=("answer1", "b"))


def test_answers_that_differ_in_white_space_alone_make_no_pair(tmp_path):
    rated = written(tmp_path, [{"prompt": "Why?", "completions": ["So.", "So.\n", "No."], "scores": [3, 2, 1]}])
    assert texts(built := build.from_ratings(rated)) == [("Why?", "So.", "No."), ("Why?", "So.\n", "No.")]
    assert built.left_out["ties"] == 1
    task = label_studio_task("left")
    task["data"]["answer2"] = " " + task["data"]["answer1"]
    export = written(tmp_path, [task], "project.json")
    built = imports.label_studio(export, prompt="prompt", between=("answer1", "answer2"))
    assert (texts(built), built.left_out["equal answers"]) == ([], 1)
