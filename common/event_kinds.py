"""The kinds of events of a run: one frozen record each, and one JSON line of `events.jsonl`.

A line holds `kind`, `time` (seconds since the epoch) and the fields; a field that has its default is not written. Kinds
and fields that this version does not know stay in `Event.line` and are passed over. Losses are nats
per answer token; `bytes_*` are of frames; `round` counts from 0; `num_rounds` is how many are behind an adapter, and 0
is the base.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from pydantic import TypeAdapter

from common.scores import Arm, Figure, Gain, PrecisionNoise, Record, Scores, Seen, Shared, Verdict

KINDS: Final[dict[str, type["Event"]]] = {}


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
    site_quantization: Mapping[str, str]
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
class Overlap(Event, kind="overlap"):
    """Held-out rows that are trained on, over all sites and by site."""

    num_held_out: int
    num_exact: int
    num_near: int
    sites: Mapping[str, Shared]


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
    """A node does not take part, or not yet; `state` is one of `common.frame.site_states`."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged(Event):
    """What the gate says of an adapter; `definition_sha256` is that of the rules."""

    stage: str
    num_rounds: int
    adapter_sha256: str
    definition_sha256: str
    is_passed: bool
    verdicts: Sequence[Verdict]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated(Judged, kind="gated"):
    """Judged by rules that were fixed before training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedLater(Judged, kind="gated_later"):
    """Judged by rules that came after the end."""


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
