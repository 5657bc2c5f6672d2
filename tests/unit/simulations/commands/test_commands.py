"""The commands of `silotune-sim` on the tiny base, through their own entry point."""

import json
import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from common import cli, events
from server.report import report, status
from server.view.run_view import RunView
from simulations.cli import options
from simulations.cli.app import app
from simulations.commands import commands
from tests import tiny


@pytest.fixture
def run_file(tiny_base, tmp_path):
    path = tmp_path / "run.toml"
    table = tiny.write_table(tmp_path / "rows.jsonl")
    path.write_text(tiny.RUN_FILE.format(base=tiny_base) + f'data.source = "{table}"\n')
    return path


def silotune_sim(*arguments: object) -> int:
    """Run the command; its exit code."""
    try:
        cli.run(app, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_compare_ends_with_one_json_line_of_all_arms_and_leaves_out_a_site_that_has_nothing_to_learn(
    run_file, tmp_path, capsys
):
    with (tmp_path / "rows.jsonl").open("a") as rows:  # no answer is left of its rows at 64 tokens
        for number in range(3):
            row = {
                "instruction": tiny.WORDS[number] * 200,
                "output": "y",
                "patient_id": f"tiny-{number}",
                "site": "Tiny",
            }
            rows.write(json.dumps(row) + "\n")
    changes = ("--set", "federation.num_sites=0", "--set", "data.too_long=truncate")
    assert silotune_sim("compare", run_file, "--output", tmp_path / "out", "--threads", 1, *changes, "--json") == 0
    told = capsys.readouterr()
    assert "tiny: failed (DataError): site tiny: no answer token is left in any of 2 rows" in told.err
    found = json.loads(told.out.splitlines()[-1])
    assert sorted(found["comparison"]) == [
        "base",
        "centralised",
        "federated",
        "site-north",
        "site-south",
        "site-west",
    ]
    assert all(
        sorted(figures) == ["exact_match", "held_out_loss", "rows_used"] for figures in found["comparison"].values()
    )
    assert found["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_run_shows_a_table_and_the_next_command(run_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert silotune_sim("run", run_file, "--output", out, "--threads", 1, "--set", "federation.num_rounds=1") == 0
    shown = capsys.readouterr().out
    assert "held-out" in shown
    assert f"next: silotune-server export {out}" in shown.replace("\n", "")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_json_keeps_progress_off_stdout(run_file, tmp_path, capsys):
    arguments = ("--output", tmp_path / "out", "--threads", 1, "--set", "federation.num_rounds=1", "--json")
    assert silotune_sim("run", run_file, *arguments) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert "held-out" in told.err
    assert "\x1b" not in told.err
    found, shown = json.loads(told.out), re.findall(r"^ +1 +(\S+)", told.err, re.MULTILINE)
    assert [f"{found['held_out_loss']:.3f}"] == shown == [f"{found['rounds'][1]['held_out_loss']:.3f}"]
    numbers = [found[key] for key in ("base_held_out_loss", "train_loss", "gap", "bytes_down", "bytes_up", "seconds")]
    assert all(isinstance(number, int | float) and number > 0 for number in numbers)
    assert (found["status"], found["num_rounds"], found["epsilon"], found["gate"]) == ("finished", 1, None, None)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["--set", "training.lerning_rate=1"], 2, "learning_rate"),
        (["--set", "training.learning_rate"], 2, "section.key=value"),
        (["--engine", "warp"], 2, "in-process, flower, deployment"),
        (["--set", "adapter.r=0"], 2, "adapter.r"),
        (["--data", "no-such.jsonl"], 3, "no-such.jsonl"),
        (["--model", "no-such-base"], 4, "no-such-base"),
        (["--set", 'adapter.targets=["nothing"]'], 4, "nothing"),
        (["--set", f'model.sha256="{"ab" * 32}"'], 4, "abab"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(run_file, tmp_path, capsys, arguments, exit_code, told):
    assert silotune_sim("run", run_file, "--output", tmp_path / "out", "--threads", 1, *arguments) == exit_code
    line = capsys.readouterr().err
    assert told in line
    assert line.startswith("error: ")
    assert not (tmp_path / "out" / "rounds").exists()


def test_a_run_file_that_is_missing_is_named(tmp_path, capsys):
    assert silotune_sim("run", tmp_path / "no-such.toml", "--json") == 2
    assert last_json(capsys)["error"]["code"] == "ConfigError"


def test_a_folder_that_holds_a_run_is_refused_and_resume_goes_on(run_file, tmp_path, capsys):
    arguments = (run_file, "--output", tmp_path / "out", "--threads", 1, "--set", "federation.num_rounds=1")
    assert silotune_sim("run", *arguments) == 0
    assert silotune_sim("run", *arguments) == 2
    assert "--resume" in capsys.readouterr().err
    bare = (run_file, "--output", tmp_path / "out", "--threads", 1, "--resume")
    assert silotune_sim("run", *bare) == 0, "what --set changed is remembered"
    capsys.readouterr()
    changes = ("--set", "federation.num_rounds=3", "--set", 'data.system_prompt="Be brief, Ada"')
    assert silotune_sim("run", *bare, *changes) == 2
    told = capsys.readouterr().err
    assert "data.system_prompt, federation.num_rounds (1 there, 3 given); resume it" in told
    assert "Ada" not in told
    run_file.write_text(run_file.read_text().replace("seed = 5", "seed = 6"))
    assert silotune_sim("run", *bare) == 2
    assert "other settings: seed (5 there, 6 given);" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_prints_the_command_that_goes_on(
    run_file, tmp_path, capsys, monkeypatch, number, exit_code
):
    monkeypatch.chdir(tmp_path)
    out = Path("my runs") / "a"

    def stop() -> None:
        while not (out / events.FILE).exists() or "round_finished" not in (out / events.FILE).read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    changes = ("--set", "federation.num_rounds=5", "--set", "evaluation.every_rounds=5")
    assert silotune_sim("run", run_file, "--output", out, "--threads", 1, *changes) == exit_code
    told = capsys.readouterr().err
    done = (out / events.FILE).read_text().count('"round_finished"')
    assert f"stopped; finished rounds in {out}: " in told
    standing = status.read(out)["status"]
    assert standing.startswith(f"interrupted, {done} of 5 rounds; go on with: silotune-sim run ")
    (command,) = re.findall(r"^next: (.*)$", told, re.MULTILINE)
    assert command in standing
    assert 0 < done < 5
    assert "--set" not in command
    words = shlex.split(command)
    assert (words[0], silotune_sim(*words[1:])) == ("silotune-sim", 0)
    assert status.read(out)["status"] == "finished"


def test_why_a_run_ended_is_an_event_and_its_status(run_file, tmp_path, capsys):
    out = tmp_path / "out"
    changes = ("--set", "data.max_length_tokens=8")
    assert silotune_sim("run", run_file, "--output", out, "--threads", 1, *changes) == 3
    log = events.read(out / "events.jsonl")
    assert (log[-1]["kind"], log[-1]["error"], log[-1]["exit_code"]) == ("run_failed", "DataError", 3)
    assert report.status(RunView.of(log)).startswith("failed: ")


def test_attacks_and_audits_of_preferences_are_refused(run_file, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"site": site, "patient_id": f"{site}-{n}", "prompt": f"Code {n}?", "chosen": "A", "rejected": "B"}
        for site in ("north", "south", "west")
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("--data", path, "--threads", 1, "--set", "training.objective.kind=dpo", "--output", tmp_path / "out")
    for arguments in (("audit", "mia", run_file), ("attack", run_file, "--attack", "label-flip", "--bad", 1)):
        assert silotune_sim(*arguments, *given) == 2
        assert "audits and attacks are of runs that learn answers" in capsys.readouterr().err


def test_the_command_lines_settings_win_over_the_file(run_file, tiny_base):
    order = commands.Order(run_file, {"adapter.r": "2"})
    settings = order.settings()
    assert settings.adapter.r == 2
    assert settings.model.base == str(tiny_base)


def test_paths_with_quotes_survive_the_command_line(run_file):
    path = '/srv/a "b" \\c'
    order = commands.Order(run_file, options.changes(model=path, overrides={}))
    assert order.settings().model.base == path
