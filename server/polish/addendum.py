"""What is added to a run that is finished: stages that its run file does not have, in a run folder of their own.

`RUN/later/NN/` is a run folder like any other: its run file has the run's stages that are kept and the new ones, its
manifest is the run's own, and its events begin with those of the run about the adapter on which the new stages begin.
`addendum.json` in it says what it was made from and what is added; its hash is in the events of both folders.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from common import events, storage
from common.errors import DataError
from common.frame import wire
from server.view.run_view import RunView

FOLDER: Final = "later"
FILE: Final = "addendum.json"
VERSION: Final = 1


@dataclass(frozen=True)
class Addendum:
    """Stages after the end of a run.

    Attributes:
        number: Place among those of the run, from 1.
        run_sha256: Its manifest's hash.
        events_sha256: Of the run's events as they stood, all lines.
        start_stage: Label of the adapter on which the stages begin.
        start_sha256: Its hash.
        num_kept: Stages of the run behind it.
        stages: The new ones, every setting with its value, seeds among them.
        gate: What their result must show, likewise.
        run_gate: What the run's own gate asks.
        evaluation_sha256: What the coordinator measures, as it was fixed before the first round.
        versions: Of the software that plays the stages.
    """

    number: int
    name: str
    run_sha256: str
    events_sha256: str
    start_stage: str
    start_sha256: str
    num_rounds: int
    num_kept: int
    stages: tuple[Mapping[str, Any], ...]
    gate: Mapping[str, Any]
    run_gate: Mapping[str, Any]
    evaluation_sha256: str
    versions: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """Canonical bytes, as the file has them."""
        return wire.canonical_json({"version": VERSION, **asdict(self)}) + b"\n"

    @property
    def sha256(self) -> str:
        """Its name in events, on cards and in seals."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def asks(self) -> tuple[Any, ...]:
        """What makes two of them the same polish."""
        return (self.start_sha256, self.num_kept, json.dumps(self.stages, sort_keys=True), self.gate)

    @property
    def has_own_gate(self) -> bool:
        """Whether another gate judges its result than the run's."""
        return self.gate != self.run_gate


def read(folder: Path) -> Addendum | None:
    """The addendum of a run folder; None where it is a run's own.

    Raises:
        DataError: It cannot be read, or was changed.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        fields = json.loads(data)
        is_known = fields.pop("version") == VERSION
        made = Addendum(**{**fields, "stages": tuple(fields["stages"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read; put it back from a copy") from error
    derived = RunView.read(folder / events.FILE).derived
    if not is_known or made.to_bytes() != data or derived is None or derived.addendum_sha256 != made.sha256:
        raise DataError(f"{path}: is not the one that {events.FILE} beside it names; put it back from a copy")
    return made


def write(folder: Path, made: Addendum) -> None:
    """Write the addendum into a run folder.

    Raises:
        StorageError: Disk full or not writable.
    """
    storage.write_atomic(folder / FILE, made.to_bytes())


def folders(run_folder: Path) -> list[Path]:
    """The folders of what was added to a run, in their order."""
    added = [path.parent for path in run_folder.glob(f"{FOLDER}/*/{FILE}") if path.parent.name.isdecimal()]
    return sorted(added, key=lambda folder: int(folder.name))


def gate_sha256(gate: Mapping[str, Any]) -> str:
    """SHA-256 of rules, every setting with its value."""
    return hashlib.sha256(wire.canonical_json(dict(gate))).hexdigest()
