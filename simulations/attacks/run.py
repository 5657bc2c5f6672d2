"""One run under one attack, judged by what it does to honest sites: their held-out loss, and the attacker's answer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from client.agent.agent import SiteData
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.data.rows import Row
from common.errors import ConfigError
from common.events import EventLog
from common.loss import evaluation
from common.model import base
from common.model.base import Engine
from common.run import config
from server.evaluate import suite
from server.fleet.grid import GridFleet
from server.run import run as server_run
from simulations.attacks import rows, updates
from simulations.world import run as running
from simulations.world import world
from simulations.world.compare import World
from simulations.world.grids import InProcessGrid
from simulations.world.world import Failures


@dataclass(frozen=True)
class Attack:
    """What a bad site does.

    Attributes:
        rows: To its rows, before it trains.
        change: To its update, afterwards; None sends it as it is.
    """

    rows: Callable[[SiteData], SiteData] = rows.unchanged
    change: Callable[[updates.Cheat], Tensors] | None = None


ATTACKS: Final[Mapping[str, Attack]] = {
    "none": Attack(),
    "label-flip": Attack(rows=rows.label_flip),
    "backdoor": Attack(rows=rows.backdoor),
    "sign-flip": Attack(change=updates.sign_flip),
    "scaled": Attack(change=updates.scaled),
    "free-rider": Attack(change=updates.free_rider),
    "lazy-copy": Attack(change=updates.lazy_copy),
}


@dataclass(frozen=True)
class Harm:
    """What honest sites have at the end.

    Attributes:
        held_out_loss: On their held-out rows, nats per answer token.
        trigger_loss: Of the attacker's answer to their held-out questions with the trigger, nats per token; low is bad.
    """

    held_out_loss: float
    trigger_loss: float


def play(shared: World, name: str, *, num_bad: int, log: EventLog) -> dict[str, Any]:
    """Run with so many bad sites, the last by name.

    Args:
        shared: Settings, base, sites and folder.
        name: One of `ATTACKS`; `none` is the control, in which these sites are honest and left out of the figures too.
        num_bad: Bad sites.
        log: Of the run.

    Raises:
        ConfigError: No such attack, or not two honest sites.
    """
    if name not in ATTACKS:
        raise ConfigError(f"--attack {name}: choose one of {', '.join(ATTACKS)}")
    honest = sorted(shared.sites)[: len(shared.sites) - num_bad]
    if num_bad < 1 or len(honest) < 2:
        raise ConfigError(f"--bad {num_bad}: of {len(shared.sites)} sites one must be bad, and two honest")
    failures = Failures(shared.folder / "sites")
    with running.explained(failures):
        outcome = server_run.execute(
            shared.settings,
            fleet=_fleet(shared, ATTACKS[name], honest, failures),
            engine=shared.engine,
            folder=shared.folder,
            log=log,
        )
    held_out = [row for site in honest for row in shared.sites[site].held_out]
    return asdict(_judge(shared.engine, shared.settings, outcome.tensors, held_out))


def before(shared: World, *, num_bad: int) -> dict[str, Any]:
    """The same figures of the adapter that the run starts from."""
    honest = sorted(shared.sites)[: len(shared.sites) - num_bad]
    held_out = [row for site in honest for row in shared.sites[site].held_out]
    return asdict(_judge(shared.engine, shared.settings, shared.engine.initial, held_out))


def _fleet(shared: World, attack: Attack, honest: list[str], failures: Failures) -> GridFleet:
    """All sites as nodes, in the order of their names."""
    settings = shared.settings
    _, tasks_sha256 = suite.read(settings.data, settings.evaluation, settings.gate)
    manifest = server_run.manifest_of(settings, shared.engine, evaluation_sha256=tasks_sha256)
    agents = {
        site: world.make_agent(site, data if site in honest else attack.rows(data), shared.engines.at(site), failures)
        for site, data in sorted(shared.sites.items())
    }
    answers = {site: agent.answer for site, agent in agents.items()}
    if attack.change:
        for site in agents.keys() - set(honest):
            answers[site] = updates.CheatingSite(agents[site], agents[honest[0]], manifest, attack.change).answer
    grid, names = InProcessGrid(dict(enumerate(answers.values(), start=1))), dict(enumerate(answers, start=1))
    return GridFleet(grid, is_closed=True, names=names, explain=failures.explain)


def _judge(engine: Engine, settings: config.RunConfig, tensors: Tensors, held_out: list[Row]) -> Harm:
    """Score an adapter on honest rows, as they are and with the trigger."""
    adapter.write(engine.model, tensors)
    return Harm(_loss(engine, settings, held_out), _loss(engine, settings, [rows.triggered(row) for row in held_out]))


def _loss(engine: Engine, settings: config.RunConfig, given: list[Row]) -> float:
    """As a site evaluates."""
    encoded = base.encode(engine, given, settings.data)[0]
    total, num_tokens = evaluation.held_out_nll(engine, encoded, batch_size=settings.evaluation.batch_size)
    return total / num_tokens
