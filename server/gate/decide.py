"""Which adapter of a run may be exported: the newest that the gate lets pass."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import adapter, config, events
from common.adapter import Tensors
from common.errors import GateRefused
from common.events import Event, EventLog
from common.manifest import RunManifest
from server import checkpoint
from server.evaluate import measure
from server.evaluate.suite import Suite
from server.gate import figures, rules, words
from server.polish import stages


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
    """The adapters in a run's folder, newest first; see `of_end`.

    Raises:
        DataError: A stage cannot be read.
        ModelError: A stage or a checkpoint is not what was written.
    """
    if done := checkpoint.finished(folder):
        last = _checkpoint(folder, run_manifest, done[-1])
        yield from of_end(folder, run_manifest, last, stages.finished(folder, run_manifest, last))


def of_end(
    folder: Path, run_manifest: RunManifest, last: Tensors, played: Sequence[stages.Finished]
) -> Iterator[Candidate]:
    """The adapters of a run, newest first: polish stages that changed it, then rounds, each read when its turn comes.

    Args:
        folder: The run's.
        run_manifest: The run.
        last: After the last round.
        played: The stages, in their order; a reward model leaves the adapter as it was.

    Raises:
        ModelError: A checkpoint is damaged.
    """
    *earlier, newest = checkpoint.finished(folder)
    for stage, was in reversed(list(zip(played, [last, *(one.tensors for one in played)], strict=False))):
        if adapter.digest(stage.tensors) != adapter.digest(was):
            yield Candidate(stage.label, newest, stage.tensors, stage.names)
    num_rounds = run_manifest.run.federation.num_rounds
    yield Candidate(measure.stage_of(newest, last=num_rounds), newest, last)
    for number in reversed(earlier):
        tensors = _checkpoint(folder, run_manifest, number)
        yield Candidate(measure.stage_of(number, last=num_rounds), number, tensors)


def _checkpoint(folder: Path, run_manifest: RunManifest, num_rounds: int) -> Tensors:
    """The adapter after so many rounds."""
    specs, run_sha256 = run_manifest.tensor_specs, run_manifest.sha256
    return checkpoint.load(folder, specs, num_rounds=num_rounds, run_sha256=run_sha256).tensors


def choose(run: config.RunConfig, candidates: Iterator[Candidate], *, suite: Suite) -> Candidate:
    """Judge candidates one by one until one passes; each that has no figures yet is measured. One event `gated` each.

    The sites are not asked: a rule about sites holds for an adapter after which they were asked.

    Args:
        run: The run file; without a gate the first candidate is taken and nothing is logged.
        candidates: Newest first; at least one.
        suite: What the coordinator measures.

    Raises:
        GateRefused: None passes. The message names each rule that the newest breaks, and by how much.
        DataError: Scores on disk are of other tasks.
        ModelError: A checkpoint is damaged.
        StorageError: Disk full or not writable.
    """
    failed: list[Event] = []
    for candidate in candidates:
        if not run.gate.is_on:
            return candidate
        found = adapter.digest(candidate.tensors)
        _require_measured(suite, candidate, found)
        event = _judge(run, suite.log, candidate, found, definition=suite.sha256)
        if event["is_passed"]:
            return candidate
        failed.append(event)
    raise GateRefused(_refusal(failed))


def judge_again(run_folder: Path, run_manifest: RunManifest) -> list[Event]:
    """Judge a run's checkpoints from its events, newest first until one passes; nothing is measured.

    For a run whose audit or comparison came after its end.

    Returns:
        The events `gated` that were logged; none without a gate.
    """
    log = EventLog(run_folder / "events.jsonl")
    told: list[Event] = []
    for candidate in of_run(run_folder, run_manifest) if run_manifest.run.gate.is_on else ():
        found, definition = adapter.digest(candidate.tensors), run_manifest.evaluation_sha256
        told.append(_judge(run_manifest.run, log, candidate, found, definition=definition))
        if told[-1]["is_passed"]:
            break
    return told


def exported(run: config.RunConfig, log: Sequence[Event]) -> Event | None:
    """The event `gated` of the newest adapter that the gate lets pass; None without a gate.

    Raises:
        GateRefused: It has let none pass, or the run has not come to its end.
    """
    if not run.gate.is_on:
        return None
    passed = [event for event in verdicts(log).values() if event["is_passed"]]
    if not passed:
        raise GateRefused(_refusal(list(verdicts(log).values())))
    return max(passed, key=lambda event: (event["num_rounds"], event["stage"].startswith("polish-"), event["stage"]))


def require(run: config.RunConfig, log: Sequence[Event], *, adapter_sha256: str) -> None:
    """Nothing is exported that the gate has not let pass.

    Args:
        run: The run file.
        log: The run's events.
        adapter_sha256: Of the adapter as its checkpoint holds it.

    Raises:
        GateRefused: The gate has refused this adapter, or has not judged it.
    """
    if not run.gate.is_on:
        return
    found = verdicts(log).get(adapter_sha256)
    if found is None or not found["is_passed"]:
        raise GateRefused(_refusal([found] if found else []))


def verdicts(log: Sequence[Event]) -> dict[str, Event]:
    """The last event `gated` of each adapter, by its hash, in the order of the first."""
    return {event["adapter_sha256"]: event for event in log if event["kind"] == "gated"}


def _judge(
    run: config.RunConfig, log: EventLog, candidate: Candidate, adapter_sha256: str, *, definition: str
) -> Event:
    """Judge one adapter and log it."""
    stage, num_rounds = candidate.stage, candidate.num_rounds
    polished = adapter_sha256 if candidate.names else ""
    told = figures.gather(run, events.read(log.path), stage=stage, num_rounds=num_rounds, polished=polished)
    found = rules.judge(run.gate, told)
    return log.append(
        "gated",
        stage=stage,
        num_rounds=num_rounds,
        adapter_sha256=adapter_sha256,
        definition_sha256=definition,
        is_passed=all(verdict.is_met for verdict in found),
        verdicts=[dataclasses.asdict(verdict) for verdict in found],
    )


def _require_measured(suite: Suite, candidate: Candidate, adapter_sha256: str) -> None:
    """Measure an adapter, unless the newest figures of its stage are its own."""
    past = [event for event in events.read(suite.log.path) if event["kind"] == "measured"]
    own = [event for event in past if event["stage"] == candidate.stage]
    if not own or (own[-1]["adapter_sha256"], own[-1]["definition_sha256"]) != (adapter_sha256, suite.sha256):
        measure.measure(suite, candidate.tensors, stage=candidate.stage)


def _refusal(failed: Sequence[Event]) -> str:
    """What is told to who wanted to export."""
    if not failed:
        return (
            "the gate has not judged this adapter; let the run come to its end, or have its checkpoints judged by "
            "silotune-server gate"
        )
    broken = "; ".join(words.line(verdict) for verdict in failed[0]["verdicts"] if not verdict["is_met"])
    others = f" ({', '.join(event['stage'] for event in failed[1:])} fail too)" if failed[1:] else ""
    return f"the gate refuses {failed[0]['stage']}{others}: {broken}; train otherwise, or begin a run with another gate"
