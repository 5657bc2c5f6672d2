"""The run's truth: an append-only `events.jsonl` from which terminal, status, report, card and gate are drawn.

One event is one frozen record of a kind below, and one JSON line: `kind`, `time` (seconds since the epoch), then its
fields; a field that has its default is not written. A kind that this version does not know, and a field that it does
not, stay in the file and in `Event.line`, and are passed over. Losses are nats per answer token; `bytes_*` are of
frames; `round` counts from 0, `num_rounds` is how many are behind an adapter, and 0 is the base.
"""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, TypeVar

from pydantic import TypeAdapter

from common.errors import DataError
from common.storage import storage_error

FILE: Final = "events.jsonl"  # in a run's folder
INTERRUPTED: Final = "Interrupted"  # the `error` of a `run_failed` that somebody asked for
MAX_NAMED: Final = 8  # damaged lines in a message
MARK_BYTES: Final = 64  # before where a reader stopped, by which it knows the file again
KINDS: Final[dict[str, type["Event"]]] = {}


class Record(Mapping[str, Any]):
    """What an event holds."""

    def __getitem__(self, name: str) -> Any:
        if name in iter(self):
            return getattr(self, name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            if each.default is dataclasses.MISSING or getattr(self, each.name) != each.default:
                yield each.name

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Event(Record):
    """One thing that happened.

    Attributes:
        time: Seconds since the epoch; set by the log.
        line: The line of the file, as it was read; empty for an event that was not.
    """

    kind: ClassVar[str] = ""
    time: float = 0.0
    line: str = field(default="", repr=False)

    def __init_subclass__(cls, *, kind: str = "", **given: Any) -> None:
        """Register a kind."""
        super().__init_subclass__(**given)
        if kind:
            cls.kind = kind
            KINDS[kind] = cls

    def __getitem__(self, name: str) -> Any:
        return self.kind if name == "kind" else super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        yield "kind"
        yield from (name for name in super().__iter__() if name != "line")

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON types, in the order of its line."""
        told: dict[str, Any] = _plain(self)
        return told


def _plain(value: Any) -> Any:
    """A value as JSON types."""
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in value}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True, eq=False)
class Unknown(Event):
    """An event of a newer version; its line says what happened."""

    name: str

    def __getitem__(self, name: str) -> Any:
        return self.name if name == "kind" else super().__getitem__(name)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunStarted(Event, kind="run_started"):
    """A run, or the next try of one, begins: what it will do.

    Attributes:
        run_sha256: Of the manifest.
        quantised_share: Part of the base's body that is stored in `quantization`, 0 to 1.
        site_quantization: Sites whose base has another precision.
        bytes_evaluation_per_site: Of an evaluation, where these are not the bytes of training; 0: not sent again.
        guarding: Guards against bad sites, in words.
        gap_warning: Share of the step from which an aggregation gap counts as large.
        epsilon_planned: After each round, by the plan; empty without privacy.
        noise_ratio: L2 norm of the noise over the largest norm of the signal, of noise for whole sites.
        noise_at: Who adds that noise.
        without_gap: The method without a gap that the other settings allow; empty: none.
        polish: Names of the stages.
        first_round: Finished rounds on which this try goes on.
    """

    name: str
    run_sha256: str
    base_sha256: str
    base: str
    quantization: str
    quantised_share: float
    site_quantization: str
    method: str
    privacy: str
    num_rounds: int
    num_base_parameters: int
    num_trained_parameters: int
    num_tensors: int
    bytes_down_per_site: int
    bytes_evaluation_per_site: int
    bytes_up_per_site: int
    guarding: str
    gap_warning: float
    epsilon_planned: Sequence[float] = ()
    dp_delta: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    privacy_wording: str = ""
    without_gap: str
    polish: Sequence[str]
    seed: int
    adapter: str
    learning_rate: float
    objective: str
    device: str
    versions: Mapping[str, str]
    noise_ratio: float | None = None
    noise_accepted: bool | None = None
    noise_at: str = ""
    first_round: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Warned(Event, kind="warned"):
    """Something to know before relying on the result."""

    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TasksOverlap(Event, kind="tasks_overlap"):
    """The sites train on rows of these tasks."""

    reasons: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared(Record):
    """Held-out rows of a site that are trained on, word for word and nearly."""

    num_held_out: int
    num_exact: int
    num_near: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlap(Event, kind="overlap"):
    """Held-out rows that are trained on, over all sites and by site."""

    num_held_out: int
    num_exact: int
    num_near: int
    sites: Mapping[str, Shared]


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionNoise(Record):
    """Relative errors ||Q(W) - W|| / ||W|| (Frobenius) of one precision: over all layers, by name, by layer."""

    sites: Sequence[str]
    error: float
    targets: Mapping[str, float]
    modules: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseNoise(Event, kind="base_noise"):
    """How far the base at each precision is from its files."""

    precisions: Mapping[str, PrecisionNoise]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteJoined(Event, kind="site_joined"):
    """A site takes part; its counts are its own claim. None: it does not tell."""

    node: int
    site: str
    num_examples: int
    num_held_out: int
    num_truncated: int | None
    num_dropped: int | None
    num_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteRefused(Event, kind="site_refused"):
    """A node does not take part, or not yet; `state` is one of `common.site_states`."""

    node: int
    site: str
    state: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteSkipped(Event, kind="site_skipped"):
    """A silent site is left out of a round."""

    site: str
    state: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteFailed(Event, kind="site_failed"):
    """An answer of a site does not count."""

    site: str
    step: str
    state: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundStarted(Event, kind="round_started"):
    """A round is sent out to these sites."""

    round: int
    sites: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteTrained(Event, kind="site_trained"):
    """An update counts. None: the site does not tell it, or noise is to cover it."""

    site: str
    round: int
    train_loss: float | None
    num_examples: int
    num_steps: int
    seconds: float | None
    update_norm: float | None
    bytes_up: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen(Record):
    """What screening saw of one update; see `server.aggregate.screen.Look`."""

    norm: float
    cosine: float
    reasons: Sequence[str]
    is_left_out: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Screened(Event, kind="screened"):
    """A round's updates were held against each other."""

    round: int
    sites: Mapping[str, Seen]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundFinished(Event, kind="round_finished"):
    """A round is on disk.

    Attributes:
        train_loss: Mean of the sites' by their weights.
        held_to_share: Sites whose claim was cut to `aggregation.max_weight_share`.
        gap: What the new adapter misses of the step, as a share; None: the method misses nothing.
        gap_error: Its standard error.
        rank: Left by AdaLoRA.
        seconds: Without the evaluation.
        epsilon: Spent so far, under noise for whole sites.
        epsilon_insider: The same against a site that knows who took part; None: none worth the name.
    """

    round: int
    adapter_sha256: str
    num_updates: int
    train_loss: float | None
    held_to_share: Sequence[str]
    gap: float | None
    gap_error: float | None
    gap_modules: Mapping[str, float]
    gap_module_errors: Mapping[str, float]
    rank: int | None = None
    bytes_down: int
    bytes_up: int
    seconds: float
    epsilon: float | None = None
    epsilon_insider: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteFigures(Record):
    """Held-out figures of one site.

    Attributes:
        exact_match: Share of generated answers equal to their reference.
        accuracy: Share of preferences that the adapter agrees with.
        sums: As the site told them, by which a resumed run takes them up.
        change: Loss minus the base's there; None: not known.
    """

    loss: float
    num_rows: int
    exact_match: float | None
    accuracy: float | None
    sums: Mapping[str, int | float | None]
    change: float | None


@dataclass(frozen=True, eq=False)
class Spread(Record):
    """One figure over sites, each site counting the same.

    Attributes:
        mean: Over sites.
        std: Standard deviation over sites (of all of them, not of a sample).
        worst: The figure of the site that fares worst.
        worst_site: Its name.
        best: The figure of the site that fares best.
        best_site: Its name.
        spread: Distance from worst to best.
    """

    mean: float
    std: float
    worst: float
    worst_site: str
    best: float
    best_site: str
    spread: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Fairness(Record):
    """Spread of the held-out loss and of exact match; None where no site has the figure."""

    loss: Spread | None
    exact_match: Spread | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionLoss(Record):
    """Held-out loss over the sites of one precision."""

    loss: float
    sites: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores(Record):
    """What the sites told of an adapter.

    Attributes:
        loss: Over all answer tokens; of preferences the loss that is learnt.
        trimmed_loss: Mean over sites without the best and the worst; None for fewer than three.
        outliers: Sites whose loss is far from the others'.
        answer_loss: Of chosen or rated answers, where preferences are learnt.
        server_loss: On the coordinator's own rows.
        stale: Sites that did not answer now; their last figures count.
        precisions: By precision, where sites have more than one.
        worse_than_base: Sites whose loss is above the base's there.
    """

    loss: float
    trimmed_loss: float | None
    outliers: Sequence[str]
    exact_match: float | None
    accuracy: float | None
    answer_loss: float | None
    server_loss: float | None
    stale: Sequence[str]
    sites: Mapping[str, SiteFigures]
    fairness: Fairness
    precisions: Mapping[str, PrecisionLoss] | None = None
    worse_than_base: Sequence[str]
    bytes_down: int | None = None
    bytes_up: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated(Scores, Event, kind="evaluated"):
    """The sites scored the adapter after so many rounds."""

    num_rounds: int
    adapter_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class NotEvaluated(Event, kind="not_evaluated"):
    """No site tells figures of an adapter: after so many rounds, or after a stage of polish."""

    num_rounds: int | None = None
    stage: str = ""
    number: int | None = None
    adapter_sha256: str
    server_loss: float | None
    reason: str = "no site tells held-out figures"


@dataclass(frozen=True, kw_only=True, eq=False)
class Figure(Record):
    """A figure of a task: value and interval of 95 %, rows behind it, and the kind of its task."""

    value: float
    low: float
    high: float
    num_rows: int
    higher_is_better: bool
    kind: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Gain(Record):
    """How far a figure rose: mean and interval of 95 % of the paired difference."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured(Event, kind="measured"):
    """The coordinator measured its tasks; `gains` are by stage compared with and by figure."""

    stage: str
    definition_sha256: str
    adapter_sha256: str
    figures: Mapping[str, Figure]
    gains: Mapping[str, Mapping[str, Gain]]
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Stopped(Event, kind="stopped"):
    """The rounds end early."""

    num_rounds: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PolishStarted(Event, kind="polish_started"):
    """A stage begins or goes on; counts of its rows, with those left out and why."""

    stage: str
    trainer: str
    number: int
    num_stages: int
    num_rows: int
    num_held_out: int
    num_truncated: int
    num_dropped: int
    num_equal: int
    num_overlapping: int
    reference: str
    num_steps_done: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PolishStep(Event, kind="polish_step"):
    """Where a stage is."""

    stage: str
    step: int
    num_steps: int
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class PolishFinished(Event, kind="polish_finished"):
    """A stage is on disk; `before` and `after` are its figures, `overlaps` tables that it has trained on."""

    stage: str
    trainer: str
    number: int
    num_stages: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    num_steps: int
    num_rows: int
    num_held_out: int
    seed: int
    learning_rate: float
    overlaps: Mapping[str, Mapping[str, int]]
    adapter_sha256: str
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class PolishEvaluated(Scores, Event, kind="polish_evaluated"):
    """The sites scored what a stage has left."""

    stage: str
    number: int
    adapter_sha256: str


@dataclass(frozen=True, eq=False)
class Verdict(Record):
    """What a rule of the gate says of an adapter.

    Attributes:
        name: The rule.
        is_met: Whether it holds.
        value: The figure, the worst of several; None if it is missing.
        limit: What it is held against; None if it is missing.
        margin: How far on the right side of the limit, in the figure's unit; below 0 on the wrong one.
        reason: Which figure, in words.
    """

    name: str
    is_met: bool
    value: float | None
    limit: float | None
    margin: float | None
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated(Event, kind="gated"):
    """The gate judged an adapter; `definition_sha256` is that of the rules, fixed before training."""

    stage: str
    num_rounds: int
    adapter_sha256: str
    definition_sha256: str
    is_passed: bool
    verdicts: Sequence[Verdict]


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedLater(Event, kind="gated_later"):
    """Rules that came after the end judged an adapter."""

    stage: str
    num_rounds: int
    adapter_sha256: str
    definition_sha256: str
    is_passed: bool
    verdicts: Sequence[Verdict]


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported(Event, kind="exported"):
    """The sealed folder is written; the figures are those of `server.verify.verify.verify`."""

    folder: str
    adapter_sha256: str
    name: str
    formats: Sequence[str]
    signer: str
    addendum_sha256: str
    num_files: int
    num_tensors: int
    perplexity: Mapping[str, float]
    probe: Mapping[str, float]
    logits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFinished(Event, kind="run_finished"):
    """The end: which adapter was exported, and from which stage; empty where each site has its own."""

    adapter: str
    num_rounds: int
    stage: str


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFailed(Event, kind="run_failed"):
    """The end, too early; `error` is a class of `common.errors`, or `INTERRUPTED`."""

    error: str
    reason: str
    exit_code: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Added(Event):
    """Stages after the end of a run; see `server.polish.addendum`."""

    number: int
    addendum_sha256: str
    name: str
    run_sha256: str
    start_stage: str
    start_sha256: str
    num_rounds: int
    num_kept: int
    stages: Sequence[str]
    gate_sha256: str
    has_own_gate: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Derived(Added, kind="derived"):
    """This folder is of stages after the end of a run; `refused` is what the run's gate held against their start."""

    versions: Mapping[str, str]
    refused: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class LaterStarted(Added, kind="later_started"):
    """Stages were added to this run, in `folder`."""

    folder: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LaterFinished(Event, kind="later_finished"):
    """The added stages were exported."""

    number: int
    addendum_sha256: str
    stage: str
    adapter_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteScore(Record):
    """One site's figures of an arm."""

    held_out_loss: float
    exact_match: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm(Record):
    """Figures of an arm of a comparison; `rows_used` counts a training row as often as it was used."""

    held_out_loss: float
    exact_match: float | None
    sites: Mapping[str, SiteScore]
    rows_used: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmStarted(Event, kind="arm_started"):
    """An arm of a comparison begins."""

    arm: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmFinished(Arm, Event, kind="arm_finished"):
    """An arm of a comparison is scored."""

    arm: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared(Event, kind="compared"):
    """All arms are scored."""

    comparison: Mapping[str, Arm]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationStarted(Event, kind="evaluation_started"):
    """Sites are asked to score; for who watches."""

    sites: Sequence[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteEvaluated(Event, kind="site_evaluated"):
    """A site has scored; for who watches."""

    site: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStep(Event, kind="site_step"):
    """Where a site's training is; for who watches a simulation."""

    site: str
    round: int
    step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmStep(Event, kind="arm_step"):
    """Where an arm's training is; for who watches a simulation."""

    arm: str
    round: int
    step: int
    num_steps: int


End = RunFinished | RunFailed
E = TypeVar("E", bound=Event)


@dataclass
class EventLog:
    """Appends events to a file and tells listeners.

    Attributes:
        path: The file; created with its folder by the first event.
        listeners: Called with every event after it is on disk.
        watchers: Called with what only a person who watches needs, such as a step; it is never written.
        clock: Seconds since the epoch.
    """

    path: Path
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    watchers: list[Callable[[Event], None]] = field(default_factory=list)
    clock: Callable[[], float] = time.time

    def append(self, event: E) -> E:
        """Write an event with the time of now, and return it.

        Raises:
            StorageError: The line could not be written.
            ValueError: A number is not finite.
        """
        event = dataclasses.replace(event, time=round(self.clock(), 3), line="")
        line = json.dumps(event.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                if size and file.read(1) != b"\n":  # a writer was killed here, and this event would become part of it
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                file.write(line.encode(errors="replace"))
        except OSError as error:
            raise storage_error(self.path, error) from error
        for listener in self.listeners:
            listener(event)
        return event

    def tell(self, event: Event) -> None:
        """Tell those who watch, and write nothing."""
        for watcher in self.watchers:
            watcher(dataclasses.replace(event, time=round(self.clock(), 3)))


@functools.cache
def _adapter(kind: type[Event]) -> TypeAdapter[Event]:
    """What checks the fields of a kind, and those of its records."""
    return TypeAdapter(kind)


def parse(line: bytes) -> Event:
    """One line of a log, as the record of its kind.

    Raises:
        ValueError: It is no event, or a field is missing or of another type.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or not isinstance(kind := fields.get("kind"), str):
        raise ValueError("not an event")
    text = line.decode()
    if kind not in KINDS:
        return Unknown(name=kind, time=fields.get("time", 0.0), line=text)
    return _adapter(KINDS[kind]).validate_python({**fields, "line": text})


@dataclass
class Tail:
    """Reads a log as it grows: each look reads what was added since the last one.

    A last line without its end is left for the next look. A log that was truncated or replaced is read from its begin.

    Attributes:
        path: The log; need not be there yet.
        damaged: Numbers of the lines that are no events, from 1.
        num_starts: How often the log was read from its begin.
    """

    path: Path
    damaged: list[int] = field(default_factory=list)
    num_starts: int = 0
    _file_id: tuple[int, int] = (0, 0)
    _offset: int = 0
    _mark: bytes = b""
    _num_lines: int = 0

    def look(self) -> list[Event]:
        """The events since the last look."""
        try:
            with self.path.open("rb") as file:
                lines = self._added(file).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        fresh = []
        for line in lines:
            self._num_lines += 1
            try:
                fresh.append(parse(line))
            except ValueError:
                self.damaged.append(self._num_lines)
        return fresh

    def _added(self, file: BinaryIO) -> bytes:
        """The whole lines that were added; of a file that is not as it was left, all."""
        status = os.fstat(file.fileno())
        file.seek(self._offset - len(self._mark))
        data = file.read()
        if (status.st_dev, status.st_ino) == self._file_id and data.startswith(self._mark):
            data = data[len(self._mark) :]
        else:
            self._file_id, self._offset, self._mark, self._num_lines = (status.st_dev, status.st_ino), 0, b"", 0
            self.damaged.clear()
            self.num_starts += 1
            file.seek(0)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:]
        return whole


def read(path: Path) -> list[Event]:
    """All whole lines of an event file; a last line cut by a crash is left out.

    Raises:
        DataError: The file is missing, or a line before the last is not an event.
    """
    found, damaged = read_damaged(path)
    if damaged:
        raise DataError(in_words(path, damaged))
    return found


def read_damaged(path: Path) -> tuple[list[Event], list[int]]:
    """What can be read of an event file, and the numbers of the lines that cannot, from 1.

    For showing a run only: what goes on from events needs all of them.

    Raises:
        DataError: The file is missing.
    """
    if not path.is_file():
        raise DataError(f"{path}: no events here; is this a run folder?")
    tail = Tail(path)
    return tail.look(), tail.damaged


def in_words(path: Path, damaged: Sequence[int]) -> str:
    """What to do about lines that cannot be read."""
    lines = ", ".join(map(str, damaged[:MAX_NAMED])) + (", ..." if len(damaged) > MAX_NAMED else "")
    commands = "; ".join(f"{number}d" for number in damaged[:MAX_NAMED])
    return (
        f"{path}: line {lines} is not a JSON event; put the file back from a copy, or remove the line, whose event is "
        f"then lost: sed -i '{commands}' {path}. Until then silotune-server status shows what can be read"
    )


def follow(path: Path, *, is_over: Callable[[], bool], num_skipped: int = 0, poll_s: float = 0.2) -> Iterator[Event]:
    """Events as they arrive, until `run_finished`, `run_failed`, or `is_over()` with nothing left to read.

    Args:
        path: The event file; need not be there yet.
        is_over: Whether nobody writes any more.
        num_skipped: Events at the start to pass over: those of an earlier try.
        poll_s: Seconds between looks.

    Raises:
        DataError: A line is not an event.
    """
    tail = Tail(path)
    while True:
        ended = is_over()
        fresh = tail.look()
        if tail.damaged:
            raise DataError(in_words(path, tail.damaged))
        fresh, num_skipped = fresh[num_skipped:], max(0, num_skipped - len(fresh))
        yield from fresh
        if ended or any(isinstance(event, End) for event in fresh):
            return
        time.sleep(poll_s)
