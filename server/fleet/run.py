"""A run as it stays from its first round to its last: what it is, where it is kept, what it is judged on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.rows import Row
from common.events import EventLog
from common.model.base import Engine
from common.privacy.noise import Noise, SystemNoise
from common.run.manifest import Offer, RunManifest
from common.run.plan import Plan
from common.text.prompts import Encoded
from server.evaluate.kept_apart import Apart
from server.evaluate.suite import Suite
from server.fleet.trail import Trail


def fresh_noise(round_index: int) -> Noise:
    """Draws and noise that nobody can foresee, and that no other try of the round has."""
    return SystemNoise()


@dataclass(frozen=True)
class OwnRows:
    """Held-out rows of the coordinator's own (`evaluation.server_data`)."""

    engine: Engine
    encoded: Sequence[Encoded]


@dataclass(frozen=True)
class Run:
    """What every step of a run reads, and none changes.

    Attributes:
        manifest: The run as data.
        folder: The run's folder.
        log: Its events.
        offer: The signed manifest; None offers it unsigned, which only sites without a policy take.
        trail: The coordinator's audit log; None where nobody signs the run.
        suite: What the coordinator measures on its own rows; None: nothing.
        own_rows: The coordinator's own held-out rows, and the engine that scores them; None without any.
        apart: Rows that no stage is to train on.
        examples: Prompts that may be shown with their answers; none: no text is kept.
        make_noise: Source of a round's secret draws and noise, under differential privacy for sites as a whole.
        clock: Seconds, monotonic.
        sleep: Waits between looks.
    """

    manifest: RunManifest
    folder: Path
    log: EventLog
    offer: Offer | None = None
    trail: Trail | None = None
    suite: Suite | None = None
    own_rows: OwnRows | None = None
    apart: Sequence[Apart] = ()
    examples: Sequence[Row] = ()
    make_noise: Callable[[int], Noise] = fresh_noise
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    @property
    def plan(self) -> Plan:
        """The run worked out."""
        return self.manifest.plan

    def record(self, kind: str, **facts: Any) -> None:
        """Write into the audit log, if one is kept; on the disk when this returns.

        Raises:
            AuditError: The log was changed meanwhile.
            StorageError: It cannot be written.
        """
        if self.trail:
            self.trail.log.append(kind, run=self.manifest.sha256, **facts)
