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
from common.event_kinds import Event, RunFailed, SiteFailed, SiteJoined, SiteRefused
from common.events import EventLog
from common.frame import site_states, wire
from common.frame.wire import Frame
from common.run import config
from common.run.catalogue.methods import FACTS
from common.run.manifest import RunManifest
from server.evaluate import suite
from server.fleet.grid import GridFleet
from server.folder import checkpoint, run_files
from server.run import finish
from server.run import run as server_run
from server.run.run import Outcome
from server.view.run_view import RunView
from simulations.engines import deployment, site_files
from simulations.world import run, world
from simulations.world.world import Engines, Failures, Source, World

_REFERENCE = re.compile(r"; the site's log has the reason under reference (\w+)")
SPARE_S = 300.0  # of a deployed run beyond its own time limits: starting processes, loading the base, export


def ray(
    shared: World,
    *,
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
        shared: The run; its engine is the coordinator's, in this process.
        base_folder: Where the workers load the base from.
        num_workers: Processes that play the sites.
        num_gpus: GPUs of this machine, for the workers to share.
    """
    from simulations.engines import flower  # loads Ray

    logs, settings = shared.folder.absolute() / "sites", shared.settings
    _, tasks_sha256 = suite.read(settings.data, settings.evaluation, settings.gate)

    def main(grid: Grid) -> Outcome:
        fleet = GridFleet(grid, is_closed=True, explain=Failures(logs).explain)
        return run.execute(shared, fleet, log=log, resume=resume, is_noise_accepted=is_noise_accepted)

    with tempfile.TemporaryDirectory(prefix="silotune-rows-") as rows:
        for number, name in enumerate(sorted(shared.sites)):
            storage.write_atomic(Path(rows) / f"{number}.pickle", pickle.dumps((name, shared.sites[name])))
        sites = Sites(
            config.resolved_json(settings),
            str(base_folder.absolute()),
            num_threads,
            rows,
            str(logs),
            tasks_sha256,
            shared.engine.date,
        )
        agents = functools.partial(_answer_of, sites)
        counts = {"num_sites": len(shared.sites), "num_workers": num_workers, "num_gpus": num_gpus}
        outcome = flower.run(main, agents, **counts)
    world.export_personal(settings.aggregation.method, shared.folder)
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
    """SuperLink, SuperNodes, couriers and agents as processes of this machine; arguments as for `ray`.

    The sites' rows lie in a temporary folder of this user while the run lasts.

    Raises:
        TransportError: A process did not start or ended early; the message names its log.
        RemoteError: The run failed; the message says why.
        TooFewSitesError: All sites have answered, and not enough of them can take part.
    """
    folder, times, method = log.path.parent, settings.federation, settings.aggregation.method
    with tempfile.TemporaryDirectory(prefix="silotune-sites-") as files:
        sites = site_files.write(
            Source.of(settings).tables(),
            data=settings.data,
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
        heard = EventLog(log.path, [hearer])
        deployment.run(sites, log=heard, config=given, timeout_s=limit_s, num_threads=num_threads)
    world.export_personal(method, folder)
    # The end of a run that another process did, read from its folder.
    if not FACTS[method].is_personal:
        stored = finish.stored(folder, num_rounds=0)
        return Outcome(stored.tensors, stored.sites, folder)
    manifest, newest = run_files.stored_manifest(folder), run_files.finished(folder)[-1]
    last = checkpoint.load(folder, manifest.tensor_specs, num_rounds=newest, run_sha256=manifest.sha256)
    return Outcome(last.tensors, RunView.read(folder / events.FILE).trained_sites(newest), folder)


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

            def reason(match: re.Match[str]) -> str:
                in_log = self.failures.explain(match[1])
                return f": {in_log}" if in_log else match[0]

            event = dataclasses.replace(event, reason=_REFERENCE.sub(reason, event.reason))
        for listener in self.log.listeners:
            listener(event)
        if isinstance(event, SiteJoined):
            self._joined.add(event.site)
        elif isinstance(event, SiteRefused) and event.state != site_states.WAITS:
            self._refused[str(event.node)] = event.reason
        num_answers = len(self._joined) + len(self._refused)
        if self._refused and num_answers >= self.num_sites and len(self._joined) < self.min_sites:
            reasons = "; ".join(self._refused.values())
            raise TooFewSitesError(f"{len(self._joined)} sites opened the run, {self.min_sites} are needed; {reasons}")


@dataclass(frozen=True)
class Sites:
    """All that a worker needs to play any site of a run; travels with every message, so it is small.

    Attributes:
        settings: The run file, as `config.resolved_json` writes it.
        rows_folder: Each site's name and rows in a file of its own, numbered from 0; a temporary folder of this user.
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
    here = settings.model_copy(update={"model": settings.model.model_copy(update={"base": sites.base_folder})})
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
