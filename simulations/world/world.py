"""Virtual sites: the rows of a run file, split into agents that share one loaded base, or one for each precision."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from client.agent import shelf as personal
from client.agent import sitelog
from client.agent.agent import Agent, SiteData
from client.agent.shelf import Shelf
from client.data import split
from client.train import schedule
from common.data import overlap, read
from common.data.files import Located
from common.data.overlap import Overlap
from common.data.problems import Problems, at_site
from common.data.rows import Columns, Row
from common.errors import ConfigError
from common.event_kinds import SiteStep
from common.events import EventLog
from common.model import loading, store
from common.model.base import Engine
from common.privacy.noise import Noise, SeededNoise
from common.run import config
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from common.run.schema import precisions
from common.run.schema.training import ObjectiveName
from server.evaluate.kept_apart import KnownRows
from simulations.embedded import preferences, records
from simulations.world import partition

EMBEDDED_BASE = Path(__file__).parents[1] / "embedded" / "base"
ADAPTER_FOLDER = "adapter"


@dataclass
class Failures:
    """What virtual sites could not do: in each site's log, and at hand for the researcher's terminal.

    Attributes:
        folder: Of the sites' logs.
        errors: In order.
    """

    folder: Path
    errors: list[Exception] = field(default_factory=list)

    def explain(self, reference: str) -> str:
        """What a virtual site's log has under a reference; empty if none has it. Sites may be other processes."""
        for path in sorted(self.folder.rglob("*.jsonl")) if reference else ():
            entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for entry in (one for one in entries if one.get("reference") == reference):
                return str(entry.get("message") or f"{entry['error']} at {entry['at'][-1]}")
        return ""

    def reporter(self, site: str) -> Callable[[str, Exception], None]:
        """A site's `report`."""

        def report(reference: str, error: Exception) -> None:
            self.errors.append(error)
            sitelog.report(self.folder / f"{site}.jsonl", reference, error)

        return report


def base_folder(settings: config.RunConfig, *, store_folder: Path = store.DEFAULT) -> Path:
    """The base's folder; `embedded` comes with this package."""
    return store.resolve(settings.model.base, store=store_folder, shipped={"embedded": EMBEDDED_BASE})


def load_engine(
    settings: config.RunConfig,
    *,
    device: str = "auto",
    num_threads: int = 0,
    store_folder: Path = store.DEFAULT,
    date: str = "",
) -> Engine:
    """The base with its adapter, as the run file says; `date` is the run's, for a chat template that prints one."""
    folder = base_folder(settings, store_folder=store_folder)
    return loading.engine_of(settings, folder, device_name=device, num_threads=num_threads, trains=True, date=date)


@dataclass
class Engines:
    """One loaded base for each precision that sites have, however many sites; the run's own is the coordinator's too.

    Attributes:
        settings: The run file.
        own: The base at the run's own precision.
    """

    settings: config.RunConfig
    own: Engine
    _others: dict[str, Engine] = field(default_factory=dict)

    def at(self, site: str) -> Engine:
        """The base at a site's precision, loaded when the first site asks for it.

        Raises:
            ModelError: This precision is impossible here.
        """
        wanted = precisions.at_site(self.settings.model, site)
        if wanted.quantization == self.settings.model.quantization:
            return self.own
        if wanted.quantization not in self._others:
            here = self.settings.model_copy(update={"model": wanted.model_copy(update={"base": str(self.own.folder)})})
            threads, device = torch.get_num_threads(), self.own.device.type
            self._others[wanted.quantization] = load_engine(
                here, device=device, num_threads=threads, date=self.own.date
            )
        return self._others[wanted.quantization]


def load_sites(settings: config.RunConfig) -> dict[str, SiteData]:
    """Read, partition and split; a function of the run file alone.

    Raises:
        DataError: Rows are missing or unusable; the message names the site, once rows are of one.
    """
    located = locate(settings)
    read.convert(located, columns_of(settings), source=settings.data.source)  # so that a file is refused as a whole
    rows: dict[str, Sequence[Row]] = {}
    for site, own in part(located, settings).items():
        with at_site(site):
            rows[site] = read.convert(own, columns_of(settings), source=settings.data.source)
    return {
        site: SiteData(*sides)
        for site, sides in split.for_run(rows, settings.data, settings.privacy, seed=settings.seed).items()
    }


def load_tables(settings: config.RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Every site's rows with all their columns, sites ascending; see `load_sites`.

    Raises:
        DataError: Rows are missing or unusable.
    """
    located = locate(settings)
    read.convert(located, columns_of(settings), source=settings.data.source)
    return {site: [row.fields for row in rows] for site, rows in part(located, settings).items()}


def locate(settings: config.RunConfig, problems: Problems | None = None) -> list[Located]:
    """The rows of all sites, each with its place.

    Args:
        settings: The run file.
        problems: Gets what cannot be read; None: that is an error.

    Raises:
        DataError: There are no rows, or some cannot be read and `problems` is None.
    """
    source = settings.data.source
    if source == "embedded":
        table = enumerate(embedded_table(settings.training.objective), start=1)
        return [Located(f"embedded row {number}", fields) for number, fields in table]
    return read.locate(source) if problems is None else read.gather(source, problems)


def part(located: Sequence[Located], settings: config.RunConfig) -> dict[str, list[Located]]:
    """Rows by site, as the run file says, sites ascending.

    Raises:
        DataError: As `partition.sites_of`.
    """
    data = settings.data
    named = partition.sites_of(
        [row.fields for row in located],
        how=data.partition,
        num_sites=data.num_sites,
        site_column=data.site_column,
        dirichlet_alpha=data.dirichlet_alpha,
        unit_column=data.unit_column,
        seed=settings.seed,
        places=[row.place for row in located],
    )
    sites: dict[str, list[Located]] = {name: [] for name in sorted(set(named))}
    for row, name in zip(located, named, strict=True):
        sites[name].append(row)
    return sites


def embedded_table(objective: ObjectiveName) -> list[dict[str, Any]]:
    """The embedded records, in the form that an objective reads."""
    made = records.generate()
    if objective == "sft":
        return list(made)
    return preferences.pairs(made) if objective == "dpo" else preferences.ratings(made)


def split_sites(tables: Mapping[str, list[dict[str, Any]]], settings: config.RunConfig) -> dict[str, SiteData]:
    """Every site's rows, held-out units aside.

    Raises:
        DataError: Rows are unusable, or a site has too few.
    """
    rows = {site: read.to_rows(table, columns_of(settings)) for site, table in tables.items()}
    return {
        site: SiteData(*sides)
        for site, sides in split.for_run(rows, settings.data, settings.privacy, seed=settings.seed).items()
    }


def overlaps(sites: Mapping[str, SiteData]) -> dict[str, Overlap]:
    """Count, for each site, the held-out rows whose text is trained on at any site; see `common.data.overlap`."""
    train = {site: data.train for site, data in sites.items()}
    return overlap.between({site: data.held_out for site, data in sites.items()}, train)


def known_rows(sites: Mapping[str, SiteData]) -> KnownRows:
    """All sites' rows, as the coordinator of a simulation can see them."""
    parts = list(sites.values())
    return KnownRows([row for data in parts for row in data.train], [row for data in parts for row in data.held_out])


def require_named(settings: config.RunConfig, sites: Mapping[str, SiteData]) -> None:
    """A simulation knows its sites, so that settings of a site that there is not are a mistake.

    Raises:
        ConfigError: `adapter.site_ranks` or `model.site_quantization` names a site that there is not.
    """
    named: dict[str, Mapping[str, object]] = {
        "adapter.site_ranks": settings.adapter.site_ranks,
        "model.site_quantization": settings.model.site_quantization,
    }
    for key, table in named.items():
        if unknown := sorted(table.keys() - sites.keys()):
            raise ConfigError(f"{key} names {unknown[0]}, and the sites are {', '.join(sorted(sites))}")


def columns_of(settings: config.RunConfig) -> Columns:
    """Which columns of a run's rows hold what."""
    data, objective = settings.data, settings.training.objective
    return Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column, objective)


def make_agent(site: str, data: SiteData, engine: Engine, failures: Failures, *, log: EventLog | None = None) -> Agent:
    """One virtual site on a shared engine; its noise comes from the run's seed, so that a study can be repeated.

    Args:
        site: Its name.
        data: Its rows.
        engine: Shared.
        failures: Where it tells what it could not do.
        log: Those who watch it are told of each step; None: nobody.
    """

    def watch(round_index: int, step: int, num_steps: int) -> None:
        if log:
            log.tell(SiteStep(site=site, round=round_index, step=step, num_steps=num_steps))

    return Agent(
        site,
        load_data=lambda _: data,
        load_engine=lambda _: engine,
        report=failures.reporter(site),
        make_noise=lambda run, round_index: seeded_noise(run, site=site, round_index=round_index),
        state_folder=failures.folder / site,
        shelf=Shelf(failures.folder / site / personal.FOLDER),
        watch=watch,
    )


def server_noise(settings: config.RunConfig) -> Callable[[int], Noise]:
    """The coordinator's draws and noise by round, from the run's seed; they protect nobody."""
    return lambda round_index: SeededNoise(schedule.derive_seed(settings.seed, "server", round_index, "noise"))


def export_personal(settings: config.RunConfig, folder: Path) -> None:
    """Write every site's own adapter as a peft folder, `sites/NAME/adapter`, where the run's method leaves one there.

    Raises:
        ModelError: What a site kept is not what was written.
        StorageError: Disk full or not writable.
    """
    if not FACTS[settings.aggregation.method].is_personal:
        return
    for path in sorted((folder / "sites").glob(f"*/{personal.FOLDER}")):
        shelf, target = Shelf(path), path.with_name(ADAPTER_FOLDER)
        if target.exists():
            shutil.rmtree(target)  # of this run before it was resumed
        for run_sha256 in shelf.runs():
            shelf.export(run_sha256, target)


def require_global(settings: config.RunConfig, *, what: str) -> None:
    """Refuse a study that scores a global adapter where the method makes none.

    Raises:
        ConfigError: Names the nearest method that does.
    """
    facts = FACTS[settings.aggregation.method]
    if facts.is_personal:
        raise ConfigError(
            f"{what} needs a global adapter, and under aggregation.method = '{facts.name}' each site has its own; "
            f"the nearest method with one is '{facts.nearest[0]}'"
        )


def seeded_noise(run: RunManifest, *, site: str, round_index: int) -> Noise:
    """Noise that the run's seed gives; it protects nobody, as whoever knows the seed can take it off."""
    return SeededNoise(schedule.derive_seed(run.run.seed, site, round_index, "noise"))
