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
from common.privacy import plan
from common.run import config, manifest
from common.run.catalogue.methods import FACTS
from common.scores import Shared
from server.folder import begun, run_files
from server.report import status
from server.report.terminal import Screen, percent
from server.run.run import Outcome
from simulations.attacks import run as attacks
from simulations.attacks import table as attack_table
from simulations.commands import options
from simulations.world import compare as comparing
from simulations.world import run as running
from simulations.world import world
from simulations.world.compare import World

ENGINES = ("in-process", "flower", "deployment")


@dataclass(frozen=True)
class Order:
    """A run file and what the command line says about it; `again` is the command itself, without --output and --set."""

    run_file: Path
    output: Path | None
    model: str
    data: str
    store: Path | None
    overrides: Mapping[str, str]
    is_quiet: bool
    num_threads: int = 0
    is_noise_accepted: bool = False
    num_workers: int = 0
    again: tuple[str, ...] = ()
    today: datetime.date = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date())

    def settings(self) -> config.RunConfig:
        """The run file with the command line's settings, and its noise chosen."""
        return plan.resolve(self.loaded())

    def loaded(self) -> config.RunConfig:
        """The run file with the command line's settings."""
        return options.load(self.run_file, model=self.model, data=self.data, overrides=self.overrides)

    def changes(self) -> dict[str, str]:
        """What the command line changes, in the run file's own words."""
        return options.changes(model=self.model, data=self.data, overrides=self.overrides)

    def resumed(self) -> "Order":
        """The same with what the run was begun with, where this command line does not say it anew."""
        if self.output is None:
            raise ConfigError("--resume: give the run's folder, --output DIR")
        return replace(self, overrides={**begun.read(self.output).overrides, **self.changes()}, model="", data="")

    def resuming(self, folder: Path) -> list[str]:
        """The command that goes on with a run; empty where none began it."""
        flags = [] if "--resume" in self.again else ["--resume"]
        return [*self.again, "--output", str(folder), *flags] if self.again else []

    def folder(self, settings: config.RunConfig) -> Path:
        """`--output`, or a new folder."""
        return self.output or cli.fresh_folder(Path(settings.output.folder), settings.name)

    def base_folder(self, settings: config.RunConfig) -> Path:
        """Where the base is."""
        return world.base_folder(settings, store_folder=self.store or store.DEFAULT)

    def world(self, *, resume: bool = False) -> World:
        """Settings, base and sites; rows first, since they are quick to be found wrong."""
        settings = self.settings()
        sites = world.load_sites(settings)
        world.require_named(settings, sites)
        folder = self.store or store.DEFAULT
        place = self.folder(settings)
        date = manifest.date_of(place / run_files.MANIFEST_FILE if resume else None, today=self.today)
        engine = world.load_engine(settings, store_folder=folder, num_threads=self.num_threads, date=date)
        return World(settings, engine, sites, place)

    def log(self, shared: World, *, resume: bool = False) -> EventLog:
        """The run's events, shown as they come; on stderr when stdout is for a program."""
        base = str(self.base_folder(shared.settings).absolute())
        start = begun.Begun(self.changes(), self.resuming(shared.folder), str(Path.cwd()), base)
        log = run_files.prepare(shared.settings, shared.folder, resume=resume, start=start)
        screen = Screen(cli.progress(as_json=self.is_quiet))
        log.listeners.append(screen)
        log.watchers.append(screen)
        return log


def compare(order: Order) -> dict[str, Any]:
    """All arms, comparison and report.

    Raises:
        ConfigError: The run's noise is for whole sites.
        SilotuneError: As the step that failed.
    """
    shared = order.world()
    if shared.settings.privacy.is_private_per_site:
        raise ConfigError("privacy.mode = 'site': an arm of one site has no sites to hide among; use silotune-sim run")
    world.require_global(shared.settings, what="a comparison with other arms")
    log = order.log(shared)
    with _ending_told(log, cli.quoted(order.again)):
        told = _tell_overlap(shared, log)
        results = comparing.compare(shared, log)
    figures = {
        name: {key: getattr(result, key) for key in ("held_out_loss", "exact_match", "rows_used")}
        for name, result in results.items()
    }
    return {"comparison": figures, "overlap": told, **_results(order, shared)}


def run(order: Order, *, engine: str, resume: bool) -> dict[str, Any]:
    """One federated run under one of the engines.

    Raises:
        ConfigError: No such engine.
        SilotuneError: As the step that failed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    if order.num_workers and engine != "flower":
        raise ConfigError(f"--workers {order.num_workers}: only --engine flower has workers")
    order = order.resumed() if resume else order
    shared = order.world(resume=resume)
    log = order.log(shared, resume=resume)
    with _ending_told(log, cli.quoted(order.resuming(shared.folder))):
        told = _tell_overlap(shared, log)
        _play(order, shared, log, engine=engine, resume=resume)
    return {"adapter": _adapters(shared.settings, shared.folder), "overlap": told, **_results(order, shared)}


def _tell_overlap(shared: World, log: EventLog) -> dict[str, int]:
    """Log how many held-out rows are trained on, over all sites and by site; the former."""
    counts = world.overlaps(shared.sites)
    total = overlap.total(counts.values())
    sites = {site: Shared(**found.as_dict()) for site, found in counts.items()}
    log.append(Overlap(**vars(total), sites=sites))
    return total.as_dict()


def _adapters(settings: config.RunConfig, folder: Path) -> str:
    """Where the finished adapter is, or those of the sites."""
    is_personal = FACTS[settings.aggregation.method].is_personal
    return str(folder / "sites" / "*" / world.ADAPTER_FOLDER if is_personal else folder / run_files.EXPORT_FOLDER)


@contextmanager
def audited(order: Order) -> Iterator[tuple[World, EventLog]]:
    """A run for an audit that trains it."""
    shared = order.world()
    world.require_global(shared.settings, what="an audit")
    _require_answers(shared.settings)
    log = order.log(shared)
    with _ending_told(log):
        yield shared, log


def attack(order: Order, *, name: str, num_bad: int, is_table: bool) -> dict[str, Any]:
    """One run with bad sites, or the table of all attacks and guards.

    Raises:
        ConfigError: No such attack, or too few honest sites.
        SilotuneError: As the step that failed.
    """
    shared = order.world()
    world.require_global(shared.settings, what="a study of attacks")
    _require_answers(shared.settings)
    if is_table:
        return {**attack_table.play(shared, num_bad=num_bad), "folder": str(shared.folder)}
    log = order.log(shared)
    with _ending_told(log):
        _tell_overlap(shared, log)
        harm = attacks.play(shared, name, num_bad=num_bad, log=log)
    return {"attack": name, "num_bad": num_bad, **harm, "folder": str(shared.folder)}


def _require_answers(settings: config.RunConfig) -> None:
    """Canaries, attackers and their scores are rows with one answer.

    Raises:
        ConfigError: The run learns preferences.
    """
    objective = settings.training.objective
    if objective != "sft":
        raise ConfigError(
            f"training.objective = '{objective}': audits and attacks are of runs that learn answers; set it to 'sft'"
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
def _ending_told(log: EventLog, command: str = "") -> Iterator[None]:
    """Why a run ends early is an event of it; one that is stopped from outside ends with the command to give next."""
    try:
        with cli.unwinding_on_sigterm():
            yield
    except BaseException as error:
        run_files.report_failure(log, error)
        if code := cli.stop_code(error):
            folder = log.path.parent
            told = f"stopped; finished rounds in {folder}: {len(run_files.finished(folder))}"
            raise cli.Stopped(f"{told}\nnext: {command}" if command else told, code) from None
        raise


def _play(order: Order, shared: World, log: EventLog, *, engine: str, resume: bool) -> Outcome:
    """The same run under the engine that was chosen."""
    settings = shared.settings
    if engine == "in-process":
        return running.in_process(
            settings,
            sites=shared.sites,
            engine=shared.engine,
            folder=shared.folder,
            log=log,
            resume=resume,
            is_noise_accepted=order.is_noise_accepted,
            engines=shared.engines,
        )
    from simulations.engines import engines

    common_part: dict[str, Any] = {
        "base_folder": order.base_folder(settings),
        "log": log,
        "resume": resume,
        "is_noise_accepted": order.is_noise_accepted,
    }
    num_threads = order.num_threads or 1
    if engine == "deployment":
        return engines.deployed(settings, num_threads=num_threads, **common_part)
    num_gpus = torch.cuda.device_count()
    num_workers = order.num_workers or num_gpus or len(os.sched_getaffinity(0))
    return engines.ray(
        settings,
        engine=shared.engine,
        num_threads=num_threads,
        num_workers=min(len(shared.sites), num_workers),
        num_gpus=num_gpus,
        **common_part,
    )


def _results(order: Order, shared: World) -> dict[str, Any]:
    """What the run came to, and where everything is; draws the report."""
    base = str(order.base_folder(shared.settings))
    return {**status.read(shared.folder), "folder": str(shared.folder), "base": base}


def comparison_note(result: Mapping[str, Any]) -> str:
    """Whether the arms' figures are of rows that nothing was trained on."""
    return overlap.sentence(result["overlap"])


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The arms side by side."""
    table = Table("", "held-out loss", "exact match", "rows used", box=None, pad_edge=False)
    for name, figures in result["comparison"].items():
        style, used = "bold" if name == "federated" else "", f"{figures['rows_used']:,}"
        table.add_row(name, f"{figures['held_out_loss']:.3f}", percent(figures["exact_match"]), used, style=style)
    return table


def ending(result: Mapping[str, Any]) -> str:
    """Where everything is and what to do next."""
    folder = result["folder"]
    adapter = result.get("adapter", f"{folder}/{run_files.EXPORT_FOLDER}")
    places = f"\nreport    {result['report']}\nadapter   {adapter}"
    if adapter != f"{folder}/{run_files.EXPORT_FOLDER}":  # of each site, and none to export
        return places
    command = ("silotune-server", "export", folder, "--merged", f"{folder}/merged", "--base", result["base"])
    return f"{places}\n{cli.next_step(*command)}"
