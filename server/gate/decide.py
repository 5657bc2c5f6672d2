"""Which adapter of a run may be exported: the newest that the gate lets pass."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Candidate:
    """An adapter that could be exported.

    Attributes:
        stage: Label of its figures.
        num_rounds: Rounds behind it.
        load: Gives its tensors.
    """

    stage: str
    num_rounds: int
    load: Callable[[], Tensors]


def of_rounds(folder: Path, run_manifest: RunManifest, *, newest: Tensors | None = None) -> Iterator[Candidate]:
    """The checkpoints of a run's folder, newest first; a stage after the rounds is a candidate of its own before them.

    Args:
        folder: The run's folder.
        run_manifest: The run.
        newest: The adapter of the newest checkpoint, where it is in memory; None reads it.

    Raises:
        ModelError: From `load`: the checkpoint is damaged.
    """
    last, done = run_manifest.run.federation.num_rounds, checkpoint.finished(folder)
    for number in reversed(done):

        def load(number: int = number) -> Tensors:
            if newest is not None and number == done[-1]:
                return newest
            specs, digest = run_manifest.tensor_specs, run_manifest.sha256
            return checkpoint.load(folder, specs, num_rounds=number, run_sha256=digest).tensors

        yield Candidate(measure.stage_of(number, last=last), number, load)


def choose(run: config.RunConfig, candidates: Iterator[Candidate], *, suite: Suite) -> tuple[Candidate, Tensors]:
    """Judge candidates one by one until one passes; each that has no figures yet is measured. One event `gated` each.

    The sites are not asked again: a rule about sites holds for an adapter after which they were asked.

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
        tensors = candidate.load()
        if not run.gate.is_on:
            return candidate, tensors
        digest = _digest(tensors)
        _require_measured(suite, candidate, tensors, digest)
        event = _judge(run, suite.log, candidate, digest, definition=suite.sha256)
        if event["is_passed"]:
            return candidate, tensors
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
    for candidate in of_rounds(run_folder, run_manifest) if run_manifest.run.gate.is_on else ():
        digest, definition = _digest(candidate.load()), run_manifest.evaluation_sha256
        told.append(_judge(run_manifest.run, log, candidate, digest, definition=definition))
        if told[-1]["is_passed"]:
            break
    return told


def exported_round(run: config.RunConfig, log: Sequence[Event]) -> int:
    """Rounds behind the adapter that the gate lets pass; 0 without a gate: the newest.

    Raises:
        GateRefused: It has let none pass, or the run has not come to its end.
    """
    if not run.gate.is_on:
        return 0
    passed = [event for event in verdicts(log).values() if event["is_passed"]]
    if not passed:
        raise GateRefused(_refusal(list(verdicts(log).values())))
    return max(int(event["num_rounds"]) for event in passed)


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


def _judge(run: config.RunConfig, log: EventLog, candidate: Candidate, digest: str, *, definition: str) -> Event:
    """Judge one adapter and log it."""
    stage, num_rounds = candidate.stage, candidate.num_rounds
    told = figures.gather(run, events.read(log.path), stage=stage, num_rounds=num_rounds)
    found = rules.judge(run.gate, told)
    return log.append(
        "gated",
        stage=stage,
        num_rounds=num_rounds,
        adapter_sha256=digest,
        definition_sha256=definition,
        is_passed=all(verdict.is_met for verdict in found),
        verdicts=[dataclasses.asdict(verdict) for verdict in found],
    )


def _require_measured(suite: Suite, candidate: Candidate, tensors: Tensors, digest: str) -> None:
    """Measure an adapter, unless the newest figures of its stage are its own."""
    past = [event for event in events.read(suite.log.path) if event["kind"] == "measured"]
    own = [event for event in past if event["stage"] == candidate.stage]
    if not own or (own[-1]["adapter_sha256"], own[-1]["definition_sha256"]) != (digest, suite.sha256):
        measure.measure(suite, tensors, stage=candidate.stage)


def _digest(tensors: Tensors) -> str:
    """Hash of an adapter's bytes, as checkpoints and events have it."""
    return hashlib.sha256(adapter.encode(tensors, dtype="float32")).hexdigest()


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
