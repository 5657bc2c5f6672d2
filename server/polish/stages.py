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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from common import storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError, DataError, ModelError
from common.event_kinds import NotEvaluated, PolishEvaluated, PolishFinished, PolishStarted, PolishStep
from common.events import EventLog
from common.frame import wire
from common.frame.records import RoundPlan, TensorSpec
from common.model import base
from common.model.base import Engine
from common.run.manifest import RunManifest
from common.run.schema.polish import AnyStage, GrpoStage, PolishStage, RlooStage
from common.run.schema.training import DataConfig
from server.evaluate import measure
from server.evaluate.kept_apart import Apart
from server.fleet import held_out
from server.fleet.run import Run
from server.fleet.sites import Sites
from server.polish import borrow, reward_model, rewards, rows, unfinished
from server.polish.rows import StageRows
from server.view import polish as view
from server.view.run_view import RunView

FOLDER: Final = "polish"
ADAPTER_FILE: Final = "adapter_model.safetensors"
RECORD_FILE: Final = "stage.json"
ANSWER_KINDS: Final = ("dpo", "kto", "orpo", "simpo")  # `rloo` and `grpo` report the length of what they sample
MAX_ANSWERS: Final = 16  # an answer on a CPU takes seconds
MAX_ANSWER_TOKENS: Final = 128
PIECE_TOKENS: Final = 4
UNFINISHED: Final = "unfinished"  # folder of a stage's checkpoints while it is played


@dataclass(frozen=True)
class Played:
    """What a stage did.

    Attributes:
        tensors: The adapter afterwards; as before, for a reward model.
        before: The objective's figures on the held-out rows, and those of `answer_figures`, by name.
        after: The same afterwards.
        reward: The reward model that was trained; None for other kinds.
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
    """

    label: str
    names: tuple[str, ...]
    tensors: Tensors


@dataclass
class _StepReport:
    """Turns a trainer's steps into events."""

    log: EventLog
    stage: str
    num_steps: int
    last: int = field(default=0)

    def __call__(self, step: int, logged: Mapping[str, float]) -> None:
        """Report a step that was not reported before an interruption."""
        if step > self.last:
            self.last = step
            figures = {name: logged[name] for name in ("loss", "reward", "rewards/margins", "kl") if name in logged}
            self.log.append(
                PolishStep(stage=self.stage, step=step, num_steps=self.num_steps, figures=_rounded(figures))
            )


def run(run: Run, start: Tensors, *, engine: Engine) -> list[Finished]:
    """Play the stages that are not on the disk yet.

    Args:
        run: Its stages, folder and events.

    Returns:
        All stages, in their order.

    Raises:
        ConfigError: A stage cannot be played here.
        DataError: A stage's data are missing or unusable.
        ModelError: Training gave a value that is not finite, or a finished stage is of something else.
        StorageError: Disk full or not writable.
    """
    done: list[Finished] = []
    for number, stage in enumerate(run.manifest.run.polish, start=1):
        before = done[-1].tensors if done else start
        folder = folder_of(run.folder, number, stage)
        if (folder / RECORD_FILE).is_file():
            after = _stored(folder, stage, before, engine.tensor_specs)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            # The process may have ended between the stage's record and its event.
            facts = json.loads((folder / RECORD_FILE).read_bytes())["finished"]
            if facts["number"] not in RunView.read(run.log.path).polish_finished:
                run.log.append(PolishFinished(**facts))
        else:
            after = _play_and_save(run, number, stage, before, engine=engine)
        done.append(_finished(done, number, stage, after))
    return done


def _play_and_save(run: Run, number: int, stage: AnyStage, before: Tensors, *, engine: Engine) -> Tensors:
    """One stage from its data to its record on the disk; the adapter that it leaves."""
    began, stages = run.clock(), run.manifest.run.polish
    data = rows.load(stage, engine, run.manifest.run.data, run.apart)
    folder = folder_of(run.folder, number, stage)
    num_done = unfinished.begin(
        folder / UNFINISHED,
        {  # on what the result depends
            "stage": stage.model_dump(mode="json"),
            "start_sha256": adapter.digest(before),
            "rows_sha256": hashlib.sha256(
                wire.canonical_json({"train": list(data.train), "held_out": list(data.held_out)})
            ).hexdigest(),
        },
    )
    facts: dict[str, Any] = {
        "stage": stage.name,
        "trainer": stage.kind,
        "number": number,
        "num_stages": len(stages),
        "num_rows": len(data.train),
        "num_held_out": len(data.held_out),
    }
    run.log.append(
        PolishStarted(
            **facts,
            num_truncated=data.num_truncated,
            num_dropped=data.num_dropped,
            num_equal=data.num_equal,
            num_overlapping=data.num_overlapping,
            reference=stage.held_to,
            num_steps_done=num_done,
        )
    )
    report = _StepReport(run.log, stage.name, rows.num_steps(stage, data))
    judge = None
    for other_number, other in enumerate(stages, start=1):
        if isinstance(stage, RlooStage) and other.name == stage.reward_stage:
            judge = reward_model.load(folder_of(run.folder, other_number, other), engine)
    played = play(stage, before, engine=engine, data=data, tell=report, judge=judge, unfinished_in=folder / UNFINISHED)
    if played.reward is None and run.suite:
        measure.measure(run.suite, played.tensors, stage=view.label(number, stage.name))
    facts |= {
        "before": _rounded(played.before),
        "after": _rounded(played.after),
        "num_steps": played.num_steps,
        "seed": stage.seed,
        "learning_rate": stage.learning_rate,
        "overlaps": {name: dict(counts) for name, counts in data.overlaps.items()},
        "adapter_sha256": adapter.digest(played.tensors),
        "seconds": round(run.clock() - began, 3),
    }
    _save(folder, stage, before, played, base_sha256=engine.base_sha256, facts=facts)
    shutil.rmtree(folder / UNFINISHED)
    run.log.append(PolishFinished(**facts))
    return played.tensors


def _finished(before: Sequence[Finished], number: int, stage: PolishStage, tensors: Tensors) -> Finished:
    """A stage after those before it."""
    names = before[-1].names if before else ()
    return Finished(view.label(number, stage.name), (*names, stage.name), tensors)


def check(stages: Sequence[AnyStage], engine: Engine, *, data: DataConfig, apart: Sequence[Apart] = ()) -> None:
    """Find out before the first round what would end a stage after the last.

    Raises:
        ConfigError: A stage cannot be played here.
        DataError: A stage's data are missing or unusable, or stand in rows that are kept `apart`.
    """
    for stage in stages:
        _refuse_head(engine)
        rows.load(stage, engine, data, apart)
        if isinstance(stage, GrpoStage):
            rewards.check_of(stage)


def finished(run_folder: Path, manifest: RunManifest, start: Tensors) -> list[Finished]:
    """The stages that are on the disk, in their order.

    Raises:
        DataError: A stage cannot be read.
        ModelError: It is not what was written, or it began with another adapter.
    """
    done: list[Finished] = []
    for number, stage in enumerate(manifest.run.polish, start=1):
        folder = folder_of(run_folder, number, stage)
        if not (folder / RECORD_FILE).is_file():
            break
        tensors = _stored(folder, stage, done[-1].tensors if done else start, manifest.tensor_specs)
        done.append(_finished(done, number, stage, tensors))
    return done


def folder_of(run_folder: Path, number: int, stage: PolishStage) -> Path:
    """Where a stage lies; numbers count from 1."""
    return run_folder / FOLDER / f"{number:02d}-{stage.name}"


def play(
    stage: PolishStage,
    start: Tensors,
    *,
    engine: Engine,
    data: StageRows,
    tell: Callable[[int, Mapping[str, float]], None],
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
        before = answer_figures(engine, stage, data)
        played = _train(stage, start, engine=engine, data=data, tell=tell, judge=judge, unfinished_in=unfinished_in)
        after = answer_figures(engine, stage, data)
    if played.reward:
        adapter.write(engine.model, start)
    return dataclasses.replace(played, before={**played.before, **before}, after={**played.after, **after})


def _train(
    stage: PolishStage,
    start: Tensors,
    *,
    engine: Engine,
    data: StageRows,
    tell: Callable[[int, Mapping[str, float]], None],
    judge: reward_model.RewardModel | None,
    unfinished_in: Path | None,
) -> Played:
    """What the trainer makes of the adapter, and the objective's figures before and after."""
    from server.polish import trainers  # loads TRL, which a run without stages does not need

    with tempfile.TemporaryDirectory(prefix="silotune-polish-") as temporary, borrow.lent(engine):
        scratch, keeps = unfinished_in or Path(temporary), unfinished_in is not None
        try:
            model = reward_model.build(engine, seed=stage.seed) if stage.kind == "reward" else None
            reward: rewards.Reward | None = rewards.Verified(stage) if isinstance(stage, GrpoStage) else None
            if stage.kind == "rloo" and judge is not None:
                reward = reward_model.Judge(engine, judge)
            trainer = trainers.make(
                stage, engine, data, scratch=str(scratch), keeps=keeps, tell=tell, model=model, reward=reward
            )
            borrow.write_masters(engine, start)
            borrow.set_reference(engine.model, start, reference=stage.held_to)
            before = trainers.figures(trainer, stage)
            trainer.train(resume_from_checkpoint=str(newest) if (newest := unfinished.newest(scratch)) else None)
            after = trainers.figures(trainer, stage)
        finally:
            borrow.drop(engine.model, reward_model.JUDGE)
        trained = reward_model.read(engine, model) if model is not None else None
        result = adapter.read(engine.model)
        # Trainers of this kind may leave pickles behind; ours are set to write nothing but their checkpoints.
        files = sorted(path.name for path in scratch.rglob("*") if path.is_file())
        if left := [name for name in files if name not in unfinished.FILES]:
            raise ModelError(
                f"a trainer wrote {left[0]}, which no stage may; check the version of trl in constraints.txt"
            )
    if not all(bool((tensor.abs() <= adapter.MAX_VALUE).all()) for tensor in result.values()):
        raise ModelError(f"polish stage '{stage.name}': the adapter diverged; lower the stage's learning_rate")
    engine.model.eval()
    return Played(start if trained else result, before, after, trained, int(trainer.state.global_step))


def _save(
    folder: Path, stage: PolishStage, start: Tensors, played: Played, *, base_sha256: str, facts: Mapping[str, Any]
) -> None:
    """Write a finished stage, its record last."""
    path = Path(stage.data).expanduser()
    if played.reward is not None:
        reward_model.save(folder, played.reward, base_sha256=base_sha256)
    storage.write_atomic(folder / ADAPTER_FILE, adapter.encode(played.tensors, dtype="float32"))
    record = {
        "stage": stage.model_dump(mode="json"),
        "start_sha256": adapter.digest(start),
        "adapter_sha256": adapter.digest(played.tensors),
        "data_sha256": storage.sha256(path) if path.is_file() else "",  # a folder or a data set's name has none
        "finished": dict(facts),
    }
    storage.write_atomic(folder / RECORD_FILE, wire.canonical_json(record) + b"\n")


def _stored(folder: Path, stage: PolishStage, start: Tensors, specs: tuple[TensorSpec, ...]) -> Tensors:
    """The adapter of a finished stage, held against its record and against what it began with."""
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
        data = (folder / ADAPTER_FILE).read_bytes()
        recorded = (record["stage"], record["start_sha256"], record["adapter_sha256"])
        record["finished"]["number"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: no whole stage; remove the folder, and it is played again") from error
    if recorded != (stage.model_dump(mode="json"), adapter.digest(start), hashlib.sha256(data).hexdigest()):
        raise ModelError(
            f"{folder}: was changed, or began with another adapter or other settings; remove it and the stages after it"
        )
    return adapter.decode(data, specs, dtype="float32")


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """For events."""
    return {name: round(value, 5) for name, value in figures.items()}


def _refuse_head(engine: Engine) -> None:
    """TRL computes log-probabilities from the output layer's own weights, so an adapter on it would be left out."""
    if any(name.startswith("base_model.model.lm_head.") for name in adapter.parameters(engine.model)):
        raise ConfigError("adapter.targets names the output layer, which no polish stage can train; leave lm_head out")


def ask_sites(sites: Sites, played: Sequence[Finished]) -> None:
    """Have the sites score what the last stages have left; one event `polish_evaluated` each, or
    `not_evaluated` where no site tells held-out figures.

    A run that goes on asks again, as after a round: a site gives the same answer to the same adapter.

    Args:
        sites: Of the run, whose stages are done.
        played: Its stages, in their order.

    Raises:
        ProtocolError: No site has ever answered.
        StorageError: An event could not be written.
    """
    settings = sites.run.manifest.run
    asked = numbers_to_evaluate(settings.polish, settings.evaluation.num_polish_stages)
    for round_number, number in enumerate(asked, start=settings.federation.num_rounds + 1):
        sites.rejoin()  # polish may have taken hours
        tensors = played[number - 1].tensors
        generate = number == asked[-1] and settings.evaluation.exact_match_rows > 0  # answers are generated once
        answers = held_out.ask(sites, tensors, RoundPlan(sites.run.manifest.sha256, round_number, generate))
        kind: type[PolishEvaluated | NotEvaluated] = PolishEvaluated if "sites" in answers else NotEvaluated
        stage, sha256 = played[number - 1].names[-1], adapter.digest(tensors)
        sites.run.log.append(kind(stage=stage, number=number, adapter_sha256=sha256, **answers))


def numbers_to_evaluate(stages: Sequence[PolishStage], count: int) -> list[int]:
    """The stages, from 1, after which the sites are asked: the last `count` that train."""
    training = [number for number, stage in enumerate(stages, start=1) if stage.changes_adapter]
    return training[-count:] if count else []


def answer_figures(engine: Engine, stage: PolishStage, data: StageRows) -> dict[str, float]:
    """Length and repetition of greedy answers to the first different prompts of the held-out rows; no text is kept.

    A stage of preferences can win its pairs and spoil what is written: answers that grow or repeat show a collapse
    (`server/report/symptoms.py`).

    Args:
        engine: The base with the adapter as it is now.
        stage: Its limit of tokens holds for prompt and answer together.

    Returns:
        `length`: mean number of tokens, at most `MAX_ANSWER_TOKENS`; `repetition`: mean of `repeated`. Empty for kinds
        without pairs or ratings.
    """
    if stage.kind not in ANSWER_KINDS:
        return {}
    asked = list(dict.fromkeys(tuple(row["prompt_ids"]) for row in data.held_out))[:MAX_ANSWERS]
    room = max(1, min(MAX_ANSWER_TOKENS, stage.max_length_tokens - max(map(len, asked))))
    ends = engine.stop_ids
    answers: list[list[int]] = []
    for start in range(0, len(asked), stage.micro_rows):
        ids_bt = base.answer_ids(engine, asked[start : start + stage.micro_rows], max_new_tokens=room)
        answers += [list(takewhile(lambda token: token not in ends, ids)) for ids in ids_bt.tolist()]
    return {
        "length": sum(map(len, answers)) / len(answers),
        "repetition": sum(map(repeated, answers)) / len(answers),
    }


def repeated(tokens: Sequence[int]) -> float:
    """Share of an answer's pieces of four tokens that stood in it before; 0 for a shorter answer.

    Source: Welleck et al. 2020, arXiv:1908.04319, section 6 (seq-rep-4).

    Example:
        >>> repeated([1, 2, 3, 4, 5]), repeated([7, 7, 7, 7, 7, 7])
        (0.0, 0.6666666666666667)
    """
    pieces = list(zip(*(tokens[start:] for start in range(PIECE_TOKENS)), strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0
