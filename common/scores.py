"""What events of a run hold: figures of sites, of tasks, of rules and of arms. Losses are nats per answer token."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
class Shared(Record):
    """Held-out rows of a site that are trained on, word for word and nearly."""

    num_held_out: int
    num_exact: int
    num_near: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecisionNoise(Record):
    """Relative errors ||Q(W) - W|| / ||W|| (Frobenius) of one precision: over all layers, by name, by layer."""

    sites: Sequence[str]
    error: float
    targets: Mapping[str, float]
    modules: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen(Record):
    """What screening saw of one update; see `server.aggregate.screen.Look`."""

    norm: float
    cosine: float
    reasons: Sequence[str]
    is_left_out: bool


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
