"""A run on one machine: virtual sites, the server's own round loop, and one of three engines between them."""

from collections.abc import Mapping

from client.agent.agent import Agent
from common.errors import ProtocolError
from common.events import EventLog
from server.fleet.grid import GridFleet
from server.run import run as server_run
from server.run.run import Outcome
from simulations.world import world
from simulations.world.grids import InProcessGrid
from simulations.world.world import Failures, World


def in_process(shared: World, *, log: EventLog, resume: bool = False, is_noise_accepted: bool = False) -> Outcome:
    """All sites in this process, on one base in memory for each precision that they have.

    Raises:
        SilotuneError: What a virtual site could not do, where that ended the run; else as `server.run.run.execute`.
    """
    failures = Failures(shared.folder / "sites")
    agents = {
        site: world.make_agent(site, data, shared.engines.at(site), failures, log=log)
        for site, data in shared.sites.items()
    }
    with explained(failures):
        outcome = execute(
            shared, fleet_of(agents, failures), log=log, resume=resume, is_noise_accepted=is_noise_accepted
        )
    world.export_personal(shared.settings.aggregation.method, shared.folder)
    return outcome


def execute(shared: World, fleet: GridFleet, *, log: EventLog, resume: bool, is_noise_accepted: bool) -> Outcome:
    """The coordinator's side of a simulated run: seeded noise, and rows that it can see."""
    return server_run.execute(
        shared.settings,
        fleet=fleet,
        engine=shared.engine,
        folder=shared.folder,
        log=log,
        resume=resume,
        is_noise_accepted=is_noise_accepted,
        make_noise=world.server_noise(shared.settings.seed),
        known=world.known_rows(shared.sites),
    )


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
