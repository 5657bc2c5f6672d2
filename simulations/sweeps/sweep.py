"""Many runs of one run file: every combination of what is compared, several seeds each, with intervals.

A sweep file names a run file beside it and axes; a point of an axis is a name and the settings that it stands for. Each
combination and seed is a run in a process of its own, with a folder of its own; what is finished is not run again.
"""

import itertools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from common import accounting, cli, events
from common.errors import AccountingUnsupported, ConfigError, DataError, SilotuneError
from common.privacy import cost as privacy_cost
from common.run import config, reading
from common.run.schema.section import RequiredLine, Section, Slug, refuse_look_alikes
from server.folder import run_files
from server.view.run_view import RunView
from simulations.bench.arms.process import ONE_THREAD

Setting = str | int | float | bool | list[str] | dict[str, str | int]
LOG_FILE: Final = "output.log"


class Sweep(Section):
    """The sweep file."""

    version: Annotated[Literal[1], BeforeValidator(refuse_look_alikes)] = Field(description="Version of this format.")
    run: RequiredLine = Field(description="The run file, relative to this one.")
    seeds: list[int] = Field(min_length=1, max_length=100, description="Each combination is run once with each.")
    set: dict[str, Setting] = Field(default_factory=dict, description="Settings of all runs.")
    axis: dict[Slug, dict[str, dict[str, Setting]]] = Field(
        min_length=1, description="Axes, their points by name, and the settings of each point."
    )


@dataclass(frozen=True)
class Cell:
    """One combination."""

    points: tuple[str, ...]
    overrides: Mapping[str, str]

    @property
    def name(self) -> str:
        """For folders."""
        return "--".join(self.points).replace(" ", "-").replace("/", "-")


@dataclass(frozen=True)
class Interval:
    """Mean over seeds, with half the width of its 95 % interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        """As in a table."""
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


def load(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: Not one; the message names the key and never its value.
    """
    try:
        return Sweep.model_validate(tomllib.loads(reading.read(path)))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def cells(sweep: Sweep) -> list[Cell]:
    """All combinations, the last axis fastest."""
    combinations = []
    for chosen in itertools.product(*(axis.items() for axis in sweep.axis.values())):
        overrides = {}
        for key, value in [*sweep.set.items(), *(pair for _, point in chosen for pair in point.items())]:
            overrides[key] = _toml(value)
        combinations.append(Cell(tuple(name for name, _ in chosen), overrides))
    return combinations


def play(path: Path, *, output: Path, jobs: int, data: str = "", model: str = "") -> dict[str, Any]:
    """Run what is not finished yet, `jobs` at a time, and gather the figures.

    Args:
        jobs: Runs at once, one thread each.

    Returns:
        `cells`: the points of each with its intervals; `refused`: the others with the reason; `privacy`: what all
        runs together cost a unit, None where no run is private.

    Raises:
        ConfigError: The sweep file is none, or every combination is refused.
        SilotuneError: A run failed; the others are finished first.
    """
    sweep = load(path)
    run_file = path.parent / sweep.run
    refused, plans = allowed_cells(run_file, cells(sweep))
    waiting = []
    for cell, seed in itertools.product([cell for cell, _ in plans], sweep.seeds):
        if not RunView.read(_folder(output, cell, seed) / events.FILE).exported_stage:
            waiting.append((cell, seed))
    failed = []
    with Progress(console=cli.progress(as_json=True), transient=True) as bar, ThreadPoolExecutor(jobs) as pool:
        task, folders = bar.add_task("runs", total=len(waiting)), {}
        for cell, seed in waiting:
            folder = _folder(output, cell, seed)
            folders[pool.submit(_run, run_file, cell, seed, folder=folder, data=data, model=model)] = str(folder)
        for done in as_completed(folders):
            bar.advance(task)
            if done.result():
                failed.append(folders[done])
    if failed:
        what = f"{len(failed)} of {len(waiting)} runs failed; {min(failed)}/{LOG_FILE} says why"
        raise SilotuneError(f"{what}, and the same command goes on with what is missing")
    shown = []
    for cell, _ in plans:
        figures = [_figures(_folder(output, cell, seed)) for seed in sweep.seeds]
        intervals = {name: asdict(interval([values[name] for values in figures])) for name in figures[0]}
        shown.append({"points": list(cell.points), "figures": intervals})
    return {
        "axes": list(sweep.axis),
        "num_seeds": len(sweep.seeds),
        "cells": shown,
        "privacy": search_cost([settings for _, settings in plans], len(sweep.seeds)),
        "refused": [{"points": list(cell.points), "reason": reason} for cell, reason in refused],
    }


def render(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """One line a combination, and below what was refused."""
    names = list(result["cells"][0]["figures"])
    table = Table(*result["axes"], *names, box=None, caption=f"mean and 95 % interval over {result['num_seeds']} seeds")
    for cell in result["cells"]:
        shown = [str(Interval(**cell["figures"][name])) for name in names]
        table.add_row(*cell["points"], *shown)
    yield table
    if result["privacy"]:
        yield cost_in_words(result["privacy"])
    for cell in result["refused"]:
        yield f"refused: {', '.join(cell['points'])}: {cell['reason']}"


def interval(values: Sequence[float]) -> Interval:
    """Mean over seeds and half the width of its 95 % interval.

    Example:
        >>> print(interval([1.0, 2.0, 3.0]))
        2.000 ± 2.484
    """
    if len(values) < 2:
        return Interval(mean(values), None)
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean(values), quantile * stdev(values) / len(values) ** 0.5)


def search_cost(plans: Sequence[config.RunConfig], num_seeds: int) -> dict[str, Any] | None:
    """What a search costs: a unit is in every run, and the best of the runs is chosen by all of them.

    No ledger is charged, as a simulation has none; at a site each run is charged to the site's.
    """
    modes = sorted({plan.privacy.mode for plan in plans})
    if modes == ["none"]:
        return None
    dp_delta = min(plan.privacy.dp_delta for plan in plans if plan.privacy.mode != "none")
    epsilon, reason = None, ""
    if len(modes) > 1:
        reason = f"they are not all private in the same way ({', '.join(modes)})"
    else:
        rounds = [privacy_cost.event_per_round(plan).times(plan.federation.num_rounds * num_seeds) for plan in plans]
        try:
            epsilon = round(accounting.compose(rounds, dp_delta=dp_delta), 4)
        except AccountingUnsupported as error:
            reason = str(error)
    num_runs = len(plans) * num_seeds
    return {"num_runs": num_runs, "modes": modes, "dp_delta": dp_delta, "epsilon": epsilon, "reason": reason}


def cost_in_words(privacy: Mapping[str, Any]) -> str:
    """The cost of a search in words."""
    runs = f"these {privacy['num_runs']} runs together"
    if privacy["epsilon"] is None:
        return f"{runs} promise nothing: {privacy['reason']}"
    whose = "a site" if privacy["modes"] == ["site"] else "a unit"
    return (
        f"{runs} cost {whose} epsilon {privacy['epsilon']:.2f} at delta {privacy['dp_delta']:g}: whoever chooses among "
        "them on private rows has spent that much"
    )


def allowed_cells(
    run_file: Path, combinations: Sequence[Cell]
) -> tuple[list[tuple[Cell, str]], list[tuple[Cell, config.RunConfig]]]:
    """Combinations that the run file's own rules refuse, with the reason, and the others, resolved."""
    refused: list[tuple[Cell, str]] = []
    allowed: list[tuple[Cell, config.RunConfig]] = []
    for cell in combinations:
        try:
            settings = privacy_cost.resolve(config.load(run_file, overrides=cell.overrides))
        except ConfigError as error:
            refused.append((cell, " ".join(str(error).split())))
        else:
            allowed.append((cell, settings))
    if not allowed:
        raise ConfigError(f"no combination is allowed; the first: {refused[0][1]}")
    return refused, allowed


def _run(run_file: Path, cell: Cell, seed: int, *, folder: Path, data: str, model: str) -> int:
    """One run in a process of its own; its exit code. What an interrupted one left is gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"--set={key}={value}" for key, value in {**cell.overrides, "seed": str(seed)}.items()]
    named = [*(["--data", data] if data else []), *(["--model", model] if model else [])]
    resume = ["--resume"] if (folder / run_files.RUN_FILE).exists() else []
    command = [sys.executable, "-m", "simulations.cli.app", "run", str(run_file), "--output", str(folder)]
    with (folder / LOG_FILE).open("wb") as log:
        done = subprocess.run(
            [*command, "--threads", "1", "--json", *settings, *named, *resume],
            env={**os.environ, **ONE_THREAD},
            stdout=log,
            stderr=log,
            check=False,
        )
    return done.returncode


def _folder(output: Path, cell: Cell, seed: int) -> Path:
    return output / cell.name / f"seed-{seed}"


def _figures(folder: Path) -> dict[str, float]:
    """Figures of one finished run: losses in nats per answer token, gap as a share, traffic in MB."""
    view = RunView.read(folder / events.FILE)
    last, rounds = view.last_evaluated, view.rounds.values()
    if last is None or not rounds:
        raise DataError(f"{folder}: no figures in its events; remove the folder and run again")
    losses = [site.loss for site in last.sites.values()]
    gaps = [event.gap for event in rounds if event.gap is not None]
    return {
        "held-out loss": last.loss,
        "worst site": max(losses),
        "spread": max(losses) - min(losses),
        "largest gap": max(gaps, default=0.0),
        "MB up": sum(event.bytes_up for event in rounds) / 1e6,
    }


def _toml(value: Setting) -> str:
    """A setting as `--set` takes it; but for tables JSON's notation is TOML's."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {json.dumps(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)
