"""Which method goes together with what: a table of cells, each derived from the method's facts; loads no torch.

A run file that combines what a cell refuses is an error (`common.run.rules.rules`); `silotune-server methods` and
docs/methods.md print the whole table.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from common.run.catalogue.methods import FACTS, Facts
from common.run.rules.rule import Rule
from common.run.schema import precisions
from common.run.schema.tables import RunTables


class Row(Protocol):
    """What a table has a row of: a method, or a kind of adapter."""

    @property
    def name(self) -> str:
        """As in the run file."""

    @property
    def nearest(self) -> Iterable[str]:
        """Others to take where this one is refused, nearest first."""


T = TypeVar("T", bound=Row)


@dataclass(frozen=True)
class Feature(Generic[T]):
    """What a method, or a kind of adapter, may or may not be combined with.

    Attributes:
        name: Column of the table.
        why_not: Why one refuses it; empty where it does not.
        remark: What to know of one that allows it; may be empty.
        keys: Settings that ask for it; none where no run file of this version can.
        is_asked: Whether a run asks for it.
        remedy: What to set instead, beside another method or kind; may be empty.
    """

    name: str
    why_not: Callable[[T], str]
    remark: Callable[[T], str] = lambda row: ""
    keys: tuple[str, ...] = ()
    is_asked: Callable[[RunTables], bool] = lambda run: False
    remedy: str = ""


@dataclass(frozen=True)
class Cell:
    """One method, or kind, with one feature.

    Attributes:
        row: Name of the method or kind.
        feature: A feature's name.
        is_allowed: Whether they go together.
        reason: Why not; or what to know.
        nearest: What to take instead; empty where it is allowed, or where nothing near does.
    """

    row: str
    feature: str
    is_allowed: bool
    reason: str = ""
    nearest: str = ""


def cell(row: T, feature: Feature[T], rows: Mapping[str, T]) -> Cell:
    """One cell of a table.

    Example:
        >>> momentum = next(feature for feature in FEATURES if feature.name == SERVER_OPTIMIZER)
        >>> cell(FACTS["fedsvd"], momentum, FACTS).nearest
        'ffa'
    """
    reason = feature.why_not(row)
    if not reason:
        return Cell(row.name, feature.name, True, feature.remark(row))
    nearest = next((name for name in row.nearest if not feature.why_not(rows[name])), "")
    return Cell(row.name, feature.name, False, reason, nearest)


def cells(rows: Mapping[str, T], features: Iterable[Feature[T]]) -> Iterator[tuple[Feature[T], Cell]]:
    """A whole table, row by row."""
    for row, feature in itertools.product(rows.values(), features):
        yield feature, cell(row, feature, rows)


def refusals(
    rows: Mapping[str, T], features: tuple[Feature[T], ...]
) -> Iterator[tuple[Feature[T], tuple[str, ...], str, str]]:
    """Each feature with the rows that refuse it for one reason and have one nearest, the reason, and that nearest."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for feature, refused in cells(rows, features):
        if not refused.is_allowed:
            found.setdefault((features.index(feature), refused.reason, refused.nearest), []).append(refused.row)
    for (number, reason, nearest), names in sorted(found.items()):
        yield features[number], tuple(names), reason, nearest


def has_site_ranks(run: RunTables) -> bool:
    """Whether sites hold adapters of different ranks."""
    return bool(run.adapter.lower_ranks)


def _in_the_clear(facts: Facts) -> str:
    return "" if facts.is_linear else "the coordinator needs each site's factors, and would see their sum only"


def _record_noise(facts: Facts) -> str:
    return "" if "record" in facts.privacy else "the sites' noise would stay in what is kept beside the factors"


def _record_remark(facts: Facts) -> str:
    if facts.is_personal:
        return "what stays at a site is as noisy as what leaves it; no publication has tried it"
    noisy_factors = "both factors carry noise, and its product does not average out; fedsvd and ffa have none"
    return noisy_factors if "AB" in facts.trains else ""


def _central_noise(facts: Facts) -> str:
    return "" if "central" in facts.privacy else "the noise is on the sum of updates, and this is no sum"


def _quantised(facts: Facts) -> str:  # nothing is ever folded into the base, so that its precision does not matter
    return ""


def _quantised_remark(facts: Facts) -> str:
    return "by the side adapter; nothing is folded into the base" if facts.base_delta == "residual" else ""


def _mixed(facts: Facts) -> str:
    return "factors of different ranks cannot be averaged" if facts.mixed_ranks == "no" else ""


def _mixed_remark(facts: Facts) -> str:
    if facts.mixed_ranks == "no":
        return ""
    if facts.base_delta == "residual":
        return "exact at every rank, as a round starts from a product of zero"
    return "a smaller site starts from an adapter that is cut to its rank, so that the mean is not exact"


def _momentum(facts: Facts) -> str:
    if facts.refreshes:
        return "the factors get new coordinates every round, and momentum of the old ones does not fit them"
    if not facts.is_linear:
        return "what is kept beside the factors belongs to their mean, and not to another step"
    return ""


def _momentum_remark(facts: Facts) -> str:
    if facts.is_personal:
        return "of what is averaged; what stays at a site moves as the site trains it"
    return "each factor has its own state, which moves in its own rounds" if len(facts.trains) > 1 else ""


def _polishing(facts: Facts) -> str:
    return "there is no global model to polish" if facts.client_state else ""


def _polishing_remark(facts: Facts) -> str:
    no_reference = "stages without a reference or a reward model, which would be without the side adapter"
    return no_reference if facts.base_delta == "residual" else ""


def _robust(facts: Facts) -> str:
    return "" if facts.is_linear else "it stands in the place of the factors' mean, which this method does not take"


def _robust_remark(facts: Facts) -> str:
    return "each factor by itself, and the gap is not measured" if "AB" in facts.sends else ""


def _at_the_coordinator(facts: Facts) -> str:
    return "the sites' own factors are not there, and the others stand for nothing without them" * facts.is_personal


def _sparse(facts: Facts) -> str:
    if facts.refreshes:
        return "what a site keeps of a sparse update does not fit the new coordinates that the factors get every round"
    return ""


def _steps(facts: Facts) -> str:
    if facts.refreshes:
        return "the factors get new coordinates every round, so that a step is as large as the adapter itself"
    return "" if facts.base_delta == "none" else "the side adapter is factored anew every round, and has no small step"


def _sparse_down(facts: Facts) -> str:
    if facts.is_experimental:
        return "nobody has tried the two together"
    if facts.refreshes:
        return "the factors get new coordinates every round, in which a small value is no less needed than a large one"
    if facts.is_personal:
        return "what a site keeps is trained beside sparse factors, and would be used beside the whole ones"
    return "" if facts.base_delta == "none" else "the side adapter belongs to the whole factors"


def _sparse_down_remark(facts: Facts) -> str:
    return "with wire.down = 'float32' the mean is not exact, as sites start from fewer values" * facts.is_exact


SERVER_OPTIMIZER: Final = "server optimizer"
STEPS: Final[Feature[Facts]] = Feature(
    "steps down", _steps, keys=("wire.down",), is_asked=lambda run: run.wire.down != "float32"
)
FEATURES: Final[tuple[Feature[Facts], ...]] = (
    Feature("secure aggregation", _in_the_clear),
    Feature(
        "record DP",
        _record_noise,
        _record_remark,
        keys=("privacy.mode",),
        is_asked=lambda run: run.privacy.mode == "unit",
    ),
    Feature(
        "central DP",
        _central_noise,
        keys=("privacy.mode",),
        is_asked=lambda run: run.privacy.mode == "site",
    ),
    Feature(
        "quantised base",
        _quantised,
        _quantised_remark,
        keys=("model.quantization",),
        is_asked=lambda run: precisions.used(run.model) != ["none"],
    ),
    Feature(
        "mixed ranks",
        _mixed,
        _mixed_remark,
        keys=("adapter.site_ranks",),
        is_asked=has_site_ranks,
    ),
    Feature(
        SERVER_OPTIMIZER,
        _momentum,
        _momentum_remark,
        keys=("aggregation.server_optimizer.kind",),
        is_asked=lambda run: run.aggregation.server_optimizer.kind != "none",
    ),
    Feature(
        "central polishing",
        _polishing,
        _polishing_remark,
        keys=("polish",),
        is_asked=lambda run: bool(run.polish),
    ),
    Feature(
        "robust aggregation",
        _robust,
        _robust_remark,
        keys=("aggregation.robust.rule",),
        is_asked=lambda run: run.aggregation.robust.rule != "none",
    ),
    Feature("sparse updates", _sparse, keys=("wire.density",), is_asked=lambda run: run.wire.density < 1),
    STEPS,
    Feature(
        "sparse download",
        _sparse_down,
        _sparse_down_remark,
        keys=("wire.down_density",),
        is_asked=lambda run: run.wire.down_density < 1,
    ),
    Feature(
        "coordinator's own rows",
        _at_the_coordinator,
        keys=("evaluation.server_data",),
        is_asked=lambda run: bool(run.evaluation.server_data),
    ),
)


def apart() -> list[tuple[Feature[Facts], Feature[Facts]]]:
    """Pairs of what a run file can ask for that no method goes together with, though each has methods by itself."""
    asked = [feature for feature in FEATURES if feature.keys]
    pairs = itertools.combinations(asked, 2)
    return [pair for pair in pairs if all(any(side.why_not(facts) for side in pair) for facts in FACTS.values())]


def _compares(name: str, key: str, is_asked: Callable[[RunTables], bool]) -> Rule:
    """What holds one site's values against another's."""
    message = f"{name} compares value by value, and a smaller site has none for some"
    keys = ("adapter.site_ranks", key)
    return Rule(keys, lambda c: has_site_ranks(c) and is_asked(c), message, "remove one of the two")


def _apart(one: Feature[Facts], other: Feature[Facts]) -> Rule:
    message = f"no method goes together with both {one.name} and {other.name}"
    keys = (*one.keys, *other.keys)
    return Rule(keys, lambda run: one.is_asked(run) and other.is_asked(run), message, "remove one of the two")


def _refused(feature: Feature[Facts], methods: tuple[str, ...], reason: str, nearest: str) -> Rule:
    return Rule(
        ("aggregation.method", *feature.keys),
        lambda run: run.aggregation.method in methods and feature.is_asked(run),
        f"no {feature.name} with this method: {reason}",
        f"the nearest method that allows it is '{nearest}'",
    )


RULES: Final = (
    Rule(
        ("adapter.site_ranks", "adapter.r"),
        lambda c: c.adapter.kind == "lora" and any(rank >= c.adapter.r for rank in c.adapter.site_ranks.values()),
        "all sites have adapter.r but for those that hold less",
        "name only sites whose rank is below it",
    ),
    _compares("robust aggregation", "aggregation.robust.rule", lambda run: run.aggregation.robust.rule != "none"),
    _compares("screening", "aggregation.screening.action", lambda run: run.aggregation.screening.action != "off"),
    *(_apart(one, other) for one, other in apart()),
    Rule(
        ("model.site_quantization", "model.quantization"),
        lambda c: c.model.quantization in c.model.site_quantization.values(),
        "all sites have model.quantization but for those that differ",
        "name only sites whose precision is another",
    ),
    *(_refused(*refused) for refused in refusals(FACTS, FEATURES) if refused[0].keys),
)


def _site(key: str, is_asked: Callable[[RunTables], bool], reason: str, remedy: str) -> Rule:
    """What noise for sites as a whole does not go together with."""
    return Rule((key, "privacy.mode"), lambda c: c.privacy.mode == "site" and is_asked(c), UNDER_SITE + reason, remedy)


UNDER_SITE: Final = "not under this mode: "
SITE_REFUSES: Final = (  # what noise for sites as a whole goes together with, whatever the method
    _site(
        "aggregation.weighting",
        lambda run: run.aggregation.weighting != "uniform",
        "a weight by rows would let a site move the sum by more than the clip norm, and tells its rows",
        "set 'uniform'",
    ),
    _site(
        "aggregation.robust.rule",
        lambda run: run.aggregation.robust.rule != "none",
        "a median or a choice of updates moves by more than the noise is made for when one site changes",
        "remove it, as the clip norm already bounds what a bad site can do",
    ),
    _site(
        "aggregation.max_update_norm",
        lambda run: run.aggregation.max_update_norm > 0,
        "privacy.clip_norm bounds an update already",
        "remove it",
    ),
    _site(
        "aggregation.screening.action",
        lambda run: run.aggregation.screening.action != "off",
        "leaving one update out for another's sake moves the sum by more than the noise is made for, and what is seen "
        "of single updates is written down without noise",
        "remove it",
    ),
    _site(
        "adapter.site_ranks",
        lambda run: has_site_ranks(run),
        "a smaller site would be clipped and noised over other values than the others",
        "give all the same rank",
    ),
    _site(
        "federation.sites_per_round",
        lambda run: run.federation.sites_per_round > 0,
        "the accountant is of sites that are drawn each for itself, not of a fixed number",
        "set privacy.sampling_prob",
    ),
)
SITE_ALLOWS: Final[Mapping[str, str]] = {
    "aggregation.server_optimizer.kind": "it sees the noised sum only, where the method allows it",
    "aggregation.proximal": "it is the site's own training, before the clip",
    "wire.down_density": "it chooses among values that are released already",
    "aggregation.gap_warning": "the gap of fedavg is not measured: it is a figure of single updates, which no noise "
    "would cover",
}


def without_gap(run: RunTables) -> str:
    """The exact method to take where averaging both factors is too far off, among those that the run's other settings
    allow; empty if there is none or the run's own is exact.
    """
    facts = FACTS[run.aggregation.method]
    asked = [feature for feature in FEATURES if feature.is_asked(run)]
    never_cuts = ("yes",) if has_site_ranks(run) else ("no", "truncate", "yes")
    exact = (name for name in facts.nearest if FACTS[name].is_exact and FACTS[name].mixed_ranks in never_cuts)
    allowed = (name for name in exact if not any(feature.why_not(FACTS[name]) for feature in asked))
    return "" if facts.is_exact or facts.is_personal else next(allowed, "")
