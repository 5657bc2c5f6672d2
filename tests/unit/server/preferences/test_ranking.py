"""Blind ranking: sides, keys, answers that survive, win rates and agreement."""

import json
import os
from collections import Counter

import pytest

from common.errors import ConfigError, DataError, StorageError
from server.preferences import agreement, answers, blind, outcome, terminal
from server.preferences import files as preferences
from server.preferences.answers import Session


def candidates(folder, number):
    folder.mkdir(exist_ok=True)
    path = folder / "answers.jsonl"
    rows = [{"prompt": f"Why {k}?", "base": f"base says {k}", "tuned": f"tuned says {k}"} for k in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(folder, number=6, *, seed=7):
    tasks, key = folder / "rate" / "tasks.jsonl", folder / "key.json"
    blind.make(candidates(folder, number), between=("base", "tuned"), seed=seed, tasks=tasks, key=key)
    return tasks, key


def rate(tasks, path, rater, choose):
    """Answer every task as `choose(task)` says; None ends early."""
    with Session(tasks, path, rater=rater) as session:
        while session.current and (choice := choose(session.current)):
            session.answer(session.current.number, choice)
    return path


def prefer(word):
    """A rater who knows what they want: the side that holds a word."""
    return lambda task: "left" if word in task.left[0].content else "right"


def test_half_of_the_tasks_have_the_first_candidate_left_and_the_key_says_which(tmp_path):
    tasks, key_file = prepared(tmp_path, 20)
    key = blind.read_key(key_file, tasks)
    assert Counter(key.is_swapped) == {True: 10, False: 10}
    assert sorted(key.rows) == list(range(1, 21))
    for task, is_swapped, row in zip(blind.read_tasks(tasks), key.is_swapped, key.rows, strict=True):
        assert task.prompt[0].content == f"Why {row - 1}?"
        assert task.left[0].content == f"{'tuned' if is_swapped else 'base'} says {row - 1}"
    assert key_file.stat().st_mode & 0o077 == 0


def test_the_seed_alone_decides_sides_and_order(tmp_path):
    made = [prepared(tmp_path / str(k), seed=seed) for k, seed in enumerate((7, 7, 8))]
    first, again, other = (tasks.read_bytes() for tasks, _ in made)
    assert first == again
    assert first != other


def test_tasks_tell_nothing_of_candidates(tmp_path):
    tasks, _ = prepared(tmp_path)
    fields = [json.loads(line) for line in tasks.read_text().splitlines()]
    assert all(row.keys() == {"prompt", "left", "right"} for row in fields)


def test_rows_with_two_equal_answers_are_not_shown_and_are_counted(tmp_path):
    source = candidates(tmp_path, 5)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[1]["tuned"] = rows[1]["base"]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks, key = tmp_path / "rate" / "tasks.jsonl", tmp_path / "key.json"
    made = blind.make(source, between=("base", "tuned"), seed=2, tasks=tasks, key=key)
    assert (sorted(made.rows), made.num_identical) == ([1, 3, 4, 5], 1)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", prefer("tuned"))
    found = outcome.unblind(tasks, key_file=key, answer_files=[path])
    assert (found.all_raters.num_second, found.num_identical) == (4, 1)
    assert "both answers being equal: 1" in " ".join(outcome.in_words(found))
    source.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="the same in every row"):
        blind.make(source, between=("base", "tuned"), seed=2, tasks=tmp_path / "b" / "t.jsonl", key=tmp_path / "b.json")


def test_the_key_lies_apart_and_is_never_overwritten(tmp_path):
    source = candidates(tmp_path, 2)
    with pytest.raises(ConfigError, match="another folder"):
        blind.make(source, between=("base", "tuned"), seed=1, tasks=tmp_path / "t.jsonl", key=tmp_path / "k.json")
    tasks, key = prepared(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        blind.make(source, between=("base", "tuned"), seed=1, tasks=tmp_path / "new" / "t.jsonl", key=key)
    with pytest.raises(ConfigError, match="two different columns"):
        blind.make(source, between=("base", "base"), seed=1, tasks=tasks, key=key)


def test_answers_are_on_the_disk_one_by_one_and_a_later_session_goes_on(tmp_path):
    tasks, _ = prepared(tmp_path)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda task: "tie" if task.number < 3 else None)
    assert len(path.read_text().splitlines()) == 3
    with Session(tasks, path, rater="anna") as session:
        assert (session.num_done, session.current.number) == (2, 3)


@pytest.mark.parametrize("num_bytes", [1, 5, 20])
def test_a_line_that_broke_off_in_a_crash_is_asked_again(tmp_path, num_bytes):
    tasks, _ = prepared(tmp_path)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda task: "tie" if task.number < 4 else None)
    os.truncate(path, path.stat().st_size - num_bytes)
    assert set(answers.read(path).choices) == {1, 2}
    with Session(tasks, path, rater="anna") as session:
        assert session.current.number == 3
        session.answer(3, "left")
    assert answers.read(path).choices == {1: "tie", 2: "tie", 3: "left"}


def test_an_undone_answer_is_asked_again_and_its_line_stays(tmp_path):
    tasks, _ = prepared(tmp_path)
    with Session(tasks, path := tmp_path / "anna.jsonl", rater="anna") as session:
        session.answer(1, "left")
        session.answer(2, "skip")
        session.undo()
        assert session.current.number == 2
        session.undo()
        assert (session.current.number, session.last) == (1, None)
        with pytest.raises(ValueError, match="no answer to take back"):
            session.undo()
        session.answer(1, "right")
    assert answers.read(path).choices == {1: "right"}
    assert len(path.read_text().splitlines()) == 6


def test_only_the_current_task_can_be_answered(tmp_path):
    tasks, _ = prepared(tmp_path)
    with Session(tasks, tmp_path / "anna.jsonl", rater="anna") as session:
        for number, choice in ((2, "left"), (1, "best")):
            with pytest.raises(ValueError, match="not an answer"):
                session.answer(number, choice)
        assert session.num_done == 0


def test_a_file_of_answers_is_one_raters_to_one_set_of_tasks_in_one_session(tmp_path):
    tasks, _ = prepared(tmp_path)
    other, _ = prepared(tmp_path / "other", seed=8)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda _: None)
    with pytest.raises(ConfigError, match="another rater's"):
        Session(tasks, path, rater="ben")
    with pytest.raises(DataError, match="other tasks"):
        Session(other, path, rater="anna")
    with pytest.raises(ConfigError, match="--rater"):
        Session(tasks, path, rater="../anna")
    with Session(tasks, path, rater="anna"), pytest.raises(StorageError, match="another session"):
        Session(tasks, path, rater="anna")


@pytest.mark.parametrize("line", ["{}", '{"task": 1, "answer": "best"}', '{"task": 9, "answer": "undo"}', "[1]", "x"])
def test_a_damaged_file_of_answers_is_refused_by_line(tmp_path, line):
    tasks, _ = prepared(tmp_path)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda task: "tie" if task.number < 2 else None)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"anna\.jsonl line"):
        answers.read(path)


def test_a_rater_who_prefers_a_candidate_is_found_out_and_one_who_prefers_a_side_is_not(tmp_path):
    tasks, key = prepared(tmp_path, 40)
    knowing = rate(tasks, tmp_path / "anna.jsonl", "anna", prefer("tuned"))
    found = outcome.unblind(tasks, key_file=key, answer_files=[knowing])
    assert (found.all_raters.num_second, found.all_raters.num_first) == (40, 0)
    assert found.all_raters.win_rate.low == pytest.approx(0.9124, abs=1e-4)  # 40 of 40, Wilson: 1 / (1 + z^2 / 40)
    chosen = {pair.chosen[0].content.split()[0] for pair in found.built.rows}
    assert chosen == {"tuned"}
    lazy = rate(tasks, tmp_path / "ben.jsonl", "ben", lambda _: "left")  # control
    found = outcome.unblind(tasks, key_file=key, answer_files=[lazy])
    assert found.all_raters.win_rate.value == 0.5
    told = " ".join(outcome.in_words(found))
    assert "more uneven than chance" in told
    assert "neither is shown" in told


def test_ties_and_skips_make_no_pairs_and_the_result_is_a_preference_file(tmp_path):
    tasks, key = prepared(tmp_path, 4)
    given = iter(["tie", "skip", "left", "right"])
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda _: next(given))
    found = outcome.unblind(tasks, key_file=key, answer_files=[path])
    assert (found.all_raters.num_ties, found.all_raters.num_skipped, len(found.built.rows)) == (1, 1, 2)
    shown = blind.read_tasks(tasks)
    assert [pair.chosen for pair in found.built.rows] == [shown[2].left, shown[3].right]
    assert [pair.rejected for pair in found.built.rows] == [shown[2].right, shown[3].left]
    fields = [preferences.as_fields(pair) for pair in found.built.rows]
    assert all(isinstance(row["prompt"], str) and row.keys() == {"prompt", "chosen", "rejected"} for row in fields)


def test_the_majority_decides_and_an_even_vote_is_a_tie(tmp_path):
    tasks, key = prepared(tmp_path, 4)
    wishes = {"anna": ["tuned"] * 4, "ben": ["tuned", "base", "base", None], "cy": ["base", "base", None, None]}
    files = []
    for rater, words in wishes.items():
        given = iter(words)
        path = tmp_path / f"{rater}.jsonl"
        files.append(rate(tasks, path, rater, lambda task, g=given: prefer(w)(task) if (w := next(g)) else "skip"))
    found = outcome.unblind(tasks, key_file=key, answer_files=files)
    verdicts = found.all_raters
    assert (verdicts.num_second, verdicts.num_first, verdicts.num_ties) == (2, 1, 1)  # 2:1, 1:2, 1:1, 1:0
    assert len(found.agreements) == 3
    assert set(found.by_rater) == set(wishes)


def test_a_key_of_other_tasks_is_refused(tmp_path):
    tasks, key = prepared(tmp_path)
    other, other_key = prepared(tmp_path / "other", seed=8)
    path = rate(tasks, tmp_path / "anna.jsonl", "anna", lambda _: "tie")
    with pytest.raises(DataError, match="is not the key"):
        outcome.unblind(tasks, key_file=other_key, answer_files=[path])
    with pytest.raises(DataError, match="is not what the raters answered"):
        outcome.unblind(other, key_file=other_key, answer_files=[path])
    key.write_text("{}")
    with pytest.raises(DataError, match="not a readable key"):
        outcome.unblind(tasks, key_file=key, answer_files=[path])


def cells(table):
    return [(row, column) for (row, column), count in table.items() for _ in range(count)]


def test_kappa_and_its_error_are_the_published_ones():
    # R package statpsych 2.0.0, ci.kappa(.05, 31, 12, 4, 58): 0.6756757, SE 0.07344761, 0.5317210 to 0.8196303
    found = agreement.kappa(cells({("0", "0"): 31, ("0", "1"): 12, ("1", "0"): 4, ("1", "1"): 58}))
    assert (found.value, found.low, found.high) == pytest.approx((0.6756757, 0.5317210, 0.8196303), abs=5e-7)


def test_kappa_of_three_answers_is_the_hand_worked_one():
    table = {("l", "l"): 44, ("l", "r"): 5, ("l", "t"): 1, ("r", "l"): 7, ("r", "r"): 20, ("r", "t"): 3}
    table |= {("t", "l"): 9, ("t", "r"): 5, ("t", "t"): 6}
    # observed 0.70; chance 0.5 x 0.6 + 0.3 x 0.3 + 0.2 x 0.1 = 0.41; 0.29 / 0.59
    assert agreement.kappa(cells(table)).value == pytest.approx(0.29 / 0.59)


def test_kappa_is_one_nought_or_nothing_at_the_ends():
    assert agreement.kappa(cells({("l", "l"): 5, ("r", "r"): 5})).value == 1.0
    even = cells({(one, other): 5 for one in "lr" for other in "lr"})
    assert agreement.kappa(even).value == pytest.approx(0.0)
    assert agreement.kappa(cells({("l", "l"): 5})) is None
    assert agreement.kappa([]) is None


def test_agreement_leaves_skipped_tasks_out(tmp_path):
    tasks, _ = prepared(tmp_path, 4)
    files = []
    for rater, given in (("anna", "left right skip tie"), ("ben", "left left right skip")):
        choices = iter(given.split())
        files.append(rate(tasks, tmp_path / f"{rater}.jsonl", rater, lambda _, c=choices: next(c)))
    [found] = agreement.compare([answers.read(path) for path in files])
    assert (found["num_tasks"], found["agreement"]["value"]) == (2, 0.5)
    with pytest.raises(DataError, match="two raters"):
        agreement.compare([answers.read(files[0])])
    with pytest.raises(DataError, match="same rater"):
        agreement.compare([answers.read(files[0])] * 2)


def shown(session, width, note=""):
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal.screen(session, width=width, note=note))
    console.file.close()
    return console.export_text()


def test_the_terminals_keys_answer_undo_and_are_told(tmp_path):
    tasks, _ = prepared(tmp_path, 3)
    with Session(tasks, path := tmp_path / "anna.jsonl", rater="anna") as session:
        assert terminal.press(session, "u") == "There is nothing to undo."
        assert terminal.press(session, "x")
        for key in "1=us2":
            terminal.press(session, key)
        assert session.current is None
        assert terminal.press(session, "1") == ""
        assert "All tasks are answered" in shown(session, 80)
    assert answers.read(path).choices == {1: "left", 2: "skip", 3: "right"}


@pytest.mark.parametrize("width", [60, 120])
def test_the_terminal_shows_one_task_and_no_control_characters(tmp_path, width):
    rows = [{"prompt": "Why?", "base": "red \x1b[31m text", "tuned": "[bold]plain[/bold]"}]
    (source := tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks, key = tmp_path / "rate" / "tasks.jsonl", tmp_path / "key.json"
    blind.make(source, between=("base", "tuned"), seed=1, tasks=tasks, key=key)
    with Session(tasks, tmp_path / "anna.jsonl", rater="anna") as session:
        screen = shown(session, width, "A note.")
    assert "\x1b" not in screen
    assert all(text in screen for text in ("Why?", "[bold]plain[/bold]", "0 of 1 answered", "A note.", "1  answer 1"))
    assert not any(name in screen for name in ("base", "tuned"))
    is_beside = any("Answer 1" in line and "Answer 2" in line for line in screen.splitlines())
    assert is_beside == (width == 120)
