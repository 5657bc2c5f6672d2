"""Stages after the end of a run: a run folder of their own that begins with the adapter which the run has left."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from common import events, storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError, DataError, GateRefused
from common.event_kinds import (
    Compared,
    Derived,
    Evaluated,
    Event,
    Exported,
    Judged,
    LaterFinished,
    LaterStarted,
    NotEvaluated,
    RunFailed,
    RunFinished,
)
from common.events import EventLog
from common.model import base as model
from common.model import loading, store
from common.model.base import Engine
from common.run import config, later
from common.run.catalogue.methods import FACTS
from common.run.later import SITE_RULES, StagesConfig
from common.run.manifest import RunManifest
from server.evaluate import kept_apart, measure, suite
from server.evaluate.kept_apart import KnownRows
from server.folder import checkpoint, lock, run_files
from server.gate import decide
from server.polish import addendum, stages
from server.polish.addendum import Addendum
from server.run import export, run
from server.view import figures, polish
from server.view import gate as words
from server.view.run_view import RunView

_LEFT_OUT: Final = (
    RunFinished, RunFailed, Judged, Exported, Compared, LaterStarted, LaterFinished,
)  # events of the run's own outcome  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The adapter on which later stages begin.

    Attributes:
        num_rounds: Rounds behind it.
        rounds: The adapter after them.
        played: The stages of the run behind it.
    """

    num_rounds: int
    rounds: Tensors
    played: tuple[stages.Finished, ...]

    @property
    def tensors(self) -> Tensors:
        """It."""
        return self.played[-1].tensors if self.played else self.rounds

    def label(self, run_config: config.RunConfig) -> str:
        """What its figures are called."""
        rounds = measure.stage_of(self.num_rounds, last=run_config.federation.num_rounds)
        return self.played[-1].label if self.played else rounds


def begin(
    run_folder: Path, stages_file: Path, *, num_kept: int | None, base: Path | None, num_threads: int
) -> tuple[Path, Engine]:
    """Make the folder of new stages, or find the one that an earlier try of the same stages has left.

    What would end a stage is found before anything is written. The run's own files stay as they are, but for one event.

    Args:
        run_folder: A run whose rounds and own stages are done; its lock is held.
        stages_file: See `common.run.later`.
        num_kept: Stages of the run's own on which the new ones are played; None: those of the adapter that it exports,
            or all of them where its gate let nothing pass.
        base: The base's folder; None looks for it in the store.
        num_threads: CPU threads of torch; 0: all cores.

    Returns:
        The folder, and the run's base.

    Raises:
        ConfigError: The file has problems or does not fit the run, a stage cannot be played here, a rule of the gate
            needs figures of sites, or these very stages are done already.
        DataError: Not a run folder, it is not finished, or a stage's data are unusable or among what it is judged on.
        ModelError: The base is not here or another one, or a checkpoint is damaged.
        StorageError: Disk full or not writable.
    """
    manifest = run_files.stored_manifest(run_folder)
    asked = later.load_stages(stages_file)
    _refuse_personal(run_folder, manifest)
    start = start_of(run_folder, manifest, num_kept=num_kept)
    settings = _settings(manifest.run, asked, start, name=str(stages_file))
    made = _addendum(run_folder, manifest, settings, start)
    known = [(folder, found) for folder in addendum.folders(run_folder) if (found := addendum.read(folder))]
    same = [folder for folder, found in known if found.asks == made.asks]
    if same and RunView.read(same[0] / events.FILE).finished:
        raise ConfigError(f"{same[0]}: these very stages are done; export it, or change a setting of {stages_file}")
    engine = engine_of(manifest, settings, base, num_threads)
    folder = same[0] if same else run_folder / addendum.FOLDER / f"{made.number:02d}"
    if not same:
        _check(manifest, settings, made, engine, folder=run_folder)
        _fill(folder, run_folder, manifest, settings, start, made)
    _tell(run_folder, folder)
    return folder, engine


def start_of(run_folder: Path, manifest: RunManifest, *, num_kept: int | None) -> Start:
    """The adapter of a finished run on which new stages begin; see `begin`.

    Raises:
        ConfigError: The run has fewer stages.
        DataError: Its rounds or its own stages are not done.
        ModelError: A checkpoint is damaged.
    """
    own, last = manifest.run.polish, last_round(run_folder, manifest.run.federation.num_rounds)
    after = _round(run_folder, manifest, last)
    played = stages.finished(run_folder, manifest, after)
    if len(played) < len(own):
        raise DataError(
            f"{run_folder}: stage {len(played) + 1} of its own {len(own)} is not done; play it first, by "
            f"silotune-server polish {run_folder}, or with run --resume where the sites are asked after it"
        )
    if num_kept is not None:
        if num_kept > len(own):
            raise ConfigError(f"--keep-stages {num_kept}: the run has {len(own)} stages; name at most as many")
        return Start(last, after, tuple(played[:num_kept]))
    try:
        passed = decide.exported(manifest.run, RunView.read(run_folder / events.FILE))
    except GateRefused:  # nothing passed: the newest is what is to be mended
        passed = None
    if passed is None:
        return Start(last, after, tuple(played))
    if passed.num_rounds != last:
        return Start(passed.num_rounds, _round(run_folder, manifest, passed.num_rounds), ())
    return Start(last, after, tuple(stage for stage in played if stage.label <= passed.stage))


def last_round(run_folder: Path, num_rounds: int) -> int:
    """The round after which the stages begin: the run's last, or the one at which its gate ended the rounds.

    Raises:
        DataError: It is not done.
    """
    if made := addendum.read(run_folder):
        return made.num_rounds
    done = run_files.finished(run_folder)
    stopped = RunView.read(run_folder / events.FILE).stopped
    last = stopped.num_rounds if stopped else num_rounds
    if last not in done:
        raise DataError(f"{run_folder}: round {last}, the last, is not done; go on with run --resume first")
    return last


def engine_of(manifest: RunManifest, settings: config.RunConfig, base: Path | None, num_threads: int) -> Engine:
    """The run's base, with an adapter of the run's shape.

    Raises:
        ModelError: The base is not here, or another one.
    """
    folder = base or store.resolve(settings.model.base)
    model.check_hash(folder, manifest.base_sha256)
    return loading.engine_of(settings, folder, num_threads=num_threads, date=manifest.date)


@contextmanager
def held(run_folder: Path) -> Iterator[None]:
    """Hold a run's folder, and that of the run to which it was added, if it was.

    Raises:
        DataError: That run is not where it was.
        RunBusyError: Another process is at work in one of them.
    """
    with ExitStack() as stack:
        for folder in _lineage(run_folder):
            stack.enter_context(lock.hold(folder))
        yield


def finish(folder: Path, view: RunView) -> Path | None:
    """Write into the events of a run what its later stages came to, once.

    Args:
        folder: Of the stages, or a run's own.
        view: Of that folder; finished.

    Returns:
        The run's folder; None where `folder` was added to none.
    """
    made = addendum.read(folder)
    if made is None:
        return None
    path, stage = _origin(folder) / events.FILE, view.exported_stage
    digests = {polish.label(e.number, e.stage): e.adapter_sha256 for e in view.polish_finished.values()}
    known = RunView.read(path).later_finished.get(made.sha256)
    if known is None or (known.stage, known.adapter_sha256) != (stage, digests[stage]):
        EventLog(path).append(
            LaterFinished(number=made.number, addendum_sha256=made.sha256, stage=stage, adapter_sha256=digests[stage])
        )
    return path.parent


def refuse_site_rules(rules: Sequence[str], *, whose: str) -> None:
    """Rules that nobody can judge a polished adapter by whom no site has scored.

    Raises:
        ConfigError: One is named.
    """
    if found := sorted(SITE_RULES & set(rules)):
        raise ConfigError(
            f"{whose} names the rules {', '.join(found)}, which need the sites' figures of this very adapter; no site "
            "is asked once a run has ended: each answers the planned evaluations and no more. Give a [gate] of rules "
            "on the coordinator's own rows"
        )


def _lineage(run_folder: Path) -> list[Path]:
    """The run to which a folder was added, that to which that one was, and so on; the folder itself last."""
    found = [run_folder]
    while addendum.read(found[0]):
        found.insert(0, _origin(found[0]))
    return found


def _origin(folder: Path) -> Path:
    """The run to which a folder was added."""
    origin = folder.resolve().parent.parent
    manifest = origin / run_files.MANIFEST_FILE
    is_there = folder.resolve().parent.name == addendum.FOLDER and manifest.is_file()
    if not is_there or manifest.read_bytes() != (folder / run_files.MANIFEST_FILE).read_bytes():
        raise DataError(f"{folder}: was made in the folder {addendum.FOLDER} of its run; put it back there to go on")
    return origin


def _refuse_personal(run_folder: Path, manifest: RunManifest) -> None:
    """Each site has an adapter of its own, and nobody has one to polish."""
    if FACTS[manifest.run.aggregation.method].is_personal:
        method = manifest.run.aggregation.method
        raise ConfigError(f"{run_folder}: under aggregation.method = '{method}' there is no one adapter to polish")


def _round(run_folder: Path, manifest: RunManifest, num_rounds: int) -> Tensors:
    """The adapter after so many rounds."""
    specs, run_sha256 = manifest.tensor_specs, manifest.sha256
    return checkpoint.load(run_folder, specs, num_rounds=num_rounds, run_sha256=run_sha256).tensors


def _settings(own: config.RunConfig, asked: StagesConfig, start: Start, *, name: str) -> config.RunConfig:
    """The run file with the stages that are kept, the new ones, and the gate of these."""
    gate = asked.gate if asked.gate.rules else own.gate
    whose = f"{name}: [gate]" if asked.gate.rules else "the run's own gate"
    refuse_site_rules(gate.kinds, whose=whose)
    kept = own.polish[: len(start.played)]
    plain = json.loads(config.resolved_json(own.model_copy(update={"polish": (*kept, *asked.polish), "gate": gate})))
    try:
        return config.RunConfig.model_validate(plain)
    except ValidationError as error:  # not chained: pydantic's own text repeats values
        reasons = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
        raise ConfigError(f"{name}: does not fit the run: {reasons}") from None


def _addendum(run_folder: Path, manifest: RunManifest, settings: config.RunConfig, start: Start) -> Addendum:
    """What is recorded of the new stages."""
    own, num_kept = addendum.read(run_folder), len(start.played)
    last = max((int(folder.name) for folder in addendum.folders(run_folder)), default=0)
    return Addendum(
        number=last + 1,
        name=manifest.run.name,
        run_sha256=manifest.sha256,
        events_sha256=hashlib.sha256((run_folder / events.FILE).read_bytes()).hexdigest(),
        start_stage=start.label(manifest.run),
        start_sha256=adapter.digest(start.tensors),
        num_rounds=start.num_rounds,
        num_kept=num_kept,
        stages=tuple(stage.model_dump(mode="json") for stage in settings.polish[num_kept:]),
        gate=settings.gate.model_dump(mode="json"),
        run_gate=own.run_gate if own else manifest.run.gate.model_dump(mode="json"),
        evaluation_sha256=manifest.evaluation_sha256,
        versions=run.versions("trl"),
    )


def _check(manifest: RunManifest, settings: config.RunConfig, made: Addendum, engine: Engine, *, folder: Path) -> None:
    """Find out before anything is written what would end the stages or the export after them."""
    measured = open_suite(settings, made, engine=engine, folder=folder, log=EventLog(folder / events.FILE))
    suite.require_same(measured.sha256, manifest.evaluation_sha256)
    apart = kept_apart.tables(measured.tasks, KnownRows())
    stages.check(settings.polish, engine, data=settings.data, apart=apart)
    export.check(RunManifest(settings, manifest.base_sha256, manifest.tensor_specs, date=manifest.date), engine)


def open_suite(
    settings: config.RunConfig, made: Addendum | None, *, engine: Engine, folder: Path, log: EventLog
) -> suite.Suite:
    """What the coordinator measures: the run's own tasks, whose hash covers the run's own gate and no other.

    Raises:
        ConfigError: A task needs what is not installed.
        DataError: Rows, schemas or tasks are missing or unusable.
    """
    if made:
        settings = settings.model_copy(update={"gate": config.GateConfig.model_validate(made.run_gate)})
    return suite.open_suite(settings, engine=engine, folder=folder, log=log)


def _fill(
    folder: Path, run_folder: Path, manifest: RunManifest, settings: config.RunConfig, start: Start, made: Addendum
) -> None:
    """Make the folder; it bears its name only when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    log = events.read(run_folder / events.FILE)
    kept = list(_history(log, start))
    labels = {figures.PROMPT_ONLY, *RunView.of(kept).measured}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, stage in enumerate(settings.polish[: made.num_kept], start=1):
            source, place = (stages.folder_of(where, number, stage) for where in (run_folder, partial))
            shutil.copytree(source, place, ignore=shutil.ignore_patterns(stages.UNFINISHED))
        for label in sorted(labels):
            if (scores := run_folder / measure.FOLDER / f"{label}.json").is_file():
                (partial / measure.FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(scores, partial / measure.FOLDER / scores.name)
        shutil.copyfile(run_folder / run_files.MANIFEST_FILE, partial / run_files.MANIFEST_FILE)
    except OSError as error:
        raise storage.storage_error(folder, error) from error
    checkpoint.save(partial, start.rounds, memory={}, num_rounds=start.num_rounds, run_sha256=manifest.sha256)
    storage.write_atomic(partial / run_files.RUN_FILE, config.resolved_json(settings).encode() + b"\n")
    addendum.write(partial, made)
    storage.write_atomic(partial / events.FILE, "".join(f"{event.line}\n" for event in kept).encode())
    EventLog(partial / events.FILE).append(
        Derived(**_facts(made), versions=dict(made.versions), refused=_refused(log, made))
    )
    try:
        partial.rename(folder)
    except OSError as error:
        raise storage.storage_error(folder, error) from error


def _history(log: Sequence[Event], start: Start) -> Iterator[Event]:
    """What a run's events tell of the adapter on which the new stages begin."""
    for event in polish.of_export(log, start.played[-1].names if start.played else ()):
        is_later = isinstance(event, Evaluated | NotEvaluated) and (event.num_rounds or 0) > start.num_rounds
        if not isinstance(event, _LEFT_OUT) and not is_later:
            yield event


def _refused(log: Sequence[Event], made: Addendum) -> list[str]:
    """What the run's own gate held against the adapter on which the new stages begin."""
    judged = decide.verdicts(RunView.of(log)).get(made.start_sha256)
    return [words.line(verdict) for verdict in judged.verdicts if not verdict.is_met] if judged else []


def _facts(made: Addendum) -> dict[str, Any]:
    """What both folders' events tell of an addendum."""
    return {
        "number": made.number,
        "addendum_sha256": made.sha256,
        "name": made.name,
        "run_sha256": made.run_sha256,
        "start_stage": made.start_stage,
        "start_sha256": made.start_sha256,
        "num_rounds": made.num_rounds,
        "num_kept": made.num_kept,
        "stages": [stage["name"] for stage in made.stages],
        "gate_sha256": addendum.gate_sha256(made.gate),
        "has_own_gate": made.has_own_gate,
    }


def _tell(run_folder: Path, folder: Path) -> None:
    """Say in the run's events that something was added to it, once."""
    made = addendum.read(folder)
    if made is None:
        raise DataError(f"{folder}: has no {addendum.FILE}; remove the folder and begin again")
    known = RunView.read(run_folder / events.FILE).later_started
    if made.sha256 not in [event.addendum_sha256 for event in known]:
        place = folder.relative_to(run_folder).as_posix()
        EventLog(run_folder / events.FILE).append(LaterStarted(folder=place, **_facts(made)))
