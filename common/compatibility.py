"""Which method goes together with what: a table of cells, each derived from the method's facts; loads no torch.

A run file that combines what a cell refuses is an error (`common.config_rules`); `silotune-server methods` and
docs/methods.md print the whole table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from common.methods import FACTS, Facts

if TYPE_CHECKING:
    from common.config import RunConfig


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
    is_asked: Callable[["RunConfig"], bool] = lambda run: False


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
    return "a site of a smaller rank starts from a cut adapter" if facts.mixed_ranks == "truncate" else ""


def _momentum(facts: Facts) -> str:
    if facts.refreshes:
        return "the factors get new coordinates every round, and momentum of the old ones does not fit them"
    if not facts.is_linear:
        return "what is kept beside the factors belongs to their mean, and not to another step"
    return ""


def _momentum_remark(facts: Facts) -> str:
    return "each factor has its own state, which moves in its own rounds" if len(facts.trains) > 1 else ""


def _polishing(facts: Facts) -> str:
    return "there is no global model to polish" if facts.client_state else ""


def _polishing_remark(facts: Facts) -> str:
    no_reference = "stages without a reference or a reward model, which would be without the side adapter"
    return no_reference if facts.base_delta == "residual" else ""


def _robust(facts: Facts) -> str:
    return "" if facts.is_linear else "it stands in the place of the factors' mean, which this method does not take"


def _robust_remark(facts: Facts) -> str:
    return "each factor by itself, and the gap is not measured" if "AB" in facts.trains else ""


SERVER_OPTIMIZER: Final = "server optimizer"
FEATURES: Final = (
    Feature("secure aggregation", _in_the_clear),
    Feature(
        "record DP",
        _record_noise,
        _record_remark,
        keys=("privacy.mode",),
        is_asked=lambda run: run.privacy.mode == "unit",
    ),
    Feature("central DP", _central_noise),
    Feature(
        "quantised base",
        _quantised,
        _quantised_remark,
        keys=("model.quantization",),
        is_asked=lambda run: run.model.quantization != "none",
    ),
    Feature("mixed ranks", _mixed, _mixed_remark),
    Feature(
        SERVER_OPTIMIZER,
        _momentum,
        _momentum_remark,
        keys=("aggregation.server_optimizer",),
        is_asked=lambda run: run.aggregation.server_optimizer != "none",
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
        keys=("aggregation.robust",),
        is_asked=lambda run: run.aggregation.robust != "none",
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


def without_gap(run: "RunConfig") -> str:
    """The exact method to take where averaging both factors is too far off, among those that the run's other settings
    allow; empty if there is none or the run's own is exact.
    """
    facts = FACTS[run.aggregation.method]
    asked = [feature for feature in FEATURES if feature.is_asked(run)]
    exact = (name for name in facts.nearest if FACTS[name].is_exact)
    allowed = (name for name in exact if not any(feature.why_not(FACTS[name]) for feature in asked))
    return "" if facts.is_exact else next(allowed, "")
