"""The question behind every federation: better than alone, and how far from pooling everything?

Arms: the base as it is, every site alone, the federation, and one site that holds all rows (the upper line). All go
through the same round loop with the same settings, and all are scored on every site's held-out rows.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.agent import SiteData
from common import config, events, storage, wire
from common.adapter import Tensors
from common.events import Event, EventLog
from common.model import Engine
from server import federation
from server import run as server_run
from server.aggregate import table
from server.evaluate import held_out
from server.federation import Federation
from simulations import run, world
from simulations.world import Engines, Failures

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True)
class World:
    """What all arms share."""

    settings: config.RunConfig
    engine: Engine
    sites: Mapping[str, SiteData]
    folder: Path

    @functools.cached_property
    def engines(self) -> Engines:
        """The base at each precision that sites have."""
        return Engines(self.settings, self.engine)


def compare(shared: World, log: EventLog) -> dict[str, Event]:
    """Train and score every arm; the federated one is the run of the folder itself.

    Args:
        shared: Settings, base and sites.
        log: Events of the folder; an `arm_started` and `arm_finished` for every arm.

    Returns:
        Held-out loss (nats per answer token), exact match and both by site, for `base`, `site-NAME`, `federated` and
        `centralised`; also written to `comparison.json`.
    """
    judge = Judge(shared)
    arms = {"base": shared.engine.initial}
    results = {"base": _scored(judge, "base", arms["base"], log)}
    outcome = run.in_process(
        shared.settings,
        sites=shared.sites,
        engine=shared.engine,
        folder=shared.folder,
        log=log,
        engines=shared.engines,
    )
    results["federated"] = _scored(judge, "federated", outcome.tensors, log)
    for name, data in {**_alone(shared), "centralised": _pooled(shared)}.items():
        log.append("arm_started", arm=name)
        tensors = _train_alone(shared, name, data)
        results[name] = _scored(judge, name, tensors, log)
    storage.write_atomic(shared.folder / COMPARISON_FILE, wire.canonical_json(results) + b"\n")
    log.append("compared", comparison=results)
    return results


class Judge:
    """Scores any adapter on every site's held-out rows, through the sites' own agents."""

    def __init__(self, shared: World) -> None:
        failures = Failures(shared.folder / "sites")
        loaded = shared.engines
        agents = {site: world.make_agent(site, data, loaded.at(site), failures) for site, data in shared.sites.items()}
        manifest = server_run.manifest_of(shared.settings, shared.engine)
        log = EventLog(shared.folder / "arms" / "judge" / events.FILE)
        method = table.find(shared.settings.aggregation.method)
        self._federation = Federation(manifest, run.fleet_of(agents), method, shared.folder, log)
        with run.explained(failures):
            federation.wait_for_sites(self._federation)

    def score(self, tensors: Tensors) -> dict[str, Any]:
        """Held-out loss and exact match of one adapter, over all sites and by site."""
        generate = self._federation.manifest.run.evaluation.exact_match_rows > 0
        loss = held_out.evaluate(self._federation, tensors, num_rounds=0, generate=generate)
        metrics = self._federation.metrics
        sites = {m.site: {"held_out_loss": m.loss, "exact_match": held_out.exact_match([m])} for m in metrics.values()}
        return {
            "held_out_loss": loss,
            "exact_match": held_out.exact_match(list(metrics.values())),
            "sites": dict(sorted(sites.items())),
        }


def _scored(judge: Judge, name: str, tensors: Tensors, log: EventLog) -> dict[str, Any]:
    """Score an arm and log it."""
    result = judge.score(tensors)
    log.append("arm_finished", arm=name, **result)
    return result


def _alone(shared: World) -> dict[str, SiteData]:
    """Each site as an arm."""
    return {f"site-{site}": data for site, data in shared.sites.items()}


def _pooled(shared: World) -> SiteData:
    """All sites' rows in one place; what a federation is there to avoid."""
    sites = shared.sites.values()
    return SiteData([row for data in sites for row in data.train], [row for data in sites for row in data.held_out])


def _train_alone(shared: World, name: str, data: SiteData) -> Tensors:
    """A federation of one, with the same settings; scored elsewhere."""
    settings = alone(shared.settings)
    folder = shared.folder / "arms" / name
    log = server_run.prepare(settings, folder)
    site = name.removeprefix("site-")
    outcome = run.in_process(
        settings, sites={site: data}, engine=shared.engine, folder=folder, log=log, engines=shared.engines
    )
    return outcome.tensors


def alone(settings: config.RunConfig) -> config.RunConfig:
    """The same run for a single site, evaluated only where it must be."""
    one = {"min_sites": 1, "sites_per_round": 0, "num_sites": 1}
    quick = {"exact_match_rows": 0, "every_rounds": settings.federation.num_rounds, "num_polish_stages": 0}
    return settings.model_copy(
        update={
            "federation": settings.federation.model_copy(update=one),
            "evaluation": settings.evaluation.model_copy(update=quick),
            "gate": config.GateConfig(),  # of the federation's adapter
            "export": config.ExportConfig(),  # likewise
        }
    )
