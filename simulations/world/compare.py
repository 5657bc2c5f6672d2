"""The question behind every federation: better than alone, and how far from pooling everything?

Arms: the base as it is, every site alone, the federation, and one site that holds all rows (the upper line). All go
through the same round loop with the same settings, and all are scored on every site's held-out rows.

Training rows are counted as they are used, so a row that is used in three steps counts three times. Pooled training
uses as many rows as all sites of the federation did together; a site alone uses what it would use in every round.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from client.agent.agent import SiteData
from common import events, storage
from common.adapter.adapter import Tensors
from common.errors import DataError
from common.event_kinds import ArmFinished, ArmStarted, ArmStep, Compared, Event, SiteStep, SiteTrained
from common.events import EventLog
from common.frame import wire
from common.run import config
from common.run.schema.privacy import PrivacyConfig
from common.scores import Arm, SiteScore
from server.fleet import held_out
from server.fleet.run import Run
from server.fleet.sites import Sites
from server.folder import run_files
from server.run import run as server_run
from simulations.world import run, world
from simulations.world.world import Failures, World

COMPARISON_FILE = "comparison.json"


def compare(shared: World, log: EventLog) -> dict[str, Arm]:
    """Train and score every arm; the federated one is the run of the folder itself.

    Args:
        log: Events of the folder; an `arm_started` and `arm_finished` for every arm.

    Returns:
        Held-out loss (nats per answer token), exact match, both by site, and `rows_used` (training rows, each as often
        as it was used), for `base`, `site-NAME`, `federated` and `centralised`; also written to `comparison.json`.
    """
    judge, settings = Judge(shared), shared.settings
    results = {"base": _scored(judge, "base", shared.engine.initial, log, num_rows=0)}
    outcome = run.in_process(shared, log=log)
    sites = {site: shared.sites[site] for site in judge.sites}
    trainings = _trainings(shared.folder)
    used = rows_used(trainings, settings.training, settings.privacy, sites)
    results["federated"] = _scored(judge, "federated", outcome.tensors, log, num_rows=used)
    arms = {f"site-{site}": (data, alone(settings)) for site, data in sites.items()}
    # All sites' rows in one folder, which a federation is there to avoid; whole steps are taken, the same number in
    # each round, so that the number of rows is right to half a step a round.
    pooled = SiteData(
        [row for data in sites.values() for row in data.train],
        [row for data in sites.values() for row in data.held_out],
    )
    num_rounds = len({event.round for event in trainings})  # fewer than planned where the run stopped early
    num_steps = max(1, round(used / (num_rounds * rows_a_step(settings.training, settings.privacy, pooled))))
    arms["centralised"] = (pooled, alone(settings, num_steps=num_steps))
    for name, (data, single) in arms.items():
        log.append(ArmStarted(arm=name))
        site, folder = name.removeprefix("site-"), shared.folder / "arms" / name

        def tell(event: Event, name: str = name) -> None:
            if isinstance(event, SiteStep):
                log.tell(ArmStep(arm=name, round=event.round, step=event.step, num_steps=event.num_steps))

        arm_log = run_files.prepare(single, folder)
        arm_log.watchers.append(tell)
        arm = World(single, shared.engine, {site: data}, folder, shared.engines)
        tensors = run.in_process(arm, log=arm_log).tensors
        used = rows_used(_trainings(folder), single.training, single.privacy, {site: data})
        results[name] = _scored(judge, name, tensors, log, num_rows=used)
    compared = log.append(Compared(comparison=results))
    storage.write_atomic(shared.folder / COMPARISON_FILE, wire.canonical_json(compared.as_dict()["comparison"]) + b"\n")
    return results


class Judge:
    """Scores any adapter on every site's held-out rows, through the sites' own agents."""

    def __init__(self, shared: World) -> None:
        failures = Failures(shared.folder / "sites")
        loaded = shared.engines
        agents = {site: world.make_agent(site, data, loaded.at(site), failures) for site, data in shared.sites.items()}
        manifest = server_run.manifest_of(shared.settings, shared.engine)
        log = EventLog(shared.folder / "arms" / "judge" / events.FILE)
        self._sites = Sites(Run(manifest, shared.folder, log), run.fleet_of(agents, failures))
        with run.explained(failures):
            self._sites.wait()

    @property
    def sites(self) -> list[str]:
        """Those that can take part; the run's own events say why another one cannot."""
        return sorted(head.site for head in self._sites.opened.values())

    def score(self, tensors: Tensors, *, rows_used: int = 0) -> Arm:
        """Held-out loss and exact match of one adapter, over all sites and by site.

        Raises:
            DataError: No site reports held-out figures.
        """
        generate = self._sites.run.manifest.run.evaluation.exact_match_rows > 0
        loss = held_out.evaluate(self._sites, tensors, num_rounds=0, generate=generate)
        if loss is None:
            raise DataError("no site reports held-out figures, by which arms are compared; set data.held_out_fraction")
        metrics = self._sites.metrics
        sites = {
            m.site: SiteScore(held_out_loss=m.loss, exact_match=held_out.exact_match([m])) for m in metrics.values()
        }
        return Arm(
            held_out_loss=loss,
            exact_match=held_out.exact_match(list(metrics.values())),
            sites=dict(sorted(sites.items())),
            rows_used=rows_used,
        )


def _scored(judge: Judge, name: str, tensors: Tensors, log: EventLog, *, num_rows: int) -> Arm:
    """Score an arm and log it."""
    result = judge.score(tensors, rows_used=num_rows)
    log.append(ArmFinished(arm=name, **vars(result)))
    return result


def alone(settings: config.RunConfig, *, num_steps: int = 0) -> config.RunConfig:
    """The same run for a single site, evaluated only where it must be; with another number of steps a round, if any."""
    single = {"min_sites": 1, "sites_per_round": 0, "num_sites": 1}
    quick = {"exact_match_rows": 0, "every_rounds": settings.federation.num_rounds, "num_polish_stages": 0}
    steps = {"local_steps": num_steps, "local_epochs": 0.0} if num_steps else {}
    return settings.model_copy(
        update={
            "federation": settings.federation.model_copy(update=single),
            "evaluation": settings.evaluation.model_copy(update=quick),
            "training": settings.training.model_copy(update=steps),
            "gate": config.GateConfig(),  # of the federation's adapter
            "export": config.ExportConfig(),  # likewise
        }
    )


def rows_a_step(training: config.TrainingConfig, privacy: PrivacyConfig, data: SiteData) -> float:
    """Training rows of an optimiser step: the batch, or the mean of a Poisson sample of units."""
    if privacy.mode != "unit":
        return training.batch_size
    rows_of_units = Counter(row.unit for row in data.train).values()
    return float(privacy.sampling_prob * sum(min(count, privacy.max_rows_per_unit) for count in rows_of_units))


def rows_used(
    trainings: Sequence[SiteTrained],
    training: config.TrainingConfig,
    privacy: PrivacyConfig,
    sites: Mapping[str, SiteData],
) -> int:
    """Training rows that the sites of a finished run used, each as often as it was; by its `site_trained` events."""
    return round(sum(event.num_steps * rows_a_step(training, privacy, sites[event.site]) for event in trainings))


def _trainings(folder: Path) -> list[SiteTrained]:
    """The event of every training of a site."""
    return [event for event in events.read(folder / events.FILE) if isinstance(event, SiteTrained)]
