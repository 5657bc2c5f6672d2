"""What users get wrong, through the commands: one line naming file, row or key and the remedy, and the exit code."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common import cli
from server.folder import run_files
from simulations.cli.app import app as sim

RUN = """version = 1
name = "trial"
[model]
base = "{base}"
quantization = "none"
[adapter]
r = 4
[data]
source = "{rows}"
max_length_tokens = 128
[training]
local_steps = 2
learning_rate = 1e-2
[federation]
num_rounds = 2
[privacy]
mode = "none"
"""
Files = Callable[..., Path]


@pytest.fixture
def run_file(tiny_base: Path, tmp_path: Path) -> Files:
    """Write a run file and its rows; `text` and `rows` change them."""

    def write(*, rows: list[dict[str, object]] | None = None, change: tuple[str, str] = ("", "")) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (good_rows() if rows is None else rows)))
        file = tmp_path / "run.toml"
        file.write_text(
            RUN.format(base=tiny_base, rows=path).replace(*change)
            if change[0]
            else RUN.format(base=tiny_base, rows=path)
        )
        return file

    return write


def good_rows() -> list[dict[str, object]]:
    return [
        {
            "site": site,
            "patient_id": f"{site}-{number}",
            "instruction": "Say the number.",
            "input": str(number),
            "output": str(number),
        }
        for site in ("north", "south")
        for number in range(8)
    ]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run `silotune-sim` and return exit code and stderr."""
    try:
        cli.run(sim, [str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


def run(capsys: pytest.CaptureFixture[str], file: Path, *more: object) -> tuple[int, str]:
    return command(capsys, "run", file, "--output", file.parent / "out", "--threads", 1, *more)


def test_a_good_run_ends_well(run_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, run_file())[0] == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("r = 4", "r = 0"), 2, ["adapter.r", "run.toml:7", "at least 1"]),
        (("r = 4", "lora_r = 4"), 2, ["run.toml:7", "adapter.r"]),
        (("local_steps", "local-steps"), 2, ["run.toml:12", "training.local_steps"]),
        (('mode = "none"', 'mode = "site-dp"'), 2, ["privacy.mode", 'write "site"']),
        (("r = 4", 'r = 4\ntargets = ["q_prj"]'), 4, ["adapter.targets", "q_prj", "q_proj"]),
        (('quantization = "none"', f'quantization = "none"\nsha256 = "{"0" * 64}"'), 4, ["hash", "0" * 64]),
        (("max_length_tokens = 128", "max_length_tokens = 9"), 3, ["data.max_length_tokens", "9"]),
    ],
)
def test_a_wrong_run_file_is_refused(
    run_file: Files, capsys: pytest.CaptureFixture[str], change: tuple[str, str], code: int, words: list[str]
) -> None:
    found, message = run(capsys, run_file(change=change))
    assert found == code, message
    assert all(word in message for word in words), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["rows.jsonl", "no rows"]),
        ([{"site": "a", "patient_id": "1", "instruction": "SECRET", "input": ""}], ["rows.jsonl", "output"]),
        ([{"site": "a", "patient_id": "1", "question": "SECRET", "answer": "SECRET"}], ["rows.jsonl", "instruction"]),
        ([*good_rows(), {**good_rows()[0], "output": ""}], ["17", "output"]),
        ([{**row, "id": 7, "input": "SECRET"} for row in good_rows()], ["id", "1", "2"]),
    ],
)
def test_wrong_rows_are_refused_by_number_not_by_value(
    run_file: Files, capsys: pytest.CaptureFixture[str], rows: list[dict[str, object]], words: list[str]
) -> None:
    found, message = run(capsys, run_file(rows=rows))
    assert found == 3, message
    assert all(word in message for word in words), message
    assert "SECRET" not in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"instruction": "a", "output": "caf\xe9"}\n', ["rows.jsonl", "UTF-8"]),
        (b'{"instruction": "a", "output": \n', ["rows.jsonl", "line 1"]),
        (b'{"instruction": "a", "output": "' + b"x" * (17 << 20) + b'"}\n', ["rows.jsonl", "line 1", "limit"]),
    ],
)
def test_a_damaged_file_is_refused(
    run_file: Files, capsys: pytest.CaptureFixture[str], data: bytes, words: list[str]
) -> None:
    file = run_file()
    (file.parent / "rows.jsonl").write_bytes(data)
    found, message = run(capsys, file)
    assert found == 3, message
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(run_file: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(capsys, "run", tmp_path / "nowhere.toml")[0] == 2
    file = run_file()
    (tmp_path / "rows.jsonl").unlink()
    found, message = run(capsys, file)
    assert (found, "rows.jsonl" in message) == (3, True)


def test_a_missing_base_names_the_command_that_fetches_it(run_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    found, message = run(capsys, run_file(), "--model", "smollm9")
    assert found == 4
    assert "silotune-sim base smollm9" in message


def test_a_folder_that_holds_a_run_is_not_overwritten(run_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file()
    assert run(capsys, file)[0] == 0
    before = (file.parent / "out" / "events.jsonl").read_bytes()
    found, message = run(capsys, file)
    assert (found, "--resume" in message) == (2, True)
    assert (file.parent / "out" / "events.jsonl").read_bytes() == before


def test_a_full_disk_leaves_finished_rounds_usable(
    run_file: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real_replace = run_file(), os.replace

    def replace(source: str, target: Path) -> None:
        if "00002" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    found, message = run(capsys, file)
    assert (found, "No space left" in message) == (8, True)
    monkeypatch.undo()
    assert run_files.finished(file.parent / "out") == [1]
    assert run(capsys, file, "--resume")[0] == 0
    assert run_files.finished(file.parent / "out") == [1, 2]


def test_json_tells_errors_to_programs(run_file: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(sim, ["run", str(run_file(change=("r = 4", "r = 0"))), "--json"])
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (error["code"], error["exit_code"]) == ("ConfigError", 2)
