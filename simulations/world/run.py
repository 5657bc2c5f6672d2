"""A run on one machine: virtual sites, the server's own round loop, and one of three engines between them."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping

from client.agent.agent import Agent
from common.errors import ProtocolError, TransportError
from common.events import EventLog
from common.frame import envelope
from server.fleet.fleet import SMALL_REPLY_BYTES, Fleet, Reply
from server.run import run as server_run
from server.run.run import Outcome
from simulations.world import world
from simulations.world.world import Failures, World

Answer = Callable[[bytes], bytes | None]


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


def execute(shared: World, fleet: Fleet, *, log: EventLog, resume: bool, is_noise_accepted: bool) -> Outcome:
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


class InProcessFleet:
    """A fleet whose nodes are functions in this very process: no message, no socket, no copy.

    A node's function is called when its reply is asked for, so one site works at a time and the order is the caller's.
    How long a frame stays valid is not played: it would make a run depend on the clock.

    Args:
        answers: What each node does with a frame, by node id. None as a result means that no answer has come yet, so
            the call is made again at the next look; `TransportError` means that the node's link broke.
        is_closed: See `Fleet.is_closed`.
        names: See `Fleet.names`.
        explain: See `Fleet.explain`.
    """

    def __init__(
        self,
        answers: Mapping[int, Answer],
        *,
        is_closed: bool = False,
        names: Mapping[int, str] | None = None,
        explain: Callable[[str], str] = lambda reference: "",
    ) -> None:
        self.is_closed, self.names = is_closed, names or {}
        self._answers, self._explain = dict(answers), explain
        self._pending: dict[str, tuple[int, bytes]] = {}
        self._numbers = itertools.count(1)

    def explain(self, reference: str) -> str:
        """What a site's own log has under a reference."""
        return self._explain(reference)

    def node_ids(self) -> list[int]:
        """All nodes, ascending."""
        return sorted(self._answers)

    def send(
        self, node_id: int, frame: bytes, *, kind: str, ttl_s: float, max_reply_bytes: int = SMALL_REPLY_BYTES
    ) -> str:
        """Keep a frame until its reply is asked for.

        Raises:
            TransportError: There is no such node.
        """
        if node_id not in self._answers:
            raise TransportError(f"no node {node_id} in this fleet")
        ticket = f"{next(self._numbers):08d}"
        self._pending[ticket] = node_id, frame
        return ticket

    def receive(self, tickets: Collection[str]) -> Iterator[Reply]:
        """Let the nodes answer, in the order of the tickets."""
        for ticket in (ticket for ticket in tuple(tickets) if ticket in self._pending):
            node_id, frame = self._pending[ticket]
            try:
                reply = self._answers[node_id](frame)
            except TransportError:
                failure, reply = envelope.failure_name(envelope.AGENT_AWAY), None
            else:
                failure = ""
            if failure or reply is not None:
                del self._pending[ticket]
                yield Reply(ticket, reply, failure)


def fleet_of(agents: Mapping[str, Agent], failures: Failures) -> InProcessFleet:
    """Agents as nodes, numbered in the order of their names."""
    names = dict(enumerate(sorted(agents), start=1))
    answers = {number: agents[site].answer for number, site in names.items()}
    return InProcessFleet(answers, is_closed=True, names=names, explain=failures.explain)


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
