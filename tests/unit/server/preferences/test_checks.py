"""What the checks find, each with data in which there is nothing to find."""

import json
import random

import pytest

from common.data import near
from server.preferences import checks
from server.preferences.checks import check
from tests.samples import runs

CANARY = "Zyxwvut"


def written(folder, rows, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(number, *, longer=None):
    """Pairs of one length each, or with the better answer longer in the first `longer` of them."""
    for place in range(number):
        gain = (1 if place < longer else -1) if longer is not None else 0
        yield {
            "prompt": f"{CANARY} case{place} of patient{place * 7}",
            "chosen": "y" * (10 + gain) + f" {place:04}",
            "rejected": "n" * 10 + f" {place:04}",
        }


def statuses(report):
    return {result.name: result.status for result in report.results}


def found(report, name):
    return next(result for result in report.results if result.name == name)


def test_a_clean_file_has_no_finding(tmp_path):
    report = check(written(tmp_path, pairs(20)), held_out=written(tmp_path, list(pairs(40))[20:], "test.jsonl"))
    assert set(statuses(report).values()) <= {"ok", "skipped"}
    assert report.exit_code == 0
    assert report.figures["num_rows"] == report.figures["num_prompts"] == 20


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda row: {**row, "rejected": row["chosen"] + "  "}, "identical pairs"),
        (lambda row: {**row, "chosen": ""}, "empty sides"),
        (lambda row: {**row, "chosen": 7}, "unusable rows"),
    ],
)
def test_a_spoilt_row_is_found_and_named_without_its_text(tmp_path, change, name):
    rows = list(pairs(8))
    rows[4] = change(rows[4])
    report = check(written(tmp_path, rows))
    result = found(report, name)
    assert (result.status, report.exit_code) == ("failed", checks.EXIT_FAILED)
    assert "pairs.jsonl line 5" in result.found
    assert result.remedy
    assert CANARY not in json.dumps(report.as_dict())


def test_a_repeated_row_and_a_reversed_one_are_told_apart(tmp_path):
    first = next(iter(pairs(1)))
    reversed_ = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    repeated = check(written(tmp_path, [first, {**first, "prompt": first["prompt"].replace(" ", "  ")}]))
    assert (statuses(repeated)["duplicates"], statuses(repeated)["contradictions"]) == ("warning", "ok")
    contrary = check(written(tmp_path, [first, reversed_]))
    assert (statuses(contrary)["duplicates"], statuses(contrary)["contradictions"]) == ("ok", "warning")
    assert "2 rows" in found(contrary, "contradictions").found
    assert contrary.exit_code == checks.EXIT_WARNINGS


def test_an_answer_of_some_words_in_its_prompt_is_a_leak_and_a_short_one_is_chance(tmp_path):
    long = {
        "prompt": "Note: give Oral Iron once a day, and ask.",
        "chosen": "Give oral iron once a day,",
        "rejected": "No.",
    }
    short = {"prompt": "Yes or no?", "chosen": "Yes", "rejected": "no?"}
    assert "1 the chosen one" in found(check(written(tmp_path, [long])), "leaked answers").found
    assert statuses(check(written(tmp_path, [short])))["leaked answers"] == "ok"
    part = {**long, "prompt": "Note: give oral iron once a daytime, and ask."}  # control: not the whole last word
    assert statuses(check(written(tmp_path, [part])))["leaked answers"] == "ok"


def test_length_bias_is_the_hand_worked_one(tmp_path):
    report = check(written(tmp_path, pairs(10, longer=9)))
    bias = report.figures["length_bias"]
    assert bias["share"] == 0.9
    assert bias["p_value"] == pytest.approx(22 / 1024)  # 2 x (1 + 10) / 2^10
    assert bias["mean_gain_chars"] == pytest.approx(0.8)  # (9 - 1) / 10
    assert found(report, "length bias").status == "warning"
    assert "not longer" in found(report, "length bias").remedy
    shorter = check(written(tmp_path, pairs(10, longer=1)))
    assert "not shorter" in found(shorter, "length bias").remedy
    even = check(written(tmp_path, pairs(10, longer=5)))  # control
    assert found(even, "length bias").status == "ok"


@pytest.mark.parametrize(
    ("num_good", "num_bad", "status"),
    [(4, 3, "ok"), (3, 4, "ok"), (5, 3, "warning"), (1, 4, "warning"), (5, 0, "failed")],
)
def test_labels_are_held_against_the_ratio_that_trl_advises(tmp_path, num_good, num_bad, status):
    labels = [True] * num_good + [False] * num_bad
    rows = [{"prompt": f"Why {k}?", "completion": f"So {k}.", "label": label} for k, label in enumerate(labels)]
    report = check(written(tmp_path, rows))
    assert found(report, "label balance").status == status
    assert (report.kind, report.figures["num_good"]) == ("ratings", num_good)


def test_one_answer_called_good_and_bad_is_a_contradiction(tmp_path):
    rows = [{"prompt": "Why?", "completion": "So.", "label": label} for label in (True, False)]
    assert statuses(check(written(tmp_path, rows)))["contradictions"] == "warning"


def test_held_out_prompts_that_training_saw_are_found(tmp_path):
    words = "the patient asks whether the new tablets may be taken together with grapefruit juice in the evening"
    train = written(tmp_path, [{"prompt": words, "chosen": "No.", "rejected": "Yes."}])
    kept = [{"prompt": text, "chosen": "A.", "rejected": "B."} for text in (words.upper(), "May I drive a car today?")]
    report = check(train, held_out=written(tmp_path, kept, "test.jsonl"))
    assert "test.jsonl line 1" in found(report, "held-out overlap").found
    assert found(report, "held-out overlap").status == "warning"
    exact = written(tmp_path, [{"prompt": words, "chosen": "A.", "rejected": "B."}], "test.jsonl")
    assert found(check(train, held_out=exact), "held-out overlap").status == "failed"


def test_prefix_filtering_finds_what_comparing_all_finds():
    draws = random.Random(3)
    texts = [" ".join(draws.choices("abcdef", k=draws.randint(1, 9))) for _ in range(120)]
    ours, theirs = texts[:60], texts[60:]
    sets = list(map(runs.shingles, theirs))
    for least in (0.5, 0.8, 1.0):
        slow = [k for k, text in enumerate(ours) if any(runs.similarity(runs.shingles(text), s) >= least for s in sets)]
        assert near.find(ours, theirs, min_similarity=least) == slow
    assert 0 < len(near.find(ours, theirs, min_similarity=0.5)) < 60  # control: neither nothing nor everything


def test_similarity_is_the_hand_worked_one():
    one, other = runs.shingles("a b c d"), runs.shingles("A, b c e!")
    assert one == {"a b c", "b c d"}
    assert runs.similarity(one, other) == pytest.approx(1 / 3)
