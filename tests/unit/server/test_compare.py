"""Pairs for blind ranking: what raters see tells nothing of the sides, and the key tells all."""

import json

import pytest

from common import adapter
from common.errors import ConfigError, DataError
from server import compare, finish, run
from tests import tiny

CHANGES = {"evaluation.max_new_tokens": "6", "federation.num_rounds": "1"}


@pytest.fixture(scope="module")
def finished(load_tiny, tiny_base, tmp_path_factory):
    """A run folder with one round."""
    engine = load_tiny(CHANGES)
    settings = tiny.settings(tiny_base, CHANGES)
    folder = tmp_path_factory.mktemp("finished") / "run"
    log = run.prepare(settings, folder)
    run.execute(settings, fleet=tiny.fleet(tiny.make_nodes(engine)), engine=engine, folder=folder, log=log)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    table = [{"instruction": row.messages[0].content, "output": row.messages[1].content} for row in tiny.rows(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


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
    pairs = compare.answered(engine, asked, compare.Order(rows), settings)
    for line, row, swapped in zip(lines, told["rows"], told["is_swapped"], strict=True):
        left_right = (line["right"], line["left"]) if swapped else (line["left"], line["right"])
        assert left_right == tuple(text if text.strip() else compare.NO_ANSWER for text in pairs[row - 1])
        assert line["prompt"] == asked[row - 1].messages[0].content
    assert any(base != own for base, own in pairs)


def test_the_same_seed_gives_the_same_file_and_another_another(finished, rows, tmp_path):
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compare.compare(finished, compare.Order(rows, seed=seed), out=tmp_path / f"{name}.jsonl", key=None)
        made[name] = (tmp_path / f"{name}.jsonl").read_text()
        assert (finished / compare.KEY_FOLDER / f"{name}.json").exists()
    assert made["a"] == made["b"] != made["c"]


def test_prompt_only_is_the_base_with_the_prompt(load_tiny, tiny_base, rows):
    engine = load_tiny(CHANGES)
    settings = tiny.settings(tiny_base, CHANGES)
    order = compare.Order(rows, against="prompt-only", prompt="Say knee, knee, knee and nothing else at all.")
    prompted = compare.answered(engine, tiny.rows(6), order, settings)
    assert any(other != own for other, own in prompted)
    plain = compare.answered(engine, tiny.rows(6), compare.Order(rows), settings)
    assert all(other == own for other, own in plain)  # the adapter as attached is the base
    with pytest.raises(DataError, match="there is nothing to rank"):
        compare.shuffled(tiny.rows(6), plain, compare.Order(rows))


def test_a_conversation_keeps_its_turns():
    from common.rows import Message, Row

    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    [line], _ = compare.shuffled([Row(turns, "u", "r")], [("x", "y")], compare.Order("rows.jsonl"))
    assert [turn["content"] for turn in line["prompt"]] == ["a", "b", "c"]
    assert {line["left"][0]["content"], line["right"][0]["content"]} == {"x", "y"}


@pytest.mark.parametrize(
    ("changes", "out", "key", "message"),
    [
        ({"against": "prompt-only"}, "o/p.jsonl", "k/p.json", "belong together"),
        ({"prompt": "p"}, "o/p.jsonl", "k/p.json", "belong together"),
        ({}, "o/p.jsonl", "o/p.json", "no rater can read"),
        ({}, "o/p.txt", "k/p.json", "must end in"),
        ({}, "there.jsonl", "k/p.json", "exists already"),
    ],
)
def test_what_would_unblind_or_overwrite_is_refused_before_anything_is_loaded(tmp_path, changes, out, key, message):
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        compare.compare(tmp_path / "no-run", compare.Order("rows", **changes), out=tmp_path / out, key=tmp_path / key)


def test_the_command_writes_pairs_and_says_where_the_key_is(finished, rows, tmp_path, capsys):
    from server import cli

    with pytest.raises(SystemExit) as end:
        cli.app(["compare", str(finished), "--rows", rows, "--out", str(tmp_path / "d.jsonl"), "--max-rows", "4"])
    assert not end.value.code
    assert "keep it from raters" in capsys.readouterr().out
    assert 0 < len(read(tmp_path / "d.jsonl")) <= 4
