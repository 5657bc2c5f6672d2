"""Pairs for blind ranking: what raters see tells nothing of the sides, and the key tells all."""

import json

import pytest

from common import cli
from common.adapter import adapter
from common.data.rows import Message, Row
from common.errors import ConfigError, DataError
from common.run.schema.polish import DpoStage
from server.cli.app import app
from server.folder import run_files
from server.polish import rows as stage_rows
from server.polish import stages
from server.preferences import answers, blind, compare, outcome, terminal, web
from server.preferences import files as preferences
from server.run import finish, run
from tests import tiny
from tests.samples.page import TOKEN, Client, post

CHANGES = {"evaluation.max_new_tokens": "6", "federation.num_rounds": "1", "training.learning_rate": "5e-3"}


@pytest.fixture(scope="module")
def finished(load_tiny, tiny_base, tmp_path_factory):
    """A run folder with one round."""
    engine = load_tiny(CHANGES)
    settings = tiny.settings(tiny_base, CHANGES)
    folder = tmp_path_factory.mktemp("finished") / "run"
    log = run_files.prepare(settings, folder)
    run.execute(settings, fleet=tiny.fleet(tiny.make_nodes(engine)), engine=engine, folder=folder, log=log)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    table = [{"instruction": row.messages[0].content, "output": row.messages[1].content} for row in tiny.rows(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def command(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(app, list(map(str, arguments)))
    assert end.value.code in (None, 0)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sides_are_shuffled_and_the_key_tells_which_is_which(finished, rows, tmp_path, load_tiny, tiny_base):
    out, key = tmp_path / "rate" / "pairs.jsonl", tmp_path / "keys" / "pairs.json"
    result = compare.compare(finished, compare.Order(rows, seed=3), out=out, key=key)
    lines, told = read(out), json.loads(key.read_text())
    assert result["num_pairs"] == len(lines) == len(told["rows"]) == len(told["is_swapped"])
    assert result["num_pairs"] + result["num_left_out"] == 8
    assert told["names"] == ["base", "adapter"]
    assert abs(2 * sum(told["is_swapped"]) - len(lines)) <= 1
    assert all(set(line) == {"prompt", "left", "right"} for line in lines)
    # the same answers by hand, put back in order by the key
    engine = load_tiny(CHANGES)
    adapter.write(engine.model, finish.stored(finished, num_rounds=0).tensors)
    settings = tiny.settings(tiny_base, CHANGES)
    asked = tiny.rows(8)
    pairs = compare.answered(engine, asked, "", data=settings.data, evaluation=settings.evaluation)
    for line, row, swapped in zip(lines, told["rows"], told["is_swapped"], strict=True):
        left_right = (line["right"], line["left"]) if swapped else (line["left"], line["right"])
        assert left_right == tuple(text if text.strip() else blind.NO_ANSWER for text in pairs[row - 1])
        assert line["prompt"] == asked[row - 1].messages[0].content
    assert any(base != own for base, own in pairs)


def test_the_same_seed_gives_the_same_file_and_another_another(finished, rows, tmp_path):
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compare.compare(finished, compare.Order(rows, seed=seed), out=tmp_path / f"{name}.jsonl", key=None)
        made[name] = (tmp_path / f"{name}.jsonl").read_text()
        assert (finished / compare.KEY_FOLDER / f"{name}.json").exists()
    assert made["a"] == made["b"] != made["c"]


def test_prompt_only_is_the_base_with_the_prompt(load_tiny, tiny_base, tmp_path):
    engine = load_tiny(CHANGES)
    settings = tiny.settings(tiny_base, CHANGES)
    sections = {"data": settings.data, "evaluation": settings.evaluation}
    prompt = "Say knee, knee, knee and nothing else at all."
    prompted = compare.answered(engine, tiny.rows(6), prompt, **sections)
    assert any(theirs != ours for theirs, ours in prompted)
    plain = compare.answered(engine, tiny.rows(6), "", **sections)
    assert all(theirs == ours for theirs, ours in plain)  # the adapter as attached is the base
    with pytest.raises(DataError, match="there is nothing to rank"):
        write(compare.pairs_of(tiny.rows(6), plain), tmp_path)


def write(pairs, folder):
    tasks = folder / "rate" / "pairs.jsonl"
    blind.write(pairs, names=("base", "adapter"), seed=0, tasks=tasks, key=folder / "key.json")
    return read(tasks)


def test_a_conversation_keeps_its_turns(tmp_path):
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    [line] = write(compare.pairs_of([Row(turns, "u", "r")], [("x", "y")]), tmp_path)
    assert [turn["content"] for turn in line["prompt"]] == ["a", "b", "c"]
    assert {line["left"][0]["content"], line["right"][0]["content"]} == {"x", "y"}


def prefer(word):
    """A rater who wants one word, and else takes the longer answer."""

    def choose(left, right):
        return "left" if (word in left, len(left), left) >= (word in right, len(right), right) else "right"

    return choose


def rate_in_the_terminal(tasks, path, choose):
    keys = {choice: key for key, choice in terminal.KEYS.items()}
    with answers.Session(tasks, path, rater=path.stem) as session:
        while task := session.current:
            terminal.press(session, keys[choose(task.left[0].content, task.right[0].content)])
    return path


def rate_on_the_page(tasks, path, choose):
    with answers.Session(tasks, path, rater=path.stem) as session:
        client = Client(web.make(session, token=TOKEN))
        while task := client.get(f"/{TOKEN}/state").json()["task"]:
            given = choose(task["left"][0]["content"], task["right"][0]["content"])
            post(client, "answer", {"task": task["number"], "answer": given})
    return path


@pytest.mark.parametrize("against", [(), ("--against", "prompt-only", "--prompt", "Say knee.")])
def test_from_a_run_through_two_raters_to_a_stage_of_dpo(
    finished, rows, tmp_path, capsys, load_tiny, tiny_base, against
):
    tasks, out, key = tmp_path / "rate" / "tasks.jsonl", tmp_path / "pairs.jsonl", tmp_path / "key.json"
    command("compare", finished, "--rows", rows, "--out", tasks, "--key", key, *against)
    choose = prefer("knee")
    files = [
        rate_in_the_terminal(tasks, tmp_path / "anna.jsonl", choose),
        rate_on_the_page(tasks, tmp_path / "ben.jsonl", choose),
    ]
    command("preferences", "unblind", tasks, *files, "--key", key, "--out", out)
    told = capsys.readouterr().out
    assert "adapter was preferred" in told
    assert f"times, {against[1] if against else 'base'} " in told
    command("preferences", "check", out)
    pairs = preferences.read(out)
    assert len(pairs) == len(blind.read_tasks(tasks))
    assert all(choose(pair.chosen[0].content, pair.rejected[0].content) == "left" for pair in pairs)
    engine = load_tiny(CHANGES)
    stage = DpoStage(name="taste", kind="dpo", data=str(out), steps=6, batch_size=4, learning_rate=1e-2)
    found = stage_rows.load(stage, engine, tiny.settings(tiny_base, CHANGES).data)
    start = finish.stored(finished, num_rounds=0).tensors
    played = stages.play(stage, start, engine=engine, data=found, tell=lambda *_: None)
    assert played.after["margin"] > played.before["margin"]


def test_an_answer_that_is_empty_is_ranked_and_no_stage_learns_its_mark(tmp_path):
    asked = [Row((Message("user", str(k)), Message("assistant", "?")), "u", "r") for k in range(3)]
    write(compare.pairs_of(asked, [("", "a"), ("b", " "), ("c", "d")]), tmp_path)
    tasks = tmp_path / "rate" / "pairs.jsonl"
    given = rate_in_the_terminal(tasks, tmp_path / "anna.jsonl", lambda left, right: "left")
    found = outcome.unblind(tasks, key_file=tmp_path / "key.json", answer_files=[given])
    assert found.all_raters.num_first + found.all_raters.num_second == 3
    assert [pair.prompt[0].content for pair in found.built.rows] == ["2"]
    assert found.built.left_out["with an empty answer"] == 2


@pytest.mark.parametrize(
    ("changes", "out", "key", "message"),
    [
        ({"against": "prompt-only"}, "o/p.jsonl", "k/p.json", "belong together"),
        ({"prompt": "p"}, "o/p.jsonl", "k/p.json", "belong together"),
        ({}, "o/p.jsonl", "o/p.json", "no rater can read"),
        ({}, "o/p.txt", "k/p.json", "ends with .jsonl"),
        ({}, "there.jsonl", "k/p.json", "exists already"),
    ],
)
def test_what_would_unblind_or_overwrite_is_refused_before_anything_is_loaded(tmp_path, changes, out, key, message):
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        compare.compare(tmp_path / "no-run", compare.Order("rows", **changes), out=tmp_path / out, key=tmp_path / key)


def test_the_command_writes_pairs_and_says_where_the_key_is(finished, rows, tmp_path, capsys):
    command("compare", finished, "--rows", rows, "--out", tmp_path / "d.jsonl", "--max-rows", "4")
    assert "keep it from raters" in capsys.readouterr().out
    assert 0 < len(read(tmp_path / "d.jsonl")) <= 4
