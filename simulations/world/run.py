"""A run on one machine: virtual sites, the server's own round loop, and one of three engines between them."""

from collections.abc import Mapping
from pathlib import Path

from client.agent.agent import Agent, SiteData
from common.errors import ProtocolError
from common.events import EventLog
from common.model.base import Engine
from common.run import config
from server.fleet.grid import GridFleet
from server.run import run as server_run
from server.run.run import Outcome
from simulations.world import world
from simulations.world.grids import InProcessGrid
from simulations.world.world import Engines, Failures


def in_process(
    settings: config.RunConfig,
    *,
    sites: Mapping[str, SiteData],
    engine: Engine,
    folder: Path,
    log: EventLog,
    resume: bool = False,
    is_noise_accepted: bool = False,
    engines: Engines | None = None,
) -> Outcome:
    """All sites in this process, on one base in memory for each precision that they have; `engines` are those loaded.

    Raises:
        SilotuneError: What a virtual site could not do, where that ended the run; else as `server.run.run.execute`.
    """
    failures = Failures(folder / "sites")
    loaded = engines or Engines(settings, engine)
    agents = {site: world.make_agent(site, data, loaded.at(site), failures, log=log) for site, data in sites.items()}
    with explained(failures):
        outcome = server_run.execute(
            settings,
            fleet=fleet_of(agents, failures),
            engine=engine,
            folder=folder,
            log=log,
            resume=resume,
            is_noise_accepted=is_noise_accepted,
            make_noise=world.server_noise(settings),
            known=world.known_rows(sites),
        )
    world.export_personal(settings, folder)
    return outcome


def fleet_of(agents: Mapping[str, Agent], failures: Failures) -> GridFleet:
    """Agents as the nodes of an in-process grid, numbered in the order of their names."""
    names = dict(enumerate(sorted(agents), start=1))
    grid = InProcessGrid({number: agents[site].answer for number, site in names.items()})
    return GridFleet(grid, is_closed=True, names=names, explain=failures.explain)


class explained:
    """Where a run ends because a virtual site failed, raise the site's own error: the researcher may see it."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Replace the server's view by the cause."""
        if isinstance(error, ProtocolError) and self._failures.errors:
            raise self._failures.errors[-1] from error
