"""Which kind of adapter goes together with what: a table of cells, each derived from the kind's facts; loads no torch.

A run file that combines what a cell refuses is an error (`common.run.rules.rules`); `silotune-server methods` and
docs/methods.md print the table. Cells without keys are what an export or a site's hardware asks for later.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from common.run.catalogue.kinds import ALL, DEFAULTS, KINDS, Kind
from common.run.schema import precisions
from common.run.schema.tables import Contradiction, RunTables

QUANTIZATION: Final = ("model.quantization", "model.site_quantization")
NO_FACTORS: Final = "it has no plain pair A and B"


@dataclass(frozen=True)
class KindFeature:
    """What a kind may or may not be combined with.

    Attributes:
        name: Column of the table.
        why_not: Why a kind refuses it; empty where it does not.
        remedy: What to set instead, beside another kind; may be empty.
        keys: Settings that ask for it; none where no run file can.
        is_asked: Whether a run asks for it.
    """

    name: str
    why_not: Callable[[Kind], str]
    remedy: str = ""
    keys: tuple[str, ...] = ()
    is_asked: Callable[[RunTables], bool] = lambda run: False


@dataclass(frozen=True)
class KindCell:
    """One kind with one feature; `nearest` is the kind to take instead, empty where it is allowed."""

    kind: str
    feature: str
    is_allowed: bool
    reason: str = ""
    nearest: str = ""


def _unless_factors(kind: Kind) -> str:
    return "" if kind.has_factors else NO_FACTORS


def _not_on(quantization: str) -> Callable[[Kind], str]:
    def why_not(kind: Kind) -> str:
        if quantization in kind.bases:
            return ""
        return "it trains the weights themselves" if kind.name == "full" else "peft cannot read such weights for it"

    return why_not


def _half_precision(kind: Kind) -> str:
    where = "" if kind.float32_on == ALL else " on a quantised base"
    return f"its float32 weights stand in the base's own path{where}" if kind.float32_on else ""


def _computes_in_half(run: RunTables) -> bool:
    facts = KINDS[run.adapter.kind]
    return run.model.dtype in ("bfloat16", "float16") and any(q in facts.float32_on for q in precisions.used(run.model))


def _checkpointing(kind: Kind) -> str:
    return (
        "keys and values that stand before the row are a cache, which checkpointing excludes"
        if (kind.name == "prefix_tuning")
        else ""
    )


def _server_optimizer(kind: Kind) -> str:
    return "momentum would bring back what the coordinator has zeroed" if kind.name == "adalora" else ""


def _steps(kind: Kind) -> str:
    return "what the coordinator zeroes would come down as a rounded step, and not be zero" * (kind.name == "adalora")


def _sparse_down(kind: Kind) -> str:
    return "" if kind.has_factors else "a value that is not sent counts as zero, which this kind cannot do without"


def _merged(kind: Kind) -> str:
    return "" if kind.is_mergeable else "virtual tokens are no part of any weight"


def _gap(kind: Kind) -> str:
    return "" if kind.has_factors else "the gap is measured on A and B; elsewhere the table says whether there is one"


STEPS: Final = KindFeature(
    "steps down", _steps, "set wire.down = 'float32'", ("wire.down",), lambda run: run.wire.down != "float32"
)
KIND_FEATURES: Final = (
    KindFeature(
        "methods beside fedavg",
        _unless_factors,
        "set aggregation.method = 'fedavg'",
        ("aggregation.method",),
        lambda run: run.aggregation.method != "fedavg",
    ),
    KindFeature(
        "int8 base",
        _not_on("int8"),
        "set another precision",
        QUANTIZATION,
        lambda run: "int8" in precisions.used(run.model),
    ),
    KindFeature(
        "nf4 base",
        _not_on("nf4"),
        "set another precision",
        QUANTIZATION,
        lambda run: "nf4" in precisions.used(run.model),
    ),
    KindFeature(
        "sites of different precision",
        lambda kind: "it starts from the base's weights, which differ between the sites" * kind.starts_from_base,
        "remove model.site_quantization",
        ("model.site_quantization",),
        lambda run: bool(run.model.site_quantization),
    ),
    KindFeature(
        "16-bit compute",
        _half_precision,
        "set model.dtype = 'float32'",
        ("model.dtype", *QUANTIZATION),
        _computes_in_half,
    ),
    KindFeature(
        "server optimizer",
        _server_optimizer,
        "set aggregation.server_optimizer.kind = 'none'",
        ("aggregation.server_optimizer.kind",),
        lambda run: run.aggregation.server_optimizer.kind != "none",
    ),
    KindFeature(
        "stacked clipping",
        _unless_factors,
        "set privacy.clipping = 'microbatch' or 'auto'",
        ("privacy.clipping",),
        lambda run: run.privacy.mode == "unit" and run.privacy.clipping == "stacked",
    ),
    KindFeature(
        "opacus clipping",
        _unless_factors,
        "set privacy.clipping = 'microbatch' or 'auto'",
        ("privacy.clipping",),
        lambda run: run.privacy.mode == "unit" and run.privacy.clipping == "opacus",
    ),
    KindFeature(
        "checkpointing",
        _checkpointing,
        "set training.gradient_checkpointing = false",
        ("training.gradient_checkpointing",),
        lambda run: run.training.gradient_checkpointing,
    ),
    STEPS,
    KindFeature(
        "sparse download",
        _sparse_down,
        "set wire.down to integers, whose steps may be sparse for any kind, or wire.down_density = 1",
        ("wire.down_density",),
        lambda run: run.wire.is_adapter_sparse,
    ),
    KindFeature("gap shown", _gap),
    KindFeature("sealed adapter, vLLM", _unless_factors, "export --output writes the peft folder of any kind"),
    KindFeature("merged, nf4, int8, GGUF export", _merged, "export --output writes the peft folder of any kind"),
)


def kind_cell(kind: Kind, feature: KindFeature) -> KindCell:
    """One cell of the table."""
    reason = feature.why_not(kind)
    nearest = next((name for name in (*kind.nearest, "lora") if not feature.why_not(KINDS[name])), "lora")
    return KindCell(kind.name, feature.name, not reason, reason, nearest if reason else "")


def kind_cells() -> Iterator[tuple[KindFeature, KindCell]]:
    """The whole table, kinds in their order."""
    for kind in KINDS.values():
        for feature in KIND_FEATURES:
            yield feature, kind_cell(kind, feature)


def refusals() -> Iterator[tuple[KindFeature, tuple[str, ...], str, str]]:
    """Each feature with the kinds that refuse it for one reason and have one nearest, the reason, and that nearest."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for feature, cell in kind_cells():
        if not cell.is_allowed:
            found.setdefault((KIND_FEATURES.index(feature), cell.reason, cell.nearest), []).append(cell.kind)
    for (number, reason, nearest), kinds in sorted(found.items()):
        yield KIND_FEATURES[number], tuple(kinds), reason, nearest


def is_unused(run: RunTables, key: str) -> bool:
    """Whether a setting of `[adapter]` was set that the run's kind does not look at."""
    return key not in KINDS[run.adapter.kind].settings and getattr(run.adapter, key) != DEFAULTS[key]


def contradictions() -> Iterator[Contradiction]:
    """Keys, whether a run is in it, and the message: what kinds refuse, and settings that not all of them use."""
    for feature, kinds, reason, nearest in refusals():
        if feature.keys:
            told = f"no {feature.name} with this kind: {reason}; {feature.remedy}, or adapter.kind = '{nearest}'"
            yield ("adapter.kind", *feature.keys), functools.partial(_is_combined, kinds=kinds, feature=feature), told
    for key in DEFAULTS:
        told = "this kind does not use it; remove it or choose another kind"
        yield (f"adapter.{key}", "adapter.kind"), functools.partial(is_unused, key=key), told
    yield ("adapter.target_r", "adapter.r"), _ranks_rise, "ranks only fall; it must not be above r"
    told = "masks of dropout depend on which units were drawn before, so that one unit would move all others; set 0"
    yield ("adapter.dropout", "privacy.mode"), _couples_units, told


def _is_combined(config: RunTables, kinds: tuple[str, ...], feature: KindFeature) -> bool:
    return config.adapter.kind in kinds and feature.is_asked(config)


def _ranks_rise(config: RunTables) -> bool:
    return config.adapter.kind == "adalora" and config.adapter.target_r > config.adapter.r


def _couples_units(config: RunTables) -> bool:
    return config.privacy.mode == "unit" and config.adapter.dropout > 0
