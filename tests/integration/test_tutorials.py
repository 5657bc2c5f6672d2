"""Every command of the tutorials, run as it stands there."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 1800  # a command that hangs; a busy machine takes several minutes


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_every_command_of_a_tutorial_runs(tutorial: Path, tmp_path: Path) -> None:
    commands = []
    for language, rest, body in BLOCK.findall(tutorial.read_text(encoding="utf-8")):
        if named := re.search(r"file=(\S+)", rest):
            (tmp_path / named[1]).write_text(body, encoding="utf-8")
        elif language == "bash":
            commands.append(body)
    assert commands
    result = run_script("\n".join(commands), folder=tmp_path)
    assert result.returncode == 0, logs(tmp_path)


def test_a_failing_command_fails_the_tutorial(tmp_path: Path) -> None:
    assert run_script("silotune-client check nowhere.toml", folder=tmp_path).returncode == 2


def run_script(script: str, *, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    log = folder / "tutorial.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(TIMEOUT_S)
    finally:
        stop(process, folder=folder)
    return subprocess.CompletedProcess(script, process.returncode, log.read_text(errors="replace"))


def stop(process: subprocess.Popen[bytes], *, folder: Path) -> None:
    """End what the script left in the background, too, and the trial that went on in a session of its own."""
    for started in folder.rglob("trial.pid"):
        with suppress(psutil.NoSuchProcess):
            trial = psutil.Process(int(started.read_text()))
            trial.terminate()
            trial.wait(300)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def logs(folder: Path) -> str:
    return "\n".join(
        f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(folder.rglob("*.log"))
    )
