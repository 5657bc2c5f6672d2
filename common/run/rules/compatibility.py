"""Which method goes together with what: a table of cells, each derived from the method's facts; loads no torch.

A run file that combines what a cell refuses is an error (`common.run.rules.rules`); `silotune-server methods` and
docs/methods.md print the whole table.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from common.run.catalogue.methods import FACTS, Facts
from common.run.schema import precisions
from common.run.schema.tables import Contradiction, RunTables


@dataclass(frozen=True)
class Feature:
    """What a method may or may not be combined with.

    Attributes:
        name: Column of the table.
        why_not: Why a method refuses it; empty where it does not.
        remark: What to know of a method that allows it; may be empty.
        keys: Settings that ask for it; none where no run file of this version can.
        is_asked: Whether a run asks for it.
    """

    name: str
    why_not: Callable[[Facts], str]
    remark: Callable[[Facts], str] = lambda facts: ""
    keys: tuple[str, ...] = ()
    is_asked: Callable[[RunTables], bool] = lambda run: False


@dataclass(frozen=True)
class Cell:
    """One method with one feature.

    Attributes:
        method: As in `aggregation.method`.
        feature: A feature's name.
        is_allowed: Whether they go together.
        reason: Why not; or what to know.
        nearest: The method to take instead; empty where it is allowed.
    """

    method: str
    feature: str
    is_allowed: bool
    reason: str = ""
    nearest: str = ""


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
STEPS: Final = Feature("steps down", _steps, keys=("wire.down",), is_asked=lambda run: run.wire.down != "float32")
FEATURES: Final = (
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
        is_asked=lambda run: bool(run.adapter.site_ranks),
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


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run asks for both, and the message, whatever the method: of sites that differ, and of `apart`."""
    yield (
        ("adapter.site_ranks", "adapter.r"),
        _has_odd_site_ranks,
        "name only sites whose rank is below adapter.r, which all others have",
    )
    compared = "compares value by value, and a smaller site has none for some; remove one of the two"
    yield (
        ("adapter.site_ranks", "aggregation.robust.rule"),
        lambda run: bool(run.adapter.site_ranks) and run.aggregation.robust.rule != "none",
        f"robust aggregation {compared}",
    )
    yield (
        ("adapter.site_ranks", "aggregation.screening.action"),
        lambda run: bool(run.adapter.site_ranks) and run.aggregation.screening.action != "off",
        f"screening {compared}",
    )

    for one, other in apart():
        told = f"no method goes together with both {one.name} and {other.name}; remove one of the two"
        yield (*one.keys, *other.keys), functools.partial(_asks_for_both, one=one, other=other), told
    yield (
        ("model.site_quantization", "model.quantization"),
        _has_idle_precisions,
        "name only sites whose precision differs from model.quantization, which all others have",
    )


def apart() -> list[tuple[Feature, Feature]]:
    """Pairs of what a run file can ask for that no method goes together with, though each has methods by itself."""
    asked = [feature for feature in FEATURES if feature.keys]
    pairs = itertools.combinations(asked, 2)
    return [pair for pair in pairs if all(any(side.why_not(facts) for side in pair) for facts in FACTS.values())]


def _asks_for_both(run: RunTables, one: Feature, other: Feature) -> bool:
    return one.is_asked(run) and other.is_asked(run)


def _has_odd_site_ranks(run: RunTables) -> bool:
    return any(rank >= run.adapter.r for rank in run.adapter.site_ranks.values())


def _has_idle_precisions(run: RunTables) -> bool:
    return run.model.quantization in run.model.site_quantization.values()


@dataclass(frozen=True)
class SiteLevel:
    """What noise for sites as a whole (`privacy.mode = site`) goes together with, whatever the method.

    Attributes:
        key: The setting.
        is_asked: Whether a run asks for what is refused, or allowed.
        is_allowed: Whether they go together.
        reason: Why, and what to do where they do not.
    """

    key: str
    is_asked: Callable[[RunTables], bool]
    is_allowed: bool
    reason: str


SITE_LEVEL: Final = (
    SiteLevel(
        "aggregation.weighting",
        lambda run: run.aggregation.weighting != "uniform",
        False,
        "a weight by rows would let a site move the sum by more than the clip norm, and tells its rows; set 'uniform'",
    ),
    SiteLevel(
        "aggregation.robust.rule",
        lambda run: run.aggregation.robust.rule != "none",
        False,
        "a median or a choice of updates moves by more than the noise is made for when one site changes; the clip norm "
        "already bounds what a bad site can do",
    ),
    SiteLevel(
        "aggregation.max_update_norm",
        lambda run: run.aggregation.max_update_norm > 0,
        False,
        "privacy.clip_norm bounds an update already; remove it",
    ),
    SiteLevel(
        "aggregation.screening.action",
        lambda run: run.aggregation.screening.action != "off",
        False,
        "leaving one update out for another's sake moves the sum by more than the noise is made for, and what is seen "
        "of single updates is written down without noise",
    ),
    SiteLevel(
        "adapter.site_ranks",
        lambda run: bool(run.adapter.site_ranks),
        False,
        "a smaller site would be clipped and noised over other values than the others; give all the same rank",
    ),
    SiteLevel(
        "federation.sites_per_round",
        lambda run: run.federation.sites_per_round > 0,
        False,
        "the accountant is of sites that are drawn each for itself, not of a fixed number; set privacy.sampling_prob",
    ),
    SiteLevel(
        "aggregation.server_optimizer.kind",
        lambda run: run.aggregation.server_optimizer.kind != "none",
        True,
        "it sees the noised sum only, where the method allows it",
    ),
    SiteLevel(
        "aggregation.proximal",
        lambda run: run.aggregation.proximal > 0,
        True,
        "it is the site's own training, before the clip",
    ),
    SiteLevel(
        "wire.down_density",
        lambda run: run.wire.down_density < 1,
        True,
        "it chooses among values that are released already",
    ),
    SiteLevel(
        "aggregation.gap_warning",
        lambda run: False,
        True,
        "the gap of fedavg is not measured: it is a figure of single updates, which no noise would cover",
    ),
)


def cell(facts: Facts, feature: Feature) -> Cell:
    """One cell of the table.

    Example:
        >>> momentum = next(feature for feature in FEATURES if feature.name == SERVER_OPTIMIZER)
        >>> cell(FACTS["fedsvd"], momentum).nearest
        'ffa'
    """
    reason = feature.why_not(facts)
    if not reason:
        return Cell(facts.name, feature.name, True, feature.remark(facts))
    nearest = next((name for name in facts.nearest if not feature.why_not(FACTS[name])), "")
    return Cell(facts.name, feature.name, False, reason, nearest)


def cells() -> Iterator[tuple[Feature, Cell]]:
    """The whole table, methods in their order."""
    for facts in FACTS.values():
        for feature in FEATURES:
            yield feature, cell(facts, feature)


def without_gap(run: RunTables) -> str:
    """The exact method to take where averaging both factors is too far off, among those that the run's other settings
    allow; empty if there is none or the run's own is exact.
    """
    facts = FACTS[run.aggregation.method]
    asked = [feature for feature in FEATURES if feature.is_asked(run)]
    never_cuts = ("yes",) if run.adapter.site_ranks else ("no", "truncate", "yes")
    exact = (name for name in facts.nearest if FACTS[name].is_exact and FACTS[name].mixed_ranks in never_cuts)
    allowed = (name for name in exact if not any(feature.why_not(FACTS[name]) for feature in asked))
    return "" if facts.is_exact or facts.is_personal else next(allowed, "")
