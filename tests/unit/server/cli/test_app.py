"""The commands of `silotune-server` that need no SuperLink."""

import json

import pytest

from common import cli
from common.trust import identity
from server.cli.app import app
from server.folder import run_files
from server.run import run
from tests import tiny


def silotune_server(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def folder(shared_engine, tiny_base, tmp_path_factory):
    """A finished run."""
    settings = tiny.settings(tiny_base)
    found = tmp_path_factory.mktemp("finished") / "run"
    log = run_files.prepare(settings, found)
    fleet = tiny.fleet(tiny.make_nodes(shared_engine))
    run.execute(settings, fleet=fleet, engine=shared_engine, folder=found, log=log)
    return found


def test_status_tells_how_a_run_stands_and_draws_its_report(folder, capsys):
    assert silotune_server("status", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "finished"
    assert found["finished_rounds"] == [1, 2]
    assert sorted(found["sites"]) == ["north", "south", "west"]
    assert (folder / "report.html").is_file()


def test_status_for_people(folder, capsys):
    assert silotune_server("status", folder) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "2, newest after round 2" in shown


def test_export_writes_any_round_and_merges(folder, tmp_path, capsys):
    arguments = ("--round", 1, "--output", tmp_path / "first", "--merged", tmp_path / "merged", "--json")
    assert silotune_server("export", folder, *arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"adapter": str(tmp_path / "first"), "merged": str(tmp_path / "merged")}
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_export_of_a_sealed_and_signed_folder_and_its_verification(folder, tmp_path, capsys):
    key = identity.create(tmp_path / "keys" / "op.pem")
    arguments = (
        "--to",
        tmp_path / "out",
        "--formats",
        "peft,merged,gguf",
        "--operator-key",
        tmp_path / "keys" / "op.pem",
    )
    assert silotune_server("export", folder, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["formats"] == "peft, merged, gguf"
    assert found["signer"] == identity.public_hex(key)
    assert silotune_server("verify", tmp_path / "out", "--signer", found["signer"]) == 0
    assert f"signed by {found['signer']}" in capsys.readouterr().out
    (tmp_path / "out" / "more.json").write_text("{}")
    assert silotune_server("verify", tmp_path / "out", "--signer", found["signer"]) == 4
    assert "more.json was added" in capsys.readouterr().err
    assert (folder / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["export", "{folder}", "--formats", "gguf"], 2, "give --to DIR"),
        (["export", "{folder}", "--to", "out", "--merged", "merged"], 2, "leave --merged out"),
        (["export", "{folder}", "--to", "out", "--formats", "torchscript"], 2, "'torchscript' is none of"),
        (["verify", "no-such-folder"], 4, "no such folder"),
        (["status", "no-such-run"], 3, "no-such-run"),
        (["export", "no-such-run"], 3, "no-such-run"),
        (["export", "{folder}", "--round", "9"], 3, "finished rounds are [1, 2]"),
        (["export", "{folder}", "--merged", "merged", "--base", "no-such-base"], 4, "no-such-base"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(folder, tmp_path, monkeypatch, capsys, arguments, exit_code, told):
    monkeypatch.chdir(tmp_path)
    assert silotune_server(*(argument.format(folder=folder) for argument in arguments)) == exit_code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert told in line
    assert line.count("\n") == 1
