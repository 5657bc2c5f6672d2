"""Contradictions of a run whose method trains cores; `common.run.rules.rules` adds them to its table. Loads no
torch.
"""

from typing import Final

from common.run.catalogue.methods import FACTS
from common.run.schema.aggregation import NUM_HEADS
from common.run.schema.tables import Contradiction, RunTables


def _has_cores(config: RunTables) -> bool:
    return FACTS[config.aggregation.method].has_cores


def _reads_layers(config: RunTables) -> bool:
    return config.privacy.mode == "unit" and config.privacy.clipping in ("stacked", "opacus")


CONFLICTS: Final[tuple[Contradiction, ...]] = (
    (
        ("aggregation.num_heads", "aggregation.method"),
        lambda c: not _has_cores(c) and c.aggregation.num_heads != NUM_HEADS,
        "has no effect, as only ravan has heads; remove it",
    ),
    (
        ("aggregation.num_heads", "adapter.r"),
        lambda c: _has_cores(c) and c.adapter.r % c.aggregation.num_heads > 0,
        "all heads have the same share of the rank; choose a number that divides adapter.r",
    ),
    (
        ("privacy.clipping", "aggregation.method"),
        lambda c: _has_cores(c) and _reads_layers(c),
        "reads gradients of units off the weights of linear layers, and a core is none; set 'microbatch' or 'auto'",
    ),
)
