"""Fresh processes to measure in.

A benchmark's arm is a module whose `main` takes strings and returns what it measured;
`python -m simulations.bench.arms.process MODULE ARGUMENTS` runs it and prints that as JSON.
"""

import json
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from common import quiet
from common.errors import SilotuneError

ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # else waiting threads spin, and count as work


def cpu_s() -> float:
    """CPU seconds of this process since it began, its finished children included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_rss_mib() -> float:
    """Most memory that this process has had resident; right as long as its parent had less."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def restart_peak() -> float:
    """Forget the most memory so far, and return what is resident now, in MiB; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """Most memory that this process has had resident since `restart_peak`."""
    return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    """One size out of Linux' account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def main(module: str, *arguments: str) -> None:
    """Run one arm in this process; its module is imported only when everything that calls out is turned off."""
    quiet.hush()
    print(json.dumps(import_module(module).main(*arguments)))


def measure(module: str, *arguments: str) -> dict[str, Any]:
    """Run an arm in a process of its own, on one thread, and return what it measured.

    Raises:
        SilotuneError: It failed; the message ends with its last line.
    """
    from common import cli  # not above: what is measured imports this module

    command = [sys.executable, "-m", "simulations.bench.arms.process", module, *arguments]
    line = f"measuring {module.rpartition('.')[2]} {' '.join(arguments)}"
    cli.progress(as_json=True).print(line, markup=False, soft_wrap=True)
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SilotuneError(f"{module} {' '.join(arguments)} failed with code {done.returncode}: {last}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main(*sys.argv[1:])
