"""Which adapter of a run may be exported: the newest, or else the best before it, that the gate lets pass."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from common import events, storage
from common.adapter import adapter
from common.adapter.adapter import Tensors
from common.errors import ConfigError, GateRefused, ModelError
from common.event_kinds import Gated, GatedLater, Judged
from common.events import EventLog
from common.frame import wire
from common.run import config
from common.run.manifest import RunManifest
from common.run.schema.gate import GateConfig
from server.evaluate import measure
from server.evaluate.suite import Suite
from server.folder import checkpoint, lock, run_files
from server.gate import figures, rules
from server.polish import addendum, stages
from server.view import fairness
from server.view import gate as words
from server.view.run_view import RunView

RULES_FOLDER: Final = "rules"
J = TypeVar("J", Gated, GatedLater)


@dataclass(frozen=True)
class Candidate:
    """An adapter that could be exported.

    Attributes:
        stage: Label of its figures.
        num_rounds: Rounds behind it.
        tensors: It.
        names: Of the polish stages behind it.
    """

    stage: str
    num_rounds: int
    tensors: Tensors
    names: tuple[str, ...] = ()


def of_run(folder: Path, run_manifest: RunManifest) -> Iterator[Candidate]:
    """The adapters in a run's folder, in the order of `of_end`.

    Raises:
        DataError: A stage cannot be read.
        ModelError: A stage or a checkpoint is not what was written.
    """
    if done := run_files.finished(folder):
        last = _checkpoint(folder, run_manifest, done[-1])
        yield from of_end(folder, run_manifest, last, stages.finished(folder, run_manifest, last))


def of_end(
    folder: Path, run_manifest: RunManifest, last: Tensors, played: Sequence[stages.Finished]
) -> Iterator[Candidate]:
    """The adapters of a run, each read when its turn comes.

    The newest first. Before it the polish stages that changed it, newer ones first, since each is after something else;
    then the rounds, from the best on: the one with the lowest held-out loss at the sites. Rounds after which the sites
    were not asked, or one was silent, come last, newer ones first. Of a folder with stages after the end of a run only
    what these have left: the rest is the run's own, which its own gate has judged.

    Args:
        folder: The run's.
        run_manifest: The run.
        last: After the last round.
        played: The stages, in their order; a reward model leaves the adapter as it was.

    Raises:
        ModelError: A checkpoint is damaged, or stages after the end of a run have changed nothing.
    """
    done, made = run_files.finished(folder), addendum.read(folder)
    before = [last, *(stage.tensors for stage in played)]
    changed = [stage for stage, was in zip(played, before, strict=False) if not _are_equal(stage.tensors, was)]
    if made:
        changed = [stage for stage in changed if len(stage.names) > made.num_kept]
        if not changed:
            raise ModelError(f"{folder}: the new stages left the adapter as it was; there is nothing to export")
    for stage in reversed(changed):
        yield Candidate(stage.label, done[-1], stage.tensors, stage.names)
    if made:
        return
    evaluated = RunView.read(folder / events.FILE).evaluated
    losses = {number: fairness.decisive(event) for number, event in evaluated.items() if not event.stale}

    def order(number: int) -> tuple[bool, float, int]:
        is_newest = number == done[-1] and not changed
        return not is_newest, losses.get(number, math.inf), -number

    for number in sorted(done, key=order):
        tensors = last if number == done[-1] else _checkpoint(folder, run_manifest, number)
        yield Candidate(measure.stage_of(number, last=run_manifest.run.federation.num_rounds), number, tensors)


def _are_equal(first: Tensors, second: Tensors) -> bool:
    """Whether both are the same adapter."""
    return adapter.digest(first) == adapter.digest(second)


def _checkpoint(folder: Path, run_manifest: RunManifest, num_rounds: int) -> Tensors:
    """The adapter after so many rounds."""
    specs, run_sha256 = run_manifest.tensor_specs, run_manifest.sha256
    return checkpoint.load(folder, specs, num_rounds=num_rounds, run_sha256=run_sha256).tensors


def choose(run: config.RunConfig, candidates: Iterator[Candidate], *, suite: Suite) -> Candidate:
    """Judge candidates one by one until one passes; each that has no figures yet is measured. One event `gated` each.

    The sites are not asked: a rule about sites holds for an adapter after which they were asked.

    Args:
        run: The run file; without a gate the first candidate is taken and nothing is logged.
        candidates: In the order in which they are tried; at least one.
        suite: What the coordinator measures.

    Raises:
        GateRefused: None passes. The message names each rule that the newest breaks, and by how much.
        DataError: Scores on disk are of other tasks.
        ModelError: A checkpoint is damaged.
        StorageError: Disk full or not writable.
    """
    failed: list[Judged] = []
    for candidate in candidates:
        if not run.gate.rules:
            return candidate
        digest = adapter.digest(candidate.tensors)
        newest = RunView.read(suite.log.path).measured.get(candidate.stage)
        if not newest or (newest.adapter_sha256, newest.definition_sha256) != (digest, suite.sha256):
            measure.measure(suite, candidate.tensors, stage=candidate.stage)
        event = _judge(Gated, run, suite.log, candidate, digest, definition=_definition(suite.folder, suite.sha256))
        if event.is_passed:
            return candidate
        failed.append(event)
    raise GateRefused(_refusal(failed))


def judge_again(run_folder: Path, run_manifest: RunManifest) -> list[Gated]:
    """Judge a run's checkpoints from its events, as at its end until one passes; nothing is measured.

    For a run whose audit or comparison came after its end.

    Returns:
        The events `gated` that were logged; none without a gate.

    Raises:
        RunBusyError: Another process is at work in the folder.
    """
    log = EventLog(run_folder / events.FILE)
    judged: list[Gated] = []
    definition = _definition(run_folder, run_manifest.evaluation_sha256)
    with lock.hold(run_folder):
        for candidate in of_run(run_folder, run_manifest) if run_manifest.run.gate.rules else ():
            digest = adapter.digest(candidate.tensors)
            judged.append(_judge(Gated, run_manifest.run, log, candidate, digest, definition=definition))
            if judged[-1].is_passed:
                break
    return judged


def judge_by(run_folder: Path, run_manifest: RunManifest, gate: GateConfig, newest: Candidate) -> GatedLater:
    """Judge an adapter by rules that came after the end of its run, from its events; nothing is measured.

    The rules go into `rules/` in the folder, under their hash, and the verdict into its events. They come on top of
    what the run's own gate asks: what that one refused stays refused, and what these refuse is not exported either,
    until it passes such rules again.

    Args:
        run_folder: The run, or stages after its end.
        run_manifest: Of it.
        gate: The rules.
        newest: What is exported from the folder.

    Returns:
        The event `gated_later`.

    Raises:
        ConfigError: The rules do not fit the run's tasks.
        RunBusyError: Another process is at work in the folder.
        StorageError: Disk full or not writable.
    """
    settings = run_manifest.run.model_copy(update={"gate": gate})
    try:  # what the schema refuses of a run file with these rules
        config.RunConfig.model_validate(json.loads(config.resolved_json(settings)))
    except ValidationError as error:  # not chained: pydantic's own text repeats values
        reasons = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
        raise ConfigError(f"the rules do not fit the run: {reasons}") from None
    stored = gate.model_dump(mode="json")
    rules_sha256, digest = addendum.gate_sha256(stored), adapter.digest(newest.tensors)
    log = EventLog(run_folder / events.FILE)
    with lock.hold(run_folder):
        storage.write_atomic(run_folder / RULES_FOLDER / f"{rules_sha256}.json", wire.canonical_json(stored) + b"\n")
        return _judge(GatedLater, settings, log, newest, digest, definition=rules_sha256)


def exported(run: config.RunConfig, view: RunView) -> Gated | None:
    """The judgement on the adapter that is exported: the last that the gate let pass; None without a gate.

    Raises:
        GateRefused: It has let none pass, or the run has not come to its end.
    """
    if not run.gate.rules:
        return None
    current = verdicts(view)
    held = [event for event in view.judgements if event.is_passed and current[event.adapter_sha256].is_passed]
    if not held:
        raise GateRefused(_refusal(list(current.values())))
    return held[-1]


def require(run: config.RunConfig, view: RunView, *, adapter_sha256: str, is_judged_later: bool = False) -> None:
    """Nothing is exported that the gate has not let pass, or that rules which came later refuse.

    Args:
        run: The run file.
        view: The run.
        adapter_sha256: Of the adapter as its checkpoint holds it.
        is_judged_later: It is about to be judged by other rules, so that what such rules said of it does not count.

    Raises:
        GateRefused: The gate has refused this adapter, or has not judged it.
    """
    later = [event for event in view.gated_later if event.adapter_sha256 == adapter_sha256]
    if later and not later[-1].is_passed and not is_judged_later:
        raise GateRefused(_refusal(later[-1:]))
    if not run.gate.rules:
        return
    judged = verdicts(view).get(adapter_sha256)
    if judged is None or not judged.is_passed:
        raise GateRefused(_refusal([judged] if judged else []))


def verdicts(view: RunView) -> dict[str, Gated]:
    """The last judgement on each adapter, by its hash, in the order of the first."""
    return {event.adapter_sha256: event for event in view.judgements}


def _definition(folder: Path, evaluation_sha256: str) -> str:
    """The hash under which the rules were fixed: of the evaluation, or of the addendum that has a gate of its own."""
    made = addendum.read(folder)
    return made.sha256 if made else evaluation_sha256


def _judge(
    kind: type[J], run: config.RunConfig, log: EventLog, candidate: Candidate, adapter_sha256: str, *, definition: str
) -> J:
    """Judge one adapter and log it."""
    stage, num_rounds = candidate.stage, candidate.num_rounds
    polished = adapter_sha256 if candidate.names else ""
    known = figures.gather(run, RunView.read(log.path), stage=stage, num_rounds=num_rounds, polished=polished)
    judged = rules.judge(run.gate, known)
    return log.append(
        kind(
            stage=stage,
            num_rounds=num_rounds,
            adapter_sha256=adapter_sha256,
            definition_sha256=definition,
            is_passed=all(verdict.is_met for verdict in judged),
            verdicts=judged,
        )
    )


def _refusal(failed: Sequence[Judged]) -> str:
    """Why nothing is exported."""
    if not failed:
        return (
            "the gate has not judged this adapter; let the run come to its end, or have its checkpoints judged by "
            "silotune-server gate"
        )
    broken = "; ".join(words.line(verdict) for verdict in failed[0].verdicts if not verdict.is_met)
    others = f" ({', '.join(event.stage for event in failed[1:])} fail too)" if failed[1:] else ""
    return f"the gate refuses {failed[0].stage}{others}: {broken}; train otherwise, or begin a run with another gate"
