"""What the commands of `silotune-sim` do, between options and printing."""

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from common import cli
from common.data import overlap
from common.errors import ConfigError
from common.event_kinds import Overlap
from common.events import EventLog
from common.model import store
from common.privacy import cost
from common.run import config, manifest
from common.run.catalogue.methods import FACTS
from common.scores import Shared
from server.folder import begun, run_files
from server.report import status
from server.report.terminal import Screen
from server.view.figures import percent
from simulations.attacks import run as attacks
from simulations.attacks import table as attack_table
from simulations.world import compare as comparing
from simulations.world import run as running
from simulations.world import world
from simulations.world.world import Source, World

ENGINES = ("in-process", "flower", "deployment")


@dataclass(frozen=True)
class Order:
    """A run file and what the command line says about it.

    Attributes:
        changes: What the command line changes, in the run file's own words.
        output: The run's folder; None: a new one.
        as_json: Whether stdout is for a program.
        again: The command itself, without `--output`.
        today: For a chat template that prints a date.
    """

    run_file: Path
    changes: Mapping[str, str]
    output: Path | None = None
    store: Path | None = None
    as_json: bool = False
    num_threads: int = 0
    again: tuple[str, ...] = ()
    today: datetime.date = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date())

    def loaded(self) -> config.RunConfig:
        """The run file with the command line's settings."""
        return config.load(self.run_file, overrides=self.changes)

    def settings(self) -> config.RunConfig:
        """The same with its noise chosen."""
        return cost.resolve(self.loaded())

    def resumed(self) -> "Order":
        """The same with what the run was begun with, where this command line does not say it anew."""
        if self.output is None:
            raise ConfigError("--resume: give the run's folder, --output DIR")
        return replace(self, changes={**begun.read(self.output).overrides, **self.changes})

    def resuming(self, folder: Path) -> list[str]:
        """The command that goes on with a run; empty where none began it."""
        flags = [] if "--resume" in self.again else ["--resume"]
        return [*self.again, "--output", str(folder), *flags] if self.again else []

    def base_folder(self, base: str) -> Path:
        """The folder of a base."""
        return world.base_folder(base, store_folder=self.store or store.DEFAULT)

    def world(self, *, resume: bool = False) -> World:
        """Settings, base and sites; rows first, since they are quick to be found wrong."""
        settings = self.settings()
        sites = Source.of(settings).sites()
        world.require_named(settings.adapter, settings.model, sites)
        folder = self.output or cli.fresh_folder(Path(settings.output.folder), settings.name)
        date = manifest.date_of(folder / run_files.MANIFEST_FILE if resume else None, today=self.today)
        store_folder = self.store or store.DEFAULT
        engine = world.load_engine(settings, store_folder=store_folder, num_threads=self.num_threads, date=date)
        return World(settings, engine, sites, folder)

    def log(self, shared: World, *, resume: bool = False) -> EventLog:
        """The run's events, shown as they come; on stderr when stdout is for a program."""
        base = str(self.base_folder(shared.settings.model.base).absolute())
        start = begun.Begun(dict(self.changes), self.resuming(shared.folder), str(Path.cwd()), base)
        log = run_files.prepare(shared.settings, shared.folder, resume=resume, start=start)
        screen = Screen(cli.progress(as_json=self.as_json))
        log.listeners.append(screen)
        log.watchers.append(screen)
        return log


def compare(order: Order) -> dict[str, Any]:
    """All arms, comparison and report."""
    shared = order.world()
    if shared.settings.privacy.mode == "site":
        raise ConfigError("privacy.mode = 'site': an arm of one site has no sites to hide among; use silotune-sim run")
    world.require_global(shared.settings.aggregation.method, what="a comparison with other arms")
    log = order.log(shared)
    with _reporting(log, cli.quoted(order.again)):
        shared_texts = _log_overlap(shared, log)
        results = comparing.compare(shared, log)
    figures = {
        name: {key: getattr(result, key) for key in ("held_out_loss", "exact_match", "rows_used")}
        for name, result in results.items()
    }
    return {"comparison": figures, "overlap": shared_texts, **_results(order, shared)}


def run(
    order: Order, *, engine: str, resume: bool, num_workers: int = 0, is_noise_accepted: bool = False
) -> dict[str, Any]:
    """One federated run under one of the engines."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    if num_workers and engine != "flower":
        raise ConfigError(f"--workers {num_workers}: only --engine flower has workers")
    order = order.resumed() if resume else order
    shared = order.world(resume=resume)
    log = order.log(shared, resume=resume)
    is_personal = FACTS[shared.settings.aggregation.method].is_personal
    adapter = shared.folder / ("sites/*/" + world.ADAPTER_FOLDER if is_personal else run_files.EXPORT_FOLDER)
    base_folder, num_threads = order.base_folder(shared.settings.model.base), order.num_threads or 1
    given: dict[str, Any] = {"log": log, "resume": resume, "is_noise_accepted": is_noise_accepted}
    with _reporting(log, cli.quoted(order.resuming(shared.folder))):
        shared_texts = _log_overlap(shared, log)
        if engine == "in-process":
            running.in_process(shared, **given)
        else:
            from simulations.engines import engines  # loads Flower

            given |= {"base_folder": base_folder, "num_threads": num_threads}
            if engine == "deployment":
                engines.deployed(shared.settings, **given)
            else:
                num_gpus = torch.cuda.device_count()
                num_workers = min(len(shared.sites), num_workers or num_gpus or len(os.sched_getaffinity(0)))
                engines.ray(shared, num_workers=num_workers, num_gpus=num_gpus, **given)
    return {"adapter": str(adapter), "overlap": shared_texts, **_results(order, shared)}


def _log_overlap(shared: World, log: EventLog) -> dict[str, int]:
    """Log how many held-out rows are trained on, over all sites and by site; the former."""
    counts = world.overlaps(shared.sites)
    total = overlap.total(counts.values())
    sites = {site: Shared(**shared_texts.as_dict()) for site, shared_texts in counts.items()}
    log.append(Overlap(**vars(total), sites=sites))
    return total.as_dict()


@contextmanager
def audited(order: Order) -> Iterator[tuple[World, EventLog]]:
    """A run for an audit that trains it."""
    shared = order.world()
    world.require_global(shared.settings.aggregation.method, what="an audit")
    _require_answers(shared.settings.training.objective.kind)
    log = order.log(shared)
    with _reporting(log):
        yield shared, log


def attack(order: Order, *, name: str, num_bad: int, is_table: bool) -> dict[str, Any]:
    """One run with bad sites, or the table of all attacks and guards."""
    shared = order.world()
    world.require_global(shared.settings.aggregation.method, what="a study of attacks")
    _require_answers(shared.settings.training.objective.kind)
    if is_table:
        return {**attack_table.play(shared, num_bad=num_bad), "folder": str(shared.folder)}
    log = order.log(shared)
    with _reporting(log):
        _log_overlap(shared, log)
        harm = attacks.play(shared, name, num_bad=num_bad, log=log)
    return {"attack": name, "num_bad": num_bad, **harm, "folder": str(shared.folder)}


def _require_answers(objective: str) -> None:
    """Canaries, attackers and their scores are rows with one answer."""
    if objective != "sft":
        raise ConfigError(
            f"training.objective.kind = '{objective}': audits and attacks are of runs that learn answers; set 'sft'"
        )


def attack_tables(result: Mapping[str, Any]) -> list[Table]:
    """The figures of one run, or the tables."""
    if "guards" in result:
        return list(attack_table.render(result))
    table = Table("figure", "value", box=None, pad_edge=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return [table]


@contextmanager
def _reporting(log: EventLog, command: str = "") -> Iterator[None]:
    """Why a run ends early is an event of it; one that is stopped from outside ends with the command to give next."""
    try:
        with cli.unwinding_on_sigterm():
            yield
    except BaseException as error:
        run_files.report_failure(log, error)
        if code := cli.stop_code(error):
            folder = log.path.parent
            message = f"stopped; finished rounds in {folder}: {len(run_files.finished(folder))}"
            raise cli.Stopped(f"{message}\nnext: {command}" if command else message, code) from None
        raise


def _results(order: Order, shared: World) -> dict[str, Any]:
    """Status, folder and base of a run; draws the report."""
    base = str(order.base_folder(shared.settings.model.base))
    return {**status.read(shared.folder), "folder": str(shared.folder), "base": base}


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The arms side by side."""
    table = Table("", "held-out loss", "exact match", "rows used", box=None, pad_edge=False)
    for name, figures in result["comparison"].items():
        style, used = "bold" if name == "federated" else "", f"{figures['rows_used']:,}"
        table.add_row(name, f"{figures['held_out_loss']:.3f}", percent(figures["exact_match"]), used, style=style)
    return table


def ending(result: Mapping[str, Any]) -> str:
    """Paths of report and adapter, and the next command."""
    folder = result["folder"]
    adapter = result.get("adapter", f"{folder}/{run_files.EXPORT_FOLDER}")
    paths = f"\nreport    {result['report']}\nadapter   {adapter}"
    if adapter != f"{folder}/{run_files.EXPORT_FOLDER}":  # of each site, and none to export
        return paths
    command = ("silotune-server", "export", folder, "--merged", f"{folder}/merged", "--base", result["base"])
    return f"{paths}\n{cli.next_step(*command)}"
