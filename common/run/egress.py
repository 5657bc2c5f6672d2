"""What may leave a site in a run: each figure with its range, the tensors' type, bytes a round. Loads no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.frame.exchanges import EXCHANGES, NUM_IN_ROUND
from common.frame.records import SIGNED, TensorSpec
from common.run import packing
from common.run.schema.privacy import PrivacyConfig
from common.run.schema.wire import WireConfig

HEAD_BYTES: Final = 4096  # more than any head and a frame's own bytes
ENTRY_BYTES: Final = 128  # of a safetensors header, besides the tensor's name
REPLIES: Final[Mapping[str, type]] = {exchange.reply: exchange.head for exchange in EXCHANGES.values()}
AUDIT: Final = (  # head of the site's audit log, signed; nothing of rows
    "num_audit_entries",
    "audit_sha256",
    "audit_time",
    "audit_signer",
    "audit_signature",
)
NAMES: Final = ("site", "run_sha256", "round_index", "adapter_sha256", *AUDIT, *SIGNED)  # no figures, and known already

PREFERENCES: Final = ("preference_loss_sum", "num_preferred")  # told by runs that learn preferences
UNTOLD: Final = ("num_tokens", "train_loss", "seconds")  # of drawn rows: no noise covers them
ROWS_LOST: Final = ("num_truncated", "num_dropped")  # of all rows, likewise

Range = tuple[float, float]
RANGES: Final[Mapping[str, Range]] = {
    "num_examples": (0, 1e9),
    "num_held_out": (0, 1e9),
    "num_truncated": (0, 1e9),
    "num_dropped": (0, 1e9),
    "num_steps": (0, 1e9),
    "num_tokens": (0, 1e12),
    "train_loss": (0, 100),
    "seconds": (0, 2_592_000),
    "nll_sum": (0, 1e12),
    "num_answer_tokens": (0, 1e12),
    "num_rows": (0, 1e9),
    "num_generated": (0, 1e6),
    "num_exact": (0, 1e6),
    "preference_loss_sum": (0, 1e12),
    "num_preferred": (0, 1e9),
}


@dataclass(frozen=True)
class Egress:
    """All that leaves a site; a run's manifest declares it, a site holds the run to it.

    Attributes:
        dtype: Of the update's tensors; their names and shapes are the manifest's.
        factors: Which of them are in an update, one entry a round, in turn: `AB` is all, `B` the up-projections.
        metrics: Kind of reply to its figures, each with its range.
        bytes_per_message: Largest message.
        bytes_per_round: Largest sum over a round.
    """

    dtype: str
    factors: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Range]]
    bytes_per_message: int
    bytes_per_round: int

    def as_dict(self) -> dict[str, Any]:
        """Give the declaration as JSON types."""
        metrics = {kind: {name: list(limits) for name, limits in own.items()} for kind, own in self.metrics.items()}
        return {**dataclasses.asdict(self), "metrics": metrics}


def declare(
    turns: Sequence[Sequence[TensorSpec]],
    *,
    factors: tuple[str, ...],
    settings: WireConfig,
    privacy: PrivacyConfig,
    learns_preferences: bool,
) -> Egress:
    """What leaves a site in a run.

    Args:
        turns: The tensors of an update, one entry a round, in turn.
        factors: What these are called.
        settings: Section `[wire]`.
        privacy: Section `[privacy]`: a count that no noise covers is not told.
        learns_preferences: Whether figures of preferences are told.

    Example:
        >>> sorted(figures("opened"))[:2]
        ['num_dropped', 'num_examples']
    """
    update = max(num_update_bytes(specs, dtype=settings.dtype, density=settings.density) for specs in turns)
    hidden = {
        "opened": ROWS_LOST if privacy.mode == "unit" else (),
        "update": UNTOLD if privacy.mode != "none" else (),
        "metrics": () if learns_preferences else PREFERENCES,
    }
    metrics = {kind: {name: RANGES[name] for name in figures(kind) if name not in hidden[kind]} for kind in REPLIES}
    return Egress(
        dtype=settings.dtype,
        factors=factors,
        metrics=metrics,
        bytes_per_message=update,
        bytes_per_round=update + NUM_IN_ROUND * HEAD_BYTES,
    )


def figures(kind: str) -> list[str]:
    """Names of the figures in a kind of reply."""
    return [field.name for field in dataclasses.fields(REPLIES[kind]) if field.name not in NAMES]


def num_update_bytes(tensor_specs: Sequence[TensorSpec], *, dtype: str, density: float = 1.0) -> int:
    """Most bytes that an update of these tensors can have, its frame included."""
    names = sum(len(spec.name.encode()) + ENTRY_BYTES for spec in tensor_specs)
    header = names if packing.is_plain(dtype, density) else 0
    return packing.body_bytes(tensor_specs, dtype=dtype, density=density) + header + HEAD_BYTES
