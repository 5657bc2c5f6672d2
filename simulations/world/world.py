"""Virtual sites: the rows of a run file, split into agents that share one loaded base, or one for each precision."""

import functools
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
from common.data.overlap import OverlapCounts
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
from common.run.schema.privacy import PrivacyConfig
from common.run.schema.training import ObjectiveName
from server.evaluate.kept_apart import KnownRows
from simulations.embedded import preferences, records
from simulations.world import partition

EMBEDDED_BASE = Path(__file__).parents[1] / "embedded" / "base"
ADAPTER_FOLDER = "adapter"


@dataclass
class Failures:
    """Errors of virtual sites: in each site's log, and at hand for the researcher's terminal."""

    folder: Path
    errors: list[Exception] = field(default_factory=list)

    def explain(self, reference: str) -> str:
        """The reason that a virtual site's log has under a reference; empty if none has it."""
        for path in sorted(self.folder.rglob("*.jsonl")) if reference else ():
            entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for entry in entries:
                if entry.get("reference") == reference:
                    return str(entry.get("message") or f"{entry['error']} at {entry['at'][-1]}")
        return ""

    def reporter(self, site: str) -> Callable[[str, Exception], None]:
        """A site's `report`."""

        def report(reference: str, error: Exception) -> None:
            self.errors.append(error)
            sitelog.report(self.folder / f"{site}.jsonl", reference, error)

        return report


def base_folder(base: str, *, store_folder: Path = store.DEFAULT) -> Path:
    """The folder of a base, a path or a name in the store; `embedded` comes with this package."""
    return store.resolve(base, store=store_folder, shipped={"embedded": EMBEDDED_BASE})


def load_engine(
    settings: config.RunConfig,
    *,
    device: str = "auto",
    num_threads: int = 0,
    store_folder: Path = store.DEFAULT,
    date: str = "",
) -> Engine:
    """The base with its adapter, as the run file says; `date` is the run's, for a chat template that prints one."""
    folder = base_folder(settings.model.base, store_folder=store_folder)
    return loading.engine_of(settings, folder, device_name=device, num_threads=num_threads, trains=True, date=date)


@dataclass
class Engines:
    """One loaded base for each precision that sites have, however many sites; the run's own is the coordinator's too.

    Attributes:
        main: The base at the run's own precision.
    """

    settings: config.RunConfig
    main: Engine
    _others: dict[str, Engine] = field(default_factory=dict)

    def at(self, site: str) -> Engine:
        """The base at a site's precision, loaded when the first site asks for it.

        Raises:
            ModelError: This precision is impossible here.
        """
        wanted = precisions.at_site(self.settings.model, site)
        if wanted.quantization == self.settings.model.quantization:
            return self.main
        if wanted.quantization not in self._others:
            here = self.settings.model_copy(update={"model": wanted.model_copy(update={"base": str(self.main.folder)})})
            threads, device = torch.get_num_threads(), self.main.device.type
            self._others[wanted.quantization] = load_engine(
                here, device=device, num_threads=threads, date=self.main.date
            )
        return self._others[wanted.quantization]


@dataclass(frozen=True)
class Source:
    """What a run file says about its rows; all that is read here is a function of it alone.

    Attributes:
        objective: `training.objective.kind`: which columns are read.
        privacy: `[privacy]`, on which the split depends.
    """

    data: config.DataConfig
    objective: ObjectiveName
    privacy: PrivacyConfig
    seed: int

    @classmethod
    def of(cls, settings: config.RunConfig) -> "Source":
        """The source of a run's rows."""
        return cls(settings.data, settings.training.objective.kind, settings.privacy, settings.seed)

    @property
    def columns(self) -> Columns:
        """Which columns hold what."""
        data = self.data
        return Columns(data.instruction_column, data.input_column, data.output_column, data.unit_column, self.objective)

    def sites(self) -> dict[str, SiteData]:
        """Read, partition and split.

        Raises:
            DataError: Rows are missing or unusable; the message names the site, once rows are of one.
        """
        located = self._located()
        rows: dict[str, Sequence[Row]] = {}
        for site, part in self.part(located).items():
            with at_site(site):
                rows[site] = read.convert(part, self.columns, source=self.data.source)
        return self.split(rows)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Every site's rows with all their columns, sites ascending; see `sites`."""
        return {site: [row.fields for row in rows] for site, rows in self.part(self._located()).items()}

    def _located(self) -> list[Located]:
        """All rows; a file with one that cannot be used is refused as a whole."""
        located = self.locate()
        read.convert(located, self.columns, source=self.data.source)
        return located

    def locate(self, problems: Problems | None = None) -> list[Located]:
        """The rows of all sites, each with its place.

        Args:
            problems: Gets what cannot be read; None: that is an error.

        Raises:
            DataError: There are no rows, or some cannot be read and `problems` is None.
        """
        if self.data.source != "embedded":
            gather = read.locate if problems is None else functools.partial(read.gather, problems=problems)
            return gather(self.data.source)
        made = records.generate()
        table: Sequence[Mapping[str, Any]] = made
        if self.objective != "sft":
            table = preferences.pairs(made) if self.objective == "dpo" else preferences.ratings(made)
        return [Located(f"embedded row {number}", dict(fields)) for number, fields in enumerate(table, start=1)]

    def part(self, located: Sequence[Located]) -> dict[str, list[Located]]:
        """Rows by site, as the run file says, sites ascending."""
        data = self.data
        named = partition.sites_of(
            [row.fields for row in located],
            how=data.partition,
            num_sites=data.num_sites,
            site_column=data.site_column,
            dirichlet_alpha=data.dirichlet_alpha,
            unit_column=data.unit_column,
            seed=self.seed,
            places=[row.place for row in located],
        )
        sites: dict[str, list[Located]] = {name: [] for name in sorted(set(named))}
        for row, name in zip(located, named, strict=True):
            sites[name].append(row)
        return sites

    def split(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, SiteData]:
        """Every site's rows, held-out units aside."""
        sides = split.for_run(rows, self.data, self.privacy, seed=self.seed)
        return {site: SiteData(train, held_out) for site, (train, held_out) in sides.items()}


@dataclass(frozen=True)
class World:
    """A run on one machine: its settings, base and sites, and the folder that it writes.

    Attributes:
        folder: The run's; made by `server.folder.run_files.prepare`.
        loaded: Bases that are loaded already, of a run with the same `[model]`; None: nothing but `engine` is.
    """

    settings: config.RunConfig
    engine: Engine
    sites: Mapping[str, SiteData]
    folder: Path
    loaded: Engines | None = None

    @functools.cached_property
    def engines(self) -> Engines:
        """The base at each precision that sites have."""
        return self.loaded or Engines(self.settings, self.engine)


def overlaps(sites: Mapping[str, SiteData]) -> dict[str, OverlapCounts]:
    """Count, for each site, the held-out rows whose text is trained on at any site; see `common.data.overlap`."""
    train = {site: data.train for site, data in sites.items()}
    return overlap.between({site: data.held_out for site, data in sites.items()}, train)


def known_rows(sites: Mapping[str, SiteData]) -> KnownRows:
    """All sites' rows, as the coordinator of a simulation can see them."""
    return KnownRows(
        [row for data in sites.values() for row in data.train],
        [row for data in sites.values() for row in data.held_out],
    )


def require_named(adapter: config.AdapterConfig, model: config.ModelConfig, sites: Mapping[str, SiteData]) -> None:
    """A simulation knows its sites, so that settings of a site that there is not are a mistake.

    Raises:
        ConfigError: `adapter.site_ranks` or `model.site_quantization` names a site that there is not.
    """
    named: dict[str, Mapping[str, object]] = {
        "adapter.site_ranks": adapter.lower_ranks,
        "model.site_quantization": model.site_quantization,
    }
    for key, table in named.items():
        if unknown := sorted(table.keys() - sites.keys()):
            raise ConfigError(f"{key} names {unknown[0]}, and the sites are {', '.join(sorted(sites))}")


def make_agent(site: str, data: SiteData, engine: Engine, failures: Failures, *, log: EventLog | None = None) -> Agent:
    """One virtual site on a shared engine; its noise comes from the run's seed, so that a study can be repeated.

    Such noise protects nobody: whoever knows the seed can take it off. Each step is passed to the watchers of `log`.
    """

    def watch(round_index: int, step: int, num_steps: int) -> None:
        if log:
            log.tell(SiteStep(site=site, round=round_index, step=step, num_steps=num_steps))

    def noise(run: RunManifest, round_index: int) -> Noise:
        return SeededNoise(schedule.derive_seed(run.run.seed, site, round_index, "noise"))

    return Agent(
        site,
        load_data=lambda _: data,
        load_engine=lambda _: engine,
        report=failures.reporter(site),
        make_noise=noise,
        state_folder=failures.folder / site,
        shelf=Shelf(failures.folder / site / personal.FOLDER),
        watch=watch,
    )


def server_noise(seed: int) -> Callable[[int], Noise]:
    """The coordinator's draws and noise by round, from the run's seed; they protect nobody."""
    return lambda round_index: SeededNoise(schedule.derive_seed(seed, "server", round_index, "noise"))


def export_personal(method: str, folder: Path) -> None:
    """Write every site's own adapter as a peft folder, `sites/NAME/adapter`, where the run's method leaves one there.

    Raises:
        ModelError: What a site kept is not what was written.
        StorageError: Disk full or not writable.
    """
    if not FACTS[method].is_personal:
        return
    for path in sorted((folder / "sites").glob(f"*/{personal.FOLDER}")):
        shelf, target = Shelf(path), path.with_name(ADAPTER_FOLDER)
        if target.exists():
            shutil.rmtree(target)  # of this run before it was resumed
        for run_sha256 in shelf.runs():
            shelf.export(run_sha256, target)


def require_global(method: str, *, what: str) -> None:
    """Refuse a study that scores a global adapter where the method makes none.

    Raises:
        ConfigError: Names the nearest method that does.
    """
    facts = FACTS[method]
    if facts.is_personal:
        raise ConfigError(
            f"{what} needs a global adapter, and under aggregation.method = '{facts.name}' each site has its own; "
            f"the nearest method with one is '{facts.nearest[0]}'"
        )
