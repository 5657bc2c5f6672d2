"""Which kind of adapter goes together with what: a table of cells, each derived from the kind's facts; loads no torch.

A run file that combines what a cell refuses is an error (`common.run.rules.rules`); `silotune-server methods` and
docs/methods.md print the table. Cells without keys are what an export or a site's hardware asks for later.
"""

from collections.abc import Callable
from typing import Final

from common.run.catalogue.kinds import ALL, KINDS, Kind
from common.run.rules.compatibility import Feature, refusals
from common.run.rules.rule import Rule
from common.run.schema import precisions
from common.run.schema.tables import RunTables

QUANTIZATION: Final = ("model.quantization", "model.site_quantization")
NO_FACTORS: Final = "it has no plain pair A and B"


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


STEPS: Final[Feature[Kind]] = Feature(
    "steps down",
    _steps,
    remedy="set wire.down = 'float32'",
    keys=("wire.down",),
    is_asked=lambda run: run.wire.down != "float32",
)
KIND_FEATURES: Final[tuple[Feature[Kind], ...]] = (
    Feature(
        "methods beside fedavg",
        _unless_factors,
        remedy="set aggregation.method = 'fedavg'",
        keys=("aggregation.method",),
        is_asked=lambda run: run.aggregation.method != "fedavg",
    ),
    Feature(
        "int8 base",
        _not_on("int8"),
        remedy="set another precision",
        keys=QUANTIZATION,
        is_asked=lambda run: "int8" in precisions.used(run.model),
    ),
    Feature(
        "nf4 base",
        _not_on("nf4"),
        remedy="set another precision",
        keys=QUANTIZATION,
        is_asked=lambda run: "nf4" in precisions.used(run.model),
    ),
    Feature(
        "sites of different precision",
        lambda kind: "it starts from the base's weights, which differ between the sites" * kind.starts_from_base,
        remedy="remove model.site_quantization",
        keys=("model.site_quantization",),
        is_asked=lambda run: bool(run.model.site_quantization),
    ),
    Feature(
        "16-bit compute",
        _half_precision,
        remedy="set model.dtype = 'float32'",
        keys=("model.dtype", *QUANTIZATION),
        is_asked=_computes_in_half,
    ),
    Feature(
        "server optimizer",
        _server_optimizer,
        remedy="set aggregation.server_optimizer.kind = 'none'",
        keys=("aggregation.server_optimizer.kind",),
        is_asked=lambda run: run.aggregation.server_optimizer.kind != "none",
    ),
    Feature(
        "stacked clipping",
        _unless_factors,
        remedy="set privacy.clipping = 'microbatch' or 'auto'",
        keys=("privacy.clipping",),
        is_asked=lambda run: run.privacy.mode == "unit" and run.privacy.clipping == "stacked",
    ),
    Feature(
        "opacus clipping",
        _unless_factors,
        remedy="set privacy.clipping = 'microbatch' or 'auto'",
        keys=("privacy.clipping",),
        is_asked=lambda run: run.privacy.mode == "unit" and run.privacy.clipping == "opacus",
    ),
    Feature(
        "checkpointing",
        _checkpointing,
        remedy="set training.gradient_checkpointing = false",
        keys=("training.gradient_checkpointing",),
        is_asked=lambda run: run.training.gradient_checkpointing,
    ),
    STEPS,
    Feature(
        "sparse download",
        _sparse_down,
        remedy="set wire.down to integers, whose steps may be sparse for any kind, or wire.down_density = 1",
        keys=("wire.down_density",),
        is_asked=lambda run: run.wire.is_adapter_sparse,
    ),
    Feature("gap shown", _gap),
    Feature("sealed adapter, vLLM", _unless_factors, remedy="export --output writes the peft folder of any kind"),
    Feature("merged, nf4, int8, GGUF export", _merged, remedy="export --output writes the peft folder of any kind"),
)


def _refused(feature: Feature[Kind], kinds: tuple[str, ...], reason: str, nearest: str) -> Rule:
    return Rule(
        ("adapter.kind", *feature.keys),
        lambda run: run.adapter.kind in kinds and feature.is_asked(run),
        f"no {feature.name} with this kind: {reason}",
        f"{feature.remedy}, or adapter.kind = '{nearest}'",
    )


RULES: Final = (
    *(_refused(*refused) for refused in refusals(KINDS, KIND_FEATURES) if refused[0].keys),
    Rule(
        ("adapter.target_r", "adapter.r"),
        lambda c: c.adapter.kind == "adalora" and c.adapter.target_r > c.adapter.r,
        "ranks only fall",
        "it must not be above r",
    ),
    Rule(
        ("adapter.dropout", "privacy.mode"),
        lambda c: c.privacy.mode == "unit" and getattr(c.adapter, "dropout", 0) > 0,
        "masks of dropout depend on which units were drawn before, so that one unit would move all others",
        "set 0",
    ),
)
