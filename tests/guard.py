"""Pytest plugin: a test that reaches beyond this machine fails, and so does one whose child process does."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "netguard"
LOG_KEY = "SILOTUNE_NETGUARD_LOG"
OWN_LOGS: list[Path] = []


def pytest_configure() -> None:
    """Install the guard here and, through the environment, in every Python that a test starts."""
    if LOG_KEY in os.environ:
        return  # installed already: loaded twice, or by a test run that started this one
    descriptor, path = tempfile.mkstemp(prefix="silotune-netguard-")
    OWN_LOGS.append(Path(path))
    os.close(descriptor)
    os.environ[LOG_KEY] = path
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    code = (FOLDER / "sitecustomize.py").read_text()
    exec(compile(code, "netguard", "exec"), {"__name__": "netguard"})


def pytest_unconfigure() -> None:
    """Remove the log."""
    for path in OWN_LOGS:
        path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def refused_connections() -> Iterator[Path]:
    """Fail the test if anything was refused meanwhile; a test of the guard itself empties the file."""
    path = Path(os.environ[LOG_KEY])
    path.write_text("")
    yield path
    if text := path.read_text():
        pytest.fail(f"reached for the network: {sys.executable}\n{text}")
