"""One run under one attack, judged by what it does to honest sites: their held-out loss, and the attacker's answer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from client.agent.agent import SiteData
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError
from common.events import EventLog
from common.loss import evaluation
from common.model import base
from server.evaluate import suite
from server.run import run as server_run
from simulations.attacks import rows, updates
from simulations.world import run as running
from simulations.world import world
from simulations.world.world import Failures, World


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
        name: One of `ATTACKS`; `none` is the control, in which these sites are honest and left out of the figures too.

    Raises:
        ConfigError: No such attack, or not two honest sites.
    """
    if name not in ATTACKS:
        raise ConfigError(f"--attack {name}: choose one of {', '.join(ATTACKS)}")
    honest = sorted(shared.sites)[: len(shared.sites) - num_bad]
    if num_bad < 1 or len(honest) < 2:
        raise ConfigError(f"--bad {num_bad}: of {len(shared.sites)} sites one must be bad, and two honest")
    failures = Failures(shared.folder / "sites")
    settings = shared.settings
    _, tasks_sha256 = suite.read(settings.data, settings.evaluation, settings.gate)
    manifest = server_run.manifest_of(settings, shared.engine, evaluation_sha256=tasks_sha256)
    attack, agents = ATTACKS[name], {}
    for site, data in sorted(shared.sites.items()):
        rows_of_site = data if site in honest else attack.rows(data)
        agents[site] = world.make_agent(site, rows_of_site, shared.engines.at(site), failures)
    answers = {site: agent.answer for site, agent in agents.items()}
    if attack.change:
        for site in agents.keys() - set(honest):
            answers[site] = updates.CheatingSite(agents[site], agents[honest[0]], manifest, attack.change).answer
    nodes, names = dict(enumerate(answers.values(), start=1)), dict(enumerate(answers, start=1))
    with running.explained(failures):
        outcome = server_run.execute(
            settings,
            fleet=running.InProcessFleet(nodes, is_closed=True, names=names, explain=failures.explain),
            engine=shared.engine,
            folder=shared.folder,
            log=log,
        )
    return _harm(shared, outcome.tensors, honest)


def before(shared: World, *, num_bad: int) -> dict[str, Any]:
    """The same figures of the adapter that the run starts from."""
    return _harm(shared, shared.engine.initial, sorted(shared.sites)[: len(shared.sites) - num_bad])


def _harm(shared: World, tensors: Tensors, honest: list[str]) -> dict[str, Any]:
    """Score an adapter on the held-out rows of honest sites, as they are and with the trigger, as a site evaluates."""
    held_out = [row for site in honest for row in shared.sites[site].held_out]
    adapter.write(shared.engine.model, tensors)
    losses = []
    for chosen in (held_out, [rows.triggered(row) for row in held_out]):
        encoded, _ = base.encode(shared.engine, chosen, shared.settings.data)
        batch_size = shared.settings.evaluation.batch_size
        total, num_tokens = evaluation.held_out_nll(shared.engine, encoded, batch_size=batch_size)
        losses.append(total / num_tokens)
    return asdict(Harm(*losses))
