"""The commands with which a site looks at its own rows."""

import json

import pytest

from client.cli import app
from common import cli
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
    assert "next: silotune-client serve" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["check", "no-such.toml"], 2, "no-such.toml"),
        (["preview", "{node}"], 4, "--base"),
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
