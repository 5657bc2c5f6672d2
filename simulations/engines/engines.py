"""The same run under Flower's two engines: virtual sites in Ray workers, or real processes over TLS.

`simulations.world.run.in_process` is the third. All three give the same adapter, bit by bit, on the CPU with as many
threads.
"""

import dataclasses
import functools
import pickle
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid

from client.agent.agent import SiteData
from common import events, storage
from common.errors import TooFewSitesError
from common.event_kinds import Event, RunFailed, SiteFailed, SiteRefused
from common.events import EventLog
from common.frame import site_states, wire
from common.frame.wire import Frame
from common.model.base import Engine
from common.run import config
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from server.evaluate import suite
from server.fleet.grid import GridFleet
from server.folder import checkpoint, run_files
from server.run import finish
from server.run import run as server_run
from server.run.run import Outcome
from simulations.engines import deployment, site_files
from simulations.world import world
from simulations.world.world import Engines, Failures

_REFERENCE = re.compile(r"; the site's log has the reason under reference (\w+)")
SPARE_S = 300.0  # of a deployed run beyond its own time limits: starting processes, loading the base, export


def ray(
    settings: config.RunConfig,
    *,
    engine: Engine,
    base_folder: Path,
    log: EventLog,
    num_workers: int,
    num_threads: int,
    num_gpus: int = 0,
    resume: bool = False,
    is_noise_accepted: bool = False,
) -> Outcome:
    """Virtual sites in Ray workers, each of which loads the base once.

    Args:
        settings: The run file.
        engine: The base on the coordinator's side, in this process.
        base_folder: Where the workers load it from.
        log: Events of a folder that `server.folder.run_files.prepare` made.
        num_workers: Processes that play the sites.
        num_threads: CPU threads of torch in each; 0: all cores.
        num_gpus: GPUs of this machine, for the workers to share.
        resume: Go on after the newest whole checkpoint.
        is_noise_accepted: See `server.run.run.execute`.

    Raises:
        TransportError: Ray or Flower's engine failed.
        SilotuneError: As `server.run.run.execute`.
    """
    from simulations.engines import flower  # loads Ray

    folder, data = log.path.parent, world.load_sites(settings)
    known = world.known_rows(data)

    def main(grid: Grid) -> Outcome:
        fleet = GridFleet(grid, is_closed=True, explain=Failures(folder / "sites").explain)
        return server_run.execute(
            settings,
            fleet=fleet,
            engine=engine,
            folder=folder,
            log=log,
            resume=resume,
            is_noise_accepted=is_noise_accepted,
            make_noise=world.server_noise(settings),
            known=known,
        )

    with tempfile.TemporaryDirectory(prefix="silotune-rows-") as rows:
        for number, name in enumerate(sorted(data)):
            storage.write_atomic(Path(rows) / f"{number}.pickle", pickle.dumps((name, data[name])))
        sites = Sites(
            config.resolved_json(settings),
            str(base_folder.absolute()),
            num_threads,
            rows,
            str(folder.absolute() / "sites"),
            suite.read(settings.data, settings.evaluation, settings.gate)[1],
            engine.date,
        )
        outcome = flower.run(
            main,
            functools.partial(_answer_of, sites),
            num_sites=len(data),
            num_workers=num_workers,
            num_gpus=num_gpus,
        )
    world.export_personal(settings, folder)
    return outcome


def deployed(
    settings: config.RunConfig,
    *,
    base_folder: Path,
    log: EventLog,
    num_threads: int,
    resume: bool = False,
    is_noise_accepted: bool = False,
) -> Outcome:
    """SuperLink, SuperNodes, couriers and agents as processes of this machine.

    The sites' rows lie in a temporary folder of this user while the run lasts.

    Args:
        settings: The run file.
        base_folder: Where all processes load the base from.
        log: Events of a folder that `server.folder.run_files.prepare` made.
        num_threads: CPU threads of torch in each process; 0: all cores.
        resume: Go on after the newest whole checkpoint.
        is_noise_accepted: See `server.run.run.execute`.

    Raises:
        TransportError: A process did not start or ended early; the message names its log.
        RemoteError: The run failed; the message says why.
        TooFewSitesError: All sites have answered, and not enough of them can take part.
    """
    folder, times = log.path.parent, settings.federation
    with tempfile.TemporaryDirectory(prefix="silotune-sites-") as files:
        sites = site_files.write(
            world.load_tables(settings),
            settings=settings,
            folder=Path(files),
            base_folder=base_folder.absolute(),
            log_folder=folder.absolute() / "sites",
            num_threads=num_threads,
        )
        num_waits = 2 * times.num_rounds + 1 + settings.evaluation.num_polish_stages
        limit_s = times.join_timeout_s + num_waits * times.round_timeout_s + SPARE_S
        given: UserConfig = {
            "base-folder": str(base_folder.absolute()),
            "resume": resume,
            "i-accept": is_noise_accepted,
        }
        hearer = _Hearer(log, Failures(folder / "sites"), num_sites=len(sites), min_sites=times.min_sites)
        told = EventLog(log.path, [hearer])
        deployment.run(sites, log=told, config=given, timeout_s=limit_s, num_threads=num_threads)
    world.export_personal(settings, folder)
    return _outcome(folder)


@dataclass
class _Hearer:
    """Hears a deployed run for whoever simulates it: the reasons in the sites' logs are this user's own to read.

    It also knows that no other site will come, which the run's own process does not.
    """

    log: EventLog
    failures: Failures
    num_sites: int
    min_sites: int
    _joined: set[str] = field(default_factory=set)
    _refused: dict[str, str] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Pass an event on, with the reason behind a reference."""
        if isinstance(event, SiteRefused | SiteFailed | RunFailed):
            event = dataclasses.replace(event, reason=_REFERENCE.sub(self._reason, event.reason))
        for listener in self.log.listeners:
            listener(event)
        if event["kind"] == "site_joined":
            self._joined.add(event["site"])
        elif event["kind"] == "site_refused" and event["state"] != site_states.WAITS:
            self._refused[str(event["node"])] = event["reason"]
        num_answers = len(self._joined) + len(self._refused)
        if self._refused and num_answers >= self.num_sites and len(self._joined) < self.min_sites:
            reasons = "; ".join(self._refused.values())
            raise TooFewSitesError(f"{len(self._joined)} sites opened the run, {self.min_sites} are needed; {reasons}")

    def _reason(self, found: re.Match[str]) -> str:
        """What a site's log has, in the place of where to look for it."""
        reason = self.failures.explain(found[1])
        return f": {reason}" if reason else found[0]


def _outcome(folder: Path) -> Outcome:
    """The end of a run that another process did, read from its folder."""
    manifest = run_files.stored_manifest(folder)
    if not FACTS[manifest.run.aggregation.method].is_personal:
        found = finish.stored(folder, num_rounds=0)
        return Outcome(found.tensors, found.sites, folder)
    newest, log = run_files.finished(folder)[-1], events.read(folder / events.FILE)
    last = checkpoint.load(folder, manifest.tensor_specs, num_rounds=newest, run_sha256=manifest.sha256)
    return Outcome(last.tensors, server_run.trained_sites(log, num_rounds=newest), folder)


@dataclass(frozen=True)
class Sites:
    """All that a worker needs to play any site of a run; travels with every message, so it is small.

    Attributes:
        settings: The run file, as `config.resolved_json` writes it.
        base_folder: Where the worker finds the base.
        num_threads: CPU threads of torch.
        rows_folder: Each site's name and rows in a file of its own, numbered from 0; a temporary folder of this user.
        log_folder: Of the sites' logs.
        evaluation_sha256: Of the manifest.
        date: Of the manifest.
    """

    settings: str
    base_folder: str
    num_threads: int
    rows_folder: str
    log_folder: str
    evaluation_sha256: str
    date: str


@functools.cache
def _world(sites: Sites) -> tuple[RunManifest, Engines]:
    """Manifest and bases of a run, once a worker process."""
    settings = config.RunConfig.model_validate_json(sites.settings)
    found_here = settings.model.model_copy(update={"base": sites.base_folder})
    here = settings.model_copy(update={"model": found_here})
    engine = world.load_engine(here, num_threads=sites.num_threads, date=sites.date)
    manifest = server_run.manifest_of(settings, engine, evaluation_sha256=sites.evaluation_sha256)
    return manifest, Engines(settings, engine)


@functools.cache
def _answer_of(sites: Sites, site_index: int) -> Callable[[bytes], bytes]:
    """A virtual site's `answer`, once a worker process; the index counts the sorted names from 0.

    The run is opened at once: a site's next message may come to another worker than its first.
    """
    manifest, loaded = _world(sites)
    rows_file = Path(sites.rows_folder) / f"{site_index}.pickle"
    site: tuple[str, SiteData] = pickle.loads(rows_file.read_bytes())  # noqa: S301  written above, by this user
    name, data = site
    agent = world.make_agent(name, data, loaded.at(name), Failures(Path(sites.log_folder)))
    agent.answer(wire.pack(Frame("open", body=manifest.to_bytes())))
    return agent.answer
