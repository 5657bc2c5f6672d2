"""The measured arm of `bench tax`: a whole silotune run, as `silotune-sim run` would do it."""

import tempfile
from pathlib import Path
from typing import Any

from common.event_kinds import Event, RoundFinished, RoundStarted
from server.report import report
from simulations.bench.arms import process
from simulations.commands import commands
from simulations.world import run

RUN_FILE = Path(__file__).parents[2] / "configs" / "bench-tax.toml"


def settings(quantization: str, base: str, local_steps: str) -> dict[str, str]:
    """What an arm changes of the run file."""
    return {
        "model.quantization": f'"{quantization}"',
        "model.base": f'"{base}"',
        "training.local_steps": local_steps,
    }


def main(quantization: str, base: str, local_steps: str) -> dict[str, Any]:
    """Return the CPU clock at the first training step and at the end of every round, and the peak memory."""
    started: list[float] = []
    rounds: list[float] = []
    losses: list[float | None] = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundStarted) and not started:
            started.append(process.cpu_s())
        if isinstance(event, RoundFinished):
            rounds.append(process.cpu_s())
            losses.append(event.train_loss)

    with tempfile.TemporaryDirectory() as folder:
        overrides = settings(quantization, base, local_steps)
        order = commands.Order(RUN_FILE, overrides, output=Path(folder) / "run", as_json=True, num_threads=1)
        shared = order.world()
        log = order.log(shared)
        log.listeners.append(watch)
        run.in_process(shared, log=log)
        report.write(shared.folder)
    return {
        "startup_cpu_s": started[0],
        "rounds_cpu_s": rounds,
        "losses": losses,
        "peak_rss_mib": process.peak_rss_mib(),
    }
