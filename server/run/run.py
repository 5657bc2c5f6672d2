"""A whole run: manifest, sites, rounds, export. The same call under every grid."""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import events, storage
from common.adapter import adapter, start
from common.adapter.adapter import Tensors
from common.errors import ConfigError, SilotuneError
from common.event_kinds import RunFinished, RunStarted, TasksOverlap, Warned
from common.events import EventLog
from common.frame.records import to_head
from common.model import base, layerwise, loading
from common.model.base import Engine
from common.privacy import cost as privacy_cost
from common.privacy import site_level as site_privacy
from common.privacy.clipping import ClipNorm
from common.privacy.noise import Noise
from common.run import config, guarding, trainable
from common.run.manifest import RunManifest
from common.run.rules import compatibility
from common.run.schema.section import MAX_MESSAGE_MIB
from common.text import templates
from server.evaluate import examples, kept_apart, measure, suite
from server.evaluate.kept_apart import KnownRows
from server.export import adapter as export
from server.export.folder import Exported
from server.fleet import trail
from server.fleet.fleet import Fleet
from server.fleet.run import OwnRows, Run, fresh_noise
from server.fleet.sites import Sites
from server.fleet.trail import Operator
from server.folder import checkpoint, lock, run_files
from server.folder.checkpoint import Checkpoint
from server.gate import decide
from server.polish import stages
from server.run import base_noise, rounds
from server.run import export as run_export
from server.run import state as states
from server.view import polish as polish_told
from server.view.run_view import RunView

EXPERIMENTAL = (
    "aggregation.method = '{method}' is experimental: that it helps, only its authors have shown; "
    "compare it with fedavg on these rows before relying on it"
)


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        tensors: The adapter that was exported: the newest that the gate lets pass. Where sites keep factors of their
            own, the global one after the last round, in which these are zero.
        sites: Names of the sites whose updates were used, with their rows.
        folder: The run's folder.
    """

    tensors: Tensors
    sites: dict[str, int]
    folder: Path


def execute(
    settings: config.RunConfig,
    *,
    fleet: Fleet,
    engine: Engine,
    folder: Path,
    log: EventLog,
    resume: bool = False,
    operator: Operator | None = None,
    is_noise_accepted: bool = False,
    make_noise: Callable[[int], Noise] = fresh_noise,
    known: KnownRows | None = None,
) -> Outcome:
    """Run federated training from the first to the last round, then the polish stages, and export the newest adapter
    that the gate lets pass.

    Args:
        settings: The run file.
        fleet: The nodes.
        engine: The base on the coordinator's side: initial adapter, shapes and hash.
        folder: The run's folder; made by `prepare`.
        log: Its events.
        resume: Go on after the newest whole checkpoint in `folder`.
        operator: Signs the manifest and keeps the audit log; None offers it unsigned, which only sites without a policy
            take, and keeps no log.
        is_noise_accepted: Go on though the noise for sites as a whole drowns what they have to say.
        make_noise: Of that noise and the draws of sites, by round; a seeded one is for simulations only.
        known: The sites' rows; None: they cannot be seen here, as everywhere but in a simulation.

    Raises:
        FloorRefused: It does, and nobody accepted it.
        GateRefused: No checkpoint shows what `[gate]` asks for; nothing is exported.
        PrivacyError: A round that was released would be played again.
        AuditError: The audit log was changed under the run.
        ConfigError: An update would be larger than `wire.max_update_mib`, a task needs what is not installed, or a
            stage cannot be played here.
        DataError: The coordinator's rows, or those of a stage, are missing or unusable, or are not those that were
            fixed before training.
        ProtocolError: Too few sites, or none evaluates.
        RunBusyError: Another process is at work in the folder.
        StorageError: Disk full or not writable.
    """
    with lock.hold(folder):
        return _execute(
            settings,
            fleet=fleet,
            engine=engine,
            folder=folder,
            log=log,
            resume=resume,
            operator=operator,
            is_noise_accepted=is_noise_accepted,
            make_noise=make_noise,
            known=known,
        )


def _execute(
    settings: config.RunConfig,
    *,
    fleet: Fleet,
    engine: Engine,
    folder: Path,
    log: EventLog,
    resume: bool,
    operator: Operator | None,
    is_noise_accepted: bool,
    make_noise: Callable[[int], Noise],
    known: KnownRows | None,
) -> Outcome:
    """The run, by the process that holds its folder."""
    storage.remove_leftovers(folder)
    measured = suite.open_suite(settings, engine=engine, folder=folder, log=log)
    manifest = manifest_of(settings, engine, evaluation_sha256=measured.sha256)
    _check_size(manifest)
    if resume and (folder / run_files.MANIFEST_FILE).exists():
        suite.require_same(measured.sha256, run_files.stored_manifest(folder).evaluation_sha256)
    first, damaged = _start(manifest, engine, folder, resume=resume)
    told = _site_level(manifest, log, num_rounds=first.num_rounds, is_noise_accepted=is_noise_accepted)
    if damaged:
        checkpoint.set_aside(folder, after=first.num_rounds)
    storage.write_atomic(folder / run_files.MANIFEST_FILE, manifest.to_bytes())
    prompts = examples.read_prompts(
        settings.output.example_prompts,
        engine,
        max_new_tokens=settings.evaluation.max_new_tokens,
        system_prompt=settings.data.system_prompt,
    )
    run = Run(
        manifest,
        folder,
        log,
        offer=operator.make_offer(manifest) if operator else None,
        trail=operator.trail if operator else None,
        suite=measured,
        own_rows=read_own_rows(settings, engine),
        apart=kept_apart.tables(measured.tasks, known or KnownRows()),
        examples=prompts,
        make_noise=make_noise,
    )
    stages.check(settings.polish, engine, data=settings.data, apart=run.apart)
    run_export.check(manifest, engine)
    log.append(RunStarted(**plan(manifest, engine), **told, first_round=first.num_rounds))
    for error in damaged:
        log.append(Warned(reason=f"{error}: going on after round {first.num_rounds}, the newest that is whole"))
    if settings.model.site_quantization:
        log.append(base_noise.as_event(settings.model, base_noise.measure(engine, settings.model)))
    if manifest.plan.method.is_experimental:
        log.append(Warned(reason=EXPERIMENTAL.format(method=settings.aggregation.method)))
    if found := kept_apart.warnings(measured.tasks, known or KnownRows()):
        log.append(TasksOverlap(reasons=found))
    with _recorded(run, first.tensors, first_round=first.num_rounds):
        sites = Sites(run, fleet, told_names=_names_of_nodes(folder, log, resume=resume))
        sites.wait()
        state = rounds.play(run, sites, states.resumed(run, first))
        played = stages.run(run, state.tensors, engine=engine)
        stages.ask_sites(sites, played)
        return finish(run, state.tensors, played)


def _names_of_nodes(folder: Path, log: EventLog, *, resume: bool) -> dict[int, str]:
    """Under which nodes were registered, where the run was started at a SuperLink, and which they told before."""
    path = folder / run_files.NODES_FILE
    names = {int(node_id): name for node_id, name in json.loads(path.read_bytes()).items()} if path.is_file() else {}
    return names | (RunView.read(log.path).names if resume else {})


def manifest_of(settings: config.RunConfig, engine: Engine, *, evaluation_sha256: str = "") -> RunManifest:
    """The manifest of a run on a base that is loaded.

    Args:
        settings: The run file.
        engine: The coordinator's.
        evaluation_sha256: Hash of what the coordinator measures (`suite`); empty: nothing.

    Raises:
        ModelError: Some sites are 4-bit and the coordinator is not, and the files' codes cannot be made here.
        ValueError: The chat template prints a date, and the base was loaded without one.
    """
    if templates.needs_date(str(getattr(engine.tokenizer, "chat_template", ""))):
        raise ValueError("the chat template prints a date; load the base with the run's")
    return RunManifest(
        settings,
        engine.base_sha256,
        engine.tensor_specs,
        layerwise.codes_of_run(engine, settings.model),
        evaluation_sha256=evaluation_sha256,
        date=engine.date,
    )


def finish(run: Run, tensors: Tensors, played: Sequence[stages.Finished]) -> Outcome:
    """Export the newest adapter that the gate lets pass, and say that the run has finished.

    Args:
        run: Its rounds and stages are done.
        tensors: After the last round. Where sites have adapters of their own it is not exported.
        played: The stages after it.

    Raises:
        GateRefused: None passes.
    """
    manifest, folder, log = run.manifest, run.folder, run.log
    if run.plan.method.is_personal or run.suite is None:
        num_rounds = run_files.finished(folder)[-1]
        sites = RunView.read(log.path).trained_sites(num_rounds)
        log.append(RunFinished(adapter="", num_rounds=num_rounds, stage=measure.FINAL))
        return Outcome(tensors, sites, folder)
    chosen = decide.choose(manifest.run, decide.of_end(folder, manifest, tensors, played), suite=run.suite)
    history = events.read(log.path)
    sites = RunView.of(history).trained_sites(chosen.num_rounds)
    told = polish_told.of_export(history, chosen.names)
    export.save_adapter(
        folder / run_files.EXPORT_FOLDER,
        chosen.tensors,
        run_manifest=manifest,
        num_rounds=chosen.num_rounds,
        sites=sites,
        log=told,
    )
    source = Exported(chosen.tensors, manifest, chosen.num_rounds, sites, told)
    examples.write(
        folder,
        run.examples,
        chosen.tensors,
        engine=run.suite.engine,
        data=manifest.run.data,
        evaluation=manifest.run.evaluation,
    )
    run_export.write(folder, source, base=run.suite.engine.folder, log=log)
    log.append(RunFinished(adapter=run_files.EXPORT_FOLDER, num_rounds=chosen.num_rounds, stage=chosen.stage))
    return Outcome(chosen.tensors, sites, folder)


@contextmanager
def _recorded(run: Run, start: Tensors, *, first_round: int) -> Iterator[None]:
    """Write offer and end of a run into the audit log; what it starts from tells how an interrupted round ended."""
    if run.offer and run.offer.signature:
        made = {name: value for name, value in to_head(run.offer.signature).items() if name != "signature"}
        made |= {"name": run.manifest.run.name, "first_round": first_round}
        run.record("offered", adapter_sha256=adapter.digest(start), **made)
    try:
        yield
    except BaseException as error:
        with suppress(SilotuneError):  # the run's own error is the one to tell
            run.record("ended", outcome="failed", **trail.of_error(error))
        raise
    run.record("ended", outcome="finished", num_rounds=run_files.finished(run.folder)[-1])


def read_own_rows(settings: config.RunConfig, engine: Engine) -> OwnRows | None:
    """The coordinator's held-out rows as tokens; None if the run file names none.

    Raises:
        DataError: The file is missing or unusable.
    """
    if not settings.evaluation.server_data:
        return None
    rows = loading.rows_of(settings.evaluation.server_data, settings.data)
    return OwnRows(engine, base.encode(engine, rows, settings.data)[0])


def plan(manifest: RunManifest, engine: Engine) -> dict[str, Any]:
    """What the run will do, in figures, for the first event."""
    settings = manifest.run
    planned = manifest.plan
    trained = {spec for turn in planned.tensors.trained for spec in turn}
    return {
        "name": settings.name,
        "run_sha256": manifest.sha256,
        "base_sha256": manifest.base_sha256,
        "base": settings.model.base,
        "quantization": settings.model.quantization,
        "quantised_share": engine.quantised_share,
        "site_quantization": settings.model.site_quantization,
        "method": settings.aggregation.method,
        "privacy": settings.privacy.mode,
        "num_rounds": settings.federation.num_rounds,
        "num_base_parameters": engine.num_base_parameters,
        "num_trained_parameters": trainable.num_values(list(trained)),
        "num_tensors": len(trained),
        "bytes_down_per_site": planned.bytes_down,
        "bytes_evaluation_per_site": planned.bytes_evaluation,
        "bytes_up_per_site": planned.bytes_up,
        "guarding": guarding.in_words(settings.aggregation),
        "gap_warning": settings.aggregation.gap_warning,
        **_privacy(settings),
        "without_gap": compatibility.without_gap(settings),
        "polish": [stage.name for stage in settings.polish],
        "seed": settings.seed,
        "adapter": export.trained(settings.adapter),
        "learning_rate": settings.training.learning_rate,
        "objective": settings.training.objective.kind,
        "device": str(engine.device),
        "versions": versions(),
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of this software and of what it trains with, by distribution."""
    names = ("silotune", "torch", "transformers", "peft", "flwr", *more)
    return {name: importlib.metadata.version(name) for name in names}


def _privacy(settings: config.RunConfig) -> dict[str, Any]:
    """What the run promises to a unit or a site: the planned curve, never the whole over the number of rounds."""
    if settings.privacy.mode == "none":
        return {}
    return {
        "epsilon_planned": [round(value, 4) for value in privacy_cost.curve(settings)],
        "dp_delta": settings.privacy.dp_delta,
        "noise_multiplier": settings.privacy.noise_multiplier,
        "clip_norm": settings.privacy.clip_norm,
        "privacy_wording": privacy_cost.wording(settings),
    }


def _site_level(manifest: RunManifest, log: EventLog, *, num_rounds: int, is_noise_accepted: bool) -> dict[str, Any]:
    """Hold a run with noise for sites as a whole against its size and its past; what its first event tells of it."""
    run = manifest.run
    if run.privacy.mode != "site":
        return {}
    num_parameters = max(trainable.num_values(specs) for specs in manifest.plan.tensors.sent)
    site_privacy.require_signal(run, num_parameters, is_accepted=is_noise_accepted)
    ClipNorm.of(run.privacy, manifest.plan.num_expected)  # too few sites to let it follow are refused here
    site_privacy.check_resume(num_released=RunView.read(log.path).num_released, num_rounds=num_rounds)
    ratio = site_privacy.noise_ratio(run, num_parameters)
    return {"noise_ratio": round(ratio, 3), "noise_accepted": is_noise_accepted, "noise_at": run.privacy.noise_at}


def _check_size(manifest: RunManifest) -> None:
    """No message may be larger than its reader takes: a site's update, and a request that brings the adapter whole.

    However the adapter goes down as a rule, a site that joins late or starts anew is sent it whole.
    """
    size_mib, limit_mib = manifest.plan.egress.bytes_per_message / (1 << 20), manifest.run.wire.max_update_mib
    if size_mib > limit_mib:
        raise ConfigError(
            f"wire.max_update_mib = {limit_mib}, and an update of this adapter has up to {size_mib:.1f} MiB; raise it, "
            "send integers (wire.dtype), lower adapter.r, or choose fewer adapter.targets"
        )
    size_mib = manifest.plan.request_bytes / (1 << 20)
    if size_mib > MAX_MESSAGE_MIB:
        raise ConfigError(
            f"a request that brings this adapter whole has up to {size_mib:.1f} MiB, and no site takes more than "
            f"{MAX_MESSAGE_MIB} MiB (agent.max_message_mib); lower adapter.r, or choose fewer adapter.targets"
        )


def _start(
    manifest: RunManifest, engine: Engine, folder: Path, *, resume: bool
) -> tuple[Checkpoint, list[checkpoint.DamagedError]]:
    """The adapter to start from and the number of rounds that are done; and what is wrong with later checkpoints."""
    found, damaged = None, list[checkpoint.DamagedError]()
    if resume:
        found, damaged = checkpoint.newest(folder, manifest.tensor_specs, run_sha256=manifest.sha256)
    return found or Checkpoint(0, start.initial(manifest, engine.initial), "", {}), damaged
