"""The commands with which a site looks at its own rows."""

import json
import shutil

import pytest

from client.cli.app import app
from common import cli
from common.text import templates
from tests import tiny


def silotune_client(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def node_file(tmp_path):
    table = tiny.write_table(tmp_path / "rows.jsonl")
    path = tmp_path / "node.toml"
    path.write_text(f'[site]\nname = "north"\n[data]\npath = "{table}"\n')
    return path


def test_check_counts_without_a_base(node_file, capsys):
    assert silotune_client("check", node_file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_units"]) == (36, 18)


def test_check_counts_tokens_with_one(node_file, tiny_base, capsys):
    assert silotune_client("check", node_file, "--base", tiny_base, "--max-length-tokens", 64, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["num_dropped"] == 0


def test_preview_shows_rows_and_the_next_command(node_file, tiny_base, capsys):
    assert silotune_client("preview", node_file, "--base", tiny_base, "--limit", 2) == 0
    shown = capsys.readouterr().out
    assert "ACHE" in shown
    assert "next: name the site's policy" in shown
    with node_file.open("a") as file:
        file.write('[agent]\npolicy = "policy.toml"\npolicy_signer = "' + "ab" * 32 + '"\nidentity_key = "site.pem"\n')
    assert silotune_client("preview", node_file, "--base", tiny_base, "--limit", 2) == 0
    assert f"next: silotune-client serve {node_file}\n" in capsys.readouterr().out


def test_preview_takes_all_that_a_run_makes_of_rows_and_marks_the_answer_in_a_pipe(
    node_file, tiny_base, tmp_path, capsys
):
    changes = {"data.system_prompt": "Be brief.", "model.chat_template": "alpaca", "data.max_length_tokens": 120}
    overrides = "".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items())
    rest = tiny.RUN_FILE.format(base=tiny_base).replace("data.max_length_tokens = 64\n", "")
    (tmp_path / "run.toml").write_text(rest + overrides)
    assert silotune_client("preview", node_file, "--run", tmp_path / "run.toml", "--limit", 1) == 0
    shown = capsys.readouterr().out
    assert "template alpaca, system prompt of 9 characters, 120 tokens at most; what is learnt stands in" in shown
    assert "Be brief.\n\n### Instruction:" in shown
    assert "### Response:\n\u27e6ACHE<|im_end|>\u27e7" in shown
    options = ["--system-prompt", "Be brief.", "--chat-template", "alpaca", "--max-length-tokens", 120]
    assert silotune_client("preview", node_file, "--base", tiny_base, *options, "--limit", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["system_prompt"] == "Be brief."
    assert [text for text, is_answer in found["rows"][0]["segments"] if is_answer] == ["ACHE<|im_end|>"]
    assert silotune_client("preview", node_file, "--run", "run.toml", "--system-prompt", "x") == 2
    assert "leave out all other options" in capsys.readouterr().err


def test_preview_prints_the_day_that_is_given_and_refuses_one_that_is_none(node_file, tiny_base, tmp_path, capsys):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') + '\n' }}" + templates.CHATML)
    assert silotune_client("preview", node_file, "--base", base, "--limit", 1, "--date", "2026-03-04") == 0
    shown = capsys.readouterr().out
    assert "date 2026-03-04; what" in shown
    assert "\n04 Mar 2026\n<|im_start|>user" in shown
    assert silotune_client("preview", node_file, "--base", base, "--date", "tomorrow") == 2
    assert "write YYYY-MM-DD" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["check", "no-such.toml"], 2, "no-such.toml"),
        (["preview", "{node}"], 4, "--base"),
        (["preview", "{node}", "--run", "no-such.toml"], 2, "no-such.toml"),
        (["preview", "{node}", "--run", "triage"], 2, "the run's TOML file"),
        (["preview", "{node}", "--base", "embedded", "--chat-template", "vicuna"], 2, "tokenizer, chatml, alpaca"),
        (["preview", "{node}", "--base", "no-such-base"], 4, "no-such-base"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(node_file, tmp_path, monkeypatch, capsys, arguments, exit_code, told):
    monkeypatch.chdir(tmp_path)
    assert silotune_client(*(argument.format(node=node_file) for argument in arguments)) == exit_code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert told in line
    assert line.count("\n") == 1


def test_check_names_every_problem_of_every_file_and_counts_the_rest(tmp_path, capsys):
    rows, held_out = tmp_path / "rows", tmp_path / "held-out.csv"
    rows.mkdir()
    good = {"patient_id": "p1", "instruction": "i", "output": "Zyxwvut"}
    lines = [good, good | {"output": ""}, good | {"patient_id": "NULL", "output": None}, good | {"patient_id": "P1"}]
    (rows / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "oops\n")
    (rows / "b.jsonl.gz").write_bytes(b"Zyxwvut")
    (rows / "LICENSE").write_text("free")
    held_out.write_text("patient_id,instruction,output\np1,i,o\n,i,o\n")
    node_file = tmp_path / "node.toml"
    node_file.write_text(f'[site]\nname = "north"\n[data]\npath = "{rows}"\nheld_out_path = "{held_out}"\n')
    assert silotune_client("check", node_file, "--json") == 3
    out = capsys.readouterr().out
    found = json.loads(out)
    assert "Zyx" not in out
    assert [problem["place"] for problem in found["problems"]] == [
        "a.jsonl line 5",
        str(rows / "b.jsonl.gz"),
        "a.jsonl line 2",
        "a.jsonl line 3",
        "a.jsonl line 3",
        "held-out.csv line 3",
        "",
    ]
    assert {problem["site"] for problem in found["problems"]} == {"north"}
    assert "one of them in a.jsonl line 1 and in held-out.csv line 2" in found["problems"][-1]["what"]
    assert (found["num_rows"], found["num_units_alike"], found["not_read"]) == (3, 2, ["LICENSE"])
    assert found["alike"] == ["a.jsonl line 1 and a.jsonl line 4"]
    assert silotune_client("check", node_file) == 3
    assert "7 problems" in capsys.readouterr().out


def test_check_of_two_files_without_units_counts_every_row_as_one(tmp_path, capsys):
    line = json.dumps({"instruction": "i", "output": "o"}) + "\n"
    paths = [tmp_path / side / "rows.jsonl" for side in ("train", "test")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(line * 3)
    node_file = tmp_path / "node.toml"
    both = f'path = "{paths[0]}"\nheld_out_path = "{paths[1]}"\nunit_column = ""\n'
    node_file.write_text(f'[site]\nname = "north"\n[data]\n{both}')
    assert silotune_client("check", node_file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_units"], found["num_units_alike"]) == (6, 6, 0)
