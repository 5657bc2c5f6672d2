"""Where a run stands between two steps, as it is saved: the state of a round, and the updates that have come for it.

    state.json                        phase, rounds behind the adapter, its hash, the round's sites
    updates/00003.3fa9...north.77...  an update as it came: round, start of the adapter's hash, site, digest

The adapter and the server optimizer's memory are the checkpoint's. A kept update is read by the checks that it passed
when it came, so that one which was changed is refused; those of another round or adapter are removed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Final

from common import storage
from common.adapter import adapter
from common.errors import ModelError, SilotuneError
from common.frame import wire
from common.frame.records import RoundPlan
from common.privacy.noise import Noise
from server.aggregate.method import State
from server.aggregate.optimizer import Memory
from server.fleet import collect
from server.fleet.broadcast import Step
from server.fleet.run import Run
from server.folder.checkpoint import Checkpoint
from server.run.aggregation import Update

FILE: Final = "state.json"
UPDATES: Final = "updates"
NUM_DIGITS: Final = 16  # of the adapter's hash, in names


class Phase(StrEnum):
    """What is next."""

    SCORE = "score"
    DRAW = "draw"
    COLLECT = "collect"
    DONE = "done"


@dataclass(frozen=True)
class RoundState:
    """A run between two phases.

    Attributes:
        phase: What is next.
        num_rounds: Rounds behind the adapter.
        tensors: The global adapter.
        memory: What the coordinator remembers from round to round.
        steps: To this adapter, where it goes down as steps: of the last round, and of rounds that sites missed. Not
            saved: whoever resumes sends it whole.
        cohort: Names of the round's sites; empty before they are drawn.
        received: Digest of each update that came and is kept, by site.
        source: Of the round's secret draws and noise; not saved, so that no try of a round has those of another.
    """

    phase: Phase
    num_rounds: int
    tensors: State
    memory: Memory
    steps: Sequence[Step] = ()
    cohort: tuple[str, ...] = ()
    received: Mapping[str, str] = field(default_factory=dict)
    source: Noise | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the global adapter, computed once: each update that is kept is named by it."""
        return adapter.digest(self.tensors)


def save(run: Run, state: RoundState) -> None:
    """Write where the run stands, whole or not at all.

    Raises:
        StorageError: Disk full or not writable.
    """
    record = {
        "run_sha256": run.manifest.sha256,
        "phase": state.phase,
        "num_rounds": state.num_rounds,
        "adapter_sha256": state.sha256,
        "cohort": list(state.cohort),
    }
    storage.write_atomic(run.folder / FILE, wire.canonical_json(record) + b"\n")


def resumed(run: Run, found: Checkpoint) -> RoundState:
    """Where a run goes on from a checkpoint: within the round after it, if that is where it stood.

    A round whose updates are not kept is drawn anew.
    """
    begun = RoundState(Phase.SCORE, found.num_rounds, found.tensors, found.memory)
    with suppress(OSError, ValueError, KeyError, TypeError):  # none is there, or it is of no use: the round begins anew
        record = json.loads((run.folder / FILE).read_bytes())
        stood = (record["run_sha256"], record["num_rounds"], record["adapter_sha256"])
        if stood == (run.manifest.sha256, begun.num_rounds, begun.sha256):
            phase, cohort = Phase(record["phase"]), tuple(map(str, record["cohort"]))
            is_lost = phase == Phase.COLLECT and not keeps_updates(run)
            begun = replace(begun, phase=Phase.DRAW if is_lost else phase, cohort=() if is_lost else cohort)
    return replace(begun, received=received(run, begun))


def keeps_updates(run: Run) -> bool:
    """Whether updates are put on the disk before they are added up.

    Not under differential privacy for sites as a whole: what is promised there is of the noised sum, and no update of
    a site is to outlive the memory of the round that it came for.
    """
    return run.plan.privacy.mode != "site"


def received(run: Run, state: RoundState) -> dict[str, str]:
    """Digests of the updates that are kept for the state's next round, by site; those for any other are removed."""
    found: dict[str, str] = {}
    for path in sorted((run.folder / UPDATES).glob("*")):
        if path.name.startswith(_mark(state)) and keeps_updates(run) and path.name.count(".") == 3:
            _, _, site, digest = path.name.split(".")
            found[site] = digest
        else:
            path.unlink(missing_ok=True)
    return found


def keep(run: Run, state: RoundState, site: str, frame: bytes) -> None:
    """Put an update that counts on the disk, before it is added.

    Raises:
        StorageError: Disk full or not writable.
    """
    path = run.folder / UPDATES / f"{_mark(state)}{site}.{wire.digest_of(frame)}"
    storage.write_atomic(path, frame, mode=storage.PRIVATE)


def kept(run: Run, state: RoundState) -> Iterator[Update]:
    """The updates that are kept for the state's round, sites ascending, each checked as when it came.

    Raises:
        ModelError: One is not what came; the message says what to do.
    """
    plan = RoundPlan(run.manifest.sha256, state.num_rounds)
    for site in sorted(state.received.keys() & set(state.cohort)):
        digest = state.received[site]
        path = run.folder / UPDATES / f"{_mark(state)}{site}.{digest}"
        try:
            data = path.read_bytes()
            frame = wire.expect(data, "update", max_body_bytes=run.plan.max_update_bytes)
            head, change = collect.read_update(frame, plan, expected=run.plan.for_site(site))
            if run.trail:
                run.trail.check(frame, site=site)
        except (OSError, SilotuneError) as error:
            raise _changed(path, site) from error
        if (head.site, wire.digest_of(data)) != (site, digest):
            raise _changed(path, site)
        yield Update(head, change, len(data))


def forget(run: Run) -> None:
    """Remove what only a round that is on needs: no update of a site outlives the rounds."""
    if (run.folder / UPDATES).is_dir():
        shutil.rmtree(run.folder / UPDATES)
    (run.folder / FILE).unlink(missing_ok=True)


def _changed(path: Path, site: str) -> ModelError:
    return ModelError(
        f"{path}: is not the update that came from {site}; remove the file and resume: the site is asked again"
    )


def _mark(state: RoundState) -> str:
    """How the names of a round's updates begin."""
    return f"{state.num_rounds:05d}.{state.sha256[:NUM_DIGITS]}."
