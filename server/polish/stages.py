"""The stages of `[[polish]]`, one after the other, each on the adapter that the one before has left.

A stage that is done is a folder `polish/NN-NAME/` whose `stage.json` was written last; a run that goes on begins after
the newest of them. A stage that was interrupted goes on from its newest checkpoint (`unfinished.py`), and gives what it
would have given.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from common import events, storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError, DataError, ModelError
from common.event_kinds import PolishFinished, PolishStarted, PolishStep
from common.events import EventLog
from common.frame import wire
from common.frame.records import TensorSpec
from common.model.base import Engine
from common.run.config import RunConfig
from common.run.manifest import RunManifest
from common.run.schema.polish import PolishStage
from server.evaluate import measure
from server.evaluate.kept_apart import Apart
from server.fleet.federation import Federation
from server.polish import answering, borrow, reward_model, rewards, rows, unfinished
from server.polish.rows import StageRows
from server.view import polish as told

FOLDER: Final = "polish"
ADAPTER_FILE: Final = "adapter_model.safetensors"
RECORD_FILE: Final = "stage.json"
UNFINISHED: Final = "unfinished"  # folder of a stage's checkpoints while it is played


@dataclass(frozen=True)
class Played:
    """What a stage did.

    Attributes:
        tensors: The adapter afterwards; as before, for a reward model.
        before: The objective's figures on the held-out rows, and those of `answering`, by name.
        after: The same afterwards.
        reward: The reward model that was trained; None for other kinds.
        num_steps: Optimizer steps.
    """

    tensors: Tensors
    before: Mapping[str, float]
    after: Mapping[str, float]
    reward: reward_model.RewardModel | None = None
    num_steps: int = 0


@dataclass(frozen=True)
class Finished:
    """A stage that is on the disk.

    Attributes:
        label: Of the coordinator's figures after it.
        names: Of the stages up to it.
        tensors: The adapter after it.
    """

    label: str
    names: tuple[str, ...]
    tensors: Tensors


@dataclass
class _Teller:
    """Turns a trainer's steps into events."""

    log: EventLog
    stage: str
    num_steps: int
    last: int = field(default=0)

    def __call__(self, step: int, told: Mapping[str, float]) -> None:
        """One step of a few."""
        if step > self.last:
            self.last = step
            figures = {name: told[name] for name in ("loss", "reward", "rewards/margins", "kl") if name in told}
            self.log.append(
                PolishStep(stage=self.stage, step=step, num_steps=self.num_steps, figures=_rounded(figures))
            )


def run(fed: Federation, start: Tensors, *, engine: Engine) -> list[Finished]:
    """Play the stages that are not on the disk yet.

    Args:
        fed: The run; its stages, folder and events.

    Returns:
        All stages, in their order.

    Raises:
        ConfigError: A stage cannot be played here.
        DataError: A stage's data are missing or unusable.
        ModelError: Training gave a value that is not finite, or a finished stage is of something else.
        StorageError: Disk full or not writable.
    """
    done: list[Finished] = []
    for number, stage in enumerate(fed.manifest.run.polish, start=1):
        before = done[-1].tensors if done else start
        folder = folder_of(fed.folder, number, stage)
        if (folder / RECORD_FILE).is_file():
            after = _stored(folder, stage, before, engine.tensor_specs)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            _tell_again(fed, folder)
        else:
            after = _play_and_keep(fed, number, stage, before, engine=engine)
        done.append(_finished(done, number, stage, after))
    return done


def _play_and_keep(fed: Federation, number: int, stage: PolishStage, before: Tensors, *, engine: Engine) -> Tensors:
    """One stage from its data to its record on the disk; the adapter that it leaves."""
    began = fed.clock()
    found = rows.load(stage, engine, fed.manifest.run.data, fed.apart)
    place = folder_of(fed.folder, number, stage) / UNFINISHED
    num_done = unfinished.begin(place, _origin(stage, before, found))
    _tell_begin(fed, number, stage, found, num_done=num_done)
    teller = _Teller(fed.log, stage.name, rows.num_steps(stage, found))
    judge = _judge(fed, stage, engine)
    played = play(stage, before, engine=engine, found=found, tell=teller, judge=judge, unfinished_in=place)
    if played.reward is None:
        _measure(fed, played.tensors, stage=told.label(number, stage.name))
    facts = _facts(fed, number, stage, found, played) | {"seconds": round(fed.clock() - began, 3)}
    _save(folder_of(fed.folder, number, stage), stage, before, played, engine=engine, facts=facts)
    shutil.rmtree(place)
    fed.log.append(PolishFinished(**facts))
    return played.tensors


def _finished(before: Sequence[Finished], number: int, stage: PolishStage, tensors: Tensors) -> Finished:
    """A stage after those before it."""
    names = before[-1].names if before else ()
    return Finished(told.label(number, stage.name), (*names, stage.name), tensors)


def _measure(fed: Federation, tensors: Tensors, *, stage: str) -> None:
    """The coordinator's evaluation of what a stage has left."""
    if fed.suite:
        measure.measure(fed.suite, tensors, stage=stage)


def check(settings: RunConfig, engine: Engine, apart: Sequence[Apart] = ()) -> None:
    """Find out before the first round what would end a stage after the last.

    Raises:
        ConfigError: A stage cannot be played here.
        DataError: A stage's data are missing or unusable, or stand in rows that are kept `apart`.
    """
    if settings.polish:
        _refuse_head(engine)
    for stage in settings.polish:
        rows.load(stage, engine, settings.data, apart)
        if stage.kind == "grpo":
            rewards.check_of(stage)


def finished(run_folder: Path, manifest: RunManifest, start: Tensors) -> list[Finished]:
    """The stages that are on the disk, in their order.

    Raises:
        DataError: A stage cannot be read.
        ModelError: It is not what was written, or it began with another adapter.
    """
    found: list[Finished] = []
    for number, stage in enumerate(manifest.run.polish, start=1):
        folder = folder_of(run_folder, number, stage)
        if not (folder / RECORD_FILE).is_file():
            break
        tensors = _stored(folder, stage, found[-1].tensors if found else start, manifest.tensor_specs)
        found.append(_finished(found, number, stage, tensors))
    return found


def folder_of(run_folder: Path, number: int, stage: PolishStage) -> Path:
    """Where a stage lies; numbers count from 1."""
    return run_folder / FOLDER / f"{number:02d}-{stage.name}"


def play(
    stage: PolishStage,
    start: Tensors,
    *,
    engine: Engine,
    found: StageRows,
    tell: Any,
    judge: reward_model.RewardModel | None = None,
    unfinished_in: Path | None = None,
) -> Played:
    """Train one stage on the engine's base.

    Args:
        start: The adapter to start from; its side adapter, where there is one, stays as it is.
        engine: The base; its adapter is overwritten.
        unfinished_in: Where checkpoints are left, and the newest gone on from (`unfinished.begin`); None: nowhere.

    Raises:
        ConfigError: An adapter on the output layer, which TRL would not train.
        ModelError: A value is not finite.
    """
    _refuse_head(engine)
    adapter.write(engine.model, start)
    with borrow.memory_named(stage):
        before = answering.figures(engine, stage, found)
        played = _trained(stage, start, engine=engine, found=found, tell=tell, judge=judge, unfinished_in=unfinished_in)
        after = answering.figures(engine, stage, found)
    if played.reward:
        adapter.write(engine.model, start)
    return dataclasses.replace(played, before={**played.before, **before}, after={**played.after, **after})


def _trained(
    stage: PolishStage,
    start: Tensors,
    *,
    engine: Engine,
    found: StageRows,
    tell: Any,
    judge: reward_model.RewardModel | None,
    unfinished_in: Path | None,
) -> Played:
    """What the trainer makes of the adapter, and the objective's figures before and after."""
    from server.polish import trainers  # loads TRL, which a run without stages does not need

    with tempfile.TemporaryDirectory(prefix="silotune-polish-") as temporary, borrow.lent(engine):
        scratch, keeps = unfinished_in or Path(temporary), unfinished_in is not None
        try:
            model = reward_model.build(engine, seed=stage.seed) if stage.kind == "reward" else None
            reward = _reward(stage, engine, judge)
            trainer = trainers.make(
                stage, engine, found, scratch=str(scratch), keeps=keeps, tell=tell, model=model, reward=reward
            )
            borrow.write_masters(engine, start)
            borrow.set_reference(engine.model, start, reference=stage.reference)
            before = trainers.figures(trainer, stage)
            trainer.train(resume_from_checkpoint=str(newest) if (newest := unfinished.newest(scratch)) else None)
            after = trainers.figures(trainer, stage)
        finally:
            borrow.drop(engine.model, reward_model.JUDGE)
        trained = reward_model.read(engine, model) if model is not None else None
        result = adapter.read(engine.model)
        _refuse_files(scratch)
    _refuse_diverged(result, stage)
    engine.model.eval()
    return Played(start if trained else result, before, after, trained, int(trainer.state.global_step))


def _origin(stage: PolishStage, start: Tensors, found: StageRows) -> dict[str, Any]:
    """On what a stage's result depends."""
    digest = hashlib.sha256(wire.canonical_json({"train": list(found.train), "held_out": list(found.held_out)}))
    settings = stage.model_dump(mode="json")
    return {"stage": settings, "start_sha256": adapter.digest(start), "rows_sha256": digest.hexdigest()}


def _tell_begin(fed: Federation, number: int, stage: PolishStage, found: StageRows, *, num_done: int) -> None:
    """Say that a stage begins, or goes on."""
    fed.log.append(
        PolishStarted(
            stage=stage.name,
            trainer=stage.kind,
            number=number,
            num_stages=len(fed.manifest.run.polish),
            num_rows=len(found.train),
            num_held_out=len(found.held_out),
            num_truncated=found.num_truncated,
            num_dropped=found.num_dropped,
            num_equal=found.num_equal,
            num_overlapping=found.num_overlapping,
            reference=stage.reference,
            num_steps_done=num_done,
        )
    )


def _facts(fed: Federation, number: int, stage: PolishStage, found: StageRows, played: Played) -> dict[str, Any]:
    """What is told of a finished stage."""
    return {
        "stage": stage.name,
        "trainer": stage.kind,
        "number": number,
        "num_stages": len(fed.manifest.run.polish),
        "before": _rounded(played.before),
        "after": _rounded(played.after),
        "num_steps": played.num_steps,
        "num_rows": len(found.train),
        "num_held_out": len(found.held_out),
        "seed": stage.seed,
        "learning_rate": stage.learning_rate,
        "overlaps": {name: dict(counts) for name, counts in found.overlaps.items()},
        "adapter_sha256": adapter.digest(played.tensors),
    }


def _tell_again(fed: Federation, folder: Path) -> None:
    """Say that a stage finished, if the process ended between its record and its event."""
    facts = json.loads((folder / RECORD_FILE).read_bytes())["finished"]
    log = events.read(fed.log.path) if fed.log.path.is_file() else []
    if facts["number"] not in [event["number"] for event in log if event["kind"] == "polish_finished"]:
        fed.log.append(PolishFinished(**facts))


def _reward(stage: PolishStage, engine: Engine, judge: reward_model.RewardModel | None) -> rewards.Reward | None:
    """What scores the answers of a stage; None for kinds that sample none."""
    if stage.kind == "grpo":
        return rewards.Verified(stage)
    if stage.kind == "rloo" and judge is not None:
        return reward_model.Judge(engine, judge)
    return None


def _judge(fed: Federation, stage: PolishStage, engine: Engine) -> reward_model.RewardModel | None:
    """The reward model that a stage names; None if it names none."""
    for number, other in enumerate(fed.manifest.run.polish, start=1):
        if stage.reward_stage and other.name == stage.reward_stage:
            return reward_model.load(folder_of(fed.folder, number, other), engine)
    return None


def _save(
    folder: Path, stage: PolishStage, start: Tensors, played: Played, *, engine: Engine, facts: Mapping[str, Any]
) -> None:
    """Write a finished stage, its record last."""
    if played.reward is not None:
        reward_model.save(folder, played.reward, base_sha256=engine.base_sha256)
    storage.write_atomic(folder / ADAPTER_FILE, adapter.encode(played.tensors, dtype="float32"))
    record = {
        "stage": stage.model_dump(mode="json"),
        "start_sha256": adapter.digest(start),
        "adapter_sha256": adapter.digest(played.tensors),
        "data_sha256": _hash_data(stage),
        "finished": dict(facts),
    }
    storage.write_atomic(folder / RECORD_FILE, wire.canonical_json(record) + b"\n")


def _stored(folder: Path, stage: PolishStage, start: Tensors, specs: tuple[TensorSpec, ...]) -> Tensors:
    """The adapter of a finished stage, held against its record and against what it began with.

    Raises:
        DataError: It cannot be read.
        ModelError: It is not what was written, or it began with another adapter or other settings.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
        data = (folder / ADAPTER_FILE).read_bytes()
        found = (record["stage"], record["start_sha256"], record["adapter_sha256"])
        record["finished"]["number"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: no whole stage; remove the folder, and it is played again") from error
    if found != (stage.model_dump(mode="json"), adapter.digest(start), hashlib.sha256(data).hexdigest()):
        raise ModelError(
            f"{folder}: was changed, or began with another adapter or other settings; remove it and the stages after it"
        )
    return adapter.decode(data, specs, dtype="float32")


def _hash_data(stage: PolishStage) -> str:
    """Hash of a stage's data file; empty for a folder or a data set's name."""
    path = Path(stage.data).expanduser()
    return storage.sha256(path) if path.is_file() else ""


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """For events."""
    return {name: round(value, 5) for name, value in figures.items()}


def _refuse_head(engine: Engine) -> None:
    """TRL computes log-probabilities from the output layer's own weights, so an adapter on it would be left out."""
    if any(name.startswith("base_model.model.lm_head.") for name in adapter.parameters(engine.model)):
        raise ConfigError("adapter.targets names the output layer, which no polish stage can train; leave lm_head out")


def _refuse_diverged(tensors: Tensors, stage: PolishStage) -> None:
    """No adapter goes on that holds what no training should give."""
    if not all(bool((tensor.abs() <= adapter.MAX_VALUE).all()) for tensor in tensors.values()):
        raise ModelError(f"polish stage '{stage.name}': the adapter diverged; lower the stage's learning_rate")


def _refuse_files(scratch: Path) -> None:
    """Trainers of this kind like to leave pickles behind; ours were told to write nothing but their checkpoints."""
    if left := sorted(path.name for path in scratch.rglob("*") if path.is_file() and path.name not in unfinished.FILES):
        raise ModelError(f"a trainer wrote {left[0]}, which no stage may; check the version of trl in constraints.txt")
